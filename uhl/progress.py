"""Progress for people: a bar on a terminal, and nothing in notebooks, logs and batch runs."""

from __future__ import annotations

import os
from collections.abc import Collection, Iterable
from typing import TypeVar

from tqdm import tqdm

T = TypeVar("T")


def batch() -> bool:
    """Whether this is a batch run (``UHL_BATCH=1``): no widgets, no progress bars."""
    return os.environ.get("UHL_BATCH") == "1"


def bar(items: Collection[T], what: str, unit: str) -> Iterable[T]:
    """The items, with a bar where a terminal shows it."""
    return tqdm(items, what, disable=True if batch() else None, leave=False, unit=unit)  # None: not a terminal
