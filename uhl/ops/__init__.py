"""The update of one weight, ``y + sum_k s_k m_{i_k} (x . v~_{i_k}) u~_{i_k}``, computed in four ways, and one choice.

``reference`` is written to be read, ``dense`` is two matrix products over all atoms, ``gather`` touches only the atoms
that a token chose, ``fused`` is the same as Triton kernels. :func:`choose` picks by device and size; ``attach(...,
path=...)`` or ``Attached.path`` overrides it, and ``Attached.paths`` says what the last forward pass used. Where the
router is one kernel, :func:`route` says.
"""

from __future__ import annotations

from collections.abc import Callable
from importlib.util import find_spec
from types import ModuleType

import torch
from jaxtyping import Float
from torch import Tensor

from uhl import router
from uhl.errors import UHLError, one_of
from uhl.ops import dense, gather, reference
from uhl.router import Route

PATHS = ("reference", "dense", "gather", "fused")
TRITON = find_spec("triton") is not None
LAUNCH = 6_000_000  # multiply-adds of two matrix products in the time that gathering needs to start (notebook 08)


def choose(device: str, tokens: int, atoms: int, d_in: int, d_out: int) -> str:
    """The path for a weight of that size on a device of that type ("cpu", "cuda").

    On CPUs gathering is quicker wherever the matrix products have enough to do: below :data:`LAUNCH` multiply-adds,
    T A (d_in + d_out), they are done before it has started (measured: the two cross between 16 and 128 tokens of a
    weight 768 wide; figures/speed_weights.csv, notebook 08). A compiled host starts nothing, so it gathers always (on
    GPUs it can call Triton's kernels, by the path `fused`). Otherwise Triton's kernels do everything on CUDA devices,
    where Triton is installed: forward they were the quickest at every size (one H200; of one weight by itself, its
    tables made anew, *dense* trained 3 to 16 % quicker).
    """
    if torch.compiler.is_compiling():
        return "gather"
    if device == "cuda" and TRITON:
        return "fused"
    return "gather" if tokens * atoms * (d_in + d_out) >= LAUNCH else "dense"


def route(
    hidden: Float[Tensor, "*b T D"],
    folded: Float[Tensor, "A D"],
    task: Float[Tensor, " A"],
    top_k: int,
    path: str | None = None,
) -> Route:
    """:func:`uhl.router.route`; in fewer kernels by the path `fused`, and on CUDA devices as :func:`choose` has it."""
    default = path is None and hidden.is_cuda and not torch.compiler.is_compiling() and TRITON
    if default or path == "fused":
        made: Route = _fused().route(hidden, folded, task, top_k)
        return made
    return router.route(hidden, folded, task, top_k)


def get(name: str) -> Callable[..., Tensor]:
    """The update function of that name. Raises :class:`UHLError` for another name, and where Triton is missing."""
    if one_of(name, PATHS, "path") != "fused":
        return {"reference": reference.update, "dense": dense.update, "gather": gather.update}[name]
    update: Callable[..., Tensor] = _fused().update
    return update


def _fused() -> ModuleType:
    try:
        from uhl.ops import fused
    except ImportError as err:
        raise UHLError("the path `fused` needs Triton: pip install triton (Linux), or choose `gather`") from err
    return fused


def halves(name: str) -> tuple[Callable[..., Tensor], Callable[..., Tensor]] | None:
    """The path's ``read(x, v, route)`` and ``write(y, dots, u, strength, route)``, of which the update is made.

    Weights that read the same need to read once. None where a path does both at once, and in compiled hosts, where the
    compiler sees what is the same.
    """
    if torch.compiler.is_compiling():
        return None
    return {"dense": (dense.read, dense.write), "gather": (gather.read, gather.write)}.get(name)
