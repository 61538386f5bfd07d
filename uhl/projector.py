"""The hypothesis's projector: one tiny network h_psi that gives a projector P(d) for every dimension d.

A dense last layer would need d x C outputs. Here P is a continuous function of position and size: with
t = (i + 1/2) / d for row i and a side (0: read, 1: write),

    P(d)[i, c] = sqrt(2 / max(d, C)) * gain_c * cos(pi c t + W2_c . sin(W1 [t, log10 d, side] + b1) + b2_c)

W2, b2 start at zero and the gains at one (stored as their distance from one), so P(d) starts as the first C columns of
the cosine transform: orthonormal columns for d >= C, unit gain through P^T P, full rank. Stored at 8 bits a weight:
under 4,096 bytes.
"""

from __future__ import annotations

import math

import torch
from jaxtyping import Float
from torch import Tensor, nn

from uhl.quant import fake_quantise

HIDDEN = 8
FEATURES = 3  # position, log10 of the dimension, side


class Projector(nn.Module):
    """The network h_psi. ``first`` (hidden, features + 1) and ``second`` (C, hidden + 2) hold weights and biases."""

    def __init__(self, width: int, generator: torch.Generator) -> None:
        super().__init__()
        self.width = width
        self.first = nn.Parameter(torch.randn(HIDDEN, FEATURES + 1, generator=generator) * math.pi)
        self.second = nn.Parameter(torch.zeros(width, HIDDEN + 2))

    def forward(self, dim: int, write: bool) -> Float[Tensor, "d C"]:
        """P(d), shape (d, C), for the read side or the write side of a weight."""
        first, second = fake_quantise(self.first, 8), fake_quantise(self.second, 8)
        t = (torch.arange(dim, device=first.device, dtype=first.dtype) + 0.5) / dim  # (d,)
        size = torch.full_like(t, math.log10(dim))
        side = torch.full_like(t, float(write))
        features = torch.stack([t, size, side, torch.ones_like(t)], 1)  # (d, features + 1)
        inner = torch.sin(features @ first.T)  # (d, hidden)
        shift = inner @ second[:, :HIDDEN].T + second[:, HIDDEN]  # (d, C)
        index = torch.arange(self.width, device=first.device)
        phase = math.pi * t[:, None] * index + shift  # (d, C)
        wave = torch.where(index == 0, math.sqrt(0.5), 1.0) * torch.cos(phase)
        return math.sqrt(2 / max(dim, self.width)) * (1 + second[:, -1]) * wave
