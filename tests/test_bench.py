"""The measuring itself: pairs, files that are gone on with, memory by process, and fits that find a known law."""

import numpy as np
import pandas as pd
import torch

from uhl import bench


def test_a_measured_size_is_not_measured_again(tmp_path, monkeypatch):
    size = {"tokens": 8, "d_in": 6, "d_out": 6, "atoms": 4, "top_k": 2}
    file = tmp_path / "weights.csv"
    first = bench.weights([size], file, repeats=2)
    monkeypatch.setattr(bench, "paired", lambda *_: 1 / 0)
    pd.testing.assert_frame_equal(bench.weights([size], file, repeats=2), first, check_exact=False)
    assert set(first["step"]) == {"bare", "LoRA r8", "dense", "gather", "reference"}


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


def test_folding_bert_large_takes_two_seconds_and_150_mb_at_most():
    (row,) = bench.folding("bert-large", ["dimension"]).to_dict("records")
    assert row["seconds"] < 2
    assert row["folded MB"] < row["peak MB"] + 1
    assert row["peak MB"] < 150


def test_folding_keeps_no_projector_of_a_weight():
    """A residual frame's products, 2 x 12 x 6 MB for BERT-base, are never held: little beyond what is folded."""
    (row,) = bench.folding("bert-base", ["residual"]).to_dict("records")
    assert row["folded MB"] > 40
    assert row["peak MB"] < row["folded MB"] + 40
