"""Archives of finished cells: a profile's manifests and predictions in one file, its adapters in a folder.

No text and no gold label of data that does not come with packages goes into one: of its examples an archive has the
`labels` that each arm said (see :mod:`uhl.evidence`), with a hash of the gold ones, `examples`, in place of what the
data tells. Manifests do name the task's path, columns and classes, and scores.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import shutil
import time
import zipfile
from collections.abc import Mapping
from functools import lru_cache, partial
from pathlib import Path, PurePosixPath
from typing import Any, TypeVar

import numpy as np

from uhl import evidence
from uhl.errors import UHLError
from uhl.files import check_sha256, npz, sha256, write_atomic
from uhl.runs import Settings, filled, manifest, manifests, root, update_results
from uhl.stages import load_data
from uhl.tasks import OFFLINE, Task, gold_labels, groups

ADAPTER = "adapter.safetensors"
MARKS = ("*-s*/*/manifest.json", "*-s*/compress/*/outcome.json")  # written last, when what lies beside them is whole
SCORED = ("task", "kind", "columns", "labels", "config", "unlabelled", "eval_size")  # what examples depend on
P = TypeVar("P", Path, PurePosixPath)


def pack(profile: str, path: str | Path) -> Path:
    """Write a profile's finished cells and pruned copies, what they say and predict, into one zip, the same bytes each
    time. Cells without predictions (notebooks 00 and 01) stay out, and copies of a source whose cell is not there.
    """
    folder = root() / profile
    cells, copies = (sorted(folder.glob(pattern)) for pattern in MARKS)
    told = {mark: manifest(mark) for mark in cells if (mark.parent / evidence.PREDICTIONS).is_file()}
    if not told:
        raise UHLError(f"profile {profile} has no finished cell in {folder}; run it first: make run PROFILE={profile}")
    marks = [*told, *(m for m in copies if (m.parent / evidence.PREDICTIONS).is_file() and _cell(m) in told)]

    def write(tmp: Path) -> None:
        with zipfile.ZipFile(tmp, "w", zipfile.ZIP_DEFLATED, compresslevel=9) as archive:
            for mark in marks:
                file = mark.parent / evidence.PREDICTIONS
                said = _bare(mark.parent) if _own(told[_cell(mark)]) else file.read_bytes()
                for written, data in ((mark, mark.read_bytes()), (file, said)):
                    entry = zipfile.ZipInfo(written.relative_to(folder).as_posix(), (1980, 1, 1, 0, 0, 0))
                    entry.compress_type = zipfile.ZIP_DEFLATED
                    archive.writestr(entry, data)

    return write_atomic(path, write)


def _cell(mark: P) -> P:
    """The manifest that says what a mark's scores are of: itself, or of a pruned copy that of the source's adapter."""
    return mark if mark.name == "manifest.json" else mark.parents[2] / "pretrain-canonical" / "manifest.json"


def _own(entry: Mapping[str, Any]) -> bool:
    """Whether a cell's data does not come with packages, as that of :data:`uhl.tasks.OFFLINE` does."""
    return filled(entry["parameters"])["task"] not in OFFLINE


def _bare(cell: Path) -> bytes:
    """A cell's predictions without what the data itself tells, as the bytes of a file."""
    kept = {name: x for name, x in evidence.predictions(cell).items() if name.endswith("/labels")}
    for arm, split in [name.split("/")[:2] for name in kept]:
        if arm != evidence.TEACHER:
            kept[f"{arm}/{split}/examples"] = _hash(evidence.examples(cell, arm, split))
    return npz(kept)


def _whole(data: bytes, task: Task, cell: PurePosixPath) -> bytes:
    """What :func:`_bare` left, with what the data tells."""
    try:
        with np.load(io.BytesIO(data)) as file:
            stored = {name: file[name] for name in file.files}
        for arm, split in [name.split("/")[:2] for name in stored if name.endswith("/labels")]:
            if arm == evidence.TEACHER:
                continue
            gold, length = evidence.flat(gold_labels(task, split))
            if not np.array_equal(stored.pop(f"{arm}/{split}/examples"), _hash(gold.tobytes() + length.tobytes())):
                raise UHLError(
                    f"{cell} was scored on other {split} examples than {task.name} has here; give the data of that run"
                )
            if len(stored[f"{arm}/{split}/labels"]) != len(gold):
                raise ValueError(f"{len(gold)} labels of {arm} expected")
            stored |= {f"{arm}/{split}/gold": gold, f"{arm}/{split}/length": length}
            if (group := groups(task, split)) is not None:
                stored[f"{split}/group"] = group
    except UHLError:
        raise
    except evidence.BROKEN as error:
        raise UHLError(f"predictions of {cell} in the archive are damaged ({error}); pack it again") from error
    return npz(stored)


def _hash(examples: bytes) -> np.ndarray:
    return np.frombuffer(hashlib.sha256(examples).digest(), dtype=np.uint8)


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
    adapter, which is put back where ``adapters``, the folder of :func:`keep_adapters`, has it. A user's own data is
    read again. Raises :class:`UHLError` for a file that is no such archive, an adapter that is not its cell's, or data
    that is missing or other than the cells', before anything is written.
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
        expected = {file for mark in marks for file in (mark, mark.parent / evidence.PREDICTIONS)}
        sane = not any(".." in n.parts or n.is_absolute() for n in files)
        sane = sane and all(_cell(mark) in told for mark in marks)
        if set(files) != expected or not sane or "/" in profile or ".." in profile:
            raise UHLError(f"{path} holds other files than cells' manifests and predictions; pack it again")
    except UHLError:
        raise
    except evidence.BROKEN as error:
        raise UHLError(f"{path} is not an archive of runs ({error}); make one with: python -m uhl pack") from error
    made, back, now = [], dict[PurePosixPath, bytes](), time.time()
    data = lru_cache(None)(lambda known: load_data(Settings(**json.loads(known))))
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
            said = files[mark.parent / evidence.PREDICTIONS]
            if _own(cell := told[_cell(mark)]):
                known = {name: filled(cell["parameters"])[name] for name in sorted(SCORED)}
                said = _whole(said, data(json.dumps(known)), mark.parent)
            back |= {mark.parent / evidence.PREDICTIONS: said, mark: files[mark]}
            made.append(place)
    for name, content in back.items():  # of each cell what says that it is whole last
        write_atomic(root() / profile / name, lambda tmp, content=content: tmp.write_bytes(content))  # type: ignore[misc]
        os.utime(root() / profile / name, (now, now))
    update_results(profile)
    return made
