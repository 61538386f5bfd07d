"""The update of one weight from the rows of the chosen atoms alone, forward and backward, never holding (T, K, D).

Everything is one of two operations, c being gate * strength and i the chosen atoms of a token:

    rows(x, v, u, c)   dots_tk = x_t . v_{i_tk},   out_t = sum_k c_tk dots_tk u_{i_tk}
    sums(s, x)         for each atom the sum of s_tk x_t over its tokens

The update is rows(x, V~, U~, c); backward, with g the output's gradient, dx = rows(g, U~, V~, c), dc is the product of
both dots, and V~'s and U~'s gradients are sums. An atom's sum is formed by one thread in the tokens' order, so it is
the same in every run. Here torch's embedding bags do both; compiled hosts write them out, so that they are fused;
:mod:`uhl.ops.fused` does them on GPUs.
"""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Float, Int64
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn.functional import embedding_bag

from uhl.router import Route


def update(
    y: Float[Tensor, "*b T d_out"],
    x: Float[Tensor, "*b T d_in"],
    v: Float[Tensor, "A d_in"],
    u: Float[Tensor, "A d_out"],
    strength: Float[Tensor, " A"],
    chosen: Route,
) -> Float[Tensor, "*b T d_out"]:
    """Same result as :func:`uhl.ops.reference.update`. First gradients only; memory is linear in T."""
    index = chosen.index.reshape(-1, chosen.index.shape[-1])
    scale = chosen.gate.reshape(index.shape).to(v.dtype) * strength[index]
    out: Tensor = _Update.apply(x.to(v.dtype).reshape(-1, x.shape[-1]), v, u, scale, index)
    return out.reshape(y.shape).to(y.dtype).add_(y)


def _dots(x: Float[Tensor, "T d"], v: Float[Tensor, "A d"], index: Int64[Tensor, "T K"]) -> Float[Tensor, "T K"]:
    if torch.compiler.is_compiling():
        return (x[:, None] * v[index]).sum(-1)
    tokens, k = torch.arange(len(index), device=x.device), index.shape[1]
    # x . v is what a bag that sums gives its per-sample weights as gradients
    dots: Tensor = torch.ops.aten._embedding_bag_per_sample_weights_backward(
        x.contiguous(), v.contiguous(), index.reshape(-1), tokens * k, tokens.repeat_interleave(k), 0
    )
    return dots.view(index.shape)


def _out(s: Float[Tensor, "T K"], u: Float[Tensor, "A d"], index: Int64[Tensor, "T K"]) -> Float[Tensor, "T d"]:
    if torch.compiler.is_compiling():
        out = s[:, 0, None] * u[index[:, 0]]
        for k in range(1, index.shape[1]):
            out = out + s[:, k, None] * u[index[:, k]]
        return out
    return embedding_bag(index, u, per_sample_weights=s, mode="sum")


class ByAtom:
    """The tokens of each atom, one after the other: places in the flat index, and where each atom's begin."""

    def __init__(self, index: Int64[Tensor, "T K"], atoms: int) -> None:
        flat = index.reshape(-1)
        self.order = flat.argsort(stable=True)
        self.tokens = self.order // index.shape[1]
        self.starts = torch.searchsorted(flat[self.order], torch.arange(atoms, device=index.device))

    def sums(self, s: Float[Tensor, "T K"], x: Float[Tensor, "T d"]) -> Float[Tensor, "A d"]:
        """For each atom the sum of s_tk x_t over its tokens."""
        return embedding_bag(self.tokens, x, self.starts, per_sample_weights=s.reshape(-1)[self.order], mode="sum")


class _Update(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, v: Tensor, u: Tensor, scale: Tensor, index: Tensor) -> Tensor:
        if not index.numel():
            ctx.save_for_backward(x, v, u, scale, index, scale)
            return x.new_zeros(len(x), u.shape[-1])
        dots = _dots(x, v, index)
        ctx.save_for_backward(x, v, u, scale, index, dots)
        return _out(dots * scale, u, index)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        x, v, u, scale, index, dots = ctx.saved_tensors
        if not index.numel():
            return (*(torch.zeros_like(t) for t in (x, v, u, scale)), None)
        for_x, for_v, for_u, for_scale, _ = ctx.needs_input_grad
        back = _dots(g, u, index)
        by_atom = ByAtom(index, len(v)) if for_v or for_u else None
        return (
            _out(back * scale, v, index) if for_x else None,
            by_atom.sums(back * scale, x) if by_atom and for_v else None,
            by_atom.sums(dots * scale, g) if by_atom and for_u else None,
            back * dots if for_scale else None,
            None,
        )
