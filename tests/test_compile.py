"""A compiled host: one graph, the eager host's outputs and gradients, and folds that follow the parameters.

Type checks around the package's functions cannot be compiled, so these tests run in a process of their own without.
"""

import copy
import os
import subprocess
import sys

import pytest
import torch
from peft import get_peft_model
from transformers import BertConfig, BertModel

from uhl.config import UHLConfig
from uhl.frame import Basis

UNCHECKED = "UHL_UNCHECKED" in os.environ
plain = pytest.mark.skipif(not UNCHECKED, reason="run by test_without_type_checks, in a process of its own")

IDS = torch.arange(5, 37).reshape(2, 16)
LARGE = torch.linspace(-9, 9, 2 * 16 * 32).sin().reshape(2, 16, 32)


def bert(**kwargs):
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=64, hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=48,
        hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
    )  # fmt: skip
    sizes = {"atoms": 16, "width": 24}
    return get_peft_model(
        BertModel(config, add_pooling_layer=False), UHLConfig(seed=0, init_weights=False, **sizes | kwargs)
    )


def frame_of(tuner):
    """A residual frame of the host, with random readers and writers."""
    read, write = torch.randn(24, 32) / 5, torch.randn(32, 24) / 5
    return Basis((read,), (write,), read, read[:, 0], (1.0,)).frame(tuner.model, tuner.attached().slots)


def run(model):
    return model(input_ids=IDS).last_hidden_state


def gradients(model, step):
    model.zero_grad()
    (step(model) * LARGE).sum().backward()
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


@pytest.fixture(autouse=True)
def _fresh():
    torch._dynamo.reset()


@pytest.mark.skipif(UNCHECKED, reason="is that process")
def test_without_type_checks():
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "no:logging", __file__]
    done = subprocess.run(command, env=os.environ | {"UHL_UNCHECKED": "1"}, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-5000:]
    assert "...." in done.stdout  # they ran


@plain
@pytest.mark.parametrize(
    ("kind", "backend"),
    [
        ({"router": "token"}, "inductor"),
        ({"router": "static"}, "eager"),  # traced, not compiled, which takes minutes
        ({"routing": "weight"}, "eager"),
        ({"routing": "model"}, "eager"),
        ({"projector": "canonical"}, "aot_eager"),  # differentiated by the compiler too
    ],
    ids=str,
)
def test_compiled_host_is_the_eager_host(kind, backend):
    model = bert(**kind)
    if kind.get("projector") == "canonical":
        model.base_model.set_frame("default", frame_of(model.base_model))
    model.eval()
    compiled = torch.compile(model, fullgraph=True, backend=backend)
    with torch.no_grad():
        eager, found = run(model), run(compiled)
        torch.testing.assert_close(found, eager, atol=1e-5, rtol=1e-5)
        model.base_model.uhl_adapters["default"].dictionary.u.add_(0.3)  # what is folded must follow
        changed = run(compiled)
        torch.testing.assert_close(changed, run(model), atol=1e-4, rtol=1e-3)
        assert (changed - found).abs().max() > 1e-2
    model.train()
    eager, found = gradients(model, run), gradients(model, lambda _: run(compiled))
    assert eager.keys() == found.keys()
    for name, gradient in eager.items():
        assert (found[name] - gradient).abs().max() <= 1e-3 * gradient.abs().max(), name
    routes = model.base_model.attached().routes
    wanted = {"weight": sorted(s.path for s in model.base_model.attached().slots), "model": [0]}
    assert sorted(routes) == wanted.get(kind.get("routing"), [0, 1])
    assert all(r.gate.requires_grad for r in routes.values())


@plain
def test_compiled_tuning_has_the_eager_gradients_and_does_not_compile_again():
    model = bert()
    for name, p in model.named_parameters():
        p.requires_grad_(name.endswith("bias") and ".tasks." in name)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    torch._dynamo.utils.counters.clear()
    for _ in range(3):
        eager, found = gradients(model, run), gradients(model, lambda _: run(compiled))
        assert list(eager) == list(found)
        for name, gradient in eager.items():
            assert (found[name] - gradient).abs().max() <= 1e-3 * gradient.abs().max()
        with torch.no_grad():
            for p in model.parameters():
                if p.requires_grad:
                    p.sub_(0.1 * p.grad)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1


@plain
def test_a_copy_of_a_compiled_model_has_folds_of_its_own():
    model = bert().eval()
    with torch.no_grad():
        run(torch.compile(model, fullgraph=True, backend="aot_eager"))
        other = copy.deepcopy(model)
        other.base_model.uhl_adapters["default"].dictionary.u.mul_(-1)
        found = run(torch.compile(other, fullgraph=True, backend="aot_eager"))
        torch.testing.assert_close(found, run(other), atol=1e-5, rtol=1e-5)
        assert (found - run(model)).abs().max() > 1e-2
