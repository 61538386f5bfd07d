"""The update of one weight as two matrix products over all A atoms, with the gates as a mask."""

from __future__ import annotations

from jaxtyping import Float
from torch import Tensor

from uhl.router import Route


def update(
    y: Float[Tensor, "*b T d_out"],
    x: Float[Tensor, "*b T d_in"],
    v: Float[Tensor, "A d_in"],
    u: Float[Tensor, "A d_out"],
    strength: Float[Tensor, " A"],
    chosen: Route,
    offset: Float[Tensor, " A"] | None = None,
) -> Float[Tensor, "*b T d_out"]:
    """Same result as :func:`uhl.ops.reference.update`; costs 2 A (d_in + d_out) FLOPs a token."""
    return write(y, read(x, v, chosen, offset), u, strength, chosen)


def read(
    x: Float[Tensor, "*b T d_in"],
    v: Float[Tensor, "A d_in"],
    chosen: Route,
    offset: Float[Tensor, " A"] | None = None,
) -> Float[Tensor, "*b T A"]:
    """What all atoms read, x . v~, less the offset."""
    dots = x.to(v.dtype) @ v.T
    return dots if offset is None else dots - offset


def write(
    y: Float[Tensor, "*b T d_out"],
    dots: Float[Tensor, "*b T A"],
    u: Float[Tensor, "A d_out"],
    strength: Float[Tensor, " A"],
    chosen: Route,
) -> Float[Tensor, "*b T d_out"]:
    """``y`` plus what the chosen atoms write for what they have read."""
    mask = dots.new_zeros(dots.shape).scatter(-1, chosen.index, chosen.gate.to(dots.dtype))
    return ((dots * mask * strength).to(u.dtype) @ u).to(y.dtype).add_(y)
