"""Pruned copies: what is cut, what stays as it was, names and errors, and an adapter on them."""

import json
import shutil
from copy import deepcopy

import pandas as pd
import pytest
import torch

from uhl import archives, compression, porting, results, runs, stages, viz
from uhl.errors import UHLError
from uhl.host import find_slots
from uhl.models import load_encoder, revision
from uhl.pruning import Cut, kept_share, parse, prune


def states(encoder, model):
    inputs = encoder.tokenizer(["good film was not dull", "bad"], padding=True, return_tensors="pt")
    with torch.no_grad():
        return model(**inputs).last_hidden_state


def sizes(model):
    return {(s.type, s.writer): (s.d_out, s.d_in) for s in find_slots(model)}


@pytest.mark.parametrize("cut", [Cut(layers=3), Cut(heads=4), Cut(neurons=48), Cut(width=24), Cut(3, 4, 48, 24)])
def test_keeping_everything_changes_nothing(encoder, cut):
    before = states(encoder, encoder.model)
    assert torch.equal(states(encoder, prune(deepcopy(encoder.model), cut)), before)


def test_heads_and_neurons_that_do_nothing_go_first_and_without_a_trace(encoder):
    for layer in encoder.model.encoder.layer:
        layer.attention.output.dense.weight[:, 6:12] = 0.0  # the second head of four, six wide
        layer.output.dense.weight[:, ::2] = 0.0
    before = states(encoder, encoder.model)
    cut = prune(deepcopy(encoder.model), Cut(heads=3, neurons=24))
    torch.testing.assert_close(states(encoder, cut), before)
    assert sizes(cut)["Q", False] == (18, 24)
    assert sizes(cut)["FFN", True] == (24, 24)
    assert not torch.allclose(states(encoder, prune(deepcopy(cut), Cut(heads=2))), before, atol=1e-3)


def test_heads_and_neurons_go_by_both_of_their_sides(encoder):
    layer = encoder.model.encoder.layer[0]
    attention, out = layer.attention.self, layer.attention.output.dense
    out.weight.fill_(1.0)
    attention.value.weight.fill_(1.0)
    out.weight[:, :6] = 3.0  # large on one side, small on the other: 3 x 0.1
    attention.value.weight[:6] = 0.1
    attention.value.weight[6:12] = 0.5  # 1 x 0.5
    layer.intermediate.dense.weight.fill_(1.0)
    layer.output.dense.weight.fill_(1.0)
    layer.output.dense.weight[:, 0], layer.intermediate.dense.weight[0] = 3.0, 0.1
    cut = prune(deepcopy(encoder.model), Cut(heads=3, neurons=47)).encoder.layer[0]
    assert torch.equal(cut.attention.self.value.weight, attention.value.weight[6:])
    assert torch.equal(cut.output.dense.weight, layer.output.dense.weight[:, 1:])


@pytest.mark.parametrize(("count", "kept"), [(1, [4]), (2, [0, 4]), (3, [0, 2, 4]), (4, [0, 1, 3, 4])])
def test_layers_are_spread_evenly(make_encoder, count, kept):
    whole = make_encoder(layers=5).model
    cut = prune(deepcopy(whole), Cut(layers=count))
    found = [layer.output.dense.weight for layer in cut.encoder.layer]
    wanted = [whole.encoder.layer[i].output.dense.weight for i in kept]
    assert len(found) == count == cut.config.num_hidden_layers
    assert all(map(torch.equal, found, wanted))
    assert kept_share(cut, whole) == pytest.approx(count / 5)


def test_width_goes_by_the_gains_and_not_by_the_order_of_coordinates(encoder):
    """A copy of a host whose stream is renumbered is the copy of the host."""
    torch.manual_seed(1)
    norms = [m for m in encoder.model.modules() if isinstance(m, torch.nn.LayerNorm)]
    for norm in norms:
        norm.weight.copy_(torch.rand(24) + 0.1)
        norm.bias.copy_(torch.randn(24) / 5)
    order = torch.randperm(24)
    turned = deepcopy(encoder.model)
    prune(turned, Cut(width=24))  # tensors of its own
    for old, new in zip(encoder.model.modules(), turned.modules(), strict=True):
        if isinstance(old, torch.nn.LayerNorm):
            new.weight.copy_(old.weight[order])
            new.bias.copy_(old.bias[order])
        elif isinstance(old, torch.nn.Embedding):
            new.weight.copy_(old.weight[:, order])
    for slot in find_slots(encoder.model):
        old, new = (m.get_submodule(slot.path) for m in (encoder.model, turned))
        new.weight.copy_(old.weight[order] if slot.writer else old.weight[:, order])
        if slot.writer:
            new.bias.copy_(old.bias[order])
    torch.testing.assert_close(states(encoder, turned), states(encoder, encoder.model)[..., order])
    one, other = (prune(model, Cut(width=16)) for model in (deepcopy(encoder.model), turned))
    assert one.config.hidden_size == 16
    assert sizes(one)["O", True] == (16, 24)
    gains = torch.stack([n.weight.square() + n.bias.square() for n in norms]).sum(0)
    kept = gains >= gains.sort().values[8]
    assert torch.equal(one.embeddings.LayerNorm.weight, norms[0].weight[kept])
    torch.testing.assert_close(
        states(encoder, other), states(encoder, one)[..., order[kept[order]].argsort().argsort()]
    )


def test_names():
    assert parse("minilm-l6@layers=4,heads=6") == ("minilm-l6", Cut(layers=4, heads=6))
    assert parse("/data/me@home/model") == ("/data/me@home/model", None)
    assert parse("team/model") == ("team/model", None)
    for name in ("m@depth=4", "m@layers=4,layers=3"):
        with pytest.raises(UHLError, match="parts are layers, heads, neurons, width"):
            parse(name)
    for name in ("m@layers=4@heads=6", "m@layers=4, heads=6", "m@layers 4", "m@heads=6,", "m@width"):
        with pytest.raises(UHLError, match="write a cut as in"):
            parse(name)
    with pytest.raises(UHLError, match=r"copies.*'layer' cannot be cut"):
        runs.Settings(copies=("layer=4",))
    with pytest.raises(UHLError, match="'four layers' is no cut"):
        runs.Settings(copies=("four layers",))


def test_a_folder_is_taken_by_its_whole_name(encoder, tmp_path):
    folder = tmp_path / "run@step=1000"
    encoder.model.save_pretrained(folder)
    encoder.tokenizer.save_pretrained(folder)
    assert load_encoder(str(folder)).layers == 3
    assert load_encoder(f"{folder}@heads=2,layers=2").revision == load_encoder(f"{folder}@layers=02,heads=2").revision


def test_what_cannot_be_cut(encoder):
    for cut in (Cut(layers=4), Cut(heads=0), Cut(neurons=49), Cut(width=25)):
        with pytest.raises(UHLError, match="keep between 1 and all of them"):
            prune(encoder.model, cut)
    encoder.model.config.model_type = "mpnet"
    with pytest.raises(UHLError, match="only BERT"):
        prune(encoder.model, Cut(layers=2))


def test_a_copy_is_another_model_than_its_whole(encoder, tmp_path):
    encoder.model.save_pretrained(tmp_path)
    encoder.tokenizer.save_pretrained(tmp_path)
    whole, copy = load_encoder(str(tmp_path)), load_encoder(f"{tmp_path}@layers=2,width=16")
    assert (copy.layers, copy.width) == (2, 16)
    assert copy.revision == revision(f"{tmp_path}@layers=2,width=16") == f"{whole.revision}@layers=2,width=16"
    assert copy.revision != whole.revision


def test_an_adapter_on_copies_of_its_source(make_encoder, task, monkeypatch, tmp_path):
    def load(name):
        _, cut = parse(name)
        made = make_encoder(3, 24)
        made.name, made.revision = name, name
        made.model = prune(made.model, cut) if cut else made.model
        return made

    monkeypatch.setattr(stages, "load_encoder", load)
    monkeypatch.setattr(stages.tasks, "load_task", lambda name: task)
    settings = runs.Settings(
        profile="t", source="big", task="mood", anchors=40, epochs=1, copies=("layers=2", "width=16")
    )
    stages.pretrain(settings, "canonical")[1].finish("pretrain-canonical")
    told = []
    outcomes = compression.measure(settings, told.append)
    assert told == ["big", "big@layers=2", "big@width=16"]
    own = scores_of(outcomes[0])
    stored = runs.load_results("t").set_index(["arm", "split"])["score"]
    assert own["lineage"] == pytest.approx(stored["uhl-canonical", "test"], abs=1e-3)  # the file's own score
    assert outcomes[0].details["ports"].keys() == {"lineage", "anchor", "zero-atoms", "random-p"}
    assert outcomes[0].details["ports"]["lineage"]["measured"] == 1  # its own decisions
    assert 0 <= outcomes[1].details["ports"]["anchor"]["predicted"] <= 1
    assert set(scores_of(outcomes[1])) == {"lineage", "anchor", "zero-atoms", "random-p", "head"}
    assert set(scores_of(outcomes[2])) == {"anchor", "zero-atoms", "random-p", "head"}  # of another width
    told.clear()
    again = compression.measure(settings, told.append)
    assert told == []
    assert [scores_of(o) for o in again] == [scores_of(o) for o in outcomes]
    for change in ({"max_length": 32}, {"anchors": 39}):
        told.clear()
        compression.measure(settings.model_copy(update={**change, "copies": ()}), told.append)
        assert told == ["big"], change
    compression.measure(settings)
    table = results.compressed("t")
    shown = ["copy", "part", "kept", "arm", *compression.PORT, "score"]
    pd.testing.assert_frame_equal(table[shown], compression.table(outcomes)[shown])
    fig = viz.compression(table)
    assert [ax.get_title() for ax in fig.axes] == ["mood: fewer layers", "mood: narrower"]
    low, high = fig.axes[0].get_ylim()
    assert low < table["low"].min()
    assert table["high"].max() < high
    fig = viz.losses(table)
    (points,) = (c for c in fig.axes[0].collections if len(c.get_offsets()) == 3)
    lost = own["lineage"] - table[table["arm"] == "anchor"]["score"]
    assert sorted(points.get_offsets()[:, 1]) == pytest.approx(sorted(lost))
    assert sorted(points.get_offsets()[:, 0]) == pytest.approx(sorted(table[table["arm"] == "anchor"]["kappa"]))
    with pytest.raises(UHLError, match="no pruned copy"):
        viz.compression(table[table["part"] == ""])
    assert table["part"].tolist() == [""] * 5 + ["layers"] * 5 + ["width"] * 4
    assert table[table["part"] == "layers"]["kept"].tolist() == pytest.approx([2 / 3] * 5)
    assert table.set_index(["copy", "arm"])["score"]["big", "anchor"] == pytest.approx(own["anchor"])
    assert ((table["low"] <= table["score"]) & (table["score"] <= table["high"])).all()
    with pytest.raises(UHLError, match="make copies PROFILE=u"):
        results.compressed("u")
    with pytest.raises(UHLError, match="keep between"):
        compression.measure(settings.model_copy(update={"copies": ("layers=9",)}))
    other = runs.cell_dir(settings.model_copy(update={"seed": 1}), "compress")
    shutil.copytree(runs.cell_dir(settings, "compress"), other)
    for file in other.glob("*/outcome.json"):
        entry = json.loads(file.read_text())
        entry["rows"] = [row | {"seed": 1} for row in entry["rows"]]
        file.write_text(json.dumps(entry))
    assert set(results.compressed("t")["seeds"]) == {2}
    shutil.rmtree(other / "big@width=16")
    with pytest.raises(UHLError, match="on big@width=16 .* lacks seeds"):
        results.compressed("t")
    shutil.rmtree(other)
    compression.measure(settings.model_copy(update={"max_length": 32, "copies": ()}))
    with pytest.raises(UHLError, match="measured otherwise than the others"):
        results.compressed("t")
    compression.measure(settings)
    before = [(file, file.read_text()) for file in runs.cell_dir(settings, "compress").glob("*/outcome.json")]
    for change in ({"rules": porting.RULES - 1}, {"protocol": runs.PROTOCOL - 1}):
        for file, text in before:
            file.write_text(json.dumps((entry := json.loads(text)) | {"about": entry["about"] | change}))
        with pytest.raises(UHLError, match="by an earlier release, which ported otherwise; delete the folders"):
            results.compressed("t")
    for file, text in before:
        file.write_text(text)
    archive = archives.pack("t", tmp_path / "t.zip")
    monkeypatch.setenv("UHL_RUNS", str(tmp_path / "elsewhere"))
    assert [f.name for f in archives.restore(archive)][:-1] == ["big", "big@layers=2", "big@width=16"]
    assert results.compressed("t").equals(table)
    path = runs.cell_dir(settings, "pretrain-canonical") / "adapter.safetensors"
    path.write_bytes(b"of another training")
    with pytest.raises(UHLError, match="or with another adapter"):
        results.compressed("t")


def scores_of(outcome):
    return {row["arm"]: row["score"] for row in outcome.rows}
