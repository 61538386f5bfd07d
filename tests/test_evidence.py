"""What is kept of each example, and archives of it: no label of a user's data leaves, and tables stay the same."""

import zipfile

import numpy as np
import pytest

from uhl import evidence, report, runs
from uhl.errors import UHLError
from uhl.runs import Settings

TAGS = ("O", "B-X", "I-X")


def test_a_damaged_archive_is_named_and_cells_without_predictions_stay_out(tmp_path):
    cell = runs.root() / "t" / "movies-s0"
    for name, files in {"port-a": ("manifest.json", "predictions.npz"), "quickstart": ("manifest.json",)}.items():
        (cell / name).mkdir(parents=True)
        for file in files:
            (cell / name / file).write_text('{"parameters": {"profile": "t"}}' * (1 if "json" in file else 99))
    archive = evidence.pack("t", tmp_path / "t.zip")
    assert zipfile.ZipFile(archive).namelist() == ["movies-s0/port-a/manifest.json", "movies-s0/port-a/predictions.npz"]
    whole = bytearray(archive.read_bytes())
    place = whole.index(b"manifest.json") + 20
    whole[place] ^= 0xFF
    archive.write_bytes(whole)
    with pytest.raises(UHLError, match="is not an archive of runs"):
        evidence.restore(archive)


@pytest.mark.parametrize(
    "name", ["../evil/x/manifest.json", "a-s0/x/run.sh", "/a-s0/x/manifest.json", "b/a-s0/x/manifest.json"]
)
def test_a_strange_archive_is_refused_and_writes_nothing(tmp_path, name):
    path = tmp_path / "a.zip"
    path.write_bytes(b"no zip")
    with pytest.raises(UHLError, match="is not an archive of runs"):
        evidence.restore(path)
    for odd in ('{"parameters": {"profile": "p"}, "artefacts": []}', "[]", '{"parameters": 1}'):
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr("a-s0/x/manifest.json", odd)
            archive.writestr("a-s0/x/predictions.npz", "")
        with pytest.raises(UHLError, match="is not an archive of runs"):
            evidence.restore(path)
    with zipfile.ZipFile(path, "w") as archive:
        manifest = '{"parameters": {"profile": "p"}, "rows": []}'
        for entry in ("a-s0/x/manifest.json", "a-s0/x/predictions.npz", name):
            archive.writestr(entry, manifest)
    with pytest.raises(UHLError, match="holds other files"):
        evidence.restore(path)
    assert not runs.root().exists()


@pytest.fixture(params=["mood", "names"])
def cells(request):
    """Two seeds of a task of the user's own, its source and a port, with predictions that are right three times in
    four: of sentences in groups, or of the words of sentences.
    """
    words, rng = request.param == "names", np.random.default_rng(0)
    length = rng.integers(1, 9, 200) if words else np.ones(200, int)
    gold = rng.integers(0, len(TAGS) if words else 2, length.sum())
    metric, labels = ("f1", TAGS) if words else ("accuracy", ("n", "p"))
    for seed in (0, 1):
        settings = Settings(profile="t", task=request.param, seed=seed, target="minilm-l3")
        for stage, arms in {
            "pretrain-canonical": ["uhl-canonical"],
            "port-minilm-l3": ["no-adapter", "anchor"],
        }.items():
            arrays, rows = {"test/group": np.arange(200, dtype=np.int32) // 2} if not words else {}, []
            for arm in arms:
                said = np.zeros_like(gold) if arm == "no-adapter" else np.where(rng.random(gold.size) < 0.75, gold, 0)
                for part, values in {"labels": said, "gold": gold, "length": length}.items():
                    arrays[f"{arm}/test/{part}"] = values.astype(np.int16)
                phase, host = ("source", "minilm-l6") if stage.startswith("pre") else ("zero-shot", "minilm-l3")
                known = {"arm": arm, "phase": phase, "target": host, "split": "test", "metric": metric}
                rows.append(runs.row(settings, **known, score=50.0, n=len(length)))
            folder = runs.cell_dir(settings, stage)
            told = {"anchor": {"agreement": 0.7, "kappa": 0.4}}
            runs.write_manifest(settings, stage, rows, labels=list(labels), reports=told if "port" in stage else {})
            np.savez(folder / "predictions.npz", **arrays)
    return request.param, gold


def same_tables(one, other):
    return one.keys() == other.keys() and all(
        np.array_equal(one[cell][seed], other[cell][seed]) for cell in one for seed in one[cell]
    )


def test_outcomes_make_the_tables_that_predictions_make_and_hold_no_label(cells, tmp_path, monkeypatch):
    task, gold = cells
    tables, forecast, groups = report.gather("t"), report.calibration("t"), report.groups_of("t", task)
    assert len(forecast) == 2
    assert 0.5 < forecast["measured"].min() < forecast["measured"].max() < 0.9
    whole, archive = runs.root(), evidence.pack("t", tmp_path / "t.zip")
    assert evidence.pack("t", tmp_path / "again.zip").read_bytes() == archive.read_bytes()
    monkeypatch.setenv("UHL_RUNS", str(tmp_path / "elsewhere"))
    restored = evidence.restore(archive)
    kept = {name for cell in restored for name in evidence.predictions(cell)}
    assert {name.rpartition("/")[2] for name in kept} <= {"counts", "examples", "alike", "group"}
    assert same_tables(report.gather("t"), tables)
    assert report.calibration("t").equals(forecast)
    assert np.array_equal(report.groups_of("t", task), groups)
    assert evidence.pack("t", tmp_path / "again.zip").read_bytes() == archive.read_bytes()
    if task == "mood":  # who says the same of all is right where the label is that
        found = tables["mood", "minilm-l3", "zero-shot", "no-adapter"][0][:, 0]
        assert found.sum() == (gold == 0).sum()
        assert abs(np.corrcoef(found, gold == 0)[0, 1]) < 0.2
        assert np.bincount(groups, found).tolist() == np.bincount(np.arange(200) // 2, gold == 0).tolist()
    # cells that ran again lie beside restored ones
    place = f"{task}-s1/port-minilm-l3/predictions.npz"
    (runs.root() / "t" / place).write_bytes((whole / "t" / place).read_bytes())
    assert same_tables(report.gather("t"), tables)
    with pytest.raises(UHLError, match="pretrain-canonical was restored without labels.* run it again"):
        report.calibration("t")


def test_examples_of_other_data_are_told_apart(cells, tmp_path):
    task, _ = cells
    path = runs.root() / "t" / f"{task}-s1" / "port-minilm-l3" / "predictions.npz"
    with np.load(path) as stored:
        arrays = dict(stored)
    arrays["anchor/test/gold"] = 1 - arrays["anchor/test/gold"]
    np.savez(path, **arrays)
    with pytest.raises(UHLError, match="scored on other test examples"):
        report.gather("t")
    np.savez(path, **{name: x for name, x in arrays.items() if not name.endswith("length")})
    with pytest.raises(UHLError, match="lacks test predictions of .*; delete that folder"):
        report.gather("t")
