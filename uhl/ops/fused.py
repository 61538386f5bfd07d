"""The two operations of :mod:`uhl.ops.gather` as Triton kernels: x is read once and y written once.

``_rows`` takes a block of tokens through both steps, dots and sum, with the dots in registers; ``_sums`` gives each
atom and block of columns to one program, which adds the atom's tokens in their order. Nothing is added atomically, so
every run gives the same bits. Products are formed in float32 whatever the tensors' dtype.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from jaxtyping import Float, Int64
from torch import Tensor
from torch.autograd.function import once_differentiable

from uhl.ops.gather import take
from uhl.router import ByAtom, Places, Route

TOKENS, COLUMNS = 16, 128  # of a block


def update(
    y: Float[Tensor, "*b T d_out"],
    x: Float[Tensor, "*b T d_in"],
    v: Float[Tensor, "A d_in"],
    u: Float[Tensor, "A d_out"],
    strength: Float[Tensor, " A"],
    chosen: Route,
    offset: Float[Tensor, " A"] | None = None,
) -> Float[Tensor, "*b T d_out"]:
    """Same result as :func:`uhl.ops.reference.update`, to float32's precision; the tensors may have several dtypes.

    First gradients only.
    """
    places = chosen.places()
    index = places.index
    scale = chosen.gate.reshape(index.shape).float() * take(strength.float(), index, places)
    flat = y.reshape(-1, y.shape[-1])
    out: Tensor = _Update.apply(flat, x.reshape(-1, x.shape[-1]), v, u, scale, offset, index, places)
    return out.reshape(y.shape)


@triton.jit
def _rows(  # type: ignore[no-untyped-def]
    x_ptr, v_ptr, u_ptr, scale_ptr, index_ptr, y_ptr, offset_ptr, out_ptr, dots_ptr,
    count, d_in, d_out,
    ADD: tl.constexpr, LESS: tl.constexpr,
    K: tl.constexpr, WIDE: tl.constexpr, TOKENS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    t = (tl.program_id(0) * TOKENS + tl.arange(0, TOKENS)).to(tl.int64)
    k = tl.arange(0, WIDE)  # K rounded up to a power of two
    live = t < count
    chosen = live[:, None] & (k < K)[None, :]
    places = t[:, None] * K + k[None, :]
    atom = tl.load(index_ptr + places, mask=chosen, other=0)
    scale = tl.load(scale_ptr + places, mask=chosen, other=0.0)
    dots = tl.zeros((TOKENS, WIDE), tl.float32)
    for start in range(0, d_in, COLUMNS):
        d = start + tl.arange(0, COLUMNS)
        inside = d < d_in
        x = tl.load(x_ptr + t[:, None] * d_in + d[None, :], mask=live[:, None] & inside[None, :], other=0.0)
        where = chosen[:, :, None] & inside[None, None, :]
        v = tl.load(v_ptr + atom[:, :, None] * d_in + d[None, None, :], mask=where, other=0.0)
        dots += tl.sum(x.to(tl.float32)[:, None, :] * v.to(tl.float32), axis=2)
    if LESS:
        dots -= tl.load(offset_ptr + atom, mask=chosen, other=0.0).to(tl.float32)
    tl.store(dots_ptr + places, dots, mask=chosen)
    s = dots * scale
    for start in range(0, d_out, COLUMNS):
        d = start + tl.arange(0, COLUMNS)
        inside = d < d_out
        where = chosen[:, :, None] & inside[None, None, :]
        u = tl.load(u_ptr + atom[:, :, None] * d_out + d[None, None, :], mask=where, other=0.0)
        out = tl.sum(s[:, :, None] * u.to(tl.float32), axis=1)
        tile = t[:, None] * d_out + d[None, :]
        here = live[:, None] & inside[None, :]
        if ADD:
            out += tl.load(y_ptr + tile, mask=here, other=0.0).to(tl.float32)
        tl.store(out_ptr + tile, out.to(out_ptr.dtype.element_ty), mask=here)


@triton.jit
def _sums(  # type: ignore[no-untyped-def]
    s_ptr, x_ptr, order_ptr, starts_ptr, out_ptr,
    width,
    K: tl.constexpr, TOKENS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    atom = tl.program_id(0).to(tl.int64)
    d = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    inside = d < width
    total = tl.zeros((COLUMNS,), tl.float32)
    end = tl.load(starts_ptr + atom + 1)
    for first in range(tl.load(starts_ptr + atom), end, TOKENS):
        at = first + tl.arange(0, TOKENS)
        here = at < end
        place = tl.load(order_ptr + at, mask=here, other=0)
        s = tl.load(s_ptr + place, mask=here, other=0.0)
        token = place // K
        x = tl.load(x_ptr + token[:, None] * width + d[None, :], mask=here[:, None] & inside[None, :], other=0.0)
        total += tl.sum(s[:, None] * x.to(tl.float32), axis=0)
    tl.store(out_ptr + atom * width + d, total.to(out_ptr.dtype.element_ty), mask=inside)


def rows(
    x: Float[Tensor, "T d_in"],
    v: Float[Tensor, "A d_in"],
    u: Float[Tensor, "A d_out"],
    scale: Float[Tensor, "T K"],
    index: Int64[Tensor, "T K"],
    y: Float[Tensor, "T d_out"] | None = None,
    offset: Float[Tensor, " A"] | None = None,
) -> tuple[Float[Tensor, "T d_out"], Float[Tensor, "T K"]]:
    """(out, dots): ``y`` plus the update, in y's (else x's) dtype, and the float32 dots less the offsets."""
    count, k = index.shape
    out = torch.empty(count, u.shape[-1], device=x.device, dtype=x.dtype if y is None else y.dtype)
    dots = torch.empty(count, k, device=x.device, dtype=torch.float32)
    others = (out if y is None else y, scale if offset is None else offset)
    given = (t.contiguous() for t in (x, v, u, scale, index, *others))
    grid = (triton.cdiv(count, TOKENS),)
    wide = triton.next_power_of_2(k)
    modes = (y is not None, offset is not None)
    _rows[grid](*given, out, dots, count, x.shape[-1], u.shape[-1], *modes, k, wide, TOKENS, COLUMNS)
    return out, dots


def sums(s: Float[Tensor, "T K"], x: Float[Tensor, "T d"], by_atom: ByAtom, dtype: torch.dtype) -> Tensor:
    """(A, d): for each atom the sum of s_tk x_t over its tokens."""
    atoms, width, k = len(by_atom.starts), x.shape[-1], s.shape[1]
    out = torch.empty(atoms, width, device=x.device, dtype=dtype)
    starts = torch.cat([by_atom.starts, by_atom.starts.new_full((1,), by_atom.order.numel())])
    grid = (atoms, triton.cdiv(width, COLUMNS))
    _sums[grid](s.contiguous(), x.contiguous(), by_atom.order, starts, out, width, k, TOKENS, COLUMNS)
    return out


class _Update(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        y: Tensor,
        x: Tensor,
        v: Tensor,
        u: Tensor,
        scale: Tensor,
        offset: Tensor | None,
        index: Tensor,
        places: Places,
    ) -> Tensor:
        ctx.places = places
        if not index.numel():
            ctx.save_for_backward(x, v, u, scale, index, scale)
            return y.clone()
        out, dots = rows(x, v, u, scale, index, y, offset)
        ctx.save_for_backward(x, v, u, scale, index, dots)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        x, v, u, scale, index, dots = ctx.saved_tensors
        if not index.numel():
            return (g, *(torch.zeros_like(t) for t in (x, v, u, scale)), None, None, None)
        _, for_x, for_v, for_u, for_scale, for_offset, *_ = ctx.needs_input_grad
        dx, back = rows(g, u, v, scale, index)
        by_atom = ctx.places.by_atom(len(v)) if for_v or for_u or for_offset else None
        read = back * scale
        return (
            g,
            dx.to(x.dtype) if for_x else None,
            sums(read, x, by_atom, v.dtype) if by_atom and for_v else None,
            sums(dots * scale, g, by_atom, u.dtype) if by_atom and for_u else None,
            back * dots if for_scale else None,
            -sums(read, torch.ones_like(read[:, :1]), by_atom, read.dtype)[:, 0] if by_atom and for_offset else None,
            None,
            None,
        )
