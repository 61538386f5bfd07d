"""The PEFT method: what PEFT users do with an adapter, its shared state, and its file on other hosts."""

import copy
import gc
import logging
import threading
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext

import pytest
import torch
from peft import AutoPeftModelForSequenceClassification, PeftModel, get_peft_model
from peft.utils.peft_types import PeftType
from torch import nn
from transformers import BertConfig, BertForSequenceClassification, T5Config, T5ForConditionalGeneration
from transformers.pytorch_utils import Conv1D

import uhl
from uhl import fileformat, peft_method, store
from uhl.adapter import UHLAdapter
from uhl.config import NAME
from uhl.errors import UHLError
from uhl.host import find_slots
from uhl.peft_method import attach

pytestmark = pytest.mark.unchecked

IDS = torch.randint(5, 60, (2, 7), generator=torch.Generator().manual_seed(3))
SMALL = {"atoms": 12, "width": 16, "hidden": 6, "seed": 5, "init_weights": False, "alpha": 0.3}


def bert(layers=3, width=24, seed=0):
    torch.manual_seed(seed)
    sizes = {"num_hidden_layers": layers, "hidden_size": width, "intermediate_size": 2 * width}
    config = BertConfig(vocab_size=64, num_attention_heads=4, initializer_range=0.3, **sizes)
    return BertForSequenceClassification(config).eval()


def logits(model, ids=IDS):
    with torch.no_grad():
        return model(input_ids=ids).logits


def test_a_new_adapter_is_the_identity_and_only_it_trains():
    host = bert()
    before = logits(host)
    model = get_peft_model(host, uhl.UHLConfig(task_type="SEQ_CLS"))
    assert torch.equal(logits(model), before)
    trained = {n for n, p in model.named_parameters() if p.requires_grad}
    assert all("uhl_adapters" in n or "modules_to_save" in n for n in trained)
    assert any("modules_to_save" in n for n in trained)  # PEFT adds the classifier by the task's type
    assert model.peft_config["default"].target_modules is None  # found in the host, never stored


def test_shared_state_is_stored_once_in_memory_and_on_disk(tmp_path):
    shallow, deep = (get_peft_model(bert(layers=n), uhl.UHLConfig(**SMALL)) for n in (2, 6))
    counts = {sum(p.numel() for n, p in m.named_parameters() if "uhl_" in n) for m in (shallow, deep)}
    assert len(counts) == 1
    pointers = [p.data_ptr() for n, p in deep.named_parameters(remove_duplicate=False) if n.endswith("dictionary.u")]
    assert len(pointers) == 1
    sizes = []
    for number, model in enumerate((shallow, deep)):
        model.save_pretrained(tmp_path / str(number))
        sizes.append((tmp_path / str(number) / "adapter_model.safetensors").stat().st_size)
    assert sizes[0] == sizes[1]


def test_the_saved_file_is_an_adapter_file(tmp_path):
    model = get_peft_model(bert(), uhl.UHLConfig(**SMALL, task_type="SEQ_CLS"))
    model.save_pretrained(tmp_path)
    found = fileformat.read(tmp_path / "adapter_model.safetensors")
    header, tensors = found.header, found.tensors
    assert header.extra == ["base_model.model.classifier.bias", "base_model.model.classifier.weight"]
    assert tensors["dictionary.u"].dtype == torch.int8
    assert tensors["task.main.bias"].dtype == torch.uint8
    found = store.load(tmp_path / "adapter_model.safetensors")
    assert found.config == model.base_model.uhl_adapters["default"].config
    again = tmp_path / "again"
    model.save_pretrained(again)
    first, second = (f / "adapter_model.safetensors" for f in (tmp_path, again))
    assert first.read_bytes() == second.read_bytes()


@pytest.mark.parametrize("low", [False, True])
@pytest.mark.parametrize("router", ["token", "static"])
def test_a_trained_adapter_scores_the_same_after_loading(tmp_path, low, router):
    model = get_peft_model(bert(), uhl.UHLConfig(**SMALL, router=router, task_type="SEQ_CLS"))
    optimiser = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    for _ in range(5):
        optimiser.zero_grad()
        model(input_ids=IDS, labels=torch.tensor([0, 1])).loss.backward()
        optimiser.step()
    model.eval()
    before = logits(model)
    assert not torch.allclose(before, logits(bert()), atol=1e-2)
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(bert(), tmp_path, low_cpu_mem_usage=low)
    torch.testing.assert_close(logits(loaded), before, atol=1e-4, rtol=0)


def test_the_trainer_trains_saves_and_resumes(tmp_path):
    from datasets import Dataset
    from transformers import Trainer, TrainingArguments

    rows = Dataset.from_dict({"input_ids": [IDS[0].tolist(), IDS[1].tolist()] * 8, "labels": [0, 1] * 8})
    model = get_peft_model(bert(), uhl.UHLConfig(**SMALL, task_type="SEQ_CLS"))
    arguments = {"output_dir": str(tmp_path), "per_device_train_batch_size": 4, "learning_rate": 1e-2, "save_steps": 2}
    arguments |= {"max_steps": 4, "report_to": [], "use_cpu": True, "disable_tqdm": True}
    Trainer(model, TrainingArguments(**arguments), train_dataset=rows).train()
    found = store.load(tmp_path / "checkpoint-4" / "adapter_model.safetensors")
    assert found.dictionary.u.abs().sum() > 0
    again = get_peft_model(bert(), uhl.UHLConfig(**SMALL, task_type="SEQ_CLS"))
    Trainer(again, TrainingArguments(**arguments), train_dataset=rows).train(str(tmp_path / "checkpoint-4"))
    torch.testing.assert_close(logits(again.eval()), logits(model.eval()), atol=1e-4, rtol=0)


def test_auto_model_finds_the_host(tmp_path):
    bert().save_pretrained(tmp_path / "host")
    host = BertForSequenceClassification.from_pretrained(tmp_path / "host")
    model = get_peft_model(host, uhl.UHLConfig(**SMALL, task_type="SEQ_CLS")).eval()
    model.save_pretrained(tmp_path / "adapter")
    loaded = AutoPeftModelForSequenceClassification.from_pretrained(tmp_path / "adapter")
    torch.testing.assert_close(logits(loaded), logits(model), atol=1e-5, rtol=0)


@pytest.mark.parametrize("shape", [(3, 24), (5, 24), (2, 40)])
def test_one_file_loads_into_other_hosts_and_says_what_it_did(tmp_path, shape, caplog, recwarn):
    get_peft_model(bert(), uhl.UHLConfig(**SMALL)).save_pretrained(tmp_path)
    recwarn.clear()
    with caplog.at_level(logging.INFO, "uhl"):
        loaded = PeftModel.from_pretrained(bert(*shape), tmp_path)
    assert not recwarn.list
    (said,) = [r.message for r in caplog.records]
    assert "trained on BertForSequenceClassification 3 x 24: " in said
    assert f"{6 * shape[0]} weights in {shape[0]} layers at depths 0 to 1, by the `dimension` projector" in said
    assert not torch.allclose(logits(loaded), logits(bert(*shape)), atol=1e-3)


def test_a_file_and_a_configuration_that_disagree_are_an_error(tmp_path):
    get_peft_model(bert(), uhl.UHLConfig(**SMALL)).save_pretrained(tmp_path)
    path = tmp_path / "adapter_config.json"
    path.write_text(path.read_text().replace('"top_k": 2', '"top_k": 1'))
    with pytest.raises(UHLError, match=r"adapter_config.json beside it"):
        PeftModel.from_pretrained(bert(), tmp_path)


def test_an_altered_file_is_refused_by_peft_too(tmp_path):
    get_peft_model(bert(), uhl.UHLConfig(**SMALL)).save_pretrained(tmp_path)
    path = tmp_path / "adapter_model.safetensors"
    data = bytearray(path.read_bytes())
    data[-3] ^= 1
    path.write_bytes(data)
    with pytest.raises(UHLError, match="altered or damaged"):
        PeftModel.from_pretrained(bert(), tmp_path)


def test_several_adapters_do_not_touch_each_other():
    model = get_peft_model(bert(), uhl.UHLConfig(**SMALL))
    first = logits(model)
    model.add_adapter("second", uhl.UHLConfig(**{**SMALL, "seed": 9, "atoms": 20}))
    assert torch.equal(logits(model), first)
    model.set_adapter("second")
    second = logits(model)
    assert not torch.allclose(first, second, atol=1e-3)
    with model.disable_adapter():
        assert torch.equal(logits(model), logits(bert()))
    assert torch.equal(logits(model), second)
    model.delete_adapter("default")
    assert torch.equal(logits(model), second)
    assert list(model.base_model.uhl_adapters) == ["second"]
    assert not any(".default." in n for n, _ in model.named_parameters())


def test_delete_frees_the_dictionary():
    import gc
    import weakref

    model = get_peft_model(bert(), uhl.UHLConfig(**SMALL))
    model.add_adapter("second", uhl.UHLConfig(**SMALL))
    logits(model)
    gone = weakref.ref(model.base_model.uhl_adapters["default"].dictionary.u)
    model.set_adapter("second")
    model.delete_adapter("default")
    gc.collect()
    assert gone() is None


def test_a_copy_is_another_adapter():
    model = get_peft_model(bert(), uhl.UHLConfig(**SMALL))
    model(input_ids=IDS).logits.sum().backward()  # with a graph in the cache
    twin = copy.deepcopy(model)
    torch.testing.assert_close(logits(twin), logits(model))
    with torch.no_grad():
        twin.base_model.uhl_adapters["default"].dictionary.u.add_(1.0)
    assert torch.equal(logits(model), logits(model))
    assert not torch.allclose(logits(twin), logits(model), atol=1e-3)


def test_a_merged_static_adapter_equals_the_unmerged_and_unmerging_is_exact():
    host = bert()
    before = {k: v.clone() for k, v in host.state_dict().items()}
    model = get_peft_model(host, uhl.UHLConfig(**SMALL, router="static"))
    apart = logits(model)
    assert not torch.allclose(apart, logits(bert()), atol=1e-3)
    model.merge_adapter()
    torch.testing.assert_close(logits(model), apart, atol=1e-5, rtol=1e-5)
    model.unmerge_adapter()
    after = {k.replace(".base_layer", ""): v for k, v in model.base_model.model.state_dict().items()}
    assert all(torch.equal(v, before[k]) for k, v in after.items())
    merged = model.merge_and_unload()
    assert not any(hasattr(m, "base_layer") for m in merged.modules())
    torch.testing.assert_close(logits(merged), apart, atol=1e-5, rtol=1e-5)


def test_merging_a_token_router_says_why_not():
    model = get_peft_model(bert(), uhl.UHLConfig(**SMALL))
    for merge in (model.merge_adapter, model.merge_and_unload):
        with pytest.raises(UHLError, match=r"cannot be merged; keep it attached, or train one with .*router='static'"):
            merge()
    logits(model)  # still at work


def test_unload_leaves_the_host_as_it_was():
    host = bert()
    before, plain = {k: v.clone() for k, v in host.state_dict().items()}, logits(host)
    model = get_peft_model(host, uhl.UHLConfig(**SMALL))
    logits(model)
    back = model.unload()
    assert all(torch.equal(v, before[k]) for k, v in back.state_dict().items())
    assert torch.equal(logits(back), plain)
    assert not any(m._forward_pre_hooks or m._forward_hooks for m in back.modules())


def trainable(checkpointing=None, **sizes):
    """A model in training without dropout, and with or without (non-)reentrant gradient checkpointing."""
    model = get_peft_model(bert(), uhl.UHLConfig(**SMALL, **sizes))
    with torch.no_grad():
        model.base_model.uhl_adapters["default"].projector.second.add_(0.1)  # at zero its inputs get no gradient
    if checkpointing is not None:
        model.base_model.model.activation_checkpointing_enable({"use_reentrant": checkpointing})
        model.enable_input_require_grads()
    model.train()
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    return model


def loss(model, ids=IDS, labels=(0, 1)):
    return model(input_ids=ids, labels=torch.tensor(labels[: len(ids)])).loss


def grads(model):
    return {n: p.grad for n, p in model.named_parameters() if p.requires_grad}


@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing_gives_the_same_gradients(reentrant):
    plain, checkpointed = trainable(), trainable(reentrant)
    for model in (plain, checkpointed):
        loss(model).backward()
    assert {n for n, g in grads(plain).items() if not g.abs().sum() > 0} == set()
    for name, gradient in grads(plain).items():
        torch.testing.assert_close(grads(checkpointed)[name], gradient, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize(("routing", "reentrant"), [("weight", False), ("weight", True), ("model", False)])
def test_checkpointing_gives_the_same_gradients_for_other_routings(routing, reentrant):
    """Also where another pass of the same shape comes before the backward pass."""
    plain, checkpointed = trainable(routing=routing), trainable(reentrant, routing=routing)
    for model in (plain, checkpointed):
        value = loss(model)
        loss(model, IDS.flip(0))
        value.backward()
    assert grads(plain)["base_model.uhl_adapters.default.router.weight"].abs().sum() > 0
    for name, gradient in grads(plain).items():
        torch.testing.assert_close(grads(checkpointed)[name], gradient, atol=1e-5, rtol=1e-4)


def test_one_route_for_all_layers_is_an_error_where_it_would_be_lost():
    with pytest.raises(UHLError, match="has no gradient under reentrant checkpointing"):
        loss(trainable(True, routing="model"))
    model = trainable(routing="model")
    layer = model.base_model.model.bert.encoder.layer[1]
    inner = layer.forward

    def run_again(*args, **kwargs):
        def call(*given):
            layer.forward = inner
            try:
                return layer(*given, **kwargs)  # hooks and all
            finally:
                layer.forward = run_again

        return torch.utils.checkpoint.checkpoint(call, *args, use_reentrant=False)

    layer.forward = run_again
    value = loss(model)
    with pytest.raises(UHLError, match="lost where a layer runs again by itself"):
        value.backward()


@pytest.mark.parametrize("checkpointing", [None, False, True])
def test_other_passes_may_come_between_forward_and_backward(checkpointing):
    """Passes without gradients, of other lengths, and of the next example; sums and one backward pass after another."""
    wanted = trainable()
    (loss(wanted) + loss(wanted, IDS[:, :4])).backward()
    model = trainable(checkpointing)
    first = loss(model)
    logits(model.eval(), IDS[:1, :3])
    second = loss(model.train(), IDS[:, :4])
    logits(model, IDS)
    (first + second).backward()
    apart = trainable(checkpointing)
    first, second = loss(apart), loss(apart, IDS[:, :4])
    second.backward()
    first.backward()
    for name, gradient in grads(wanted).items():
        torch.testing.assert_close(grads(model)[name], gradient, atol=1e-5, rtol=1e-4)
        torch.testing.assert_close(grads(apart)[name], gradient, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize(
    ("routing", "checkpointing"), [("layer", None), ("weight", None), ("model", None), ("layer", False)]
)
@pytest.mark.parametrize("without", [False, True])
def test_a_pass_may_come_inside_of_another(routing, checkpointing, without):
    """A layer that calls the whole host, with the adapter or without it, on other tokens; also where it runs again."""
    wanted = trainable(routing=routing)
    loss(wanted).backward()
    inner = logits(wanted, IDS[:1, :3])
    model = trainable(checkpointing, routing=routing)
    attached, seen, busy = model.base_model._attached["default"], [], []

    def call(*_):
        if not busy:
            busy.append(None)
            with model.disable_adapter() if without else nullcontext():
                seen.append(logits(model, IDS[:1, :3]))
            busy.clear()

    layers = [m for n, m in model.named_modules() if n.endswith(("layer.0.attention", "layers.0.self_attn"))]
    handle = layers[0].register_forward_hook(call)
    value = loss(model)
    assert len(seen) == 1
    assert all(r.index.shape[:-1] == IDS.shape for r in attached.routes.values() if r.index.ndim == 3)
    value.backward()
    handle.remove()
    assert len(seen) == (1 if checkpointing is None else 2)
    assert all(torch.allclose(found, inner) != without for found in seen)
    for name, gradient in grads(wanted).items():
        torch.testing.assert_close(grads(model)[name], gradient, atol=1e-5, rtol=1e-4)


def interrupt(*_):
    raise KeyboardInterrupt


def test_an_interrupted_pass_leaves_nothing_behind():
    model = trainable().eval()
    attached = model.base_model._attached["default"]
    wanted = logits(model)

    layers = [m for m in model.modules() if type(m).__name__ == "UHLLinear"]
    handle = layers[-1].register_forward_hook(interrupt)
    for _ in range(2):
        with pytest.raises(KeyboardInterrupt):
            logits(model)
    nested = layers[0].register_forward_hook(
        lambda *_: logits(model) if len(calls) < 3 and not calls.append(None) else None
    )
    calls = []
    with pytest.raises(KeyboardInterrupt):  # three passes, one inside of the other
        logits(model)
    handle.remove()
    nested.remove()
    torch.testing.assert_close(logits(model), wanted)
    assert not attached.folds.inside
    assert not attached._now.outer
    folded = attached.folded
    with torch.no_grad():
        attached.adapter.dictionary.u.add_(0.3)
    assert attached.folded is not folded


def test_after_an_interrupted_pass_an_inner_encoder_sees_changes():
    model = trainable().eval()
    attached, inner = model.base_model._attached["default"], model.base_model.model.bert
    handle = inner.encoder.layer[-1].register_forward_hook(interrupt)
    with pytest.raises(KeyboardInterrupt):
        logits(model)
    handle.remove()
    with torch.no_grad():
        before = inner(input_ids=IDS).last_hidden_state
        attached.adapter.dictionary.u.mul_(-1)
        after = inner(input_ids=IDS).last_hidden_state
        attached.refold()
        torch.testing.assert_close(after, inner(input_ids=IDS).last_hidden_state)
    assert not torch.allclose(after, before)


def test_an_adapter_made_in_inference_mode_follows_what_is_loaded_into_it():
    with torch.inference_mode():
        model = trainable().eval()
        adapter = model.base_model.uhl_adapters["default"]
        first = logits(model)
        adapter.load_state_dict({name: -value for name, value in adapter.state_dict().items()})
        second = logits(model)
        model.base_model._attached["default"].refold()
        torch.testing.assert_close(second, logits(model))
    assert not torch.allclose(first, second)


@pytest.mark.parametrize(("dtype", "error"), [(torch.float64, 1e-4), (torch.bfloat16, 0.1)])
def test_a_host_and_an_adapter_in_another_precision(dtype, error):
    model = trainable().eval()
    wanted = logits(model)
    torch.testing.assert_close(logits(model.to(dtype)), wanted.to(dtype), atol=error, rtol=error)


@pytest.mark.parametrize("reentrant", [False, True])
def test_a_part_of_a_layer_that_runs_again_by_itself_is_refused(reentrant):
    model = trainable()
    for layer in model.base_model.model.bert.encoder.layer:
        part, inner = layer.intermediate, layer.intermediate.forward
        part.forward = lambda x, inner=inner: torch.utils.checkpoint.checkpoint(inner, x, use_reentrant=reentrant)
    model.enable_input_require_grads()
    with pytest.raises(UHLError, match="a part of layer 2 runs again by itself, .* checkpoint whole layers"):
        loss(model).backward()


def test_a_layer_that_ran_again_keeps_nothing_of_its_graph():
    """On a GPU backward passes run in a thread of their own, whose state no later forward pass clears."""
    model = trainable(False)
    value, found = loss(model), []

    def back():
        value.backward()
        now = model.base_model._attached["default"]._now  # this thread's
        found.append((now.layer, now.reading, [r.gate.requires_grad for r in now.routes.values()]))

    thread = threading.Thread(target=back)
    thread.start()
    thread.join()
    ((layer, reading, gates),) = found
    assert layer is None
    assert reading is None
    assert gates
    assert not any(gates)


def test_modules_that_data_parallel_has_copied_are_refused():
    model = trainable().eval()
    for module in model.modules():
        module._is_replica = True  # as torch.nn.parallel.replicate marks its copies
    with pytest.raises(UHLError, match="use DistributedDataParallel"):
        logits(model)


def test_the_gate_sum_counts_a_decoders_own_tokens():
    torch.manual_seed(0)
    config = T5Config(vocab_size=64, d_model=24, d_kv=6, d_ff=40, num_layers=2, num_heads=4, decoder_start_token_id=0)
    model = get_peft_model(T5ForConditionalGeneration(config).eval(), uhl.UHLConfig(**SMALL, task_type="SEQ_2_SEQ_LM"))
    attached = model.base_model._attached["default"]
    mask = torch.ones_like(IDS)
    mask[1, 3:] = 0
    for own in (None, torch.ones_like(IDS).tril()[: len(IDS)]):
        model(input_ids=IDS, attention_mask=mask, decoder_input_ids=IDS, decoder_attention_mask=own)
        total = weight = 0.0
        for number, route in attached.routes.items():
            counted = mask if number < 2 else torch.ones_like(IDS) if own is None else own
            total += float((route.gate.detach().sum(-1) * counted).sum())
            weight += float(counted.sum())
        assert attached.active().item() == pytest.approx(total / weight, rel=1e-5)


def test_the_gate_sum_has_its_gradient_under_checkpointing_or_says_that_it_has_none():
    found = []
    for checkpointing in (None, False):
        model = trainable(checkpointing)
        loss(model)
        model.base_model._attached["default"].active().backward()
        found.append(grads(model)["base_model.uhl_adapters.default.router.weight"])
    assert found[0].abs().max() > 1e-6
    torch.testing.assert_close(*found, atol=1e-6, rtol=1e-4)
    model = trainable(True)
    loss(model)
    with pytest.warns(UserWarning, match="pass use_reentrant=False"):
        model.base_model._attached["default"].active()


def test_checkpointing_leaves_no_trace_on_the_host():
    model = trainable(False)
    loss(model).backward()
    host = model.unload()
    assert not any(type(v).__module__ == "uhl.layer" for m in host.modules() for v in vars(m).values())


def test_an_encoder_called_alone_trains_without_an_optimiser_between():
    model = trainable()
    inner = model.base_model.model.bert
    sums = []
    for _ in range(2):
        inner(input_ids=IDS).last_hidden_state.pow(2).sum().backward()
        sums.append(grads(model)["base_model.uhl_adapters.default.dictionary.v"].clone())
    torch.testing.assert_close(sums[1], 2 * sums[0])
    one, two = (inner(input_ids=IDS).last_hidden_state.sum() for _ in range(2))
    one.backward()
    two.backward()


def test_inference_mode_before_and_after_training():
    model = trainable().eval()
    with torch.inference_mode():
        first = model(input_ids=IDS).logits.clone()
    torch.testing.assert_close(first, logits(model))
    for name, p in model.named_parameters():
        p.requires_grad_("tasks.main.bias" in name)
    before = model.base_model.uhl_adapters["default"].tasks["main"].bias
    loss(model).backward()  # what was folded in inference mode takes part
    assert before.grad.abs().sum() > 0
    with torch.inference_mode():
        inside = trainable().eval()
        torch.testing.assert_close(inside(input_ids=IDS).logits, first)


def test_writes_that_nothing_shows_are_seen_after_a_backward_pass_or_refold():
    model = trainable().eval()
    before, u = logits(model), model.base_model.uhl_adapters["default"].dictionary.u
    loss(model).backward()
    u.data.mul_(3.0)  # as optimisers with their own copy of the parameters write
    after = logits(model)
    assert not torch.allclose(after, before, atol=1e-3)
    u.data.div_(3.0)
    model.base_model._attached["default"].refold()
    torch.testing.assert_close(logits(model), before)
    u.data = u.data * 3.0
    torch.testing.assert_close(logits(model), after)


@pytest.mark.parametrize("checkpointing", [None, False], ids=["plain", "checkpointing"])
def test_threads_do_not_share_a_pass(checkpointing):
    model = trainable(checkpointing)
    learned = [p for p in model.parameters() if p.requires_grad]

    def once(length):
        made = loss(model, IDS[:, :length])
        return [logits(model, IDS[:, :length]), *torch.autograd.grad(made, learned, allow_unused=True)]

    wanted = {n: once(n) for n in (3, 5, 7)}
    with ThreadPoolExecutor(3) as pool:
        for found in pool.map(lambda n: [once(n) for _ in range(20)], wanted):
            for expected in found[1:]:
                torch.testing.assert_close(expected, found[0])
        for n, found in zip(wanted, pool.map(once, wanted), strict=True):
            assert sum(g is not None and bool(g.any()) for g in found[1:]) > 3
            torch.testing.assert_close(found, wanted[n])


def test_a_model_can_be_pickled_and_works_on():
    import pickle

    model = trainable()
    loss(model).backward()
    twin = pickle.loads(pickle.dumps(model))
    torch.testing.assert_close(logits(twin.eval()), logits(model.eval()))
    loss(twin.train()).backward()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_hosts_in_half_precision_keep_a_float32_adapter(tmp_path, dtype):
    model = get_peft_model(bert().to(dtype), uhl.UHLConfig(**SMALL))
    assert {p.dtype for n, p in model.named_parameters() if "uhl_" in n} == {torch.float32}
    found = logits(model)
    assert found.dtype == dtype
    check_near(found)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_an_adapter_in_half_precision_is_the_one_of_its_file(tmp_path, dtype):
    model = trainable().to(dtype)
    adapter = model.base_model.uhl_adapters["default"]
    with torch.no_grad():
        adapter.dictionary.u.normal_()
    model.save_pretrained(tmp_path)
    kept = store.load(tmp_path / "adapter_model.safetensors")
    for live, stored in zip(adapter.dictionary(), kept.dictionary(), strict=True):
        assert torch.equal(live, stored)
    features = torch.randn(5, 6)
    assert torch.equal(adapter.mixer(features), kept.mixer(features))


def test_a_kind_of_task_is_not_taken_for_a_name():
    with pytest.raises(UHLError, match=r"PEFT's kind of task is `task_type`"):
        uhl.UHLConfig(task="SEQ_CLS")


def test_messages_below_a_program_s_own_level_are_not_for_it(caplog):
    logger = logging.getLogger("uhl")
    logger.setLevel(peft_method.UNASKED)  # a test before may have asked for another
    for level, name in ((logging.WARNING, None), (logging.INFO, None), (logging.INFO, "uhl")):
        with caplog.at_level(level, name):
            logger.info("%s for %s", level, name)
    assert caplog.messages == ["20 for None", "20 for uhl"]


def check_near(found):
    """Much nearer to what a float32 host with the adapter gives than the host alone, or with a wrong atom, is."""
    model, alone = get_peft_model(bert(), uhl.UHLConfig(**SMALL)), logits(bert())
    wanted = logits(model)
    attached = model.base_model._attached["default"]
    chosen = attached.routes[0]
    atom, u = int(chosen.index[chosen.gate > 0.5][0]), attached.adapter.dictionary.u
    with torch.no_grad():
        u[atom] = -u[atom]
    far = min((other - wanted).norm() for other in (alone, logits(model)))
    assert (found.float() - wanted).norm() < 0.3 * far


def test_autocast_is_close_to_float32():
    model = get_peft_model(bert(), uhl.UHLConfig(**SMALL))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = logits(model)
    check_near(found)


def test_encoder_decoder_cross_attention_is_routed_by_what_it_reads():
    torch.manual_seed(0)
    config = T5Config(vocab_size=64, d_model=24, d_kv=6, d_ff=40, num_layers=2, num_heads=4, decoder_start_token_id=0)
    model = get_peft_model(T5ForConditionalGeneration(config).eval(), uhl.UHLConfig(**SMALL, task_type="SEQ_2_SEQ_LM"))
    out = model(input_ids=IDS, decoder_input_ids=IDS[:, :3]).logits
    assert torch.isfinite(out).all()
    attached = model.base_model._attached["default"]
    own = {s.path for s in attached.slots if not s.shared}
    assert own == {s.path for s in attached.slots if "EncDecAttention" in s.path}
    assert model.generate(input_ids=IDS, max_new_tokens=4).shape[0] == 2


def test_conv1d_weights_get_the_update_of_their_own_shape():
    class Host(nn.Module):
        def __init__(self):
            super().__init__()
            torch.manual_seed(0)
            self.inner = Conv1D(7, 5)

        def forward(self, x):
            return self.inner(x)

    x = torch.randn(2, 3, 5)
    model = get_peft_model(Host(), uhl.UHLConfig(**SMALL, router="static", target_modules=["inner"]))
    apart = model(x)
    assert not torch.allclose(apart, Host()(x), atol=1e-3)
    torch.testing.assert_close(model.merge_and_unload()(x), apart, atol=1e-5, rtol=1e-5)


def test_a_module_of_another_kind_is_an_error():
    with pytest.raises(UHLError, match=r"is a LayerNorm, which is not supported; expected nn.Linear"):
        get_peft_model(bert(), uhl.UHLConfig(target_modules=["LayerNorm"]))


def test_unknown_sizes_are_an_error():
    with pytest.raises(UHLError, match="top_k"):
        uhl.UHLConfig(top_k=0)
    with pytest.raises(TypeError, match="topk"):
        uhl.UHLConfig(topk=2)


def test_a_canonical_adapter_needs_a_port_and_says_so(config):
    adapter = UHLAdapter(config.model_copy(update={"projector": "canonical"}))
    adapter.add_task("mood", ("a", "b"), "sentence")
    host = bert()
    with pytest.raises(UHLError, match=r"port it first: uhl.port_model"):
        attach(host, adapter, "mood")
    assert not any(hasattr(m, "base_layer") for m in host.modules())


def test_attach_is_the_same_update_as_peft():
    adapter = UHLAdapter(uhl.UHLConfig(**SMALL).sizes())
    adapter.add_task("main", (), "sentence")
    model = get_peft_model(bert(), uhl.UHLConfig(**SMALL))
    adapter.load_state_dict(model.base_model.uhl_adapters["default"].state_dict())
    with attach(bert(), adapter, "main") as attached:
        torch.testing.assert_close(logits(attached.model), logits(model))


def deberta(seed=0):
    from transformers import DebertaV2Config, DebertaV2Model

    torch.manual_seed(seed)
    sizes = {"vocab_size": 64, "hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 4}
    sizes |= {
        "intermediate_size": 40,
        "relative_attention": True,
        "pos_att_type": ["c2p", "p2c"],
        "share_att_key": True,
    }
    return DebertaV2Model(DebertaV2Config(**sizes, position_buckets=4, initializer_range=0.3)).eval()


def test_relative_positions_are_routed_by_themselves_whatever_their_number():
    """DeBERTa's key weight reads the layer's tokens, then position embeddings: once as many as tokens here."""
    model = get_peft_model(deberta(), uhl.UHLConfig(**SMALL))
    attached = model.base_model._attached["default"]
    layer = model.base_model.model.encoder.layer[0].attention.self
    seen = []
    layer.key_proj.register_forward_hook(lambda _m, x, y: seen.append((x[0], y)))
    for tokens in (7, 8, 9):
        with torch.no_grad():
            model(input_ids=torch.arange(5, 5 + tokens)[None])
        positions, found = seen[-1]
        assert positions.shape[1] == 8
        slot = attached.slots[[s.path for s in attached.slots].index("encoder.layer.0.attention.self.key_proj")]
        assert slot.twice
        attached.after_host()  # no layer is running: routed by itself
        torch.testing.assert_close(found, layer.key_proj(positions))


def test_flattened_tokens_keep_their_layers_route():
    from transformers import OPTConfig, OPTForCausalLM

    sizes = {"vocab_size": 64, "hidden_size": 24, "word_embed_proj_dim": 24, "num_hidden_layers": 2, "ffn_dim": 40}
    torch.manual_seed(0)
    host = OPTForCausalLM(OPTConfig(**sizes, num_attention_heads=4, init_std=0.3, do_layer_norm_before=False)).eval()
    model = get_peft_model(host, uhl.UHLConfig(**SMALL))
    attached, asked = model.base_model._attached["default"], []
    own = attached._own_reader
    attached._own_reader = lambda *a: asked.append(a) or own(*a)
    logits(model)
    assert not asked


def test_feed_forward_in_chunks_is_an_error():
    host = bert()
    host.config.chunk_size_feed_forward = 2
    with pytest.raises(UHLError, match="set its config.chunk_size_feed_forward to 0"):
        get_peft_model(host, uhl.UHLConfig(**SMALL))


def test_depth_is_that_of_the_host_also_where_few_layers_are_targeted():
    model = get_peft_model(bert(layers=5), uhl.UHLConfig(**SMALL, target_modules=r".*layer\.1\..*query"))
    (slot,) = model.base_model._attached["default"].slots
    assert slot.depth == 0.25


def test_types_narrow_the_named_modules():
    model = get_peft_model(bert(), uhl.UHLConfig(**SMALL, target_modules=["query", "key"], types=["K"]))
    assert {s.path.rsplit(".")[-1] for s in model.base_model._attached["default"].slots} == {"key"}
    logits(model)


def two_adapters():
    model = get_peft_model(bert(), uhl.UHLConfig(**SMALL), adapter_name="token")
    model.add_adapter("static", uhl.UHLConfig(**{**SMALL, "seed": 6}, router="static"))
    return model


def test_merging_asks_the_adapters_that_are_merged():
    model = two_adapters()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    for merge in (model.merge_and_unload, model.merge_adapter):
        with pytest.raises(UHLError, match="'token' chooses atoms"):
            merge(adapter_names=["static", "token"])
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    model.set_adapter("static")
    wanted = logits(model)
    model.set_adapter("token")
    merged = model.merge_and_unload(adapter_names=["static"])
    torch.testing.assert_close(logits(merged), wanted, atol=1e-5, rtol=1e-5)


def test_packed_weights_are_refused_where_their_values_are_needed():
    host = bert()
    model = get_peft_model(host, uhl.UHLConfig(**SMALL, router="static"))
    base = model.base_model.model.bert.encoder.layer[0].attention.self.query.base_layer
    base.weight = nn.Parameter(torch.zeros(24 * 24 // 2, 1, dtype=torch.uint8), requires_grad=False)
    assert find_slots(model.base_model.model)[0].d_in == 24
    with pytest.raises(UHLError, match="without quantisation"):
        model.merge_adapter()


def test_sizes_beyond_a_file_are_an_error_at_once():
    with pytest.raises(UHLError, match="a file holds at most"):
        uhl.UHLConfig(atoms=20_000, width=512)


def test_values_that_are_not_finite_do_not_replace_a_good_file(tmp_path):
    model = get_peft_model(bert(), uhl.UHLConfig(**SMALL))
    model.save_pretrained(tmp_path)
    good = (tmp_path / "adapter_model.safetensors").read_bytes()
    with torch.no_grad():
        model.base_model.uhl_adapters["default"].dictionary.u[0, 0] = float("nan")
    with pytest.raises(UHLError, match="not finite"):
        model.save_pretrained(tmp_path)
    assert (tmp_path / "adapter_model.safetensors").read_bytes() == good


@pytest.mark.parametrize("host", ["narrow", "distil", "llama"])
def test_the_head_of_another_host_is_left_out_and_said(tmp_path, host, caplog, recwarn):
    """PEFT saves the host's own classifier with a sequence classifier; it cannot move to another width or family."""
    from transformers import DistilBertConfig, LlamaConfig, LlamaForSequenceClassification
    from transformers import DistilBertForSequenceClassification as Distil

    get_peft_model(bert(), uhl.UHLConfig(**SMALL, task_type="SEQ_CLS")).save_pretrained(tmp_path)
    small = {"vocab_size": 64, "hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 4, "pad_token_id": 0}
    distil = DistilBertConfig(vocab_size=64, dim=32, n_layers=2, n_heads=4, hidden_dim=48)
    made = {
        "narrow": lambda: bert(2, 16),
        "distil": lambda: Distil(distil).eval(),
        "llama": lambda: LlamaForSequenceClassification(LlamaConfig(**small, intermediate_size=40)).eval(),
    }[host]()
    plain = {n: p.clone() for n, p in made.named_parameters()}
    recwarn.clear()
    with caplog.at_level(logging.INFO, "uhl"):
        model = PeftModel.from_pretrained(made, tmp_path)
    assert not recwarn.list
    assert "is of another host, so this host's own stays as it is" in caplog.text
    logits(model)
    for name, p in model.base_model.model.named_parameters():
        assert name.replace(".base_layer", "") not in plain or torch.equal(p, plain[name.replace(".base_layer", "")])
    model.save_pretrained(tmp_path / "again")
    assert PeftModel.from_pretrained(bert(), tmp_path / "again")


def test_a_loaded_configuration_alone_starts_a_new_adapter(tmp_path):
    import shutil

    model = get_peft_model(bert(), uhl.UHLConfig(**SMALL))
    model.save_pretrained(tmp_path / "a")
    config = uhl.UHLConfig.from_pretrained(tmp_path / "a")
    shutil.rmtree(tmp_path / "a")
    config.init_weights = True
    config.inference_mode = False
    fresh = get_peft_model(bert(), config)
    assert torch.equal(logits(fresh), logits(bert()))


def test_a_state_dict_of_other_sizes_or_values_is_an_error():
    from peft import get_peft_model_state_dict, set_peft_model_state_dict

    model = get_peft_model(bert(), uhl.UHLConfig(**SMALL))
    state = get_peft_model_state_dict(model)
    set_peft_model_state_dict(model, state)
    for name, value, message in (
        ("dictionary.u", state["dictionary.u"][:-1], "dictionary.u has shape"),
        ("dictionary.u", state["dictionary.u"].float(), "expected .* I8"),
        ("dictionary.u.scale", state["dictionary.u.scale"] * float("nan"), "not finite"),
        ("router", None, "router is missing"),
    ):
        changed = state | {name: value} if value is not None else {k: v for k, v in state.items() if k != name}
        with pytest.raises(UHLError, match=message):
            set_peft_model_state_dict(model, changed)


def test_a_configuration_never_rewrites_another_adapters_file(tmp_path):
    from peft import get_peft_model_state_dict

    first, other = (get_peft_model(bert(), uhl.UHLConfig(**{**SMALL, "seed": s})) for s in (1, 2))
    other.save_pretrained(tmp_path)
    before = (tmp_path / "adapter_model.safetensors").read_bytes()
    get_peft_model_state_dict(first)
    first.peft_config["default"].save_pretrained(tmp_path)
    assert (tmp_path / "adapter_model.safetensors").read_bytes() == before


def test_anchors_and_provenance_come_with_the_file(tmp_path, adapter):
    from uhl.anchors import Anchors, Codes

    adapter.info = {"source": "tiny", "shape": "3 x 24"}
    codes = [Codes.of(torch.randn(20, 16)) for _ in range(4)]
    adapter.anchors = Anchors([f"text {i}" for i in range(20)], "generic, MIT", codes[0], codes[1:])
    store.save(adapter, tmp_path / "adapter_model.safetensors")
    config = uhl.UHLConfig(**adapter.config.model_dump() | {"types": None}, task="mood")
    config.save_pretrained(tmp_path)
    model = PeftModel.from_pretrained(bert(), tmp_path)
    found = model.base_model.uhl_adapters["default"]
    assert found.info == adapter.info
    assert found.anchors.texts == adapter.anchors.texts
    model.save_pretrained(tmp_path / "again")
    first, second = (f / "adapter_model.safetensors" for f in (tmp_path, tmp_path / "again"))
    assert first.read_bytes() == second.read_bytes()


def test_the_model_card_tells_what_the_file_is_and_keeps_a_persons_text(tmp_path):
    bert().save_pretrained(tmp_path / "host")
    host = BertForSequenceClassification.from_pretrained(tmp_path / "host")
    model = get_peft_model(host, uhl.UHLConfig(**SMALL))
    model.save_pretrained(tmp_path / "a")
    readme = tmp_path / "a" / "README.md"
    text = readme.read_text()
    assert "Trained on **host 3 x 24**" in text
    assert "- `main`: the host's own head is used" in text
    assert f"| file | {(tmp_path / 'a' / 'adapter_model.safetensors').stat().st_size:,} of at most 1,000,000 |" in text
    assert "More Information Needed" not in text
    assert str(tmp_path) not in text
    assert "unihyperlora" in text.split("---")[1]
    readme.write_text(text + "\nA person's own words.\n")
    with torch.no_grad():
        model.base_model.uhl_adapters["default"].dictionary.u.mul_(2)
    model.save_pretrained(tmp_path / "a")
    again = readme.read_text()
    assert again.count("# UniHyperLoRA adapter") == 1
    assert "A person's own words." in again


def test_pushing_to_the_hub_uploads_a_folder_that_loads(tmp_path, monkeypatch):
    """The hub is a folder here: what would be uploaded is copied."""
    import shutil

    from transformers.utils import hub

    class Api:
        def create_repo(self, repo_id, **_):
            return type("Url", (), {"repo_id": repo_id})()

    monkeypatch.setattr(hub, "hf_api", lambda *_, **__: Api())

    def upload(self, folder, repo_id, *args, **kwargs):
        shutil.copytree(folder, tmp_path / "hub" / repo_id)

    monkeypatch.setattr(hub.PushToHubMixin, "_upload_modified_files", upload)
    model = get_peft_model(bert(), uhl.UHLConfig(**SMALL))
    model.push_to_hub("someone/adapter")
    there = tmp_path / "hub" / "someone" / "adapter"
    assert {p.name for p in there.iterdir()} == {"README.md", "adapter_config.json", "adapter_model.safetensors"}
    torch.testing.assert_close(logits(PeftModel.from_pretrained(bert(), there)), logits(model), atol=1e-4, rtol=0)


def test_the_readmes_imports_are_there():
    import re
    from pathlib import Path

    blocks = re.findall(r"```python\n(.*?)```", (Path(__file__).parent.parent / "README.md").read_text(), re.S)
    lines = [line for block in blocks for line in block.splitlines() if line.startswith(("import ", "from "))]
    assert len(lines) >= 4
    for line in lines:
        exec(line, {})


def distributed(rank, folder):
    """One of two processes, each with one example; its gradients after the first step and the second are saved."""
    import torch.distributed as dist

    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    model = trainable()
    parallel = nn.parallel.DistributedDataParallel(model)
    optimiser = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.05)
    steps = []
    for _ in range(2):
        optimiser.zero_grad()
        loss(parallel, IDS[rank : rank + 1], (rank,)).backward()
        steps.append({n: g.clone() for n, g in grads(model).items()})
        optimiser.step()
    torch.save(steps, f"{folder}/{rank}.pt")
    # The wrapper must not be the group's last owner: it would wait for the group's thread while it holds the lock that
    # the thread needs (seen once, with torch 2.13).
    del parallel
    gc.collect()
    dist.destroy_process_group()


@pytest.mark.slow
def test_data_parallel_gradients_are_the_mean_of_the_processes(tmp_path):
    torch.multiprocessing.start_processes(distributed, (str(tmp_path),), nprocs=2, start_method="forkserver")
    mine, theirs = (torch.load(tmp_path / f"{rank}.pt") for rank in (0, 1))
    model = trainable()
    optimiser = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.05)
    for step in range(2):
        alone = []
        for rank in (0, 1):
            optimiser.zero_grad()
            loss(model, IDS[rank : rank + 1], (rank,)).backward()
            alone.append({n: g.clone() for n, g in grads(model).items()})
        for name, found in mine[step].items():
            mean = (alone[0][name] + alone[1][name]) / 2
            assert torch.equal(found, theirs[step][name]), name
            torch.testing.assert_close(found, mean, atol=1e-5, rtol=1e-3)
            dict(model.named_parameters())[name].grad = mean
        first = "base_model.uhl_adapters.default.dictionary.u"
        assert not torch.allclose(mine[step][first], alone[0][first], rtol=1e-2)
        optimiser.step()


@pytest.mark.parametrize("routing", ["layer", "weight", "model"])
def test_generating_with_a_cache_gives_the_tokens_and_logits_without(routing):
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    sizes = {"vocab_size": 64, "hidden_size": 24, "num_hidden_layers": 3, "num_attention_heads": 4}
    sizes |= {"intermediate_size": 40, "initializer_range": 0.3, "eos_token_id": None, "pad_token_id": 0}
    host = LlamaForCausalLM(LlamaConfig(**sizes, num_key_value_heads=2)).eval()
    given = {"input_ids": IDS, "attention_mask": torch.ones_like(IDS), "max_new_tokens": 12, "do_sample": False}
    given |= {"output_logits": True, "return_dict_in_generate": True}
    bare = host.generate(**given)
    model = get_peft_model(host, uhl.UHLConfig(**SMALL, routing=routing, task_type="CAUSAL_LM")).eval()
    cached, whole = (model.generate(**given, use_cache=use) for use in (True, False))
    assert torch.equal(cached.sequences, whole.sequences)
    assert not torch.equal(cached.sequences, bare.sequences)
    torch.testing.assert_close(torch.stack(cached.logits), torch.stack(whole.logits), atol=1e-4, rtol=1e-4)


def test_the_method_is_a_member_of_pefts_enumeration():
    """From Python 3.12 on members are found as attributes of the class, by which PEFT looks."""
    assert vars(PeftType)[NAME] is PeftType(NAME) is getattr(PeftType, NAME)
    assert PeftType(NAME) in list(PeftType)
