"""FLOPs by formula equal torch's counter on the reference path; percentages on real shapes."""

import zlib
from dataclasses import replace

import pytest
import torch
from peft import get_peft_model
from test_host import FAMILIES
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoConfig, AutoModel, BertConfig

from uhl import budget, results
from uhl.adapter import TaskPart, UHLAdapter
from uhl.anchors import Probe
from uhl.baselines import HEAD_AND_HEADER, file_sizes, own_frame, peft_method
from uhl.config import Sizes
from uhl.frame import Basis
from uhl.host import find_slots
from uhl.peft_method import attach
from uhl.sat import SATAdapter


def count(encoder, inputs):
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        encoder.model(**inputs)
    return counter.get_total_flops()


@pytest.mark.parametrize(("layers", "width"), [(3, 24), (1, 16)])
@pytest.mark.parametrize("routing", ["layer", "weight", "model"])
@pytest.mark.parametrize("stream", [False, True])
def test_formula_equals_the_counter(make_encoder, config, layers, width, routing, stream):
    encoder = make_encoder(layers, width)
    adapter = UHLAdapter(config.model_copy(update={"routing": routing}))
    adapter.add_task("mood", ("a", "b"), "sentence")
    inputs = encoder.tokenizer(["good film the plot"], return_tensors="pt")
    slots, tokens = find_slots(encoder.model), inputs["input_ids"].numel()
    bare = count(encoder, inputs)
    maps = torch.randn(16, width)
    frame = Basis((maps,), (maps.T.contiguous(),), maps, maps[:, 0], (1.0,)).frame(slots) if stream else None
    with torch.no_grad(), attach(encoder.model, adapter, "mood", frame, path="reference"):  # folds before the count
        extra = count(encoder, inputs) - bare
    updates = budget.update_flops(adapter.config, slots, stream)
    routes = budget.routing_flops(adapter.config, slots, width, stream)
    assert extra == tokens * (routes + updates)
    routed = {"layer": layers * width, "weight": layers * (6 if stream else 7) * width, "model": width}[routing]
    assert routes == 2 * adapter.config.atoms * routed
    assert updates == 2 * 2 * layers * width * (12 if stream else 14)  # FFN's inner width is twice D


@pytest.mark.parametrize("method", ["lora-r8", "lora-1mb", "vera", "vb-lora", "uni-lora"])
def test_formulas_of_the_baselines_equal_the_counter(make_encoder, method):
    """Per token: what a method computes once a pass (its matrices) falls out of the difference."""
    encoder = make_encoder()
    slots = find_slots(encoder.model)
    short, long = ({"input_ids": torch.arange(5, 5 + n)[None]} for n in (8, 20))
    bare = count(encoder, long) - count(encoder, short)
    config, targets, rank = peft_method(method, slots)
    encoder.model = get_peft_model(encoder.model, config)
    extra = count(encoder, long) - count(encoder, short) - bare
    assert extra == 12 * sum(2 * rank * (s.d_in + s.d_out) for s in targets)


@pytest.mark.parametrize("functional", [False, True])
def test_formula_of_sparse_baselines_equals_the_counter(make_encoder, functional):
    encoder = make_encoder()
    slots, inputs = find_slots(encoder.model), {"input_ids": torch.arange(5, 17)[None]}
    adapter = SATAdapter(Sizes(), slots, encoder.width, functional=functional)
    adapter.tasks["main"] = TaskPart(Sizes(), ("a", "b"), "sentence")
    with torch.no_grad():
        bare = count(encoder, inputs)
        with attach(
            encoder.model, adapter, "main", own_frame(encoder, Probe(["good film", "bad plot"])), path="reference"
        ):
            extra = count(encoder, inputs) - bare
    wanted = budget.routing_flops(adapter.config, slots, encoder.width) + budget.update_flops(adapter.config, slots)
    assert extra == 12 * wanted


@pytest.mark.parametrize(("layers", "width"), [(4, 312), (3, 384), (12, 768)])
def test_the_largest_lora_stays_in_both_budgets(layers, width):
    """One more rank would leave one of the two."""
    sizes = {"num_hidden_layers": layers, "num_attention_heads": 12, "intermediate_size": 4 * width}
    slots = find_slots(AutoModel.from_config(BertConfig(vocab_size=50, hidden_size=width, **sizes)))
    _, targets, rank = peft_method("lora-1mb", slots)

    def inside(r):
        size = 2 * r * sum(s.d_in + s.d_out for s in targets) + HEAD_AND_HEADER
        return size <= budget.LIMIT_BYTES and budget.lora_flops_pct(r, targets, slots) <= budget.LIMIT_FLOPS_PCT

    assert inside(rank)
    assert not inside(rank + 1)


@pytest.mark.parametrize(
    ("family", "more"), [*((name, {}) for name in FAMILIES), ("deberta-v2", {"share_att_key": True})], ids=str
)
def test_formula_equals_the_counter_on_every_family(family, more, config, encoder):
    """Per token: what DeBERTa's layers do once a pass, with its positions, falls out of the difference."""
    made = AutoConfig.for_model(family, vocab_size=50, **FAMILIES[family], **more)
    host = replace(encoder, model=AutoModel.from_config(made).eval().requires_grad_(False))
    adapter = UHLAdapter(config)
    adapter.add_task("mood", ("a", "b"), "sentence")
    short, long = ({"input_ids": torch.arange(5, 5 + n)[None]} for n in (8, 20))
    with torch.no_grad():
        bare = count(host, long) - count(host, short)
        with attach(host.model, adapter, "mood", path="reference"):
            extra = count(host, long) - count(host, short) - bare
    slots = find_slots(host.model)
    assert extra == 12 * (budget.routing_flops(config, slots, 32) + budget.update_flops(config, slots))


def test_static_routes_cost_nothing(encoder, config):
    static = config.model_copy(update={"router": "static"})
    assert budget.routing_flops(static, find_slots(encoder.model), 24) == 0


@pytest.mark.parametrize(
    ("layers", "width", "inner", "most"), [(12, 768, 3072, 2.0), (4, 312, 1200, 5.0), (24, 1024, 4096, 1.5)]
)
def test_extra_flops_on_real_shapes(layers, width, inner, most):
    shape = BertConfig(hidden_size=width, num_hidden_layers=layers, intermediate_size=inner, num_attention_heads=4)
    with torch.device("meta"):
        slots = find_slots(AutoModel.from_config(shape))
    extra = budget.extra_flops_pct(Sizes(), slots, slots, width)
    assert 0.5 < extra <= most


def test_file_sizes_are_those_of_files_that_peft_wrote():
    host = AutoModel.from_config(
        BertConfig(vocab_size=64, hidden_size=256, num_hidden_layers=1, num_attention_heads=4, intermediate_size=300)
    )
    before = {n: p.clone() for n, p in host.named_parameters()}
    table = file_sizes(host, ["query", "value"]).set_index("method")
    assert table.loc["LoRA r8", "trained"] == 2 * 8 * (256 + 256)
    assert table.loc["VeRA r256", "trained"] == 2 * (256 + 256)
    assert table.loc["FourierFT", "trained"] == 2 * 1000
    assert table.loc["Uni-LoRA", "trained"] == 23_040
    assert (table["bytes"] >= 4 * table["trained"].where(table.index != "VB-LoRA", 0)).all()
    assert (table["bytes, float16"] < table["bytes"]).all()
    arms = {"LoRA r8": "lora-r8", "VeRA r256": "vera", "VB-LoRA": "vb-lora", "Uni-LoRA": "uni-lora"}
    known = table.loc[list(arms)].rename(arms).rename_axis("arm").reset_index()
    known = known.rename(columns={"bytes, float16": "adapter_bytes", "trained": "trainable_params"})
    guess = results.at_eight_bits(known.assign(task="x", target="y", phase="retrained"))
    scales = (known["bytes, 8 bits"] - guess).set_axis(known["arm"])  # and their lines in the file's header
    assert scales.between(0, 1_500).all()
    assert scales["uni-lora"] < 100  # one vector
    assert all(torch.equal(p, before[n]) for n, p in host.named_parameters())


@pytest.mark.parametrize(("labels", "size"), [(1, 10), (2, 10), (4, 20), (9, 32)])
def test_labelled_texts_weigh_what_their_parts_do(labels, size):
    texts = [f"text {i}" for i in range(80)]
    packed = len(zlib.compress("\n".join(texts).encode(), 9))
    assert budget.labelled_bytes(texts, labels) == packed + size  # 80 labels of 1, 2 or 3.17 bits
