"""The router r_phi: which atoms, at most K, a token uses in a layer.

    scores = R P_in h / rms(h) + e_task                 (T, A), from the layer's input h
    s_j    = [sigmoid(score_j) > 1/2] for j in top-K    straight-through: the gradient is the sigmoid's

Decided once per token and layer, at the layer's input, and shared by that layer's weights; or, to compare, by each
weight at what its atoms read, or once at the first layer's input for all layers (`Sizes.routing`). A token may use
fewer than K atoms; E[k] is the mean of the gates' sum, and has a gradient. A static router drops the first term: one
choice a task, for all tokens and layers.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property

import torch
from jaxtyping import Float, Int64
from torch import Tensor, nn
from torch.nn.functional import embedding_bag

from uhl.quant import fake_quantise


class ByAtom:
    """The tokens of each atom, one after the other: places in the flat index, and where each atom's begin."""

    def __init__(self, index: Int64[Tensor, "T K"], atoms: int) -> None:
        flat, self._k = index.reshape(-1), index.shape[1]
        self._tokens: Tensor | None = None
        if flat.is_cuda and atoms < 2**15:
            flat = flat.to(torch.int16)  # sorted there byte by byte
        ordered, self.order = flat.sort(stable=True)
        self.starts = torch.searchsorted(ordered, torch.arange(atoms, device=index.device, dtype=flat.dtype))

    @property
    def tokens(self) -> Int64[Tensor, " TK"]:
        """The token of each place, in that order."""
        if self._tokens is None:  # no cached_property: before Python 3.12 it takes a lock, which cannot be compiled
            self._tokens = self.order // self._k
        return self._tokens

    def sums(self, s: Float[Tensor, "T K"], x: Float[Tensor, "T d"]) -> Float[Tensor, "A d"]:
        """For each atom the sum of s_tk x_t over its tokens."""
        if not len(self.order):
            return x.new_zeros(len(self.starts), x.shape[-1])
        return embedding_bag(self.tokens, x, self.starts, per_sample_weights=s.reshape(-1)[self.order], mode="sum")


class Places:
    """Where a route's atoms are: ``index`` (T, K), all tokens in a row, and tables made when first asked for."""

    def __init__(self, index: Int64[Tensor, "*b K"]) -> None:
        self.index = index.reshape(-1, index.shape[-1])
        self._by_atom: ByAtom | None = None

    @cached_property
    def starts(self) -> Int64[Tensor, " T"]:
        """Where each token's places begin in the flat index."""
        count, k = self.index.shape
        return torch.arange(0, count * k, k, device=self.index.device)

    @cached_property
    def tokens(self) -> Int64[Tensor, " TK"]:
        """The token of each place."""
        count, k = self.index.shape
        return torch.arange(count, device=self.index.device).repeat_interleave(k)

    def by_atom(self, atoms: int) -> ByAtom:
        """The places sorted by atom, of ``atoms`` atoms."""
        if self._by_atom is None or len(self._by_atom.starts) != atoms:
            self._by_atom = ByAtom(self.index, atoms)
        return self._by_atom


@dataclass(eq=False)
class Route:
    """One layer's decision: atom indices and gates, both (..., T, K); gates are 0 or 1 in the forward pass.

    What is derived from it is kept with it, since six weights and their backward passes ask for the same.
    """

    index: Int64[Tensor, "*b K"]
    gate: Float[Tensor, "*b K"]
    _places: Places | None = field(default=None, init=False, repr=False)
    _flat: Route | None = field(default=None, init=False, repr=False)

    def places(self) -> Places:
        """Where the atoms are; the same object every time."""
        if self._places is None:
            self._places = Places(self.index)
        return self._places

    def flat(self) -> Route:
        """The route of all tokens in a row, (T, K); the same object every time."""
        if self._flat is None:
            self._flat = Route(self.index.flatten(0, -2), self.gate.flatten(0, -2))
        return self._flat


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
    return choose(scores(hidden, folded, task), top_k)


def scores(
    hidden: Float[Tensor, "*b T D"], folded: Float[Tensor, "A D"], task: Float[Tensor, " A"]
) -> Float[Tensor, "*b T A"]:
    """Each atom's score. ``hidden`` and ``folded`` may have half precision; the scores have ``task``'s, float32."""
    size = torch.linalg.vector_norm(hidden, dim=-1, keepdim=True, dtype=task.dtype)
    rms = (size / hidden.shape[-1] ** 0.5).clamp_min(1e-6)
    return (hidden @ folded.T).to(task.dtype) / rms + task


def choose(scores: Float[Tensor, "*b A"], top_k: int, index: Int64[Tensor, "*b K"] | None = None) -> Route:
    """Straight-through gates of the best ``top_k`` scores; ``index``: where they are, if that is known."""
    k = min(top_k, scores.shape[-1])
    if index is None and scores.is_cuda and torch.compiler.is_compiling():
        index = _rounds(scores.detach(), k)
    if index is None:
        top, index = scores.topk(k, dim=-1)
    else:
        top = scores.gather(-1, index)
    soft = torch.sigmoid(top)
    hard = (soft > 0.5).to(soft.dtype)
    return Route(index, hard + (soft - soft.detach()) if soft.requires_grad else hard)


def _rounds(scores: Float[Tensor, "*b A"], k: int) -> Int64[Tensor, "*b K"]:
    """Where the best k are, by k searches for the best: compilers for GPUs fuse these, but not `topk`."""
    found: list[Tensor] = []
    every = torch.arange(scores.shape[-1], device=scores.device)
    for _ in range(k):
        found.append(scores.argmax(-1, keepdim=True))
        scores = torch.where(every == found[-1], -torch.inf, scores)
    return torch.cat(found, -1)
