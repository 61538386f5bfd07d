"""Every path against a float64 loop, forward and gradients; a wrong atom must fail the tolerance.

Without a GPU the Triton kernels run in Triton's interpreter.
"""

import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from uhl import ops, router
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


@pytest.fixture(autouse=True)
def _poisoned():
    """New memory holds NaN, so that what is not written shows; and what has no deterministic form is an error."""
    torch.use_deterministic_algorithms(True)
    assert torch.empty(3).isnan().all()
    yield
    torch.use_deterministic_algorithms(False)


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
    {"seed": 1, "k": 1, "t": 33},
    {"seed": 2, "k": 4, "d_in": 130, "d_out": 300, "t": 3},  # more columns than a block of the kernel that sums
    {"seed": 6, "d_in": 1100, "d_out": 2100, "b": 1, "t": 3},  # and than one of the kernel that reads and writes
    {"seed": 3, "a": 200, "k": 3, "t": 9},
    {"seed": 4, "one_atom": True, "t": 40},  # all tokens share an atom
    {"seed": 5, "a": 2, "k": 1, "b": 1, "t": 300},  # more tokens than a block; an atom's are summed in parts
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
    at = tuple(given[5].gate.nonzero()[0].tolist())
    index = given[5].index.clone()
    index[at] = (index[at] + 1) % len(given[2])  # one atom of one token
    wrong = [z.detach().clone().requires_grad_() for z in leaves]
    other = ops.get(path)(*wrong[:5], Route(index, wrong[5]), wrong[6])
    (other * weights.to(device)).sum().backward()
    assert not torch.allclose(other.cpu().double(), wanted, atol=1e-2)
    for name, mine, true in zip("yxvumgo", wrong, leaves64, strict=True):
        assert torch.allclose(mine.grad.cpu().double(), true.grad, atol=1e-3, rtol=1e-3) == (name == "y"), name
    plain, zero = (ops.get(path)(*given, *less) for less in ((), (torch.zeros_like(offset),)))
    torch.testing.assert_close(plain, zero)
    assert not torch.allclose(plain.cpu().double(), wanted, atol=1e-2)


@pytest.mark.parametrize("path", ["reference", "dense", "gather"])
def test_gradients_are_the_slopes(path):
    """By finite differences, in float64; Triton's kernels add in float32."""
    leaves, (*_, chosen) = doubled(inputs(t=3, d_in=4, d_out=3))
    leaves.append(torch.linspace(-2, 2, 7).double().requires_grad_())

    def update(y, x, v, u, m, gate, offset):
        return ops.get(path)(y, x, v, u, m, Route(chosen.index, gate), offset)

    assert torch.autograd.gradcheck(update, leaves)


@pytest.mark.parametrize("trained", ["m", "v", "u", "x", "mo"])
def test_gradients_are_the_same_where_few_are_wanted(place, trained):
    """Frozen atoms have none: tuning trains what makes the strengths alone."""
    path, device = place
    given = inputs(device, t=40)
    offset = torch.linspace(-2, 2, 7).to(device)

    def run(names):
        leaves = {n: z.detach().clone() for n, z in zip("yxvumgo", (*given[:5], given[5].gate, offset), strict=True)}
        for n in names:
            leaves[n].requires_grad_()
        y, x, v, u, m, gate, less = leaves.values()
        out = ops.get(path)(y, x, v, u, m, Route(given[5].index, gate), less)
        out.square().sum().backward()
        return {n: leaves[n].grad for n in trained}

    every = run("yxvumgo")
    for name, gradient in run(trained).items():
        assert every[name].abs().max() > 0.1
        torch.testing.assert_close(gradient, every[name])


def test_memory_may_lie_in_any_order(place):
    """Strided, transposed and expanded inputs, and gradients that come so."""
    path, device = place
    y, x, v, u, m, chosen = inputs(device)
    straight = [x, v, u, m[:1].expand(7).contiguous()]
    odd = [
        torch.stack([x, x], -1)[..., 0],
        v.T.contiguous().T,
        torch.stack([u, u], 1).flatten(0, 1)[::2],
        m[:1].expand(7),
    ]
    assert not any(z.is_contiguous() for z in odd)
    found = []
    for (a, b, c, d), grown, index in (
        (straight, y, chosen.index),
        (odd, y.mT.contiguous().mT, chosen.index.mT.contiguous().mT),
    ):
        leaves = [z.detach().requires_grad_() for z in (a, b, c, d)]
        out = ops.get(path)(grown, *leaves, Route(index, chosen.gate[:1].expand_as(chosen.gate)))
        out.mT.contiguous().mT.backward(torch.linspace(-1, 1, 9, device=device).expand_as(out))
        found.append([out.detach(), *(z.grad for z in leaves)])
    for first, second in zip(*found, strict=True):
        assert first.abs().max() > 0.1
        torch.testing.assert_close(first, second)
    index[0, 0, 0] = (index[0, 0, 0] + 1) % 7  # one atom of one token
    gate = torch.ones_like(chosen.gate)
    right, wrong = (ops.get(path)(y, x, v, u, m, Route(i.contiguous(), gate)) for i in (chosen.index, index))
    assert not torch.allclose(right, wrong, atol=1e-2)


def test_closed_gates_and_no_tokens(place):
    path, device = place
    y, x, v, u, m, chosen = inputs(device)
    before = y.clone()
    out = ops.get(path)(y, x, v, u, m, Route(chosen.index, torch.zeros_like(chosen.gate)))
    assert torch.equal(out, before)
    assert torch.equal(y, before)  # the host's own output is never written to
    leaves = [z.clone().requires_grad_() for z in (x, v, u, m, torch.zeros_like(chosen.gate))]
    ops.get(path)(y, *leaves[:4], Route(chosen.index, leaves[4])).sum().backward()
    assert not any(z.grad.any() for z in leaves[:4])
    wanted = m[chosen.index] * (v[chosen.index] @ x[..., None])[..., 0] * u.sum(-1)[chosen.index]
    torch.testing.assert_close(leaves[4].grad, wanted, atol=1e-4, rtol=1e-4)  # a closed gate may open again
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
@pytest.mark.parametrize("atoms", [torch.float32, None], ids=["float32 atoms", "its atoms"])
def test_half_precision_host(place, dtype, atoms):
    """Outputs and gradients within a few roundings of what float64 gives for the same rounded numbers."""
    path, device = place
    if path == "reference" and atoms is None:
        pytest.skip("rounds each step, where the others add in float32")
    *tensors, chosen = inputs(device, t=20)
    given = [z.to(dtype) for z in tensors[:2]] + [z.to(atoms or dtype) for z in tensors[2:]]
    leaves64, given64 = doubled([*given, chosen])
    wanted = ops.get("reference")(*given64)
    wanted.sum().backward()

    def run(index):
        leaves = [z.detach().clone().requires_grad_() for z in given]
        out = ops.get(path)(*leaves, Route(index, chosen.gate))
        out.sum().backward()
        assert [z.dtype for z in (out, *(z.grad for z in leaves))] == [dtype, *(z.dtype for z in given)]
        pairs = zip((out, *(z.grad for z in leaves)), (wanted, *(z.grad for z in leaves64[:5])), strict=True)
        return [float((a.detach().cpu().double() - b.detach()).abs().max() / b.detach().abs().max()) for a, b in pairs]

    most = 3 * torch.finfo(dtype).eps
    assert max(run(chosen.index)) < most
    index = chosen.index.clone()
    at = tuple(chosen.gate.nonzero()[0].tolist())
    index[at] = (index[at] + 1) % len(given[2])
    off = run(index)
    assert min(off[:1] + off[2:]) > 2 * most  # all but the host's own gradient, which passes through


@pytest.mark.parametrize("tokens", [300, 20_000])
def test_same_bits_every_time(place, tokens):
    path, device = place
    if path == "reference" and tokens > 300:
        pytest.skip("torch adds an index's gradients in any order where there are many")
    if path == "fused" and device == "cpu" and tokens > 300:
        pytest.skip("minutes in Triton's interpreter")
    torch.use_deterministic_algorithms(False)  # they are so by themselves

    def gradients():
        given = inputs(device, b=1, t=tokens, a=5)
        leaves = [z.requires_grad_() for z in given[1:5]]
        ops.get(path)(given[0], *leaves, given[5]).pow(2).sum().backward()
        return [z.grad for z in leaves]

    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        first, *others = [gradients() for _ in range(3)]
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(a, b) for later in others for a, b in zip(first, later, strict=True))


@settings(max_examples=25, deadline=None)
@given(st.integers(1, 40), st.integers(1, 12), st.integers(1, 3), st.integers(0, 1000))
def test_sums_by_atom_are_the_masked_product(tokens, atoms, k, seed):
    g = torch.Generator().manual_seed(seed)
    index = torch.randint(atoms, (tokens, k), generator=g)  # an atom may come twice
    s, x = torch.randn(tokens, k, generator=g), torch.randn(tokens, 4, generator=g)
    mask = torch.zeros(tokens, atoms).scatter_add_(1, index, s)
    torch.testing.assert_close(ByAtom(index, atoms).sums(s, x), mask.T @ x, atol=1e-4, rtol=1e-4)


def kept_for_backward(path, device, tokens, atoms):
    """Numbers of each tensor that an update keeps for its backward pass, beside x, V~, U~ and the strengths."""
    kept = {}

    def save(tensor):
        kept[tensor.data_ptr()] = tensor.numel()
        return tensor

    y, x, v, u, m, chosen = inputs(device, b=1, t=tokens, a=atoms, d_in=50, d_out=50)
    leaves = [z.requires_grad_() for z in (x, v, u, m)]
    with torch.autograd.graph.saved_tensors_hooks(save, lambda t: t):
        ops.get(path)(y, *leaves, chosen)
    for own in leaves:
        kept.pop(own.data_ptr(), None)
    return list(kept.values())


def test_memory_is_linear_in_tokens(place):
    """What backward keeps; gathering and the kernels keep nothing of T x K x D or T x A."""
    path, device = place
    sizes = [kept_for_backward(path, device, tokens, 100) for tokens in (64, 128, 256)]
    first, second, third = map(sum, sizes)
    assert third - second == 2 * (second - first) > 0
    if path in {"gather", "fused"}:
        assert all(max(numbers) <= max(tokens * 2, 100) for tokens, numbers in zip((64, 128, 256), sizes, strict=True))


def test_choice():
    assert ops.choose("cpu", 1024, 128, 768, 768) == "gather"
    assert ops.choose("cpu", 1, 128, 768, 768) == "dense"
    assert ops.choose("cpu", ops.LAUNCH, 1, 1, 0) == "gather"
    with pytest.raises(UHLError, match="choose one of: reference, dense, gather, fused"):
        ops.get("fast")


@pytest.mark.parametrize("device", ["cpu", *(["cuda"] if GPU else [])])
def test_the_router_in_one_kernel_decides_as_the_equation(device):
    pytest.importorskip("triton", reason="Triton is not installed")
    if GPU and device == "cpu":
        pytest.skip("the kernels run on the GPU")
    from uhl.ops import fused

    g, gates = torch.Generator().manual_seed(0), []
    for tokens, width, atoms, k in ((5, 6, 7, 2), (33, 130, 128, 1), (3, 1100, 20, 4), (2, 8, 3, 3), (0, 8, 3, 1)):
        hidden = 3 * torch.randn(2, tokens, width, generator=g).to(device)
        folded = torch.randn(atoms, width, generator=g).to(device) / width**0.5
        task = torch.randn(atoms, generator=g).to(device) - 1.5
        wanted = router.route(hidden, folded, task, k)
        found = fused.route(hidden, folded, task, k)
        assert torch.equal(found.index, wanted.index)
        assert torch.equal(found.gate, wanted.gate)
        gates.append(found.gate.flatten())
        leaves = [z.clone().requires_grad_() for z in (hidden, folded, task)]
        weights = torch.randn(found.gate.shape, generator=g).to(device)
        slopes = []
        for way in (router.route, fused.route):
            slopes.append(torch.autograd.grad((way(*leaves, k).gate * weights).sum(), leaves))
        for a, b in zip(*slopes, strict=True):
            assert not tokens or a.abs().max() > 1e-3
            torch.testing.assert_close(a, b)
    assert 0 < torch.cat(gates).mean() < 1


def test_the_operators_that_compilers_call(monkeypatch):
    pytest.importorskip("triton", reason="Triton is not installed")
    ops.get("fused")
    torch.use_deterministic_algorithms(False)  # which poisons what compared operators leave unwritten
    y, x, v, u, m, chosen = inputs(b=1, t=5)
    tables, index, gate = chosen.places().by_atom(len(v)), chosen.index[0], chosen.gate[0]
    g, dots = y[0].clone(), torch.randn(5, 2)
    leaves = [z.requires_grad_() for z in (x[0], v, u, m, gate)]
    rows = [*leaves, index, y[0], torch.randn(7), None, True, torch.float32, tables.order, tables.starts]
    for name, tensors in {
        "rows": rows,
        "sums": [x[0].detach(), g, m.detach(), gate.detach(), dots, dots, tables.order, tables.starts, True, False],
        "best": [torch.randn(5, 7), 2, torch.randn(5, 6), torch.randn(7)],
    }.items():
        torch.library.opcheck(getattr(torch.ops.uhl, name).default, tensors)
    out = torch.ops.uhl.rows(*rows)[0].sum()
    with pytest.raises(UHLError, match="first gradients only"):
        torch.autograd.grad(out, leaves, create_graph=True)
    with pytest.raises(UHLError, match="first gradients only"):
        torch.ops.uhl.rows(*(False if z is True else z for z in rows))[0].sum().backward()
    monkeypatch.setattr(torch.compiler, "_is_compiling_flag", True)  # as it is while another thread compiles
    assert torch.ops.uhl.best(torch.randn(5, 7), 2, None, None)[0].shape == (5, 2)


def test_without_triton_the_fused_path_says_what_is_missing(monkeypatch):
    monkeypatch.setitem(sys.modules, "uhl.ops.fused", None)
    monkeypatch.delattr(ops, "fused", raising=False)
    _, x, v, _, m, _ = inputs()
    for work in (lambda: ops.get("fused"), lambda: ops.route(x, v, m, 2, "fused")):
        with pytest.raises(UHLError, match="needs Triton: pip install triton"):
            work()


def test_kernels_see_their_own_module():
    """Where types are checked, a checker wraps each function, and Triton must be given what is inside."""
    pytest.importorskip("triton", reason="Triton is not installed")
    from uhl.ops import fused

    assert fused._rows.jit.fn.__globals__ is vars(fused)


def test_rounds_of_the_best_are_topk():
    scores = torch.randn(4, 9, 12)
    assert torch.equal(router._rounds(scores, 3), scores.topk(3).indices)


def test_gradients_have_their_tensors_precision(place):
    """Behind a layer norm under autocast a weight reads float32 and gives half precision."""
    path, device = place
    y, x, v, u, m, chosen = inputs(device, t=20)
    weights = torch.linspace(-1, 1, y.numel(), device=device).view_as(y).bfloat16()
    found = []
    for dtype in (torch.float32, torch.bfloat16):
        leaf = x.clone().requires_grad_()
        out = ops.get(path)(y.to(dtype), leaf, v, u, m, chosen)
        out.backward(weights.to(dtype))
        found.append(leaf.grad)
    assert found[1].dtype == torch.float32
    torch.testing.assert_close(*found, atol=1e-5, rtol=1e-5)
