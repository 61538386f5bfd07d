"""Both paths against a float64 loop, forward and gradients; a wrong atom must fail the tolerance."""

import pytest
import torch

from uhl import ops
from uhl.errors import UHLError
from uhl.router import Route


def inputs(seed=0, b=2, t=5, a=7, k=2, d_in=6, d_out=9):
    g = torch.Generator().manual_seed(seed)

    def draw(*shape):
        return torch.randn(*shape, generator=g)

    index = torch.stack([torch.randperm(a, generator=g)[:k] for _ in range(b * t)]).reshape(b, t, k)
    gate = (draw(b, t, k) > 0).float()
    return draw(b, t, d_in), draw(a, d_in), draw(a, d_out), draw(a), Route(index, gate)


def loop(x, v, u, m, chosen):
    x, v, u, m = (z.double() for z in (x, v, u, m))
    out = x.new_zeros(*x.shape[:-1], u.shape[1])
    for place in torch.cartesian_prod(torch.arange(x.shape[0]), torch.arange(x.shape[1])).tolist():
        for j, s in zip(chosen.index[tuple(place)], chosen.gate[tuple(place)], strict=True):
            out[tuple(place)] += s.double() * m[j] * (v[j] @ x[tuple(place)]) * u[j]
    return out


@pytest.mark.parametrize("path", list(ops.PATHS))
@pytest.mark.parametrize("seed", range(3))
def test_path_equals_the_loop(path, seed):
    given = inputs(seed)
    wanted = loop(*given)
    torch.testing.assert_close(ops.get(path)(*given).double(), wanted, atol=1e-5, rtol=1e-5)
    x, v, u, m, chosen = given
    wrong = ops.get(path)(x, v, u, m, Route((chosen.index + 1) % len(m), chosen.gate)).double()
    assert not torch.allclose(wrong, wanted, atol=1e-2)


def test_gradients_agree():
    grads = []
    for path in ops.PATHS:
        x, v, u, m, chosen = inputs()
        leaves = [z.requires_grad_() for z in (x, v, u, m, chosen.gate)]
        ops.get(path)(x, v, u, m, Route(chosen.index, chosen.gate)).pow(2).sum().backward()
        grads.append([z.grad for z in leaves])
    for a, b in zip(*grads, strict=True):
        torch.testing.assert_close(a, b, atol=1e-4, rtol=1e-4)
        assert a.abs().sum() > 0


@pytest.mark.parametrize("path", list(ops.PATHS))
def test_closed_gates_and_no_tokens(path):
    x, v, u, m, chosen = inputs()
    assert ops.get(path)(x, v, u, m, Route(chosen.index, torch.zeros_like(chosen.gate))).abs().sum() == 0
    empty = ops.get(path)(x[:, :0], v, u, m, Route(chosen.index[:, :0], chosen.gate[:, :0]))
    assert empty.shape == (2, 0, 9)


def test_unknown_path():
    with pytest.raises(UHLError, match="choose one of: reference, dense"):
        ops.get("fast")
