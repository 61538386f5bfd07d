"""The mixer g_theta: how strongly a weight of a given relative depth and type uses each atom, and the task bias.

    g(depth, type) = W2 sin(W1 [depth, one-hot type] + b1) + b2      (A,), 2,018 parameters at A = 128, 4-bit
    d(depth, type) = B^T [one-hot type, cos(pi k depth) for k = 1..3] (A,), 8 x A values a task, 4-bit

Sine activations as in SIREN (Sitzmann et al. 2020). W2 starts at random, so that layers and types differ from the first
step on; the task bias starts at zero.
"""

from __future__ import annotations

import math

import torch
from jaxtyping import Float
from torch import Tensor, nn

from uhl.config import WEIGHT_TYPES
from uhl.quant import fake_quantise

INPUTS = len(WEIGHT_TYPES) + 1
BASIS = len(WEIGHT_TYPES) + 3
SPREAD = 0.3  # standard deviation of W2 at the start


def type_features(depth: float, kind: str) -> Float[Tensor, " features"]:
    """[depth, one-hot type], the mixer's input (6,)."""
    return torch.tensor([depth, *(float(kind == t) for t in WEIGHT_TYPES)])


def bias_features(depth: float, kind: str) -> Float[Tensor, " basis"]:
    """[one-hot type, three depth cosines], the basis of the task bias (8,)."""
    cosines = (math.cos(math.pi * k * depth) for k in (1, 2, 3))
    return torch.tensor([*(float(kind == t) for t in WEIGHT_TYPES), *cosines])


class Mixer(nn.Module):
    """The network g_theta; each matrix carries its bias as a last column."""

    def __init__(self, atoms: int, hidden: int, generator: torch.Generator) -> None:
        super().__init__()
        self.first = nn.Parameter(torch.randn(hidden, INPUTS + 1, generator=generator))
        second = torch.randn(atoms, hidden + 1, generator=generator) * SPREAD
        second[:, -1] = 0.0
        self.second = nn.Parameter(second)

    def forward(self, features: Float[Tensor, "*n features"]) -> Float[Tensor, "*n A"]:
        """Strength of every atom for each row of features."""
        first, second = fake_quantise(self.first, 4), fake_quantise(self.second, 4)
        inner = torch.sin(features @ first[:, :-1].T + first[:, -1])
        return inner @ second[:, :-1].T + second[:, -1]
