import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from uhl import quant

FLOATS = st.floats(-1e3, 1e3, width=32)
MATRICES = hnp.arrays("float32", hnp.array_shapes(min_dims=2, max_dims=2, max_side=9), elements=FLOATS)


@pytest.mark.parametrize("bits", [4, 8])
@given(x=MATRICES)
def test_rounding_is_within_half_a_step_and_idempotent(bits, x):
    x = torch.from_numpy(x)
    q, scale = quant.quantise(x, bits)
    back = quant.dequantise(q, scale)
    step = scale.float().unsqueeze(-1)
    # float16 rounds the scale by up to 2^-11, which the largest integer multiplies
    assert ((back - x).abs() <= step * (0.5 + quant.QMAX[bits] * 2**-10) + 1e-6).all()
    assert torch.equal(quant.dequantise(*quant.quantise(back, bits)), back)


@given(q=hnp.arrays("int8", hnp.array_shapes(max_dims=2, max_side=9), elements=st.integers(-8, 7)))
def test_pack4_round_trip(q):
    q = torch.from_numpy(q)
    packed = quant.pack4(q)
    assert packed.numel() == (q.numel() + 1) // 2
    assert torch.equal(quant.unpack4(packed, tuple(q.shape)), q)


def test_pack4_rejects_what_it_cannot_hold():
    with pytest.raises(ValueError, match=r"\[-8, 7\]"):
        quant.pack4(torch.tensor([8], dtype=torch.int8))
    with pytest.raises(ValueError, match="takes 2 uint8"):
        quant.unpack4(torch.zeros(1, dtype=torch.uint8), (3,))


def test_fake_quantisation_has_the_gradient_of_the_identity():
    x = torch.randn(3, 5, requires_grad=True)
    weight = torch.randn(3, 5)
    (quant.fake_quantise(x, 4) * weight).sum().backward()
    assert torch.equal(x.grad, weight)
    assert not torch.equal(quant.fake_quantise(x, 4), x)
