"""The measuring itself: pairs, files that are gone on with, memory by process, and fits that find a known law."""

import logging
import math
import time
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModel

from uhl import baselines, bench, budget, gpu, roofline, viz
from uhl.config import Sizes
from uhl.errors import UHLError
from uhl.host import find_slots, linear_flops


def test_a_measured_size_is_not_measured_again(tmp_path, monkeypatch):
    size = {"tokens": 8, "d_in": 6, "d_out": 6, "atoms": 4, "top_k": 2}
    file = tmp_path / "weights.csv"
    other = size | {"tokens": 9}
    measure = bench._weight_steps
    monkeypatch.setattr(bench.runs, "commit", lambda: "0123456789")
    monkeypatch.setattr(bench, "_weight_steps", lambda **given: {"x": lambda: 1 / (given["tokens"] - 9)})
    with pytest.raises(ZeroDivisionError):  # interrupted at the second size
        bench.weights([size, other], file, repeats=2)
    seen = []
    monkeypatch.setattr(bench, "_weight_steps", lambda **given: seen.append(given["tokens"]) or measure(**given))
    both = bench.weights([size, other], file, repeats=2)
    assert seen == [9]
    assert both["step"].tolist()[0] == "x"
    assert set(both["tokens"]) == {8, 9}
    first = bench.weights([other], file, repeats=2)
    assert seen == [9]
    assert len(bench.weights([other], file, repeats=3)) == len(first)
    assert seen == [9, 9]
    monkeypatch.setattr(bench.runs, "hardware", lambda: "another machine")
    bench.weights([other], file, repeats=3)
    assert seen == [9, 9, 9]
    monkeypatch.setattr(bench.runs, "commit", lambda: "0123456789-dirty")  # files that no commit names
    for count in (4, 5):
        assert len(bench.weights([other], file, repeats=3)) == len(first)
        assert len(seen) == count
    assert (pd.read_csv(file, dtype=str)["commit"] == "0123456789-dirty").sum() == len(first)
    assert set(first["step"]) == {"bare", "LoRA r8", "VeRA r256", "VB-LoRA", "dense", "gather", "reference"}


def test_a_ratio_to_lora_is_of_rows_alike():
    rows = [("bare", 8, 1.0), ("LoRA r8", 8, 2.0), ("LoRA r8", 16, 5.0), ("UHL", 16, 4.0), ("UHL", 32, 9.0)]
    found = pd.DataFrame(rows, columns=["step", "tokens", "seconds"], index=[7, 3, 5, 1, 9])
    ratio = bench.to_lora(found, "seconds", ["tokens"])
    assert ratio.drop(9).to_dict() == {7: 0.5, 3: 1.0, 5: 1.0, 1: 0.8}
    assert math.isnan(ratio[9])  # LoRA was not measured there


def test_power_law_finds_exponents():
    rows = []
    for t in (16, 64, 256):
        for a in (2, 8):
            rows += [{"tokens": t, "atoms": a, "step": "bare", "seconds": 1.0}]
            rows += [{"tokens": t, "atoms": a, "step": "x", "seconds": 1.0 + 3 * t**0.5 * a}]
    found = bench.power_law(pd.DataFrame(rows), "x", ["tokens", "atoms"])
    assert np.allclose([found["tokens"], found["atoms"], found["seconds"], found["r2"]], [0.5, 1, 3, 1], atol=1e-6)


def test_peak_is_that_of_the_process_alone():
    held = torch.ones(400_000_000 // 4)  # 400 MB in the parent
    here, child = bench._peak(), bench._alone(bench._peak)
    assert here > held.nbytes
    assert child < here - held.nbytes / 2


def rise_after_a_peak():
    """How much more than 16 MB the peak rises for them, where 64 MB were needed, and given back, before."""
    np.ones(8_000_000)
    before = bench._base()
    held = np.ones(2_000_000)
    return bench._peak() - before - held.nbytes


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="the system cannot forget a peak")
def test_an_earlier_peak_hides_nothing():
    assert -1e6 < bench._alone(rise_after_a_peak) < 4e6


def test_porting_is_measured_with_and_without_fragments():
    bare, cut = bench.porting("tiny", 32, 1).to_dict("records")
    assert (bare["anchors"], bare["with fragments"]) == (32, 32)
    assert cut["with fragments"] > 64
    assert cut["with fragments"] % 3 == 32 % 3  # whole texts, and three of some
    assert bare["host MB"] == pytest.approx(sum(p.numel() for p in bench.bert("tiny").parameters()) * 4e-6, abs=0.05)
    assert all(0 < row["seconds"] < 60 and 0 <= row["peak MB"] < 500 for row in (bare, cut))


@pytest.mark.parametrize("frame", ["dimension", "residual"])
def test_folding_bert_large_takes_two_seconds_and_150_mb_at_most(frame):
    (row,) = bench.folding("bert-large", [frame]).to_dict("records")
    assert row["seconds"] < 2
    assert row["folded MB"] < row["peak MB"] + 1
    assert row["peak MB"] < 150
    if frame == "residual":  # V~, U~ and R~ of all weights, and a strength each
        assert row["folded MB"] < 3 * 128 * 1024 * 4 / 1e6 + 0.2


def test_a_size_stops_at_its_limit_and_says_after_how_many_rounds():
    found = bench.paired({"a": lambda: time.sleep(0.02), "b": lambda: None}, 50, 0.1)
    assert set(found["rounds"]) <= {3, 4, 5}
    assert set(bench.paired({"a": lambda: time.sleep(0.02)}, 9, 0.0)["rounds"]) == {3}
    assert set(bench.paired({"a": lambda: None}, 9)["rounds"]) == {9}


def test_memory_of_a_step_is_counted_to_the_byte():
    x, kept = torch.ones(1000), []
    assert bench.held(lambda: x.neg().exp()) == 8000  # both at once
    assert bench.held(lambda: x.neg_()) == 0
    assert bench.held(lambda: [x.exp().sum() for _ in range(3)]) == 4000 + 3 * 4  # one after another
    assert bench.held(lambda: kept.append(x.exp())) == 4000
    assert bench.held(kept.clear) == 0  # what was there before

    def learn():
        w = torch.ones(1000, requires_grad=True)
        (w.exp() * 1.0).sum().backward()

    assert 4 * 4000 <= bench.held(learn) < 4 * 4000 + 200  # w, exp(w) and two gradients


@pytest.mark.parametrize("train", [False, True])
def test_memory_of_a_step_is_linear_in_tokens_and_not_of_every_token_and_atom(train):
    size = {"tokens": 512, "d_in": 64, "d_out": 64, "atoms": 128, "top_k": 4}
    once, twice = (bench.weights([size | {"tokens": t}], repeats=2, train=train) for t in (512, 1024))
    one, two = (found.set_index("step")["step MB"] * 1e6 for found in (once, twice))
    assert (two <= 2.01 * one).all()
    assert (one >= 4 * 512 * 64).all()  # the output
    rows = 4 * 512 * 4 * 64  # what would be (T, K, D)
    assert one["gather"] - one["bare"] < rows < one["reference"] - one["bare"]


def test_formula_says_the_fit():
    fit = {"tokens": 0.981, "d_in": 1.02, "atoms": 0.012, "seconds": 3.1e-9, "r2": 0.9}
    assert bench.formula(fit) == "seconds = 3.1e-09 T^0.98 D^1.02 A^0.01"


@pytest.mark.parametrize("name", [n for n in bench.architectures() if n != "bert-large"])
def test_flops_of_a_host_are_those_of_the_formula(name):
    config = bench.architectures()[name]
    with torch.device("meta"):
        slots = find_slots(AutoModel.from_config(config))
    counted, width = bench.flops(config, tokens=3), slots[0].d_in
    for method, stream in (("UHL", True), ("UHL dimension", False)):
        routes = budget.routing_flops(Sizes(), slots, width, stream)
        assert counted[method] == 3 * (routes + budget.update_flops(Sizes(), slots, stream)) > 0
    for method in bench.RIVALS:
        assert counted[method] == 3 * budget.lora_flops(baselines.RANKS[method], slots) > 0
    assert counted["bare"] >= 3 * linear_flops(slots)  # attention may come on top


def test_work_counts_by_hand_and_as_torch_does():
    size = {"tokens": 10, "d_in": 6, "d_out": 4, "atoms": 5, "top_k": 2}
    assert roofline.work("bare", **size, train=False) == (480, 4 * (60 + 24 + 40))
    assert roofline.work("gather", **size, train=False) == (480 + 400, 4 * (124 + 10 * 14 + 5 * 10))
    assert roofline.work("dense", **size, train=True) == (2 * 480 + 3 * 1000, 4 * (2 * 124 + 3 * 190))
    for train in (False, True):
        steps = bench._weight_steps(**size, train=train)
        for name in ("bare", "LoRA r8", "dense"):
            compiled = roofline.work(f"{name}, compiled", **size, train=train)
            assert compiled == roofline.work(name, **size, train=train)
            with FlopCounterMode(display=False) as counter:
                steps[name]()
            assert counter.get_total_flops() == roofline.work(name, **size, train=train)[0], (name, train)


@pytest.mark.unchecked
def test_rivals_on_one_weight_begin_as_the_weight_and_are_measured_as_they_are_used():
    with pytest.raises(KeyError):
        roofline.work("VeRA r256", 8, 6, 6, 4, 2, False)
    linear = torch.nn.Linear(12, 18)
    before, x = [p.clone() for p in linear.parameters()], torch.randn(5, 12)
    for name in ("VeRA r256", "VB-LoRA"):
        made = bench._on_one_weight(linear, name)
        learned = {n for n, p in made.named_parameters() if p.requires_grad}
        assert learned, name
        assert not any("base_layer" in n for n in learned)
        if name == "VeRA r256":
            torch.testing.assert_close(made(x), linear(x))
    assert all(torch.equal(a, b) for a, b in zip(before, linear.parameters(), strict=True))
    assert all(p.requires_grad for p in linear.parameters())
    steps = bench._weight_steps(8, 6, 6, 4, 2, train=False, compiled=True)
    assert [name for name in steps if name.endswith("compiled")] == [
        f"{name}, compiled" for name in ("LoRA r8", "VeRA r256", "VB-LoRA", "gather")
    ]


@pytest.mark.unchecked
def test_what_does_not_compile_whole_is_left_out_and_others_stay_whole(caplog):
    graphs = []

    def counting(graph, inputs):
        graphs.append(graph)
        return graph.forward

    rivals = bench._methods("tiny", ["LoRA r8", "VB-LoRA"])  # in training VB-LoRA asks for a value, outside of it not
    for train, kept in ((True, ["LoRA r8"]), (False, ["LoRA r8", "VB-LoRA"])):
        with caplog.at_level(logging.WARNING, "uhl"):
            found = bench._compiled(rivals, lambda model, train=train: bench.host_step(model, 1, 4, train))
        assert list(found) == kept
        rivals = bench._methods("tiny", ["LoRA r8", "VB-LoRA"])
    assert "VB-LoRA does not compile as one graph, and is left out" in caplog.text
    for model in rivals.values():
        bench.host_step(torch.compile(model, fullgraph=True, backend=counting), 1, 4, train=False)()
    assert len(graphs) == 2


def test_points_lie_below_the_roofs_that_are_drawn():
    found = bench.weights([{"tokens": 64, "d_in": 32, "d_out": 32, "atoms": 8, "top_k": 2}], repeats=2)
    points = roofline.roofline(found)
    assert (points["GFLOP/s"] * points["seconds"] * 1e9).round().astype(int).tolist() == points["flops"].tolist()
    roofs = roofline.machine(side=64, megabytes=1, repeats=2)
    assert min(roofs.values()) > 0
    fig, shown = viz.roofline(points, roofs)
    assert shown is points
    for ax in fig.axes:
        assert ax.lines[0].get_ydata().max() >= points["GFLOP/s"].max()
    ways = ["bare", "LoRA r8", "dense", "gather", "reference"]
    assert [t.get_text() for t in fig.legends[0].get_texts()] == points["step"].tolist() == ways
    assert fig.axes[0].get_xscale() == fig.axes[0].get_yscale() == "log"


def test_times_of_a_weight_are_drawn_with_plain_numbers():
    base = {"tokens": 8, "d_in": 6, "d_out": 6, "atoms": 4, "top_k": 2}
    measured = pd.concat([bench.weights([base, base | {"tokens": 16}], repeats=2, train=t) for t in (False, True)])
    fig, shown = viz.speed_of_weights(measured, base)
    assert shown is measured
    assert [t.get_text() for t in fig.axes[0].get_xticklabels()] == ["8", "16"]
    ticks = [t.get_text() for ax in (fig.axes[0], fig.axes[4]) for t in ax.get_yticklabels()]
    assert ticks
    assert set(ticks) <= {"1", "1.5", "2", "3", "4", "6", "8", "12", "16", "24", "32", "48", "64"}
    for ax in (fig.axes[0], fig.axes[4]):  # and they do not run together
        low, high = np.log(ax.get_ylim())
        points = 72 * ax.get_window_extent().height / fig.dpi * (np.log(sorted(ax.get_yticks())) - low) / (high - low)
        assert (np.diff(points) > 8).all()  # the axes were a little higher when they were chosen


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_its_measurements_are_refused(tmp_path):
    with pytest.raises(UHLError, match="no CUDA device here"):
        gpu.measure(tmp_path)
    assert not list(tmp_path.iterdir())


def test_rivals_fit_every_shape_of_the_notebook():
    """VB-LoRA's vectors must divide all widths: 312 and 1,200 are no multiples of 256."""
    (model,) = bench._methods("tinybert-4l", ["VB-LoRA"]).values()
    assert model.peft_config["default"].vector_length == 24
    bench.host_step(model, 1, 4, train=True)()


def test_a_decoder_carries_the_methods_on_all_seven_weights():
    models = bench._methods("llama-tiny", ("LoRA r8", "UHL"))
    assert len(models["UHL"].base_model.attached().slots) == 7 * bench.DECODERS["llama-tiny"][0]
    lora = [n for n, _ in models["LoRA r8"].named_parameters() if "lora_A" in n]
    assert len(lora) == 7 * bench.DECODERS["llama-tiny"][0]
    bench.host_step(models["UHL"], 1, 4, train=True)()
