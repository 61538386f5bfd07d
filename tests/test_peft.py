"""The PEFT method: what PEFT users do with an adapter, its shared state, and its file on other hosts."""

import copy
import logging

import pytest
import torch
from peft import AutoPeftModelForSequenceClassification, PeftModel, get_peft_model
from torch import nn
from transformers import BertConfig, BertForSequenceClassification, T5Config, T5ForConditionalGeneration
from transformers.pytorch_utils import Conv1D

import uhl
from uhl import store
from uhl.adapter import UHLAdapter
from uhl.errors import UHLError
from uhl.peft_method import attach

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
    header, tensors = store.read(tmp_path / "adapter_model.safetensors")
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


def gradients(checkpointing):
    model = get_peft_model(bert(), uhl.UHLConfig(**SMALL))
    with torch.no_grad():
        model.base_model.uhl_adapters["default"].projector.second.add_(0.1)  # at zero its inputs get no gradient
    if checkpointing is not None:
        model.base_model.model.activation_checkpointing_enable({"use_reentrant": checkpointing})
        model.enable_input_require_grads()
    model.train()
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    model(input_ids=IDS, labels=torch.tensor([0, 1])).loss.backward()
    return {n: p.grad for n, p in model.named_parameters() if p.requires_grad}


def test_gradient_checkpointing_gives_the_same_gradients():
    plain, checkpointed = gradients(None), gradients(False)
    assert {n for n, g in plain.items() if not g.abs().sum() > 0} == set()
    for name, gradient in plain.items():
        torch.testing.assert_close(checkpointed[name], gradient, atol=1e-5, rtol=1e-4)


def test_reentrant_checkpointing_trains_and_says_what_it_cuts():
    with pytest.warns(UserWarning, match="pass use_reentrant=False"):
        found = gradients(True)
    plain = gradients(None)
    for name, gradient in found.items():
        assert torch.cosine_similarity(gradient.flatten(), plain[name].flatten(), dim=0) > 0.8, name


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_hosts_in_half_precision_keep_a_float32_adapter(tmp_path, dtype):
    model = get_peft_model(bert().to(dtype), uhl.UHLConfig(**SMALL))
    assert {p.dtype for n, p in model.named_parameters() if "uhl_" in n} == {torch.float32}
    found = logits(model)
    assert found.dtype == dtype
    torch.testing.assert_close(
        found.float(), logits(get_peft_model(bert(), uhl.UHLConfig(**SMALL))), atol=0.3, rtol=0.1
    )


def test_autocast_is_close_to_float32():
    model = get_peft_model(bert(), uhl.UHLConfig(**SMALL))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = logits(model)
    torch.testing.assert_close(found.float(), logits(model), atol=0.3, rtol=0.1)


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
    with pytest.raises(UHLError, match=r"make them with uhl.port.port"):
        attach(host, adapter, "mood")
    assert not any(hasattr(m, "base_layer") for m in host.modules())


def test_attach_is_the_same_update_as_peft():
    adapter = UHLAdapter(uhl.UHLConfig(**SMALL).sizes())
    adapter.add_task("main", (), "sentence")
    model = get_peft_model(bert(), uhl.UHLConfig(**SMALL))
    adapter.load_state_dict(model.base_model.uhl_adapters["default"].state_dict())
    with attach(bert(), adapter, "main") as attached:
        torch.testing.assert_close(logits(attached.model), logits(model))
