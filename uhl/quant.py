"""Symmetric 8-bit and 4-bit quantisation with one float16 scale a row, as pure functions.

    q = round(x / s),  s = max|x| / qmax  (rounded to float16),  qmax = 127 or 7

The scale that training sees is the rounded one that the file stores, and quantising a dequantised row gives the same
row again, so an adapter scores the same before saving and after loading.
"""

from __future__ import annotations

import torch
from jaxtyping import Float, Int8, UInt8
from torch import Tensor

QMAX = {8: 127, 4: 7}
SMALLEST_SCALE, LARGEST_SCALE = 2.0**-14, 65504.0  # float16's smallest normal number, and its largest


def quantise(x: Float[Tensor, "*rows n"], bits: int) -> tuple[Int8[Tensor, "*rows n"], Float[Tensor, "*rows"]]:
    """Integers and float16 scales of each row (the last axis) of ``x``. ``bits`` is 8 or 4."""
    qmax = QMAX[bits]
    largest = x.abs().amax(-1).to(torch.promote_types(x.dtype, torch.float32))
    scale = _half((largest / qmax).clamp(SMALLEST_SCALE, LARGEST_SCALE))
    integers = (x / scale.float().unsqueeze(-1)).round().clamp(-qmax, qmax).to(torch.int8)
    return integers, scale


def dequantise(q: Int8[Tensor, "*rows n"], scale: Float[Tensor, "*rows"]) -> Float[Tensor, "*rows n"]:
    """Float32 values of quantised rows."""
    return q.float() * scale.float().unsqueeze(-1)


def fake_quantise(x: Float[Tensor, "*rows n"], bits: int) -> Float[Tensor, "*rows n"]:
    """What the file would give back, with the gradient of the identity (straight-through; Bengio et al. 2013)."""
    stored = dequantise(*quantise(x.detach(), bits))
    return stored + (x - x.detach())


def to_half(x: Tensor) -> Tensor:
    """``x`` as float16, the largest where it is larger."""
    return _half(x.clamp(-LARGEST_SCALE, LARGEST_SCALE))


def _half(x: Tensor) -> Tensor:
    """``x.half()``, also where `torch.compile` would leave out a cast to float16 and back for being more exact."""
    if torch.compiler.is_compiling():
        return opaque_half(x)
    return x.half()


@torch.library.custom_op("uhl::half", mutates_args=(), schema="(Tensor x) -> Tensor")
def opaque_half(x: Tensor) -> Tensor:
    """A cast to float16 that no compiler looks into."""
    return x.half()


@opaque_half.register_fake
def _(x: Tensor) -> Tensor:
    return torch.empty_like(x, dtype=torch.float16)


def fake_half(x: Tensor) -> Tensor:
    """``x`` rounded to float16 (the largest where it is larger), with the gradient of the identity."""
    return to_half(x.detach()).float() + (x - x.detach())


def pack4(q: Int8[Tensor, "*shape"]) -> UInt8[Tensor, " bytes"]:
    """Two 4-bit integers of [-8, 7] a byte, low half first; an odd count is padded with zero."""
    if q.dtype != torch.int8 or (q.numel() and (q.min() < -8 or q.max() > 7)):
        raise ValueError("pack4 takes int8 values in [-8, 7]")
    flat = (q.flatten().to(torch.int16) & 0xF).to(torch.uint8)
    if flat.numel() % 2:
        flat = torch.cat([flat, flat.new_zeros(1)])
    return flat[0::2] | (flat[1::2] << 4)


def unpack4(packed: UInt8[Tensor, " bytes"], shape: tuple[int, ...]) -> Int8[Tensor, "*shape"]:
    """Inverse of :func:`pack4`."""
    count = 1
    for size in shape:
        count *= size
    if packed.dtype != torch.uint8 or packed.numel() != (count + 1) // 2:
        raise ValueError(f"unpack4 takes {(count + 1) // 2} uint8 for shape {shape}, got {packed.numel()}")
    low, high = packed & 0xF, packed >> 4
    flat = torch.stack([low, high], 1).flatten()[:count].to(torch.int8)
    return torch.where(flat > 7, flat - 16, flat).reshape(shape)
