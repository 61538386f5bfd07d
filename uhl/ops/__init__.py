"""The update of one weight: a readable reference and a dense path, chosen by name."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from uhl.errors import one_of
from uhl.ops import dense, reference

PATHS: dict[str, Callable[..., Tensor]] = {"reference": reference.update, "dense": dense.update}


def get(name: str) -> Callable[..., Tensor]:
    """The update function of that name."""
    return PATHS[one_of(name, PATHS, "path")]
