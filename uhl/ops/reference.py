"""The update of one weight, written plainly: read the chosen atoms, scale, write.

    y_t + sum_k  s_tk * m_{i_tk} * (x_t . v~_{i_tk}) * u~_{i_tk}

with folded atoms V~ = V P_in (A, d_in) and U~ = U P_out^T (A, d_out). Costs 2 K (d_in + d_out) FLOPs a token.
"""

from __future__ import annotations

import torch
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
    """``y`` plus the update, in y's dtype; computed in the atoms', which are gathered per token.

    ``offset`` is subtracted from what the atoms read: an update that reads x - b has the offsets V~ b.
    """
    read = torch.einsum("...td,...tkd->...tk", x.to(v.dtype), v[chosen.index])  # (..., T, K)
    if offset is not None:
        read = read - offset[chosen.index]
    scaled = read * chosen.gate * strength[chosen.index]
    return y + torch.einsum("...tk,...tkd->...td", scaled, u[chosen.index]).to(y.dtype)
