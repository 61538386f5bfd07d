"""The update of one weight from the rows of the chosen atoms alone, forward and backward, never holding (T, K, D).

Two operations, each the other's adjoint, i being the chosen atoms of a token:

    dots(x, v)   d_tk = x_t . v_{i_tk}            backward: dx = out(g, v), dv = sums(g, x)
    out(s, u)    o_t = sum_k s_tk u_{i_tk}        backward: ds = dots(g, u), du = sums(s, g)

with sums(s, x) for each atom the sum of s_tk x_t over its tokens. The update is out(c * dots(x, V~), U~), c being
gate * strength; weights that read the same x with the same V~ share the dots (:func:`read`, :func:`write`). An atom's
sum is formed by one thread in the tokens' order, so it is the same in every run. Here torch's embedding bags do all of
it; compiled hosts write it out, so that it is fused; :mod:`uhl.ops.fused` does it on GPUs.
"""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Float, Int64
from torch import Tensor
from torch.autograd.function import Function, once_differentiable
from torch.nn.functional import embedding_bag

from uhl.router import Places, Route


def update(
    y: Float[Tensor, "*b T d_out"],
    x: Float[Tensor, "*b T d_in"],
    v: Float[Tensor, "A d_in"],
    u: Float[Tensor, "A d_out"],
    strength: Float[Tensor, " A"],
    chosen: Route,
    offset: Float[Tensor, " A"] | None = None,
) -> Float[Tensor, "*b T d_out"]:
    """Same result as :func:`uhl.ops.reference.update`. First gradients only; memory is linear in T."""
    return write(y, read(x, v, chosen, offset), u, strength, chosen)


def read(
    x: Float[Tensor, "*b T d_in"],
    v: Float[Tensor, "A d_in"],
    chosen: Route,
    offset: Float[Tensor, " A"] | None = None,
) -> Float[Tensor, "N K"]:
    """What the chosen atoms read, x . v~, less the offset, for all N tokens in a row."""
    index, places = _places(chosen)
    dots: Tensor = _Dots.apply(x.to(v.dtype).reshape(-1, x.shape[-1]), v, index, places)
    return dots if offset is None else dots - take(offset, index, places)


def write(
    y: Float[Tensor, "*b T d_out"],
    dots: Float[Tensor, "N K"],
    u: Float[Tensor, "A d_out"],
    strength: Float[Tensor, " A"],
    chosen: Route,
) -> Float[Tensor, "*b T d_out"]:
    """``y`` plus what the atoms write for what they have read."""
    index, places = _places(chosen)
    scaled = (dots * chosen.gate.reshape(index.shape) * take(strength, index, places)).to(u.dtype)
    out: Tensor = _Out.apply(scaled, u, index, places)
    return out.reshape(y.shape).to(y.dtype).add_(y)


def take(values: Float[Tensor, " A"], index: Int64[Tensor, "N K"], places: Places | None) -> Float[Tensor, "N K"]:
    """``values[index]``, whose gradients are added in the tokens' order too."""
    taken: Tensor = _Take.apply(values, index, places)
    return taken


def _places(chosen: Route) -> tuple[Int64[Tensor, "N K"], Places | None]:
    """The flat index, and in eager hosts the tables that go with it."""
    if torch.compiler.is_compiling():
        return chosen.index.reshape(-1, chosen.index.shape[-1]), None
    return chosen.places().index, chosen.places()


def _dots(
    x: Float[Tensor, "T d"], v: Float[Tensor, "A d"], index: Int64[Tensor, "T K"], places: Places | None
) -> Float[Tensor, "T K"]:
    if not index.numel():
        return x.new_zeros(index.shape)
    if places is None:
        return (x[:, None] * v[index]).sum(-1)
    if x.is_cuda and x.dtype == torch.bfloat16:  # which the next has no kernel for
        return _dots(x.float(), v.float(), index, places).to(x.dtype)
    # x . v is what a bag that sums gives its per-sample weights as gradients
    dots: Tensor = torch.ops.aten._embedding_bag_per_sample_weights_backward(
        x.contiguous(), v.contiguous(), index.reshape(-1), places.starts, places.tokens, 0
    )
    return dots.view(index.shape)


def _out(
    s: Float[Tensor, "T K"], u: Float[Tensor, "A d"], index: Int64[Tensor, "T K"], places: Places | None
) -> Float[Tensor, "T d"]:
    if not index.numel():
        return u.new_zeros(len(s), u.shape[-1])
    if places is None:
        out = s[:, 0, None] * u[index[:, 0]]
        for k in range(1, index.shape[1]):
            out = out + s[:, k, None] * u[index[:, k]]
        return out
    return embedding_bag(index.reshape(-1), u, places.starts, per_sample_weights=s.reshape(-1), mode="sum")


class _Dots(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, v: Tensor, index: Tensor, places: Places | None) -> Tensor:
        ctx.save_for_backward(x, v, index)
        ctx.places = places
        return _dots(x, v, index, places)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        x, v, index = ctx.saved_tensors
        by_atom = (ctx.places or Places(index)).by_atom
        dx = _out(g, v, index, ctx.places) if ctx.needs_input_grad[0] else None
        dv = by_atom(len(v)).sums(g, x) if ctx.needs_input_grad[1] else None
        return dx, dv, None, None


class _Out(Function):
    @staticmethod
    def forward(ctx: Any, s: Tensor, u: Tensor, index: Tensor, places: Places | None) -> Tensor:
        ctx.save_for_backward(s, u, index)
        ctx.places = places
        return _out(s, u, index, places)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        s, u, index = ctx.saved_tensors
        by_atom = (ctx.places or Places(index)).by_atom
        ds = _dots(g, u, index, ctx.places) if ctx.needs_input_grad[0] else None
        du = by_atom(len(u)).sums(s, g) if ctx.needs_input_grad[1] else None
        return ds, du, None, None


class _Take(Function):
    @staticmethod
    def forward(ctx: Any, values: Tensor, index: Tensor, places: Places | None) -> Tensor:
        ctx.save_for_backward(index)
        ctx.places, ctx.count = places, len(values)
        return values[index]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        (index,) = ctx.saved_tensors
        by_atom = (ctx.places or Places(index)).by_atom(ctx.count)
        return by_atom.sums(g, torch.ones_like(g[:, :1]))[:, 0], None, None
