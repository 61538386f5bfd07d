"""The update of one weight from gathered rows, forward and backward, never holding (T, K, D).

Two products do all of it, and torch's embedding bags have fast kernels for both:

    read(x, v)_tk = x_t . v_{i_tk}        the gradient that a bag gives its per-sample weights
    write(s, u)_t = sum_k s_tk u_{i_tk}   a bag with per-sample weights s

Backward, with g the output's gradient and c = gate * strength:  dx = write(read(g, u) c, v),
dc = read(g, u) read(x, v). V~'s and U~'s gradients are bags too, one an atom, of the tokens that chose it in their order:
no two threads add to the same row, so the sums are the same in every run.
"""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Float, Int64
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn.functional import embedding_bag

from uhl.router import Route

_SUM = 0  # the bag's mode


def update(
    x: Float[Tensor, "*b T d_in"],
    v: Float[Tensor, "A d_in"],
    u: Float[Tensor, "A d_out"],
    strength: Float[Tensor, " A"],
    chosen: Route,
) -> Float[Tensor, "*b T d_out"]:
    """Same result as :func:`uhl.ops.reference.update`. First gradients only; memory is linear in T."""
    index = chosen.index.reshape(-1, chosen.index.shape[-1])
    scale = chosen.gate.reshape(index.shape).to(v.dtype) * strength[index]
    out: Tensor = _Update.apply(x.reshape(-1, x.shape[-1]), v, u, scale, index)
    return out.reshape(*x.shape[:-1], u.shape[-1])


def _read(x: Float[Tensor, "T d"], v: Float[Tensor, "A d"], index: Int64[Tensor, "T K"]) -> Float[Tensor, "T K"]:
    if torch.compiler.is_compiling():
        return (x[:, None] * v[index]).sum(-1)
    tokens = torch.arange(len(index), device=x.device)
    k = index.shape[1]
    bags = tokens * k, tokens.repeat_interleave(k)
    read: Tensor = torch.ops.aten._embedding_bag_per_sample_weights_backward(
        x.contiguous(), v.contiguous(), index.reshape(-1), *bags, _SUM
    )
    return read.view(index.shape)


def _write(s: Float[Tensor, "T K"], u: Float[Tensor, "A d"], index: Int64[Tensor, "T K"]) -> Float[Tensor, "T d"]:
    if torch.compiler.is_compiling():
        terms = [s[:, k, None] * u[index[:, k]] for k in range(index.shape[1])]
        return torch.stack(terms).sum(0) if len(terms) > 2 else sum(terms[1:], terms[0])
    return embedding_bag(index, u, per_sample_weights=s, mode="sum")


class _ByAtom:
    """The tokens of each atom, one after the other: T K token numbers, and where each atom's begin."""

    def __init__(self, index: Int64[Tensor, "T K"], atoms: int) -> None:
        flat = index.reshape(-1)
        self.order = flat.argsort(stable=True)
        self.tokens = self.order // index.shape[1]
        self.starts = torch.searchsorted(flat[self.order], torch.arange(atoms, device=index.device))

    def sums(self, s: Float[Tensor, "T K"], x: Float[Tensor, "T d"]) -> Float[Tensor, "A d"]:
        """For each atom the sum of s_tk x_t over its tokens, in the tokens' order."""
        return embedding_bag(self.tokens, x, self.starts, per_sample_weights=s.reshape(-1)[self.order], mode="sum")


class _Update(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, v: Tensor, u: Tensor, scale: Tensor, index: Tensor) -> Tensor:
        if not index.numel():
            ctx.empty = True
            ctx.save_for_backward(x, v, u, scale)
            return x.new_zeros(len(x), u.shape[-1])
        read = _read(x, v, index)
        ctx.empty = False
        ctx.save_for_backward(x, v, u, scale, index, read)
        return _write(read * scale, u, index)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        if ctx.empty:
            return (*(torch.zeros_like(t) for t in ctx.saved_tensors), None)
        x, v, u, scale, index, read = ctx.saved_tensors
        wants = ctx.needs_input_grad
        by_atom = _ByAtom(index, len(v)) if wants[1] or wants[2] else None
        back = _read(g, u, index) if wants[0] or wants[1] or wants[3] else None
        dx = dv = du = dc = None
        if back is not None:
            if wants[0]:
                dx = _write(back * scale, v, index)
            if by_atom and wants[1]:
                dv = by_atom.sums(back * scale, x)
            if wants[3]:
                dc = back * read
        if by_atom and wants[2]:
            du = by_atom.sums(read * scale, g)
        return dx, dv, du, dc, None
