"""What only a GPU can show: its kernels inside a host, compiled and recorded hosts, and that nothing waits for it."""

import os
import subprocess
import sys

import pytest
import torch
from peft import get_peft_model
from transformers import BertConfig, BertModel

from uhl import ops
from uhl.config import UHLConfig
from uhl.frame import Basis

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
UNCHECKED = "UHL_UNCHECKED" in os.environ
plain = pytest.mark.skipif(not UNCHECKED, reason="run by test_without_type_checks, in a process of its own")
IDS = torch.arange(5, 133).reshape(2, 64)


def bert(stream=True, **kwargs):
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=160, hidden_size=48, num_hidden_layers=2, num_attention_heads=2, intermediate_size=80,
        hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
    )  # fmt: skip
    sizes = {"atoms": 16, "width": 24}
    host = BertModel(config, add_pooling_layer=False)
    for name, parameter in host.named_parameters():
        if name.endswith("bias"):  # zeros at the start, from which atoms would read nothing
            torch.nn.init.normal_(parameter)
    model = get_peft_model(host, UHLConfig(seed=0, init_weights=False, **sizes | kwargs))
    if stream:
        read, write = torch.randn(24, 48) / 5, torch.randn(48, 24) / 5
        frame = Basis((read,), (write,), read, read[:, 0], (1.0,)).frame(model.base_model.attached().slots)
        model.base_model.set_frame("default", frame, scale=4.0)
    return model.eval()


def run(model):
    return model(input_ids=IDS.to(model.device)).last_hidden_state


def gradients(model):
    model.zero_grad()
    out = run(model)
    (out * torch.linspace(-9, 9, out.numel(), device=out.device).sin().view_as(out)).sum().backward()
    return {n: p.grad.cpu() for n, p in model.named_parameters() if p.grad is not None}


def change(model):
    with torch.no_grad():
        model.base_model.uhl_adapters["default"].dictionary.u.add_(0.3)


def close(found, wanted, most=1e-3):
    assert (found.cpu().float() - wanted.cpu().float()).abs().max() <= most * wanted.abs().max()


@pytest.mark.skipif(UNCHECKED, reason="is that process")
def test_without_type_checks():
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", __file__]
    done = subprocess.run(command, env=os.environ | {"UHL_UNCHECKED": "1"}, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-5000:]
    assert "...." in done.stdout  # they ran


@pytest.mark.parametrize("path", [None, "fused", "gather", "dense"])
@pytest.mark.parametrize("stream", [True, False])
def test_a_host_on_a_gpu_gives_what_it_gives_on_a_cpu(path, stream):
    model = bert(stream)
    model.base_model.attached().path = "reference"
    with torch.no_grad():
        wanted = run(model)
        with model.disable_adapter():
            assert (run(model) - wanted).abs().max() > 1e-2
    slopes = gradients(model)
    model.cuda().base_model.attached().path = path
    with torch.no_grad():
        close(run(model), wanted)
    paths = set(model.base_model.attached().paths.values())
    assert paths == {path or ops.choose("cuda", 128, 16, 48, 48)}
    found = gradients(model)
    assert found.keys() == slopes.keys()
    for name, gradient in slopes.items():
        close(found[name], gradient)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(dtype):
    model = bert()
    with torch.no_grad():
        wanted = run(model)
        with model.disable_adapter():
            assert (run(model) - wanted).norm() > 0.4 * wanted.norm()
        model.base_model.model.to("cuda", dtype)
        model.cuda()
        found = run(model)
    assert found.dtype == dtype
    assert (found.cpu().float() - wanted).norm() < 0.1 * wanted.norm()  # a token near a threshold may change its atoms


def test_nothing_waits_for_the_gpu_and_a_pass_can_be_recorded():
    model = bert().cuda()
    ids, mask = IDS.cuda(), torch.ones_like(IDS).cuda()
    with torch.no_grad():
        wanted = model(input_ids=ids, attention_mask=mask).last_hidden_state.clone()
        mode = torch.cuda.get_sync_debug_mode()
        torch.cuda.set_sync_debug_mode("error")
        try:
            assert torch.is_tensor(model(input_ids=ids).last_hidden_state)
        finally:
            torch.cuda.set_sync_debug_mode(mode)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            out = model(input_ids=ids).last_hidden_state
        out.zero_()
        graph.replay()
    torch.testing.assert_close(out, wanted)


def test_training_waits_for_nothing():
    model = bert().cuda()
    ids = IDS.cuda()
    gradients(model)
    mode = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        model(input_ids=ids).last_hidden_state.square().mean().backward()
    finally:
        torch.cuda.set_sync_debug_mode(mode)


@plain
@pytest.mark.parametrize("mode", ["default", "reduce-overhead"])
@pytest.mark.parametrize("path", [None, "fused"])
def test_a_compiled_host_is_the_eager_host_and_follows_the_parameters(path, mode):
    torch._dynamo.reset()
    model = bert().cuda()
    model.base_model.attached().path = path
    compiled = torch.compile(model, fullgraph=True, mode=mode)
    with torch.no_grad():
        for _ in range(3):  # recorded in the second, repeated in the third
            found = run(compiled).clone()
            close(found, run(model))
        change(model)
        changed = run(compiled).clone()
        close(changed, run(model))
        assert (changed - found).abs().max() > 1e-2
    wanted, found = gradients(model), gradients(compiled)
    for name, gradient in wanted.items():
        close(found["_orig_mod." + name], gradient)
