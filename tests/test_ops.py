"""Every path against a float64 loop, forward and gradients; a wrong atom must fail the tolerance.

Without a GPU the Triton kernels run in Triton's interpreter.
"""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from uhl import ops
from uhl.errors import UHLError
from uhl.router import ByAtom, Route

GPU = torch.cuda.is_available()
PLACES = [(path, "cpu") for path in ("reference", "dense", "gather")]
PLACES += [("fused", "cuda" if GPU else "cpu")] + [(p, "cuda") for p in ("dense", "gather") if GPU]


@pytest.fixture(params=PLACES, ids=lambda p: "-".join(p))
def place(request):
    if request.param[0] == "fused":
        pytest.importorskip("triton", reason="Triton is not installed")
    return request.param


def inputs(device="cpu", seed=0, b=2, t=5, a=7, k=2, d_in=6, d_out=9, one_atom=False):
    g = torch.Generator().manual_seed(seed)

    def draw(*shape):
        return torch.randn(*shape, generator=g).to(device)

    index = torch.stack([torch.randperm(a, generator=g)[:k] for _ in range(b * t)]).reshape(b, t, k)
    if one_atom:  # every token's first choice
        index[..., 0], index[..., 1:] = 0, 1
    gate = (draw(b, t, k) > 0).float()
    return [draw(b, t, d_out), draw(b, t, d_in), draw(a, d_in), draw(a, d_out), draw(a), Route(index.to(device), gate)]


def loop(y, x, v, u, m, chosen, offset):
    """The equation for each token by itself, in float64, with gradients."""
    out = []
    for place in torch.cartesian_prod(torch.arange(x.shape[0]), torch.arange(x.shape[1])).tolist():
        at = tuple(place)
        terms = [
            s * m[j] * (v[j] @ x[at] - offset[j]) * u[j]
            for j, s in zip(chosen.index[at].tolist(), chosen.gate[at], strict=True)
        ]
        out.append(y[at] + sum(terms))
    return torch.stack(out).reshape(y.shape)


def doubled(given):
    *tensors, chosen = given
    leaves = [z.detach().cpu().double().requires_grad_() for z in (*tensors, chosen.gate)]
    return leaves, [*leaves[:5], Route(chosen.index.cpu(), leaves[5])]


SIZES = [
    {},
    {"seed": 1, "k": 1, "t": 33},  # more tokens than a block
    {"seed": 2, "k": 4, "d_in": 130, "d_out": 300, "t": 3},  # more columns than a block
    {"seed": 3, "a": 200, "k": 3, "t": 9},
    {"seed": 4, "one_atom": True, "t": 40},  # all tokens share an atom
]


@pytest.mark.parametrize("size", SIZES, ids=str)
def test_forward_and_gradients_equal_the_loop(place, size):
    path, device = place
    given = inputs(device, **size)
    offset = torch.linspace(-2, 2, len(given[2])).to(device)
    leaves64, given64 = doubled(given)
    leaves64.append(offset.detach().cpu().double().requires_grad_())
    weights = torch.linspace(-1, 1, given[0].numel()).reshape(given[0].shape)
    wanted = loop(*given64, leaves64[6])
    (wanted * weights.double()).sum().backward()
    leaves = [z.detach().clone().requires_grad_() for z in (*given[:5], given[5].gate, offset)]
    found = ops.get(path)(*leaves[:5], Route(given[5].index, leaves[5]), leaves[6])
    (found * weights.to(device)).sum().backward()
    torch.testing.assert_close(found.cpu().double(), wanted, atol=1e-4, rtol=1e-4)
    for mine, true in zip(leaves, leaves64, strict=True):
        assert true.grad.abs().max() > 0.1
        torch.testing.assert_close(mine.grad.cpu().double(), true.grad, atol=1e-4, rtol=1e-4)
    if not size.get("one_atom"):
        wrong = ops.get(path)(*given[:5], Route((given[5].index + 1) % len(given[2]), given[5].gate), offset)
        assert not torch.allclose(wrong.cpu().double(), wanted, atol=1e-2)
    plain, zero = (ops.get(path)(*given, *less) for less in ((), (torch.zeros_like(offset),)))
    torch.testing.assert_close(plain, zero)
    assert not torch.allclose(plain.cpu().double(), wanted, atol=1e-2)


def test_closed_gates_and_no_tokens(place):
    path, device = place
    y, x, v, u, m, chosen = inputs(device)
    before = y.clone()
    out = ops.get(path)(y, x, v, u, m, Route(chosen.index, torch.zeros_like(chosen.gate)))
    assert torch.equal(out, before)
    assert torch.equal(y, before)  # the host's own output is never written to
    none = [
        y[:, :0],
        x[:, :0].requires_grad_(),
        v.requires_grad_(),
        u,
        m,
        Route(chosen.index[:, :0], chosen.gate[:, :0]),
    ]
    empty = ops.get(path)(*none)
    assert empty.shape == (2, 0, 9)
    empty.sum().backward()
    assert v.grad is None or not v.grad.any()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_host_with_float32_atoms(place, dtype):
    path, device = place
    y, x, v, u, m, chosen = inputs(device)
    out = ops.get(path)(y.to(dtype), x.to(dtype), v, u, m, chosen)
    assert out.dtype == dtype
    true = ops.get("reference")(y, x, v, u, m, chosen)
    torch.testing.assert_close(out.float(), true, atol=0.1, rtol=0.02)


def test_same_bits_every_time(place):
    path, device = place
    grads = []
    for _ in range(3):
        given = inputs(device, t=300, a=5)
        leaves = [z.requires_grad_() for z in given[1:5]]
        ops.get(path)(given[0], *leaves, given[5]).pow(2).sum().backward()
        grads.append([z.grad for z in leaves])
    assert all(torch.equal(a, b) for later in grads[1:] for a, b in zip(grads[0], later, strict=True))


@settings(max_examples=25, deadline=None)
@given(st.integers(1, 40), st.integers(1, 12), st.integers(1, 3), st.integers(0, 1000))
def test_sums_by_atom_are_the_masked_product(tokens, atoms, k, seed):
    g = torch.Generator().manual_seed(seed)
    index = torch.randint(atoms, (tokens, k), generator=g)  # an atom may come twice
    s, x = torch.randn(tokens, k, generator=g), torch.randn(tokens, 4, generator=g)
    mask = torch.zeros(tokens, atoms).scatter_add_(1, index, s)
    torch.testing.assert_close(ByAtom(index, atoms).sums(s, x), mask.T @ x, atol=1e-4, rtol=1e-4)


def test_memory_of_gathering_is_linear_in_tokens_and_not_in_atoms():
    """What backward keeps: x, and numbers per token and chosen atom; nothing of T x K x D or T x A."""
    kept = []

    def save(tensor):
        kept.append(tensor)
        return tensor

    y, x, v, u, m, chosen = inputs(t=64, a=100, d_in=50, d_out=50)
    leaves = [z.requires_grad_() for z in (x, v, u, m)]
    with torch.autograd.graph.saved_tensors_hooks(save, lambda t: t):
        ops.get("gather")(y, *leaves, chosen)
    own = {t.data_ptr(): t.numel() for t in kept if t.numel() not in (x.numel(), v.numel(), m.numel())}
    assert own
    assert max(own.values()) <= chosen.index.numel()


def test_choice():
    assert ops.choose("cpu", 1024, 128, 768, 768) == "gather"
    assert ops.choose("cpu", 1, 128, 768, 768) == "dense"
    assert ops.choose("cpu", ops.LAUNCH, 1, 1, 0) == "gather"
    with pytest.raises(UHLError, match="choose one of: reference, dense, gather, fused"):
        ops.get("fast")
