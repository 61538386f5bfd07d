"""What finished cells keep of each example, and archives of it, from which tables are made again without a model.

A cell's predictions.npz has, of each arm and split, the `labels` that it said, the `gold` ones and the `length` of each
example in them (1, or a sentence's words), and where a split's examples come in groups the `group` of each.
"""

from __future__ import annotations

import json
import os
import shutil
import time
import zipfile
import zlib
from collections.abc import Mapping
from functools import lru_cache, partial
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np

from uhl import stats
from uhl.errors import UHLError
from uhl.files import check_sha256, sha256, write_atomic
from uhl.runs import manifest, manifests, root, update_results

PREDICTIONS, ADAPTER = "predictions.npz", "adapter.safetensors"
TEACHER = "teacher"  # in place of an arm, with decisions and no row of results
UNREADABLE = (OSError, EOFError, ValueError, zipfile.BadZipFile, zlib.error)
MARKS = ("*-s*/*/manifest.json", "*-s*/compress/*/outcome.json")  # written last, when what lies beside them is whole


def predictions(cell: Path) -> dict[str, np.ndarray]:
    """All arrays of a cell's predictions; a file that did not change is read once."""
    path = cell / PREDICTIONS
    return _read(path, path.stat().st_mtime_ns) if path.is_file() else {}


@lru_cache(maxsize=256)
def _read(path: Path, _changed: int) -> dict[str, np.ndarray]:
    try:
        with np.load(path) as stored:
            return {name: stored[name] for name in stored.files}
    except UNREADABLE as error:
        raise UHLError(f"{path} is damaged ({error}); delete that folder and run the cell again") from error


def _of(cell: Path, arm: str, split: str) -> list[np.ndarray]:
    """Labels, gold labels and lengths of one arm."""
    names, found = [f"{arm}/{split}/{part}" for part in ("labels", "gold", "length")], predictions(cell)
    if not set(names) <= set(found):
        path = cell / PREDICTIONS
        raise UHLError(f"{path} lacks {split} predictions of {arm}; delete that folder and run the cell again")
    labels, gold, length = (found[name] for name in names)
    if not len(labels) == len(gold) == length.sum():
        path = cell / PREDICTIONS
        raise UHLError(
            f"{path} has {len(labels)} {split} predictions of {arm} for {len(gold)} gold labels; delete that folder "
            "and run the cell again"
        )
    return [labels, gold, length]


def counts(cell: Path, arm: str, split: str, metric: str) -> np.ndarray:
    """Counts (n, 3) of one arm on a split's examples; see :mod:`uhl.stats`."""
    labels, gold, length = _of(cell, arm, split)
    if metric != "f1":
        return stats.counts(labels, gold)
    if (path := cell / "manifest.json").is_file():
        names = manifest(path)["labels"]
    else:  # a pruned copy's
        names = json.loads((cell / "outcome.json").read_text())["about"]["labels"]
    cuts = np.cumsum(length)[:-1]
    return stats.counts(np.split(labels, cuts), np.split(gold, cuts), names)


def examples(cell: Path, arm: str, split: str) -> bytes:
    """Which examples an arm was scored on, and their order, as their gold labels tell."""
    _, gold, length = _of(cell, arm, split)
    return gold.tobytes() + length.tobytes()


def of_source(cell: Path, split: str) -> np.ndarray | None:
    """What a file's anchors would have a port decide: what the source's adapter decides, or its teacher where it has
    one, in the adapter's cell; None where neither was asked.
    """
    found = predictions(cell)
    return found.get(f"{TEACHER}/{split}/labels", found.get(f"uhl-canonical/{split}/labels"))


def alike(cell: Path, arm: str, split: str) -> float | None:
    """In which share of its decisions (of a token task: words) a port says what its source does, or the source's
    teacher; None where the source has no such labels, as the adapter is that of another task.
    """
    said = of_source(cell.parent / "pretrain-canonical", split)
    return None if said is None else float((said == _of(cell, arm, split)[0]).mean())


# --- archives: a profile's evidence in one file, its adapters in a folder ---------------------------------------------


def pack(profile: str, path: str | Path) -> Path:
    """Write a profile's finished cells and pruned copies, what they say and predict, into one zip, the same bytes each
    time. Cells without predictions (notebooks 00 and 01) stay out.
    """
    folder = root() / profile
    marks = [
        mark for pattern in MARKS for mark in sorted(folder.glob(pattern)) if (mark.parent / PREDICTIONS).is_file()
    ]
    if not any(mark.name == "manifest.json" for mark in marks):
        raise UHLError(f"profile {profile} has no finished cell in {folder}; run it first: make run PROFILE={profile}")

    def write(tmp: Path) -> None:
        with zipfile.ZipFile(tmp, "w", zipfile.ZIP_DEFLATED, compresslevel=9) as archive:
            for file in (file for mark in marks for file in (mark, mark.parent / PREDICTIONS)):
                entry = zipfile.ZipInfo(file.relative_to(folder).as_posix(), (1980, 1, 1, 0, 0, 0))
                entry.compress_type = zipfile.ZIP_DEFLATED
                archive.writestr(entry, file.read_bytes())

    return write_atomic(path, write)


def keep_adapters(profile: str, folder: Path) -> list[Path]:
    """Copy the adapters of a profile's finished cells into a folder, for :func:`restore`; returns the copies."""
    copies = []
    for cell, entry in manifests(profile).items():
        trained, file = _trained(entry), cell / ADAPTER
        if trained and file.is_file() and sha256(file) == trained:
            copies.append(write_atomic(_kept(folder, cell), partial(shutil.copyfile, file)))
    return copies


def _kept(folder: Path, cell: Path | PurePosixPath) -> Path:
    """Where :func:`keep_adapters` puts a cell's adapter: ``movies-s0-canonical.safetensors``."""
    return folder / f"{cell.parent.name}-{cell.name.removeprefix('pretrain-')}.safetensors"


def _trained(entry: Mapping[str, Any]) -> str | None:
    """Hash of the adapter that a cell trained, by its manifest."""
    return entry.get("artefacts", {}).get(ADAPTER, {}).get("sha256")  # type: ignore[no-any-return]


def restore(path: str | Path, adapters: Path | None = None) -> list[Path]:
    """Put back under :func:`root` what :func:`pack` wrote and return the folders; cells that are there already stay.

    Tables and figures can then be made again. In a folder without cells a batch goes on with those that are missing, as
    all files have one time and no cell looks older than what it was made from; but a port or tuning needs its trained
    adapter, which is put back where ``adapters``, the folder of :func:`keep_adapters`, has it. Raises
    :class:`UHLError` for a file that is no such archive, or an adapter that is not its cell's, before anything is
    written.
    """
    path = Path(path)
    try:
        with zipfile.ZipFile(path) as archive:
            files = {PurePosixPath(name): archive.read(name) for name in archive.namelist()}
        marks = [n for n in files if any(n.match(p) and len(n.parts) == p.count("/") + 1 for p in MARKS)]
        told = {n: json.loads(files[n]) for n in marks}
        hashes = {n: _trained(entry) for n, entry in told.items()}
        if not any(n.name == "manifest.json" for n in marks):
            raise UHLError(f"{path} holds no cell; make an archive with: uhl pack")
        (profile,) = {entry["parameters"]["profile"] for n, entry in told.items() if n.name == "manifest.json"}
        expected = {file for mark in marks for file in (mark, mark.parent / PREDICTIONS)}
        sane = not any(".." in n.parts or n.is_absolute() for n in files)
        if set(files) != expected or not sane or "/" in profile or ".." in profile:
            raise UHLError(f"{path} holds other files than cells' manifests and predictions; pack it again")
    except (*UNREADABLE, LookupError, TypeError, AttributeError) as error:
        if isinstance(error, UHLError):
            raise
        raise UHLError(f"{path} is not an archive of runs ({error}); make one with: python -m uhl pack") from error
    made, back, now = [], dict[PurePosixPath, bytes](), time.time()
    for mark in sorted(marks):
        place = root() / profile / mark.parent
        new = not (place / mark.name).is_file()
        trained = hashes[mark] if new else _trained(manifest(place / mark.name))
        if adapters and trained and not (place / ADAPTER).is_file():
            file = _kept(adapters, mark.parent)
            if file.is_file():
                check_sha256(file, trained, f"{place} trained another; restore the file, or remove it")
                back[mark.parent / ADAPTER] = file.read_bytes()
        if new:
            back |= {name: files[name] for name in (mark.parent / PREDICTIONS, mark)}
            made.append(place)
    for name, data in back.items():  # of each cell what says that it is whole last
        write_atomic(root() / profile / name, lambda tmp, data=data: tmp.write_bytes(data))  # type: ignore[misc]
        os.utime(root() / profile / name, (now, now))
    update_results(profile)
    return made
