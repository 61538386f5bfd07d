"""Archives of finished cells: a profile's manifests and predictions in one file, its adapters in a folder.

Nothing of a user's own data goes into one: of its examples an archive has the `labels` that each arm said (see
:mod:`uhl.evidence`), with a hash of the `examples` in place of what the data tells.
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
from typing import Any

import numpy as np

from uhl import evidence
from uhl.errors import UHLError
from uhl.files import check_sha256, sha256, write_atomic
from uhl.runs import Settings, manifest, manifests, root, update_results
from uhl.stages import load_data
from uhl.tasks import Task, gold_labels

ADAPTER = "adapter.safetensors"
MARKS = ("*-s*/*/manifest.json", "*-s*/compress/*/outcome.json")  # written last, when what lies beside them is whole


def pack(profile: str, path: str | Path) -> Path:
    """Write a profile's finished cells and pruned copies, what they say and predict, into one zip, the same bytes each
    time. Cells without predictions (notebooks 00 and 01) stay out, and so does what a user's own data says of them.
    """
    folder = root() / profile
    found = [mark for pattern in MARKS for mark in sorted(folder.glob(pattern))]
    marks = [mark for mark in found if (mark.parent / evidence.PREDICTIONS).is_file()]
    if not any(mark.name == "manifest.json" for mark in marks):
        raise UHLError(f"profile {profile} has no finished cell in {folder}; run it first: make run PROFILE={profile}")

    own = _described({mark.parent: manifest(mark) for mark in marks if mark.name == "manifest.json"})

    def write(tmp: Path) -> None:
        with zipfile.ZipFile(tmp, "w", zipfile.ZIP_DEFLATED, compresslevel=9) as archive:
            for file in (file for mark in marks for file in (mark, mark.parent / evidence.PREDICTIONS)):
                name = file.relative_to(folder)
                entry = zipfile.ZipInfo(name.as_posix(), (1980, 1, 1, 0, 0, 0))
                entry.compress_type = zipfile.ZIP_DEFLATED
                hidden = file.name == evidence.PREDICTIONS and name.parts[0] in own
                archive.writestr(entry, _bare(file.parent) if hidden else file.read_bytes())

    return write_atomic(path, write)


def _described(entries: Mapping[Any, Mapping[str, Any]]) -> dict[str, Mapping[str, Any]]:
    """Parameters of the folders, such as ``sst2-s0``, whose task is a user's own, by their cells' manifests."""
    told = {cell.parent.name: entry["parameters"] for cell, entry in entries.items()}
    return {folder: parameters for folder, parameters in told.items() if parameters.get("kind")}


def _bare(cell: Path) -> bytes:
    """A cell's predictions without what the data itself tells, as the bytes of a file."""
    kept = {name: x for name, x in evidence.predictions(cell).items() if name.endswith("/labels")}
    for arm, split in [name.split("/")[:2] for name in kept]:
        if arm != evidence.TEACHER:
            kept[f"{arm}/{split}/examples"] = _hash(evidence.examples(cell, arm, split))
    return _bytes(kept)


def _whole(data: bytes, task: Task, cell: PurePosixPath) -> bytes:
    """What :func:`_bare` left, with what the data tells."""
    try:
        with np.load(io.BytesIO(data)) as file:
            stored = {name: file[name] for name in file.files}
    except evidence.UNREADABLE as error:
        raise UHLError(f"predictions of {cell} in the archive are damaged ({error}); pack it again") from error
    for place in [name.removesuffix("/examples") for name in stored if name.endswith("/examples")]:
        split = place.rpartition("/")[2]
        stored[f"{place}/gold"], stored[f"{place}/length"] = gold, length = evidence.flat(gold_labels(task, split))
        if not np.array_equal(stored.pop(f"{place}/examples"), _hash(gold.tobytes() + length.tobytes())):
            raise UHLError(
                f"{cell} was scored on other {split} examples than {task.name} has here; give the data of that run"
            )
        if (of := evidence.groups(task, split)) is not None:
            stored[f"{split}/group"] = of
    return _bytes(stored)


def _hash(examples: bytes) -> np.ndarray:
    return np.frombuffer(hashlib.sha256(examples).digest(), dtype=np.uint8)


def _bytes(arrays: Mapping[str, np.ndarray]) -> bytes:
    made = io.BytesIO()
    np.savez_compressed(made, **arrays)  # type: ignore[arg-type]
    return made.getvalue()


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
        if set(files) != expected or not sane or "/" in profile or ".." in profile:
            raise UHLError(f"{path} holds other files than cells' manifests and predictions; pack it again")
    except (*evidence.UNREADABLE, LookupError, TypeError, AttributeError) as error:
        if isinstance(error, UHLError):
            raise
        raise UHLError(f"{path} is not an archive of runs ({error}); make one with: python -m uhl pack") from error
    made, back, now = [], dict[PurePosixPath, bytes](), time.time()
    own = _described({n.parent: entry for n, entry in told.items() if n.name == "manifest.json"})
    data = lru_cache(None)(lambda folder: load_data(Settings(**own[folder])))
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
            if (folder := mark.parts[0]) in own:
                said = _whole(said, data(folder), mark.parent)
            back |= {mark.parent / evidence.PREDICTIONS: said, mark: files[mark]}
            made.append(place)
    for name, content in back.items():  # of each cell what says that it is whole last
        write_atomic(root() / profile / name, lambda tmp, content=content: tmp.write_bytes(content))  # type: ignore[misc]
        os.utime(root() / profile / name, (now, now))
    update_results(profile)
    return made
