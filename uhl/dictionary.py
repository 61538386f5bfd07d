"""The atom dictionary: A rank-1 atoms u_j v_j^T in the canonical space, shared by all layers and all models.

U and V have shape (A, C) and are trained as they are stored: 8-bit with one float16 scale a row.
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor, nn

from uhl.quant import fake_quantise


class AtomDictionary(nn.Module):
    """Parameters ``u`` (A, writes) and ``v`` (A, reads), which are both C by default.

    V starts as unit rows, U at zero, so a new adapter changes nothing.
    """

    def __init__(self, atoms: int, reads: int, generator: torch.Generator, writes: int | None = None) -> None:
        super().__init__()
        self.u = nn.Parameter(torch.zeros(atoms, writes or reads))
        self.v = nn.Parameter(nn.functional.normalize(torch.randn(atoms, reads, generator=generator), dim=1))

    def forward(self) -> tuple[Float[Tensor, "A writes"], Float[Tensor, "A reads"]]:
        """U and V as the file gives them back."""
        return fake_quantise(self.u, 8), fake_quantise(self.v, 8)
