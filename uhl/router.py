"""The router r_phi: which atoms, at most K, a token uses in a layer.

    scores = R P_in h / rms(h) + e_task                 (T, A), from the layer's input h
    s_j    = [sigmoid(score_j) > 1/2] for j in top-K    straight-through: the gradient is the sigmoid's

Decided once per token and layer, at the layer's input, and shared by that layer's weights. A token may use fewer than
K atoms; E[k] is the mean of the gates' sum, and has a gradient. A static router drops the first term: one choice a
task, for all tokens and layers.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from jaxtyping import Float, Int64
from torch import Tensor, nn

from uhl.quant import fake_quantise


class Route(NamedTuple):
    """One layer's decision: atom indices and gates, both (..., T, K); gates are 0 or 1 in the forward pass."""

    index: Int64[Tensor, "*b T K"]  # type: ignore[assignment]  # hides tuple.index, which nobody calls
    gate: Float[Tensor, "*b T K"]


class Router(nn.Module):
    """Router weights R, (A, C), stored at 8 bits."""

    def __init__(self, atoms: int, width: int, generator: torch.Generator) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(atoms, width, generator=generator) / width**0.5)

    def forward(self) -> Float[Tensor, "A C"]:
        """R as the file gives it back."""
        return fake_quantise(self.weight, 8)


def route(
    hidden: Float[Tensor, "*b T D"], folded: Float[Tensor, "A D"], task: Float[Tensor, " A"], top_k: int
) -> Route:
    """Choose atoms for every token. ``folded`` is R P_in, so no canonical coordinates are ever formed."""
    rms = hidden.pow(2).mean(-1, keepdim=True).clamp_min(1e-12).rsqrt()
    scores = (hidden @ folded.T) * rms + task  # (..., T, A)
    return choose(scores, top_k)


def choose(scores: Float[Tensor, "*b A"], top_k: int) -> Route:
    """Straight-through gates of the best ``top_k`` scores."""
    top, index = scores.topk(min(top_k, scores.shape[-1]), dim=-1)
    soft = torch.sigmoid(top)
    hard = (soft > 0.5).to(soft.dtype)
    return Route(index, hard + (soft - soft.detach()))
