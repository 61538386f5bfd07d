"""What finished cells keep of each example, from which tables are made again without a model.

A cell's predictions.npz has, of each arm and split, the `labels` that it said, the `gold` ones and the `length` of each
example in them (1, or a sentence's words), and where a split's examples come in groups the `group` of each.
"""

from __future__ import annotations

import json
import zipfile
import zlib
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np

from uhl import stats
from uhl.errors import UHLError
from uhl.runs import manifest

PREDICTIONS = "predictions.npz"
TEACHER = "teacher"  # in place of an arm, with decisions and no row of results
UNREADABLE = (OSError, EOFError, ValueError, zipfile.BadZipFile, zlib.error)
BROKEN = (*UNREADABLE, LookupError, TypeError, AttributeError)  # what reading raises of a file that is whole, and wrong


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


def flat(labels: Sequence[Any]) -> tuple[np.ndarray, np.ndarray]:
    """Labels of examples, one each or one a word, as one array, and how many of them each example has."""
    rows = [np.atleast_1d(x) for x in labels]
    return np.concatenate(rows).astype(np.int16), np.array([len(x) for x in rows], dtype=np.int32)


def _of(cell: Path, arm: str, split: str) -> list[np.ndarray]:
    """Labels, gold labels and lengths of one arm; a teacher's examples are those of the adapter beside it."""
    own, found = cell.name.replace("pretrain", "uhl") if arm == TEACHER else arm, predictions(cell)
    names = [f"{arm}/{split}/labels", f"{own}/{split}/gold", f"{own}/{split}/length"]
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
