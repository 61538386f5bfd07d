"""The update of one weight, written plainly: read the chosen atoms, scale, write.

    y_t += sum_k  s_tk * m_{i_tk} * (x_t . v~_{i_tk}) * u~_{i_tk}

with folded atoms V~ = V P_in (A, d_in) and U~ = U P_out^T (A, d_out). Costs 2 K (d_in + d_out) FLOPs a token.
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from uhl.router import Route


def update(
    x: Float[Tensor, "*b T d_in"],
    v: Float[Tensor, "A d_in"],
    u: Float[Tensor, "A d_out"],
    strength: Float[Tensor, " A"],
    chosen: Route,
) -> Float[Tensor, "*b T d_out"]:
    """The term to add to the weight's output, atoms gathered per token."""
    read = torch.einsum("...td,...tkd->...tk", x, v[chosen.index])  # (..., T, K)
    scaled = read * chosen.gate * strength[chosen.index]
    return torch.einsum("...tk,...tkd->...td", scaled, u[chosen.index])
