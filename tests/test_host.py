import pytest
import torch
from torch import nn
from transformers import AutoConfig, AutoModel

from uhl.errors import UHLError
from uhl.host import find_slots, stream_width
from uhl.models import Encoder

COMMON = dict(vocab_size=50)
FAMILIES = {
    "bert": dict(hidden_size=32, num_hidden_layers=3, num_attention_heads=4, intermediate_size=64),
    "roberta": dict(hidden_size=32, num_hidden_layers=3, num_attention_heads=4, intermediate_size=64),
    "electra": dict(
        hidden_size=32, num_hidden_layers=3, num_attention_heads=4, intermediate_size=64, embedding_size=16
    ),
    "mpnet": dict(hidden_size=32, num_hidden_layers=3, num_attention_heads=4, intermediate_size=64),
    "deberta-v2": dict(
        hidden_size=32,
        num_hidden_layers=3,
        num_attention_heads=4,
        intermediate_size=64,
        relative_attention=True,
        pos_att_type=["c2p", "p2c"],
    ),
    "distilbert": dict(dim=32, n_layers=3, n_heads=4, hidden_dim=64),
}


@pytest.fixture(params=FAMILIES)
def model(request):
    config = AutoConfig.for_model(request.param, **COMMON, **FAMILIES[request.param])
    return AutoModel.from_config(config).eval()


def test_every_family_gives_six_weights_a_layer(model):
    slots = find_slots(model)
    assert len(slots) == 18
    for layer in range(3):
        own = [s for s in slots if s.layer == layer]
        assert sorted(s.type for s in own) == ["FFN", "FFN", "K", "O", "Q", "V"]
        assert {s.depth for s in own} == {layer / 2}
    for s in slots:
        assert s.writer == (s.type == "O" or (s.d_in, s.d_out) == (64, 32))
        assert isinstance(model.get_submodule(s.path), nn.Linear)


def test_the_width_of_a_host_for_several_modalities_is_the_texts(tokenizer):
    text = dict(hidden_size=24, num_hidden_layers=2, num_attention_heads=2, intermediate_size=48, vocab_size=50)
    vision = text | {"hidden_size": 16, "image_size": 8, "patch_size": 4}
    config = AutoConfig.for_model("gemma3", text_config=text | {"head_dim": 12}, vision_config=vision)
    model = AutoModel.from_config(config)
    assert stream_width(model) == 24
    assert Encoder("g", model, tokenizer, "").shape == "2 x 24"


def test_attaches_to_every_family_and_leaves_it_bit_identical(model, config):
    from world import fill

    from uhl.adapter import UHLAdapter
    from uhl.peft_method import attach

    adapter = UHLAdapter(config)
    adapter.add_task("t", ("a", "b"), "sentence")
    fill(adapter)
    ids = torch.randint(0, 50, (2, 7))
    mask = torch.ones_like(ids)
    state = {k: v.clone() for k, v in model.state_dict().items()}
    names = [n for n, _ in model.named_modules()]
    before = model(input_ids=ids, attention_mask=mask).last_hidden_state
    with attach(model, adapter, "t") as attached:
        inside = model(input_ids=ids, attention_mask=mask).last_hidden_state
        assert sorted(attached.routes) == [0, 1, 2]
        assert find_slots(model) == attached.slots
    after = model(input_ids=ids, attention_mask=mask).last_hidden_state
    assert not torch.allclose(before, inside, atol=1e-3)
    assert torch.equal(before, after)
    assert names == [n for n, _ in model.named_modules()]
    assert all(torch.equal(v, state[k]) for k, v in model.state_dict().items())


OTHERS = {  # types of a layer's weights, in order
    "modernbert": (["Q", "O", "FFN", "FFN"], dict(hidden_size=32, num_hidden_layers=3, num_attention_heads=4)),
    "albert": (["Q", "K", "V", "O", "FFN", "FFN"], dict(hidden_size=32, embedding_size=16, num_attention_heads=4)),
}


@pytest.mark.parametrize("family", OTHERS)
def test_encoders_with_other_names(family, config):
    from world import fill

    from uhl.adapter import UHLAdapter
    from uhl.peft_method import attach

    types, sizes = OTHERS[family]
    made = AutoConfig.for_model(family, **COMMON, **sizes, intermediate_size=64, pad_token_id=0)
    made.num_hidden_layers = 3
    torch.manual_seed(0)
    model = AutoModel.from_config(made).eval()
    slots = find_slots(model)
    own = {name: [s for s in slots if s.layer_path == name] for name in {s.layer_path for s in slots}}
    assert len(own) == (1 if family == "albert" else 3)  # ALBERT runs one layer again and again
    for weights in own.values():
        assert sorted(s.type for s in weights) == sorted(types)
        assert sum(s.writer for s in weights) == 2
    assert all(s.d_out == 32 for s in slots if s.writer)
    adapter = UHLAdapter(config)
    adapter.add_task("t", ("a", "b"), "sentence")
    fill(adapter)
    ids = torch.randint(1, 50, (2, 7))
    before = model(input_ids=ids).last_hidden_state
    with attach(model, adapter, "t"):
        assert not torch.allclose(before, model(input_ids=ids).last_hidden_state, atol=1e-3)
    assert torch.equal(before, model(input_ids=ids).last_hidden_state)


def test_types_choose_weights(encoder):
    assert {s.type for s in find_slots(encoder.model, ("O", "FFN"))} == {"O", "FFN"}


def test_a_single_layer_has_depth_zero(make_encoder):
    assert {s.depth for s in find_slots(make_encoder(layers=1).model)} == {0.0}


def test_a_host_without_known_weights_is_an_error():
    with pytest.raises(UHLError, match="no nn.Linear of a known type .* expected a Transformer such as BERT"):
        find_slots(nn.Sequential(nn.Linear(3, 3)))
