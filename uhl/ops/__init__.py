"""The update of one weight, ``y + sum_k s_k m_{i_k} (x . v~_{i_k}) u~_{i_k}``: three ways to compute it, and one choice.

``reference`` is written to be read, ``dense`` is two matrix products over all atoms, ``gather`` touches only the atoms
that a token chose. :func:`choose` picks by size; ``attach(..., path=...)`` or ``Attached.path`` overrides it, and
``Attached.paths`` says what the last forward pass used.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from uhl.errors import one_of
from uhl.ops import dense, gather, reference

PATHS: dict[str, Callable[..., Tensor]] = {
    "reference": reference.update,
    "dense": dense.update,
    "gather": gather.update,
}
LAUNCH = 1_500_000  # multiply-adds that two matrix products do in the time that gathering needs to start (notebook 08)


def choose(tokens: int, atoms: int, d_in: int, d_out: int) -> str:
    """The quickest path for a weight of that size, as measured on a CPU.

    Gathering is quicker wherever the dense products have enough to do: below :data:`LAUNCH` multiply-adds, T A (d_in +
    d_out), they are done before it has started. A compiled host starts nothing, so it gathers always.
    """
    if torch.compiler.is_compiling() or tokens * atoms * (d_in + d_out) >= LAUNCH:
        return "gather"
    return "dense"


def get(name: str) -> Callable[..., Tensor]:
    """The update function of that name."""
    return PATHS[one_of(name, PATHS, "path")]
