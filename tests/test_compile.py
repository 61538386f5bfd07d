"""A compiled host: one graph, the eager host's outputs and gradients, and folds that follow the parameters.

Type checks around the package's functions cannot be compiled, so these tests run in a process of their own without.
"""

import copy
import math
import os
import re
import subprocess
import sys

import pytest
import torch
from peft import get_peft_model
from torch._inductor.utils import run_and_get_code
from transformers import BertConfig, BertModel

from uhl import ops
from uhl.config import UHLConfig
from uhl.frame import Basis
from uhl.router import Route

UNCHECKED = "UHL_UNCHECKED" in os.environ
plain = pytest.mark.skipif(not UNCHECKED, reason="run by test_without_type_checks, in a process of its own")
long = pytest.mark.skipif("UHL_LONG" not in os.environ, reason="compiles for minutes; set UHL_LONG=1")

IDS = torch.arange(5, 37).reshape(2, 16)
LARGE = torch.linspace(-9, 9, 2 * 16 * 32).sin().reshape(2, 16, 32)


def bert(layers=2, **kwargs):
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=64, hidden_size=32, num_hidden_layers=layers, num_attention_heads=2, intermediate_size=48,
        hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
    )  # fmt: skip
    sizes = {"atoms": 16, "width": 24}
    host = BertModel(config, add_pooling_layer=False)
    for name, parameter in host.named_parameters():
        if name.endswith("bias"):  # zeros at the start, from which atoms would read nothing
            torch.nn.init.normal_(parameter)
    return get_peft_model(host, UHLConfig(seed=0, init_weights=False, **sizes | kwargs))


def frame_of(tuner):
    """A residual frame of the host, with random readers and writers."""
    read, write = torch.randn(24, 32) / 5, torch.randn(32, 24) / 5
    return Basis((read,), (write,), read, read[:, 0], (1.0,)).frame(tuner.attached().slots)


def run(model):
    return model(input_ids=IDS).last_hidden_state


def gradients(model, step):
    model.zero_grad()
    (step(model) * LARGE).sum().backward()
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def keeping(graphs):
    """A backend that compiles as `aot_eager` does, and keeps what Dynamo gives it."""

    def kept(graph, inputs):
        graphs.append(graph)
        return torch._dynamo.lookup_backend("aot_eager")(graph, inputs)

    return kept


@pytest.fixture(autouse=True)
def _fresh():
    torch._dynamo.reset()


@pytest.mark.skipif(UNCHECKED, reason="is that process")
def test_without_type_checks():
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "no:logging", __file__]
    done = subprocess.run(command, env=os.environ | {"UHL_UNCHECKED": "1"}, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-5000:]
    assert "...." in done.stdout  # they ran


def check_forward(model, compiled):
    """Outputs, also after a change of a parameter, which what is folded must follow."""
    with torch.no_grad():
        eager, found = run(model), run(compiled)
        torch.testing.assert_close(found, eager, atol=1e-5, rtol=1e-5)
        model.base_model.uhl_adapters["default"].dictionary.u.add_(0.3)
        changed = run(compiled)
        torch.testing.assert_close(changed, run(model), atol=1e-4, rtol=1e-3)
        assert (changed - found).abs().max() > 1e-2
        attached = model.base_model.attached()
        attached.set_frame(attached.folds.given, 0.5)  # also what is folded with another scale, and from nothing
        torch.testing.assert_close(run(compiled), run(model), atol=1e-4, rtol=1e-3)
        assert (run(compiled) - changed).abs().max() > 1e-2
        attached.set_frame(attached.folds.given)
        torch.testing.assert_close(run(compiled), changed, atol=1e-4, rtol=1e-3)


def check_gradients(model, compiled):
    eager, found = gradients(model, run), gradients(model, lambda _: run(compiled))
    assert list(eager) == list(found)
    for name, gradient in eager.items():
        assert (found[name] - gradient).abs().max() <= 1e-3 * gradient.abs().max(), name


SOME = ("Q", "O")  # a reader and a writer take half the time that six take to trace; the last kind has all six
KINDS = [
    {"router": "token", "layers": 1, "types": SOME},
    {"router": "static", "layers": 1, "types": SOME},
    {"routing": "weight", "layers": 1, "types": SOME},
    {"routing": "model", "types": SOME},
    {"projector": "canonical", "layers": 1},
]


def made(kind):
    model = bert(**kind)
    if kind.get("projector") == "canonical":
        model.base_model.set_frame("default", frame_of(model.base_model))
    return model


@plain
@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_compiled_host_is_the_eager_host(kind):
    """Traced and not compiled, which takes minutes; the tests of tuning and of Inductor's code do."""
    model = made(kind).eval()
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    torch._dynamo.utils.counters.clear()
    if tested := kind == KINDS[-1]:  # the others fold as the host of test_inductors_code_for_a_host does
        check_forward(model, compiled)
    model.train()
    for _ in range(2):
        torch.testing.assert_close(run(compiled), run(model), atol=1e-5, rtol=1e-5)
    check_gradients(model, compiled)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1 + 3 * tested  # another frame is another graph
    routes = model.base_model.attached().routes
    wanted = {"weight": sorted(s.path for s in model.base_model.attached().slots), "model": [0]}
    assert sorted(routes) == wanted.get(kind.get("routing"), [*range(kind.get("layers", 2))])
    assert all(r.gate.requires_grad for r in routes.values())


@plain
def test_a_compiled_host_may_checkpoint():
    """With the settings that README names; torch makes a checkpointed layer's graph one node."""
    graphs = []
    model = bert(types=SOME).train()
    host = model.base_model.model
    host.activation_checkpointing_enable()
    host.disable_input_require_grads()
    host.config.use_cache = False
    with torch._dynamo.config.patch(skip_fwd_side_effects_in_bwd_under_checkpoint=True):
        compiled = torch.compile(model, fullgraph=True, backend=keeping(graphs))
        for _ in range(2):
            check_gradients(model, compiled)
            with torch.no_grad():
                model.base_model.uhl_adapters["default"].dictionary.u.add_(0.3)
    checkpointed = [node for graph in graphs for node in graph.graph.nodes if "checkpoint" in str(node.target)]
    assert len(graphs) == 1
    assert len(checkpointed) == 2  # layers


def break_inside(layer):
    """The graph breaks in the layer's attention, and goes on behind it."""
    inner = layer.attention.forward

    def forward(*args, **kwargs):
        torch._dynamo.graph_break()
        return inner(*args, **kwargs)

    layer.attention.forward = forward


@plain
@pytest.mark.parametrize("part", ["broken", "layer", "encoder"])
def test_a_host_that_is_compiled_in_parts(part):
    """What one part writes down about a pass, the next one reads."""
    model = made({"projector": "canonical", "types": SOME}).eval()
    layer = model.base_model.model.encoder.layer[0]
    with torch.no_grad():
        wanted = run(model)
        model.base_model.attached().routes.clear()
        whole = model
        if part == "broken":
            break_inside(layer)
            whole = torch.compile(model, backend="eager")
        else:
            (layer if part == "layer" else model.base_model.model.encoder).compile(backend="eager", fullgraph=True)
        for _ in range(3):
            torch.testing.assert_close(run(whole), wanted, atol=1e-5, rtol=1e-5)
        assert sorted(model.base_model.attached().routes) == [0, 1]


@plain
def test_a_compiled_pass_leaves_its_own_routes_and_their_gradients():
    model = made(KINDS[-1] | {"types": SOME})
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    attached = model.base_model.attached()
    found = []
    for whole in (model, compiled):
        run(model)
        with torch.no_grad():
            model.base_model.uhl_adapters["default"].router.weight.neg_()  # other routes than those just made
        found.append(gradients(model, lambda _, whole=whole: 0 * run(whole).detach() + attached.active() * LARGE))
        with torch.no_grad():
            model.base_model.uhl_adapters["default"].router.weight.neg_()
    assert max(gradient.abs().max() for gradient in found[0].values()) > 1e-3
    for name, gradient in found[0].items():
        torch.testing.assert_close(found[1][name], gradient, atol=1e-6, rtol=1e-4)


@plain
@long
def test_inductors_code_for_a_host():
    model = bert(layers=1).eval()
    check_forward(model, torch.compile(model, fullgraph=True))


@plain
@long
def test_inductors_code_for_a_hosts_gradients():
    model = bert(layers=1)
    check_gradients(model, torch.compile(model, fullgraph=True))


@plain
def test_what_compiled_hosts_hold_has_memory_of_its_own():
    """Inductor's code for GPUs was wrong where a refreshed tensor was a view of others' memory."""
    model = bert(layers=1).eval()
    with torch.no_grad():
        run(torch.compile(model, fullgraph=True, backend="eager"))
    tensors = model.base_model.attached().folds._cache.compiled[torch.float32].tensors
    assert len({t.untyped_storage().data_ptr() for t in tensors}) == len(tensors) > 6
    assert all(t.untyped_storage().nbytes() == t.nbytes for t in tensors)


def calling_kernels(dtype, graphs):
    """A host and the same compiled, which call Triton's kernels: its interpreter's, where there is no GPU."""
    pytest.importorskip("triton", reason="Triton is not installed")
    model = made(KINDS[-1]).eval()
    model.base_model.attached().path = "fused"
    model.base_model.model.to(dtype)
    return model, torch.compile(model, fullgraph=True, backend=keeping(graphs))


@plain
def test_a_compiled_host_calls_tritons_kernels():
    """In half precision, as on a GPU; no compiler may look into the interpreter, either."""
    graphs = []
    model, compiled = calling_kernels(torch.bfloat16, graphs)
    with torch.no_grad():
        found = run(compiled)
        torch.testing.assert_close(found, run(model), atol=1e-5, rtol=1e-5)
        model.base_model.uhl_adapters["default"].dictionary.u.add_(0.3)
        changed = run(compiled)
        torch.testing.assert_close(changed, run(model), atol=1e-5, rtol=1e-5)
        assert (changed - found).abs().max() > 1e-2
        ids = torch.arange(5, 26).reshape(1, 21)
        torch._dynamo.mark_dynamic(ids, 1)
        longer = compiled(input_ids=ids).last_hidden_state
        torch.testing.assert_close(longer, model(input_ids=ids).last_hidden_state, atol=1e-5, rtol=1e-5)
        assert len(graphs) == 2
    names = [str(node.target) for node in graphs[0].graph.nodes]
    assert sum("rows" in name for name in names) == 6  # weights of a layer
    assert sum("best" in name for name in names) == 1
    assert not any("topk" in name for name in names)


@plain
def test_the_kernels_gradients_in_a_compiled_host():
    graphs = []
    model, compiled = calling_kernels(torch.float32, graphs)
    torch.testing.assert_close(run(compiled), run(model), atol=1e-5, rtol=1e-5)
    check_gradients(model, compiled)
    assert sum("rows" in str(node.target) for node in graphs[0].graph.nodes) == 6


@plain
@pytest.mark.parametrize("path", ["gather", "fused"])
def test_inductors_code_for_an_update_and_its_gradients(path):
    if path == "fused":
        pytest.importorskip("triton", reason="Triton is not installed")
    g = torch.Generator().manual_seed(0)
    y, x, v, u = (torch.randn(*shape, generator=g) for shape in ((19, 10), (19, 12), (7, 12), (7, 10)))
    strength, offset = torch.randn(2, 7, generator=g)
    gate, index = torch.rand(19, 2, generator=g), torch.arange(38).view(19, 2) % 7
    found, other = [], index.clone()
    other[3, 0] = (index[3, 0] + 1) % 7  # one atom of one token
    compiled = torch.compile(ops.get(path), fullgraph=True)

    def step(update, places):
        leaves = [t.clone().requires_grad_() for t in (y, x, v, u, strength, gate, offset)]
        out = update(*leaves[:5], Route(places, leaves[5]), leaves[6])
        (out * torch.linspace(-1, 1, out.numel()).view_as(out)).sum().backward()
        found.append([out, *(leaf.grad for leaf in leaves)])

    step(ops.get("reference"), index)
    _, codes = run_and_get_code(step, compiled, index)
    step(compiled, other)
    assert len(codes) == 2  # forward and backward
    for code in codes:
        sizes = re.findall(r"empty_strided\w*\(\(([\d, ]+)\)", code)
        assert sizes or path == "fused"  # whose kernels allocate by themselves
        assert all(math.prod(int(n) for n in size.split(",") if n.strip()) <= 19 * 12 for size in sizes)  # no T x K x D
    for number, (reference, mine, wrong) in enumerate(zip(*found, strict=True)):
        assert reference.abs().max() > 0.1
        torch.testing.assert_close(mine, reference, atol=1e-4, rtol=1e-4)
        passes_through = number == 1  # y's own gradient
        assert torch.allclose(wrong, reference, atol=1e-3, rtol=1e-3) == passes_through


@plain
@pytest.mark.parametrize(("path", "dtype"), [(None, torch.float32), ("fused", torch.bfloat16)])
def test_compiled_tuning_has_the_eager_gradients_and_does_not_compile_again(path, dtype):
    if path == "fused":
        pytest.importorskip("triton", reason="Triton is not installed")
    model = made(KINDS[-1] | {"types": SOME})  # its backward pass goes through edits of the residual stream, too
    model.base_model.attached().path = path
    model.base_model.model.to(dtype)
    for name, p in model.named_parameters():
        p.requires_grad_(name.endswith("bias") and ".tasks." in name)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    torch._dynamo.utils.counters.clear()
    for _ in range(3):
        check_gradients(model, compiled)
        with torch.no_grad():
            for p in model.parameters():
                if p.requires_grad:
                    p.sub_(0.1 * p.grad)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1


@plain
def test_a_copy_of_a_compiled_model_has_folds_of_its_own():
    model = bert(layers=1).eval()
    with torch.no_grad():
        run(torch.compile(model, fullgraph=True, backend="eager"))
        other = copy.deepcopy(model)
        other.base_model.uhl_adapters["default"].dictionary.u.mul_(-1)
        found = run(torch.compile(other, fullgraph=True, backend="eager"))
        torch.testing.assert_close(found, run(other), atol=1e-5, rtol=1e-5)
        assert (found - run(model)).abs().max() > 1e-2
