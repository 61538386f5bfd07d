"""FLOPs by formula equal torch's counter on the reference path; percentages on real shapes."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModel, BertConfig

from uhl import budget
from uhl.config import Sizes
from uhl.host import find_slots
from uhl.peft_method import attach


def count(encoder, inputs):
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        encoder.model(**inputs)
    return counter.get_total_flops()


@pytest.mark.parametrize(("layers", "width"), [(3, 24), (1, 16)])
def test_formula_equals_the_counter(make_encoder, adapter, layers, width):
    encoder = make_encoder(layers, width)
    inputs = encoder.tokenizer(["good film the plot"], return_tensors="pt")
    slots, tokens = find_slots(encoder.model), inputs["input_ids"].numel()
    bare = count(encoder, inputs)
    with torch.no_grad(), attach(encoder.model, adapter, "mood", path="reference"):  # folds before the count
        extra = count(encoder, inputs) - bare
    formula = budget.routing_flops(adapter.config, slots, width) + budget.update_flops(adapter.config, slots)
    assert extra == tokens * formula
    assert extra != tokens * budget.update_flops(adapter.config, slots)


@pytest.mark.parametrize(
    ("layers", "width", "inner", "most"), [(12, 768, 3072, 2.0), (4, 312, 1200, 5.0), (24, 1024, 4096, 1.5)]
)
def test_extra_flops_on_real_shapes(layers, width, inner, most):
    shape = BertConfig(hidden_size=width, num_hidden_layers=layers, intermediate_size=inner, num_attention_heads=4)
    with torch.device("meta"):
        slots = find_slots(AutoModel.from_config(shape))
    extra = budget.extra_flops_pct(Sizes(), slots, slots, width)
    assert 0.5 < extra <= most
