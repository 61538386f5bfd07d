"""The stages on tiny hosts, for the three kinds of task: the results contract, archives, searches, files."""

import io
import json
import logging
import multiprocessing
import os
import shutil
import time
import zipfile
from copy import deepcopy
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import optuna
import pandas as pd
import pytest
import torch
from datasets import Dataset, DatasetDict
from optuna.storages._heartbeat import HeartbeatThread
from transformers import TrainerState
from world import sentences

from uhl import (
    archives,
    attempts,
    audit,
    budget,
    compression,
    evidence,
    porting,
    report,
    results,
    runs,
    search,
    stages,
    stats,
    store,
    teacher,
    viz,
)
from uhl.adapter import UHLAdapter
from uhl.anchors import observe
from uhl.augment import ByTurns, Perturbed
from uhl.config import ARMS, METHODS
from uhl.errors import DivergenceError, UHLError
from uhl.files import npz
from uhl.fits import basis_of, upper_levels
from uhl.grid import Grid
from uhl.host import find_slots
from uhl.outcome import Outcome, merge
from uhl.peft_method import attach
from uhl.porting import Shared, at_work, port, predict_texts
from uhl.runs import Settings
from uhl.tasks import load_task, plain_text
from uhl.train import Classifier, Prediction, predict, train

pytestmark = pytest.mark.unchecked


@pytest.fixture
def tiny_world(make_encoder, task, monkeypatch):
    """Stages see a tiny source, a tiny target and the toy task."""
    shapes = {"big": (3, 24), "small": (2, 16), "other": (2, 20)}
    monkeypatch.setattr(attempts, "SECOND", ("small", "other"))
    monkeypatch.setattr(
        stages, "load_encoder", lambda name: replace(make_encoder(*shapes[name]), name=name, revision=name)
    )
    monkeypatch.setattr(stages.tasks, "load_task", lambda name: task)
    return Settings(
        profile="t",
        source="big",
        target="small",
        task="mood",
        anchors=40,
        anchor_text="in-domain",
        epochs=1,
        batch=16,
        tune_steps=4,
        tune_batch=8,
        more_anchors=20,
        refresh_steps=3,
    )


def write_rows(path, kind, count, seed):
    """Rows of a toy task in a file, under column names of their own."""
    texts = sentences(count, seed)
    good = [int("good" in t or "fine" in t) for t in texts]
    if kind == "token":
        names = {"good": "B-JOY", "fine": "B-JOY", "great": "I-JOY"}
        rows = [{"words": t.split(), "ner": [names.get(w, "O") for w in t.split()]} for t in texts]
    else:
        rows = [{"ask": "is it good", "about": t, "answer": ("no", "yes")[g]} for t, g in zip(texts, good, strict=True)]
    path.write_text("\n".join(map(json.dumps, rows)))


@pytest.fixture
def own_files(tiny_world, tmp_path, monkeypatch):
    """Settings of a pair or token task in the user's own files, with the columns named."""

    def make(kind):
        folder = tmp_path / "mood.v2"
        folder.mkdir()
        for seed, (split, count) in enumerate({"train": 96, "dev": 16, "test": 16}.items()):
            write_rows(folder / f"{split}.jsonl", kind, count, seed)
        monkeypatch.setattr(stages.tasks, "load_task", load_task)
        monkeypatch.setattr(stages.tasks, "generic_text", lambda: sentences(80, 4))
        own = {"text": "ask", "text_pair": "about", "label": "answer"}
        own = {"tokens": "words", "tags": "ner"} if kind == "token" else own
        about = {"task": str(folder), "kind": kind, "columns": own, "anchor_text": "generic"}
        return Settings(**tiny_world.model_dump() | about)

    return make


TRAINED: dict[str, bytes] = {}  # by settings: files that `trained` has made


def trained(settings):
    """The canonical adapter in its cell, for tests that need one; trained for the first of them alone."""
    path, key = stages.adapter_path(settings, "anchor"), settings.model_dump_json()
    if key in TRAINED:
        path.parent.mkdir(parents=True)
        path.write_bytes(TRAINED[key])
    else:
        stages.pretrain(settings, "canonical")
        TRAINED[key] = path.read_bytes()
    return store.load(path)


@pytest.mark.checked
@pytest.mark.parametrize("kind", ["sentence", "pair", "token"])
def test_a_teacher_s_decisions_are_those_of_the_file(tiny_world, own_files, monkeypatch, kind):
    settings = tiny_world if kind == "sentence" else own_files(kind).model_copy(update={"unlabelled": 8})
    settings = settings.model_copy(update={"teacher": "full", "full_rate": 5e-3, "steps": 6})
    seen, asked = [], train

    def watched(classifier, encoder, task, config, *rest):
        seen.append((task, config.steps))
        return asked(classifier, encoder, task, config, *rest)

    monkeypatch.setattr(stages, "train", watched)
    adapter, outcome = stages.pretrain(settings, "canonical")
    labelled = stages.load_data(settings)
    ((lesson, steps),) = seen
    assert steps == 6
    count, more = (len(labelled.data[split]) for split in ("train", "unlabelled"))
    label, rows = "tags" if kind == "token" else "label", lesson.data["train"]
    assert len(rows) == count + more
    assert rows[label][:count] == labelled.data["train"][label]
    hidden = rows[label][count:] if kind != "token" else [x for tags in rows[label][count:] for x in tags]
    assert set(hidden) == {-100}
    says = np.load(runs.cell_dir(settings, "teacher-full") / "says.npz")
    told = [x if kind == "token" else [x] for x in rows["teacher"]]
    np.testing.assert_allclose(np.concatenate(told), np.concatenate([says["train"], says["unlabelled"]]))
    step = (says["anchors"].max(0) - says["anchors"].min(0)) / 127
    assert (np.abs(adapter.anchors.decided().numpy() - says["anchors"]) <= step + 1e-2).all()
    alone, _ = stages.pretrain(settings.model_copy(update={"teacher": None, "profile": "alone"}), "canonical")
    own = alone.anchors.decided()  # another's
    assert np.abs(own.numpy() - says["anchors"]).max() > 10 * step.max()
    about = outcome.details["teacher"]
    assert about["method"] == adapter.info["teacher"] == "full"
    outcome.finish("pretrain-canonical", **outcome.details)
    cell = runs.cell_dir(settings, "pretrain-canonical")
    gold = labelled.data["test"][label]
    flat = np.concatenate([np.atleast_1d(x) for x in gold])
    assert evidence.of_source(cell, "test").tolist() == says["test"].tolist()  # what ports are compared with
    if kind != "token":
        assert about["scores"]["test"] == pytest.approx(100 * (says["test"] == flat).mean())
    _, dimension = stages.pretrain(settings, "dimension")  # in a cell of its own, with the same teacher
    dimension.finish("pretrain-dimension", **dimension.details)
    (told,) = results.teachers(settings.profile).values()
    assert stats.score_of(told[settings.seed].sum(0)) == pytest.approx(about["scores"]["test"])
    with pytest.raises(UHLError, match="have a teacher's logits"):
        attempts.measure(settings, adapter, *[stages.load_encoder("small")] * 2, labelled, ())


def test_a_teacher_is_trained_once_for_both_adapters_and_anew_for_other_settings(tiny_world, monkeypatch):
    settings = tiny_world.model_copy(update={"teacher": "full", "steps": 3})
    made, really = [], teacher.run_baseline
    monkeypatch.setattr(teacher, "run_baseline", lambda *given, **named: made.append(1) or really(*given, **named))
    first, _ = stages.pretrain(settings, "canonical")
    stages.pretrain(settings, "dimension")
    assert len(made) == 1
    stages.pretrain(settings.model_copy(update={"teacher_weight": 0.2}), "canonical")
    assert len(made) == 1
    stages.pretrain(settings.model_copy(update={"full_rate": 5e-4}), "canonical")
    assert len(made) == 2
    file = runs.cell_dir(settings, "teacher-full") / "says.npz"
    file.write_bytes(file.read_bytes()[:-100])  # cut off
    again, _ = stages.pretrain(settings, "canonical")
    assert len(made) == 3
    torch.testing.assert_close(again.anchors.decided(), first.anchors.decided())


def test_the_trials_of_a_search_have_a_teacher_in_common_that_is_not_asked_about_test(tiny_world, monkeypatch):
    made, really = [], teacher.run_baseline
    monkeypatch.setattr(teacher, "run_baseline", lambda *given, **named: made.append(1) or really(*given, **named))
    settings = tiny_world.model_copy(update={"teacher": "full", "steps": 3})
    for rate in (1e-3, 2e-3):
        row = search.run(settings, "uhl-canonical", {"rate": rate})
        assert row["split"] == "dev"
    assert len(made) == 1
    (file,) = (runs.root() / f"{settings.profile}-search").rglob("says.npz")
    assert not any("test" in name for name in np.load(file))
    assert set(json.loads(str(np.load(file)["about"]))["scores"]) == {"dev"}


def run_all(settings):
    for projector in ("canonical", "dimension"):
        _, outcome = stages.pretrain(settings, projector)
        outcome.finish(f"pretrain-{projector}")
    outcome = stages.zero_shot(settings)
    outcome.finish("port-small", **outcome.details)
    tuned = [o for o in (stages.tune(settings, arm) for arm in stages.TUNED_ARMS) if o]
    merge(tuned).finish("tune-small")
    for host, name in (("source", "big"), ("target", "small")):
        merge(stages.baselines(settings, host).values()).finish(f"baselines-{name}")
    return outcome


@pytest.mark.checked
@pytest.mark.parametrize("kind", ["sentence", "pair", "token"])
def test_stages_fill_the_results_contract(tiny_world, own_files, kind):
    settings = tiny_world if kind == "sentence" else own_files(kind)
    methods = METHODS if kind == "sentence" else ("head", "sat-lora", "full")
    settings = settings.model_copy(update={"baselines": methods})
    zero = run_all(settings)
    frame = runs.load_results("t")
    assert tuple(frame.columns) == runs.COLUMNS
    test = frame[frame["split"] == "test"]
    cells = {phase: set(rows["arm"]) for phase, rows in test.groupby("phase")}
    assert cells["source"] == {"uhl-canonical", "uhl-dimension", *methods}
    assert cells["retrained"] == set(methods)
    assert cells["zero-shot"] == {"no-adapter", *ARMS} - {"lineage", "embedding"}
    assert cells["tuned"] == {"dimension", "anchor", "zero-atoms", "random-p", "untrained"}
    assert "equal widths" in zero.details["undefined"]["lineage"]
    assert "shared vocabulary" in zero.details["undefined"]["embedding"]
    assert (test["n"] == 16).all()
    assert set(test["metric"]) == {"f1" if kind == "token" else "accuracy"}
    assert set(test["task"]) == {"mood"}
    from uhl import claims

    table = results.summary("t")  # raises when a score differs from the stored predictions
    assert len(table) == len(test)
    assert not table[table["phase"] == "retrained"].set_index("arm").loc["full", "extra_flops_pct"]
    text = report.markdown("t")
    assert "shuffled anchors" in text
    assert "nan" not in text
    tables = results.gather("t")
    pairs = results.paired(tables)
    assert len(pairs) >= 8
    assert (pairs["p holm"] >= pairs["p"]).all()
    assert pairs["p mcnemar"].isna().all() == (kind == "token")
    judged = claims.judge(table, tables, {}, audit.undefined("t"))
    ours, without = {"dimension", "anchor", "refresh"}, set(claims.WITHOUT)
    others = kind == "sentence"  # LoRA at 1 MB ran there alone
    for number, arms in {
        "1": ours | without,
        "2 tuned": (ours | without) - {"refresh"},
        "3": (ours | without) - {"refresh"} if others else set(),
    }.items():
        rows = judged[judged["claim"].str.startswith(number)]
        assert set(rows["arm"]) == {*claims.PORTED, *without}
        assert set(rows["arm"][rows["seeds"] > 0]) == arms
        assert (rows["verdict"].str.startswith("not ") & (rows["verdict"] != "not decidable")).equals(
            rows["seeds"] == 0
        )
        assert set(rows["verdict"][rows["arm"].isin(["lineage", "embedding"])]) == {"not defined"}
    lacks = judged[judged["claim"].str.startswith("3")].set_index("arm")["reason"]
    assert lacks["lineage"] == "lineage is not defined there"
    assert (lacks["anchor"] == "LoRA at 1 MB was not run") == (not others)
    assert audit.missing("t") == []
    cells = [(phase, arm) for phase in ("zero-shot", "tuned") for arm in ("lineage", "embedding")]
    assert set(audit.undefined("t")) == {(settings.task_name, "small", *cell) for cell in cells}
    assert set(judged["verdict"]) <= {"held", "refuted", "not decidable", "not run", "not defined"}
    told = claims.markdown(claims.of_profile("t"), "t", Path("README.md")).splitlines()
    assert sum(line.startswith("| 1 ") for line in told) == len(ours | without)
    assert all(" of 1 |" in line for line in told if line.startswith(("| 1 ", "| 2 tuned")))
    assert sum("| *ported head, " in line for line in told) == (6 if others else 4)
    assert any(line.startswith("| 3 ") and "| every arm | not run |" in line for line in told) == (not others)
    moved = results.before_and_after(table, tables, {})
    assert moved.equals(table[table["phase"].isin(["zero-shot", "tuned"])])  # of as many seeds
    board = results.leaderboard(table, moved)
    assert {"anchor", "sat-lora", "full", "no-adapter"} <= set(board["method"])
    assert (board[board["method"] == "anchor"]["zero-shot"] > 0).all()
    assert not board.duplicated(["task", "target", "method"]).any()
    assert (board[board["method"] == "full"]["memory MB"] > 0).all()
    learned = results.curves("t")
    assert {"uhl-canonical", "sat-lora", "anchor"} <= set(learned["arm"])
    assert set(learned["phase"]) == {"source", "tuned", "retrained"}
    trust = results.calibration("t").set_index("arm")
    assert set(trust.index) == {"anchor", "zero-atoms", "random-p"}
    for arm, row in trust.iterrows():
        assert 0 <= row["predicted"] <= 1
        assert np.isnan(row["expected"]) if kind == "token" else row["expected"] >= 0
        assert row["measured"] == pytest.approx(stages.agreement(settings, zero.predictions[f"{arm}/test"]))
    few = settings.model_copy(update={"arms": ("anchor",)})  # its port does not say that there is no lineage
    stages.zero_shot(few).finish("port-small")
    assert audit.missing("t") == []
    shutil.rmtree(runs.cell_dir(settings, "pretrain-canonical"))
    assert results.calibration("t").empty  # what is missing is named elsewhere


def test_on_a_target_all_methods_are_trained_as_ours_is_tuned(tiny_world, monkeypatch):
    """As many steps of as many sentences, one rate of the head, no charge for atoms, the same levels below the head."""
    _, source = stages.pretrain(tiny_world.model_copy(update={"steps": 5}), "canonical")
    assert {row["steps"] for row in source.rows} == {5}  # and not an epoch's
    tuned, trained, train, baseline = [], [], stages.train, stages.run_baseline

    def tune(classifier, encoder, task, config, *rest):
        tuned.append((config, classifier.frame.levels))
        return train(classifier, encoder, task, config, *rest)

    def retrain(method, encoder, task, begin, config, folder, watch, sizes, about):
        trained.append((config, begin.frame.levels))
        assert sizes.top_k == 1
        assert "levels" in about
        return baseline(method, encoder, task, begin, config, folder, watch, sizes, about)

    monkeypatch.setattr(stages, "train", tune)
    monkeypatch.setattr(stages, "run_baseline", retrain)
    stages.tune(tiny_world, "anchor")
    methods = tiny_world.model_copy(update={"baselines": ("lora-r8", "sat-lora"), "top_k": 1})
    stages.baselines(methods, "target")
    ((config, levels),) = tuned
    assert len(levels) > 1
    assert len(trained) == 2
    for rival, read in trained:
        same = ("steps", "batch", "head_rate", "lambda_f", "max_length", "seed")
        assert [getattr(rival, name) for name in same] == [getattr(config, name) for name in same]
        assert read == levels
    assert config.lambda_f == 0
    assert config.head_rate == tiny_world.head_rate


def test_atoms_that_do_not_act_cost_nothing(tiny_world, monkeypatch):
    monkeypatch.setattr("uhl.porting.SCALES", (0.0,))
    trained(tiny_world)
    settings = tiny_world.model_copy(update={"arms": ("anchor", "zero-atoms", "random-p")})
    ported, alone = stages.zero_shot(settings), stages.tune(settings, "zero-atoms")
    rows = [row for row in ported.rows + alone.rows if row["arm"] != "no-adapter"]
    assert {(row["extra_flops_pct"], row["active_atoms"]) for row in rows} == {(0.0, 0.0)}
    anchor = stages.tune(settings, "anchor")  # the bias of its task acts, at any scale
    assert all(row["extra_flops_pct"] > 0 and row["active_atoms"] > 0 for row in anchor.rows)
    assert anchor.rows[0]["trainable_params"] > alone.rows[0]["trainable_params"]


def test_times_are_medians_over_seeds(tiny_world):
    for seed, seconds in enumerate((3.0, 4.0, 1000.0)):  # the machine slept during the last
        settings = tiny_world.model_copy(update={"seed": seed, "baselines": ("head",)})
        outcome = merge(stages.baselines(settings, "target").values())
        for row in outcome.rows:
            row["seconds"] = seconds
        outcome.finish("baselines-small")
    (row,) = results.summary("t").to_dict("records")
    assert (row["seeds"], row["seconds"]) == (3, 4.0)


def test_an_archive_gives_back_the_tables(tiny_world, tmp_path, monkeypatch):
    for kind in ("canonical", "dimension"):
        _, outcome = stages.pretrain(tiny_world, kind)
        outcome.finish(f"pretrain-{kind}")
    before = results.summary("t")
    folder = tmp_path / "adapters"
    assert [f.name for f in archives.keep_adapters("t", folder)] == [
        f"mood-s0-{k}.safetensors" for k in ("canonical", "dimension")
    ]
    archive = archives.pack("t", tmp_path / "t.zip")
    assert archives.pack("t", tmp_path / "again.zip").read_bytes() == archive.read_bytes()
    assert archives.restore(archive) == []  # what is there stays
    monkeypatch.setenv("UHL_RUNS", str(tmp_path / "elsewhere"))
    cells = archives.restore(archive)
    assert [cell.name for cell in cells] == ["pretrain-canonical", "pretrain-dimension"]
    files = [p for cell in cells for p in cell.iterdir()]
    assert sorted(p.name for p in files) == ["manifest.json", "manifest.json", "predictions.npz", "predictions.npz"]
    assert len({p.stat().st_mtime_ns for p in files}) == 1  # else a batch would make one again
    assert results.summary("t").equals(before)
    ported = tiny_world.model_copy(update={"arms": ("anchor",)})
    with pytest.raises(UHLError, match="a cell restored from an archive may have none"):
        stages.zero_shot(ported)
    (folder / "mood-s0-dimension.safetensors").unlink()  # one may lack
    assert archives.restore(archive, folder) == []  # into the cells that are there
    assert [f.parent.name for f in runs.root().glob("t/*/*/adapter.safetensors")] == ["pretrain-canonical"]
    stages.zero_shot(ported)
    monkeypatch.setenv("UHL_RUNS", str(tmp_path / "with"))
    assert len(archives.restore(archive, folder)) == 2
    assert [f.parent.name for f in runs.root().glob("t/*/*/adapter.safetensors")] == ["pretrain-canonical"]
    assert [f.name for f in archives.keep_adapters("t", folder)] == ["mood-s0-canonical.safetensors"]
    (path,) = runs.root().glob("t/*/*/adapter.safetensors")
    path.write_bytes(b"of a training that was interrupted before its manifest")
    assert archives.keep_adapters("t", folder) == []
    monkeypatch.setenv("UHL_RUNS", str(tmp_path / "none"))
    shutil.copy(files[0], folder / "mood-s0-canonical.safetensors")
    with pytest.raises(UHLError, match=r"mood-s0-canonical.safetensors is corrupt.*trained another"):
        archives.restore(archive, folder)
    assert not runs.root().exists()


def test_a_file_beyond_the_limit_is_told(tiny_world, monkeypatch, caplog):
    with caplog.at_level(logging.WARNING, "uhl"):
        stages.pretrain(tiny_world.model_copy(update={"steps": 1}), "canonical")
    assert not caplog.text
    monkeypatch.setattr(stages, "LIMIT_BYTES", 1000)
    with caplog.at_level(logging.WARNING, "uhl"):
        stages.pretrain(tiny_world.model_copy(update={"steps": 1}), "canonical")
    assert "more than 1,000; lower `more_anchors`" in caplog.text


@pytest.mark.parametrize("kind", ["pair", "token"])
def test_an_archive_of_own_data_holds_none_of_it(own_files, tmp_path, monkeypatch, kind):
    settings, test = own_files(kind).model_copy(update={"baselines": ("head",)}), tmp_path / "mood.v2" / "test.jsonl"
    if kind == "pair":  # two questions on each passage
        test.write_text(test.read_text() + "\n" + test.read_text().replace("is it good", "is it so"))
    outcome = merge(stages.baselines(settings, "source").values())
    said = Prediction([0, 1], [1, 1], [], 50.0, 0.0)
    outcome.predictions |= {f"{evidence.TEACHER}/{split}": said for split in settings.splits}
    cell = outcome.finish("baselines-big").parent
    before, whole = results.summary("t"), dict(evidence.predictions(cell))
    assert ("test/group" in whole) == (kind == "pair")
    archive = archives.pack("t", tmp_path / "t.zip")
    assert archives.pack("t", tmp_path / "again.zip").read_bytes() == archive.read_bytes()
    with zipfile.ZipFile(archive) as file, file.open("mood-s0/baselines-big/predictions.npz") as inner:
        held = np.load(io.BytesIO(inner.read()))
        assert {name.rpartition("/")[2] for name in held.files} == {"labels", "examples"}
        texts = {text for split in ("train", "dev", "test") for text in plain_text(outcome.task, split)}
        assert not any(text in file.read(name).decode(errors="ignore") for name in file.namelist() for text in texts)
    for name, broken in {"short": held.files[:1], "long": [*held.files, "head/other/labels"]}.items():
        with zipfile.ZipFile(archive) as file, zipfile.ZipFile(tmp_path / f"{name}.zip", "w") as bad:
            bad.writestr("mood-s0/baselines-big/manifest.json", file.read("mood-s0/baselines-big/manifest.json"))
            arrays = {key: held[key] if key in held.files else [0] for key in broken}
            bad.writestr("mood-s0/baselines-big/predictions.npz", npz(arrays))
    rows, elsewhere = test.read_text(), tmp_path / "elsewhere"
    monkeypatch.setenv("UHL_RUNS", str(elsewhere))
    with zipfile.ZipFile(archive) as file, zipfile.ZipFile(tmp_path / "bad.zip", "w") as bad:
        for name in file.namelist():
            bad.writestr(name, file.read(name) if name.endswith("json") else file.read(name)[:99])
    for name in ("bad", "short", "long"):
        with pytest.raises(UHLError, match="predictions of mood-s0/baselines-big in the archive are damaged"):
            archives.restore(tmp_path / f"{name}.zip")
    test.write_text("\n".join(reversed(rows.splitlines())))
    with pytest.raises(UHLError, match="mood-s0/baselines-big was scored on other test examples than mood has here"):
        archives.restore(archive)
    test.write_text(rows)
    moved = test.parent.rename(tmp_path / "lost")
    with pytest.raises(UHLError, match=r"mood\.v2"):
        archives.restore(archive)
    assert not elsewhere.exists()
    moved.rename(test.parent)
    (cell,) = archives.restore(archive)
    assert results.summary("t").equals(before)
    back = evidence.predictions(cell)
    needed = {name for name in whole if not name.startswith(evidence.TEACHER) or name.endswith("/labels")}
    assert set(back) == needed
    assert all((back[name] == whole[name]).all() and back[name].dtype == whole[name].dtype for name in needed)
    assert archives.pack("t", tmp_path / "third.zip").read_bytes() == archive.read_bytes()


def test_baselines_of_the_profile_beside_are_not_run_again(tiny_world, task, monkeypatch):
    two = tiny_world.model_copy(update={"baselines": ("head", "bitfit")})
    monkeypatch.setattr(runs, "commit", lambda: "first")
    monkeypatch.setattr(runs, "hardware", lambda: "one and another")
    first = merge(stages.baselines(two, "target").values())
    entry = json.loads(first.finish("baselines-small").read_text())
    monkeypatch.setattr(runs, "commit", lambda: "second")
    monkeypatch.setattr(runs, "hardware", lambda: "one")
    grid = SimpleNamespace(beside="t")
    monkeypatch.setattr(stages, "Grid", SimpleNamespace(known=lambda profile: None if profile == "t" else grid))
    made, really = [], stages.run_baseline
    monkeypatch.setattr(stages, "run_baseline", lambda method, *rest: made.append(method) or really(method, *rest))
    mine = two.model_copy(update={"profile": "u", "arms": ("anchor",), "baselines": ("head", "lora-r8", "bitfit")})
    found = stages.baselines(mine, "target")
    assert made == ["lora-r8"]
    theirs = {row["arm"]: row for row in entry["rows"] if row["split"] == "test"}
    for method in two.baselines:
        assert found[method].rows == [row | {"profile": "u"} for row in first.rows if row["arm"] == method]
        said, before = (outcome.predictions[f"{method}/test"] for outcome in (found[method], first))
        assert (said.labels, said.gold, said.score) == (before.labels, before.gold, before.score)
        assert found[method].table()["score"].item() == theirs[method]["score"]
        assert found[method].curves[method] == first.curves[method]
    told = json.loads(merge(found.values()).finish("baselines-small").read_text())
    assert (told["commit"], told["hardware"]) == ("first, second", "another and one")
    for change in ({"bitfit_rate": 0.5}, {"seed": 1}, {"tune_steps": 5}, {"splits": ("test",)}):
        made.clear()
        stages.baselines(mine.model_copy(update=change | {"baselines": ("bitfit",)}), "target")
        assert made == ["bitfit"]
    made.clear()
    once = mine.model_copy(update={"baselines": ("head",)})
    for split in ("train", "test"):
        data = task.data[split]
        other = replace(task, data=DatasetDict({**task.data, split: data.select(range(len(data) - 1))}))
        monkeypatch.setattr(stages.tasks, "load_task", lambda name, other=other: other)
        stages.baselines(once.model_copy(update={"profile": f"u-{split}"}), "target")
        assert made == ["head"]
        made.clear()
    monkeypatch.setattr(stages.tasks, "load_task", lambda name: task)
    stages.baselines(once.model_copy(update={"profile": "v"}), "target")
    assert not made
    known = entry["models"] | {"small": "another revision"}
    (runs.cell_dir(two, "baselines-small") / "manifest.json").write_text(json.dumps(entry | {"models": known}))
    stages.baselines(once.model_copy(update={"profile": "w"}), "target")
    assert made == ["head"]


def test_a_search_goes_on_where_it_was_stopped_and_never_scores_test(tiny_world, monkeypatch):
    told, trained, pretrain = [], [], stages.pretrain
    grid = {"rate": [1e-3, 3e-3], "top_k": [1]}
    study = search.search(tiny_world, "uhl-canonical", grid, trials=1, tell=told.append)
    assert len(search.table([study])) == 1
    study = search.search(tiny_world, "uhl-canonical", grid, tell=told.append)
    rows = search.table([study])
    assert [dict(r) for r in told] == rows.to_dict("records")
    assert sorted(rows["settings"]) == ["rate 0.001, top_k 1", "rate 0.003, top_k 1"]  # a grid ends by itself
    assert set(rows["state"]) == {"complete"}
    stored = [json.loads(p.read_text()) for p in (runs.root() / "t-search").glob("*/*/trial/manifest.json")]
    assert sorted(m["rows"][0]["score"] for m in stored) == sorted(rows["score"])
    assert {row["split"] for m in stored for row in m["rows"]} == {"dev"}
    with monkeypatch.context() as patch:
        patch.setattr(stages, "pretrain", None)  # finished trials are read, not run, in another database too
        url = f"sqlite:///{runs.root() / 'other.db'}"
        other = search.search(tiny_world, "uhl-canonical", grid, url=url)
        assert sorted(search.table([other])["score"]) == sorted(rows["score"])
        elsewhere = tiny_world.model_copy(update={"target": "other", "tune_rate": 0.5})  # no settings of the source
        assert len(search.search(elsewhere, "uhl-canonical", grid).trials) == 2  # nothing is left to try
    wider = tiny_world.model_copy(update={"lambda_f": 0.02})  # another study
    assert len(search.table([search.search(wider, "uhl-canonical", grid, trials=1)])) == 1
    with monkeypatch.context() as patch:
        patch.setattr(runs, "PROTOCOL", runs.PROTOCOL + 1)  # nor are scores of another release read
        patch.setattr(stages, "pretrain", lambda *given: trained.append(given) or pretrain(*given))
        assert len(search.table([search.search(tiny_world, "uhl-canonical", grid, trials=1)])) == len(trained) == 1


def test_an_interrupted_trial_is_run_again(tiny_world, monkeypatch):
    calls = []

    def stopped(*args):
        calls.append(args)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(stages, "pretrain", stopped)
        with pytest.raises(KeyboardInterrupt):
            search.search(tiny_world, "uhl-canonical", {"rate": [1e-3, 3e-3]})
    study = search.search(tiny_world, "uhl-canonical", {"rate": [1e-3, 3e-3]})
    assert len(calls) == 1
    assert sorted(search.table([study])["settings"]) == ["rate 0.001", "rate 0.003"]
    with pytest.raises(UHLError, match="unknown method to search on the source 'lora'; choose one of: uhl-canonical"):
        search.search(tiny_world, "lora", {"rate": [1e-3]})
    on_target = tiny_world.model_copy(update={"hosts": ("target",)})
    with pytest.raises(UHLError, match="unknown method to search on the target 'uhl-canonical'"):
        search.search(on_target, "uhl-canonical", {"rate": [1e-3]})
    spaces = {"full": {"full_rate": [1e-3]}, "tune-anchor": {"tune_rate": [1e-3]}}
    spaces["uhl-canonical"] = {"rate": [1e-3]}
    assert list(search.methods_of(spaces, "source")) == ["full", "uhl-canonical"]
    assert list(search.methods_of(spaces, "target")) == ["full"]  # tuning needs a trained adapter
    assert list(search.methods_of(spaces, "target", ["tune-anchor"])) == ["tune-anchor"]
    with pytest.raises(UHLError, match="unknown method to search on the source 'tune-anchor'"):
        search.methods_of(spaces, "source", ["tune-anchor"])


def test_a_search_is_over_what_its_method_trains_with(tiny_world):
    """And neither over another's settings nor over what its scores are measured on."""
    there = tiny_world.model_copy(update={"hosts": ("target",)})
    for settings, method, name in (
        (tiny_world, "uhl-canonical", "splits"),
        (tiny_world, "uhl-canonical", "seed"),
        (tiny_world, "uhl-canonical", "eval_size"),
        (tiny_world, "uhl-canonical", "dimension_rate"),
        (tiny_world, "lora-r8", "lambda_f"),
        (there, "lora-r8", "batch"),  # tune_batch there
        (there, "sat-lora", "lambda_f"),  # no charge there
        (there, "tune-anchor", "mixer_rate"),
    ):
        with pytest.raises(UHLError, match=f"is not searched over '{name}', which has no part in its training; it may"):
            search.search(settings, method, {name: [1]})
    assert not runs.root().exists()
    search.check(tiny_world, "uhl-canonical", {"rate": [1], "top_k": [1], "lambda_f": [1], "batch": [1]})
    search.check(there, "sat-lora", {"sat_lora_rate": [1], "top_k": [1], "tune_batch": [1]})
    search.check(there, "tune-anchor", {"tune_rate": [1], "lambda_q": [1]})


@pytest.mark.parametrize(
    ("method", "host", "stage"),
    [
        ("uhl-canonical", "source", "pretrain-canonical"),
        ("full", "source", "baselines-minilm-l6"),
        ("full", "target", "baselines-mpnet-base"),
        ("tune-anchor", "target", "tune-mpnet-base"),
    ],
)
def test_trials_have_the_settings_of_the_batch(method, host, stage):
    found = search.settings_of("offline-full", method, "amazon", 1, host, "mpnet-base")
    assert found == Grid.read("offline-full").settings(f"amazon-s1/{stage}").model_copy(update={"hosts": (host,)})
    assert found.bf16 == (host == "target")


def test_what_methods_share_is_saved_as_it_is_best_for_ours(tiny_world, tmp_path, monkeypatch):
    monkeypatch.setattr(search, "PARAMS", tmp_path)
    made = optuna.storages.InMemoryStorage()
    studies, values = [], {"uhl-canonical": {"rate": 0.1, "batch": 8}, "uhl-dimension": {"dimension_rate": 0.2}}
    values |= {"full": {"full_rate": 0.3, "batch": 4}}
    values["uhl-dimension"]["batch"] = 16
    for method, found in values.items():
        study = optuna.create_study(study_name=method, storage=made)
        study.set_user_attr("method", method)
        distributions = {name: optuna.distributions.CategoricalDistribution([value]) for name, value in found.items()}
        study.add_trial(optuna.trial.create_trial(params=found, distributions=distributions, value=1.0))
        studies.append(study)
    assert search.best(studies) == {"dimension_rate": 0.2, "full_rate": 0.3, "rate": 0.1, "batch": 8}
    assert search.save(tiny_world, studies) == []
    file = tmp_path / "t" / "settings.yaml"
    assert runs.read_yaml(file) == {"rate": 0.1, "batch": 8, "dimension_rate": 0.2, "full_rate": 0.3}
    file.unlink()
    assert search.save(tiny_world, studies[1:]) == ["batch"]
    assert runs.read_yaml(file) == {"dimension_rate": 0.2, "full_rate": 0.3}


def test_a_search_of_tuning_uses_the_trained_adapter_and_follows_it(tiny_world, monkeypatch):
    space = {"tune_rate": [1e-3, 1e-2], "lambda_q": [0.0]}
    tiny_world = tiny_world.model_copy(update={"hosts": ("target",)})
    with pytest.raises(UHLError, match="train it first: make port PROFILE=t TARGET=small"):
        search.search(tiny_world, "tune-anchor", space)
    trained(tiny_world)
    file = stages.adapter_path(tiny_world, "anchor")
    before = file.read_bytes()
    study = search.search(tiny_world, "tune-anchor", space)
    assert [t.params["tune_rate"] for t in study.trials] == [1e-3, 1e-2]
    assert [sorted(t.intermediate_values) for t in study.trials] == [[1, 2, 3]] * 2  # watched, so that it can be pruned
    stored = [json.loads(p.read_text()) for p in (runs.root() / "t-search").glob("*/*/trial/manifest.json")]
    assert {(row["phase"], row["split"], row["target"]) for m in stored for row in m["rows"]} == {
        ("tuned", "dev", "small")
    }
    assert file.read_bytes() == before
    with monkeypatch.context() as patch:
        patch.setattr(stages, "tune", None)  # finished trials are read, not run, in another database too
        url = f"sqlite:///{runs.root() / 'other.db'}"
        assert len(search.search(tiny_world, "tune-anchor", space, url=url).trials) == 2
        elsewhere = tiny_world.model_copy(update={"epochs": 3.0, "rate": 0.1})  # no settings of tuning
        assert len(search.search(elsewhere, "tune-anchor", space).trials) == 2
    other = tiny_world.model_copy(update={"rate": 2e-3})
    stages.pretrain(other, "canonical")
    assert file.read_bytes() != before
    calls, tune = [], stages.tune
    monkeypatch.setattr(stages, "tune", lambda *a, **k: calls.append(a) or tune(*a, **k))
    search.search(tiny_world, "tune-anchor", space)  # another adapter: another study, and its trials are run
    assert len(calls) == 2
    monkeypatch.setattr(stages, "port_rules", lambda *_: porting.RULES - 1)
    search.search(tiny_world, "tune-anchor", space)  # another way to port it
    assert len(calls) == 4


def test_a_search_on_a_target_retrains_as_the_batch_does_and_saves_beside_the_settings(
    tiny_world, tmp_path, monkeypatch
):
    there = tiny_world.model_copy(update={"hosts": ("target",), "tune_steps": 3})
    study = search.search(there, "lora-r8", {"lora_rate": [1e-3, 3e-3]})
    (first, _) = sorted((runs.root() / "t-search").glob("lora-r8-small-*/*/trial/manifest.json"))
    (row,) = json.loads(first.read_text())["rows"]
    assert (row["phase"], row["target"], row["split"], row["steps"]) == ("retrained", "small", "dev", 3)
    assert set(search.table([study])["target"]) == {"small"}
    longer = there.model_copy(update={"tune_steps": 4, "epochs": 9.0})  # another study; epochs are nothing to it
    assert len(search.table([search.search(longer, "lora-r8", {"lora_rate": [1e-3]})])) == 1
    same = there.model_copy(update={"epochs": 9.0})
    monkeypatch.setattr(stages, "baseline", None)
    assert len(search.search(same, "lora-r8", {"lora_rate": [1e-3, 3e-3]}).trials) == 2
    monkeypatch.setattr(search, "PARAMS", tmp_path)
    search.save(there, [study])
    assert runs.read_yaml(tmp_path / "t" / "retrained.yaml") == study.best_params
    search.save(tiny_world, [study])
    assert runs.read_yaml(tmp_path / "t" / "settings.yaml") == study.best_params
    (tmp_path / "t" / "source.yaml").write_text("baselines: [lora-r8]\n")
    (tmp_path / "t" / "settings.yaml").unlink()
    search.save(tiny_world, [study])
    assert runs.read_yaml(tmp_path / "t" / "source.yaml") == {"baselines": ["lora-r8"], **study.best_params}
    assert not (tmp_path / "t" / "settings.yaml").exists()
    with pytest.raises(UHLError, match="a search is on one host"):
        search.search(tiny_world.model_copy(update={"hosts": ("source", "target")}), "full", {"full_rate": [1e-3]})


def test_a_range_is_sampled_within_its_bounds_and_the_best_is_written(tiny_world, tmp_path):
    space = {"lora_rate": search.Range(low=1e-4, high=1e-1, log=True), "batch": search.Range(low=8, high=16)}
    study = search.search(tiny_world, "lora-r8", space, trials=3)
    values = [t.params for t in study.trials]
    assert len({v["lora_rate"] for v in values}) == 3
    assert all(1e-4 <= v["lora_rate"] <= 1e-1 and v["batch"] in range(8, 17) for v in values)
    again = search.search(tiny_world.model_copy(update={"profile": "u"}), "lora-r8", space, trials=1)
    assert again.trials[0].params == values[0]  # seeded
    file = tmp_path / "settings.yaml"
    file.write_text("# why\nprofile: t  # here\nlora_rate: 1\nseed: 0\n")
    search.write_settings(file, search.best([study]))
    lines = file.read_text().splitlines()
    assert lines[:2] == ["# why", "profile: t  # here"]
    assert lines[2] == f"lora_rate: {study.best_params['lora_rate']}"
    assert lines[4] == f"batch: {study.best_params['batch']}"
    assert runs.read_yaml(file)["batch"] == study.best_params["batch"]


def test_poor_trials_are_pruned_and_diverged_ones_fail(tiny_world, monkeypatch):
    quality = {0.5: 1.0, 0.6: 2.0, 0.7: 3.0, 0.8: 4.0, 0.1: 0.5, 0.2: None}
    space, starts = {"full_rate": list(quality)}, []

    def baseline(settings, host, method, begin, watch):
        assert begin == "fitted"
        (runs.cell_dir(settings, "trial")).mkdir(parents=True)
        score = quality[settings.full_rate]
        if score is None:
            raise DivergenceError("the loss is nan")
        for step in (1, 2, 3):
            watch(step, score)
        row = dict.fromkeys(runs.COLUMNS, 0) | {"score": score, "metric": "accuracy", "split": "dev", "arm": method}
        return Outcome(settings, stages.load_data(settings), rows=[row])

    monkeypatch.setattr(stages, "baseline", baseline)
    monkeypatch.setattr(stages, "baseline_start", lambda *given: starts.append(given) or "fitted")
    study = search.search(tiny_world, "full", space, trials=6)
    assert len(starts) == 1  # trials differ in rates alone
    assert [t.state.name for t in study.trials] == ["COMPLETE"] * 4 + ["PRUNED", "FAIL"]
    assert not (runs.root() / "t-search" / "full-full_rate-0.1" / "mood-s0").exists()
    assert search.table([study])["score"].tolist()[:5] == [1, 2, 3, 4, 0.5]
    assert search.best([study]) == {"full_rate": 0.8}


def test_no_trial_is_taken_by_two_workers(tiny_world):
    space, fork = {"full_rate": [0.001 * n for n in range(1, 61)]}, multiprocessing.get_context("fork")
    begun, taken = fork.Barrier(2, timeout=60), runs.root() / "taken"
    search.study(tiny_world, "full", space)

    def work():
        own = search.study(tiny_world, "full", space)
        begun.wait()
        while (trial := own._pop_waiting_trial_id()) is not None:
            with runs.locked(taken.with_suffix(".lock")), open(taken, "a") as file:
                file.write(f"{trial}\n")

    workers = [fork.Process(target=work, daemon=True) for _ in range(2)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(120)
        assert worker.exitcode == 0
    assert len(set(trials := taken.read_text().split())) == len(trials) == 60


def test_two_workers_share_a_grid(tiny_world, task, monkeypatch):
    """Each process takes what the other has not; together they try every value once."""
    space, fork = {"full_rate": [0.1, 0.2, 0.3, 0.4, 0.5, 0.6]}, multiprocessing.get_context("fork")
    begun = fork.Barrier(2)

    def baseline(settings, host, method, begin, watch):
        (runs.root() / "by").mkdir(exist_ok=True)
        name = f"{os.getpid()}-{settings.full_rate}-{time.monotonic_ns()}"
        (runs.root() / "by" / name).touch()
        time.sleep(0.3)
        row = dict.fromkeys(runs.COLUMNS, 0) | {"score": settings.full_rate, "metric": "accuracy", "arm": method}
        return Outcome(settings, task, rows=[row])

    def work():
        begun.wait()
        search.search(tiny_world, "full", space)

    monkeypatch.setattr(stages, "baseline", baseline)
    monkeypatch.setattr(stages, "baseline_start", lambda *_: None)
    workers = [fork.Process(target=work) for _ in range(2)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(120)
        assert worker.exitcode == 0
    ran = [path.name.split("-")[:2] for path in (runs.root() / "by").iterdir()]
    assert sorted(float(rate) for _, rate in ran) == space["full_rate"]
    assert len({process for process, _ in ran}) == 2
    study = search.study(tiny_world, "full", space)
    assert [t.state.name for t in study.trials if t.params] == ["COMPLETE"] * 6
    assert search.best([study]) == {"full_rate": 0.6}


@pytest.mark.parametrize("at", [0.1, 0.2])  # with another queued, and the last of all
def test_a_trial_whose_worker_was_killed_is_run_again(tiny_world, monkeypatch, at):
    task = stages.load_data(tiny_world)
    space, fork, killed = {"full_rate": [0.1, 0.2]}, multiprocessing.get_context("fork"), runs.root() / "killed"

    def baseline(settings, host, method, begin, watch):
        if settings.full_rate == at and not killed.exists():
            killed.mkdir(parents=True)
            os._exit(9)
        row = dict.fromkeys(runs.COLUMNS, 0) | {"score": settings.full_rate, "metric": "accuracy", "arm": method}
        return Outcome(settings, task, rows=[row])

    monkeypatch.setattr(search, "BEAT", 1)
    for name in ("start", "join"):  # killed before the thread that gives signs of life has begun
        monkeypatch.setattr(HeartbeatThread, name, lambda self: None)
    monkeypatch.setattr(stages, "baseline", baseline)
    monkeypatch.setattr(stages, "baseline_start", lambda *_: None)
    worker = fork.Process(target=search.search, args=(tiny_world, "full", space))
    worker.start()
    worker.join(60)
    assert worker.exitcode == 9
    study = search.search(tiny_world, "full", space)
    assert sorted(search.table([study])["score"]) == space["full_rate"]


def test_watching_a_run_does_not_change_it(tiny_world):
    seen = []
    _, plain = stages.pretrain(tiny_world, "canonical")
    _, watched = stages.pretrain(
        tiny_world.model_copy(update={"profile": "w"}), "canonical", lambda step, score: seen.append((step, score))
    )
    assert plain.rows[0]["steps"] == 3
    assert [quarters for quarters, _ in seen] == [2, 3]  # the first is before the first step
    assert all(0 <= score <= 100 for _, score in seen)
    assert watched.curves == plain.curves
    assert [r["score"] for r in watched.rows] == [r["score"] for r in plain.rows]


def test_finished_baselines_are_read_back(tiny_world, monkeypatch):
    settings = tiny_world.model_copy(update={"baselines": ("head", "bitfit")})
    ran, once = [], stages.baseline
    monkeypatch.setattr(stages, "baseline", lambda *given: ran.append(given[2]) or once(*given))
    first = stages.baselines(settings, "target")
    more = settings.model_copy(update={"baselines": ("head", "lora-r8", "bitfit"), "refresh_steps": 7})
    again = stages.baselines(more, "target")
    assert ran == ["head", "bitfit", "lora-r8"]
    assert {row["steps"] for row in again["lora-r8"].rows} == {settings.tune_steps}
    assert list(again) == ["head", "lora-r8", "bitfit"]
    for method, outcome in first.items():
        found = again[method]
        assert (found.rows, found.curves) == (outcome.rows, outcome.curves)
        assert (found.counts(method) == outcome.counts(method)).all()
    merge(again.values()).finish("baselines-small")
    del ran[:]
    stages.baselines(more.model_copy(update={"bitfit_rate": 0.5}), "target")
    assert ran == ["bitfit"]
    del ran[:]
    stages.baselines(settings, "source")
    longer = {"tune_steps": settings.tune_steps + 1}
    for host in ("source", "target"):  # the source's do not tune, and are not trained again
        assert ran.count("bitfit") == 1
        stages.baselines(settings.model_copy(update=longer), host)
    assert ran == ["head", "bitfit"] * 2
    del ran[:]
    with monkeypatch.context() as patch:
        patch.setattr(runs, "PROTOCOL", runs.PROTOCOL + 1)  # the same settings measure something else now
        stages.baselines(settings.model_copy(update={"baselines": ("head",)}), "target")
        assert ran == ["head"]
        assert audit.missing("t") == []
        assert "Measured by an older release" in report.markdown("t")
        merge(stages.baselines(settings, "source").values()).finish("baselines-big")  # cells of both are not compared
        (stale,) = audit.missing("t")
        assert stale.startswith("mood-s0/baselines-small: measured by an older release than others; delete the folder")
        assert set(results.summary("t")["target"]) == {"big"}
        assert "Measured by an older release" not in report.markdown("t")
    del ran[:]
    for cut in (b"PK cut", b""):
        (runs.cell_dir(settings, "baselines-small") / "head" / "predictions.npz").write_bytes(cut)
        stages.baselines(settings.model_copy(update={"baselines": ("head",)}), "target")
    assert ran == ["head", "head"]
    data = stages.load_data(settings)
    other = replace(data, labels=("bad", "good"))
    monkeypatch.setattr(stages.tasks, "load_task", lambda name: other)
    stages.baselines(settings.model_copy(update={"baselines": ("head",)}), "target")
    assert ran == ["head"] * 3


def test_a_database_that_cannot_be_used(tiny_world):
    with pytest.raises(UHLError, match="nosuch://x cannot be used .* give a URL such as"):
        search.storage(tiny_world, "nosuch://x")


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("lora: {rate: [1]}", "unknown method to search 'lora'"),
        ("full: {full_rate: 1}", "full, full_rate: expected a list of values or a range"),
        ("full: {full_rate: {low: 2, high: 1}}", "low must be at most high"),
        ("full: {full_rate: {low: 0, high: 1, log: true}}", "above 0 with log"),
        ("full: {full_rate: {lo: 0, high: 1}}", "Range, low"),
        ("full: {ful_rate: [1]}", "Settings, ful_rate"),
        ("full: {full_rate: [-1]}", "Settings, full_rate"),
        ("full: {full_rate: {low: -1, high: 1}}", "Settings, full_rate"),
        ("full: {}", "must map methods"),
        ("[full]", "must map methods"),
    ],
)
def test_a_search_file_is_checked(tmp_path, text, says):
    path = tmp_path / "search.yaml"
    with pytest.raises(UHLError, match="does not exist"):
        search.read_spaces(path)
    path.write_text(text)
    with pytest.raises(UHLError, match=says):
        search.read_spaces(path)


def test_a_tuned_file_holds_what_was_scored(tiny_world):
    before = trained(tiny_world)
    outcome = stages.tune(tiny_world, "anchor")
    after = store.load(outcome.paths[0])
    assert torch.equal(before.dictionary.u, after.dictionary.u)
    assert torch.equal(before.router.weight, after.router.weight)
    assert not torch.equal(before.task("mood").bias, after.task("mood").bias)


def test_an_interrupted_cell_of_tuning_reads_back_the_arms_that_were_scored(tiny_world, monkeypatch):
    for projector in ("canonical", "dimension"):
        stages.pretrain(tiny_world, projector)
    shared, tune = Shared(), stages.tune
    first = stages.tuned(tiny_world, shared)
    asked = []
    monkeypatch.setattr(stages, "tune", lambda settings, arm, shared: asked.append(arm) or tune(settings, arm, shared))
    again = stages.tuned(tiny_world, shared)
    undefined = [arm for arm in stages.TUNED_ARMS if arm not in first]
    assert asked == undefined
    for arm, outcome in first.items():
        kept = again[arm]
        assert kept.rows == json.loads(json.dumps(outcome.rows))
        assert (kept.paths, kept.adapters, kept.rules) == (outcome.paths, outcome.adapters, outcome.rules)
        assert (kept.details, kept.curves) == (outcome.details, outcome.curves)
        assert np.array_equal(kept.counts(arm), outcome.counts(arm))
    asked.clear()
    store.save(store.load(first["anchor"].paths[0]), first["random-p"].paths[0])  # not what was scored
    stages.tuned(tiny_world, shared)
    assert asked == [arm for arm in stages.TUNED_ARMS if arm in {*undefined, "random-p"}]
    asked.clear()
    stages.tuned(tiny_world.model_copy(update={"tune_rate": 0.5 * tiny_world.tune_rate}), shared)
    assert asked == list(stages.TUNED_ARMS)


@pytest.mark.parametrize(("source", "target"), [("big", "small"), ("small", "big")])
def test_an_interrupted_cell_of_ports_reads_back_the_arms_that_were_scored(tiny_world, monkeypatch, source, target):
    tiny_world = tiny_world.model_copy(update={"source": source, "target": target})
    for projector in ("canonical", "dimension"):
        stages.pretrain(tiny_world, projector)
    asked, port = [], stages.port
    monkeypatch.setattr(
        stages, "port", lambda adapter, target, task, arm, *a: asked.append(arm) or port(adapter, target, task, arm, *a)
    )
    arms = ("dimension", "lineage", "anchor", "refresh")
    settings = tiny_world.model_copy(update={"arms": arms})
    score = Outcome.score_adapter
    with monkeypatch.context() as patch:
        patch.setattr(Outcome, "score_adapter", lambda *a, **k: score(*a, **k) if k["arm"] != "refresh" else 1 / 0)
        with pytest.raises(ZeroDivisionError):
            stages.zero_shot(settings)
    ran = [arm for arm in arms if arm in asked]
    assert ran == asked
    assert {"dimension", "anchor", "refresh"} <= {*ran}
    asked.clear()
    whole = stages.zero_shot(settings)
    assert asked == ["refresh"]
    again = stages.zero_shot(settings)
    assert asked == ["refresh"]
    assert again.rows == json.loads(json.dumps(whole.rows))
    assert (again.paths, again.adapters, again.rules) == (whole.paths, whole.adapters, whole.rules)
    assert again.details == json.loads(json.dumps(whole.details))
    assert whole.details["reports"].keys() == {*ran}
    assert whole.rules == (porting.RULES if source == "big" else porting.LARGER_RULES)
    for arm in ran:
        assert np.array_equal(again.counts(arm), whole.counts(arm))
    stages.zero_shot(settings.model_copy(update={"tune_rate": 0.5 * tiny_world.tune_rate}))
    assert asked == ["refresh"]
    stages.zero_shot(settings.model_copy(update={"refresh_steps": tiny_world.refresh_steps + 1}))
    assert asked == ["refresh", "refresh"]  # no other arm depends on it
    stages.zero_shot(settings.model_copy(update={"max_length": 8}))
    assert asked == ["refresh", "refresh", *ran]


def test_a_file_without_anchors_is_not_tuned(tiny_world):
    adapter, outcome = stages.pretrain(tiny_world, "canonical")
    adapter.anchors = None
    store.save(adapter, outcome.paths[0])
    with pytest.raises(UHLError, match="the adapter has no anchors; pre-train a canonical one"):
        stages.tuned(tiny_world)


def test_what_was_kept_is_read_back_by_a_release_with_more_settings(tiny_world, monkeypatch):
    stages.pretrain(tiny_world, "canonical")
    few = tiny_world.model_copy(update={"arms": ("anchor",)})  # without a `dimension` adapter
    shared = Shared()
    assert list(stages.tuned(few, shared)) == ["anchor", "untrained"]
    for file in runs.root().rglob("outcome.json"):
        entry = json.loads(file.read_text())
        del entry["about"]["bf16"]
        file.write_text(json.dumps(entry))
    monkeypatch.setattr(stages, "tune", lambda *_: pytest.fail("kept, and run again"))
    assert list(stages.tuned(few, shared)) == ["anchor", "untrained"]
    with pytest.raises(UHLError, match=r"pretrain-dimension/adapter\.safetensors does not exist; trained ones lie in"):
        stages.tuned(tiny_world, shared)


def test_the_untrained_control_keeps_nothing_of_the_dictionary_but_its_sizes(tiny_world):
    before = trained(tiny_world)
    after = store.load(stages.tune(tiny_world, "untrained").paths[0])
    new = UHLAdapter(before.config)
    one, other = ((a.dictionary.u, a.dictionary.v, a.router.weight) for a in (before, after))
    for learned, drawn in zip(one, other, strict=True):
        assert learned.abs().max() > 0
        torch.testing.assert_close(drawn.norm(dim=1), learned.norm(dim=1), rtol=0.02, atol=1e-6)
        for known in (*one, new.dictionary.v, new.router.weight):  # nor what an adapter of this seed begins with
            same = torch.nn.functional.cosine_similarity(drawn, known)
            assert same.mean().abs() < 4 / known.numel() ** 0.5
    assert after.info["redrawn"] == tiny_world.seed
    assert torch.equal(before.mixer.first, after.mixer.first)
    assert after.task("mood").bias.abs().max() > 0


@pytest.mark.parametrize("arm", ["anchor", "random-p", "zero-atoms", "untrained"])
def test_a_tuned_file_ported_again_gives_the_scored_logits(tiny_world, arm, monkeypatch):
    monkeypatch.setattr("uhl.porting.SCALES", (1.0, 2.0))  # atoms and bias at work in the fit
    adapter = trained(tiny_world)
    outcome = stages.tune(tiny_world, arm)
    found = store.load(outcome.paths[0])
    ported_as = "anchor" if arm == "untrained" else arm
    assert found.info["arm"] == ported_as
    assert arm == "zero-atoms" or found.task("mood").bias.abs().max() > 0
    target, data = stages.freeze(stages.load_encoder("small")), stages.load_data(tiny_world)
    ported = port(found, target, "mood", ported_as, seed=found.info["port_seed"])
    assert ported.scale == found.info["scale"]
    assert arm == "zero-atoms" or ported.scale == port(adapter, target, "mood").scale  # controls have as much of atoms
    scored = outcome.predictions[f"{arm}/test"]
    if arm == "zero-atoms":
        again = predict(Classifier(target.model, found.task("mood"), ported.frame), target, data, "test")
    else:
        with attach(target.model, found, "mood", ported.frame, ported.scale) as attached:
            again = predict(Classifier(target.model, found.task("mood"), None, attached), target, data, "test")
    np.testing.assert_allclose(np.stack(again.logits), np.stack(scored.logits), atol=1e-4)


@pytest.mark.parametrize("kind", ["sentence", "pair", "token"])
def test_what_is_trained_is_what_is_shipped(tiny_world, own_files, kind, tmp_path):
    """Every example's logits, before saving and after loading, for the three kinds of task."""
    settings = tiny_world if kind == "sentence" else own_files(kind)
    data, encoder = stages.load_data(settings), stages.freeze(stages.load_encoder("big"))
    adapter = UHLAdapter(settings.adapter_config("dimension"))
    part = adapter.add_task("t", data.labels, data.kind)
    logits = []
    with attach(encoder.model, adapter, "t") as attached:
        classifier = Classifier(encoder.model, part, None, attached, settings.train_config())
        train(classifier, encoder, data, settings.train_config(), tmp_path / "trainer")
        logits.append(predict(classifier, encoder, data, "test").logits)
    assert part.bias.abs().max() > 0
    found = store.load(store.save(adapter, tmp_path / "a.safetensors"))
    with attach(encoder.model, found, "t") as attached:
        logits.append(predict(Classifier(encoder.model, found.task("t"), None, attached), encoder, data, "test").logits)
    assert len(logits[0]) == len(data.data["test"])
    for before, after in zip(*logits, strict=True):
        np.testing.assert_allclose(after, before, atol=1e-4)
    assert np.ptp(np.concatenate([np.ravel(x) for x in logits[0]])) > 0.01


def test_an_exported_cell_is_a_peft_folder_with_its_scores(tiny_world, tmp_path):
    from peft import PeftModel

    stages.pretrain(tiny_world, "canonical")[1].finish("pretrain-canonical")
    stages.zero_shot(tiny_world.model_copy(update={"arms": ("anchor", "zero-atoms")})).finish("port-small")
    runs.update_results("t")
    folder = report.export("t", "mood", 0, "canonical", tmp_path / "out")
    text = (folder / "README.md").read_text()
    assert "| big | mood | uhl-canonical | source |" in text
    assert "| small | mood | anchor | zero-shot |" in text
    assert "| small | mood | dimension" not in text
    assert "60 unlabelled texts travel with the file" in text
    cell = runs.cell_dir(tiny_world, "pretrain-canonical") / "adapter.safetensors"
    assert (folder / "adapter_model.safetensors").read_bytes() == cell.read_bytes()
    model = PeftModel.from_pretrained(stages.load_encoder("small").model, folder)
    assert model.base_model.uhl_adapters["default"].anchors.texts == store.load(cell).anchors.texts
    with pytest.raises(UHLError, match="does not exist"):
        report.export("t", "mood", 1, "canonical", tmp_path / "none")
    (file := tmp_path / "a file").write_text("not a folder")
    with pytest.raises(UHLError, match="could not be written"):
        report.export("t", "mood", 0, "canonical", file)
    assert file.read_text() == "not a folder"
    assert not (tmp_path / "none").exists()


def test_training_again_with_one_seed_gives_the_same_file(tiny_world):
    files = [stages.pretrain(tiny_world, "canonical")[1].paths[0].read_bytes() for _ in range(2)]
    assert files[0] == files[1]


def test_an_adapter_is_lent_to_another_task(tiny_world, task, monkeypatch, tmp_path):
    """Nothing of the task's own labels is learned before it is tuned: the parts are those of the lender's file."""
    lender = Settings(**tiny_world.model_dump() | {"source_task": "mood"})
    film = replace(task, name="film", data=DatasetDict(task.data | {"test": task.data["test"].select(range(16))}))
    monkeypatch.setattr(stages.tasks, "load_task", lambda name: film if name == "film" else task)
    borrower = lender.model_copy(update={"task": "film", "arms": ("dimension", "anchor", "zero-atoms", "refresh")})
    with pytest.raises(UHLError, match="is missing; run notebook 02 with task mood"):
        stages.pretrain(borrower, "canonical")
    for settings in (lender, borrower):
        for projector in ("canonical", "dimension"):
            _, outcome = stages.pretrain(settings, projector)
            outcome.finish(f"pretrain-{projector}")
            assert [(row["task"], row["arm"]) for row in outcome.rows] == [(settings.task, f"uhl-{projector}")] * 2
    assert outcome.rows[0]["trainable_params"] == 0
    ours, theirs = (stages.adapter_for(settings, "anchor")[0] for settings in (borrower, lender))
    assert list(ours.tasks) == ["film"]
    assert ours.anchors.judges("film")
    assert (
        ", on the task `mood`: "
        in (report.export("t", "film", 0, "canonical", tmp_path / "card") / "README.md").read_text()
    )
    assert ours.info == theirs.info | {"source_task": "mood"}
    state = {name.replace("mood", "film"): value for name, value in theirs.state_dict().items()}
    assert all(torch.equal(value, state[name]) for name, value in ours.state_dict().items())
    ported = stages.zero_shot(borrower)
    ported.finish("port-small", **ported.details)
    assert {row["arm"] for row in ported.rows} == {"no-adapter", *borrower.arms}
    assert all(row["n"] == 16 for row in ported.rows if row["split"] == "test")
    tuned = stages.tune(borrower, "anchor")
    assert store.add_task(theirs, store.save_task(store.load(tuned.paths[0]), "film", tmp_path / "film")) == "film"
    target = stages.load_encoder("small")
    made = port(theirs, target, "film")  # in the lender's file
    with at_work(theirs, target, "film", made.frame, made.scale) as attached:
        again = predict(Classifier(target.model, theirs.task("film"), made.frame, attached), target, film, "test")
    np.testing.assert_allclose(np.stack(again.logits), np.stack(tuned.predictions["anchor/test"].logits), atol=1e-4)
    assert audit.missing("t") == []
    stages.pretrain(lender.model_copy(update={"rate": 5e-4}), "canonical")[1].finish("pretrain-canonical")
    (found,) = audit.missing("t")
    assert found.startswith("film-s0/pretrain-canonical: mood-s0/pretrain-canonical has another adapter now")
    table = report.markdown("t")
    assert "(adapters: with the labels of mood alone; baselines: with each task's own) on the source" in table
    assert "| small | zero-shot | anchor |" in table
    (row,) = (line for line in table.splitlines() if line.startswith("| small | zero-shot | anchor |"))
    assert row.split(" | ")[4] == ""  # the lender's column


def test_an_adapter_is_scored_on_the_lender_s_own_task_as_where_it_was_trained(tiny_world, monkeypatch):
    for projector in ("canonical", "dimension"):
        _, own = stages.pretrain(tiny_world, projector)
        _, lent = stages.pretrain(tiny_world.model_copy(update={"task": "film", "source_task": "mood"}), projector)
        assert [row["score"] for row in lent.rows] == [row["score"] for row in own.rows]
        for name, found in own.predictions.items():
            other = lent.predictions[name].logits
            np.testing.assert_allclose(np.stack(other), np.stack(found.logits), atol=1e-5)


def test_a_task_with_other_labels_has_the_lent_dictionary_and_a_head_of_its_own(
    tiny_world, task, monkeypatch, tmp_path
):
    """Without labels nothing can be said of it; tuned, its own head is behind atoms that have seen no label of it."""
    texts = sentences(80, seed=3)
    rows = [{"tokens": t.split(), "tags": [int(w in {"good", "fine"}) for w in t.split()]} for t in texts]
    data = {split: Dataset.from_list(rows[a:b]) for split, (a, b) in SPLITS.items()}
    joy = replace(task, name="joy", kind="token", labels=("O", "B-JOY"), data=DatasetDict(data))
    monkeypatch.setattr(stages.tasks, "load_task", lambda name: joy if name == "joy" else task)
    lender = Settings(**tiny_world.model_dump() | {"source_task": "mood"})
    borrower = lender.model_copy(update={"task": "joy", "arms": ("dimension", "lineage", "anchor", "zero-atoms")})
    for settings in (lender, borrower):
        for projector in ("canonical", "dimension"):
            _, outcome = stages.pretrain(settings, projector)
            outcome.finish(f"pretrain-{projector}", undefined=outcome.details.get("undefined", {}))
    assert outcome.rows == []
    file = stages.adapter_path(borrower, "anchor")
    assert store.load(file).task("joy").labels == ("O", "B-JOY")
    ported = stages.zero_shot(borrower)
    ported.finish("port-small", **ported.details)
    assert {row["arm"] for row in ported.rows} == {"no-adapter"}
    assert set(ported.details["undefined"].values()) == {
        "arm lineage needs equal widths; the source has 24, the target 16",
        "the adapter was trained on mood, whose labels or kind are others, so the head of joy is not trained",
    }
    lent, own = (stages.adapter_for(settings, "anchor")[0] for settings in (lender, borrower))
    assert lent.task("mood").embedding.abs().max() > 0
    assert torch.equal(own.task("joy").embedding, lent.task("mood").embedding)
    outcomes = stages.tuned(borrower)
    assert outcomes.keys() == {"dimension", "anchor", "zero-atoms", "untrained"}
    assert {outcome.details["head"] for outcome in outcomes.values()} == {"fitted"}
    found = store.load(outcomes["anchor"].paths[0])
    pack, whole = store.save_task(found, "joy", tmp_path / "joy"), stages.adapter_for(lender, "anchor")[0]
    assert store.add_task(whole, pack) == "joy"
    assert pack.stat().st_size < 3000
    target, scored = stages.load_encoder("small"), outcomes["anchor"].predictions["anchor/test"].logits
    words, source = replace(own.anchors.probe.first(), kind="token", words=0), stages.load_encoder("big")
    for arm, host in (("anchor", target), ("zero-atoms", target), ("lineage", source), ("anchor", source)):
        frame, wanted = port(found, host, "joy", arm, source).frame, basis_of(observe(host, words), 256)
        assert frame.levels == upper_levels(host.layers) != wanted.levels
        wanted = basis_of(observe(host, words), 256, frame.levels)
        torch.testing.assert_close((frame.head, frame.shift), (wanted.head, wanted.shift))
    with pytest.raises(UHLError, match="the head of joy was trained on none"):
        port(own, target, "joy", "refresh")
    for adapter, why in ((own, "is not trained yet"), (found, "was fitted on small and reads that host's own")):
        other = port(adapter, stages.load_encoder("other"), "joy")
        assert why in other.report["warning"]
        with pytest.raises(UHLError, match=f"the head of joy {why}.* on other means nothing: tune the task there"):
            predict_texts(adapter, stages.load_encoder("other"), other, ["good film"])
    told = predict_texts(found, target, port(found, target, "joy"), [" ".join(joy.data["test"][0]["tokens"])])
    assert told[0]["label"] == [joy.labels[i] for i in outcomes["anchor"].predictions["anchor/test"].labels[0]]
    for name, strange in (("/elsewhere/small", False), ("small/large", True)):
        host = replace(target, name=name)
        assert ("warning" in port(found, host, "joy").report) == strange
    found.task("joy").own_head = "small\x1b[2J"
    with pytest.raises(UHLError, match="cannot be"):
        store.save_task(found, "joy", tmp_path / "bad")
    found.task("joy").own_head = "small"
    assert "its head is of small alone" in store.describe(outcomes["anchor"].paths[0])
    assert "its head is not trained yet" in store.describe(file)
    joined = store.load(store.save(whole, tmp_path / "whole"))  # the lender's file, with the task's pack
    for adapter in (found, joined):
        ported = port(adapter, target, "joy")
        with at_work(adapter, target, "joy", ported.frame, ported.scale) as attached:
            classifier = Classifier(target.model, adapter.task("joy"), ported.frame, attached)
            again = predict(classifier, target, joy, "test").logits
        assert all(np.allclose(*pair, atol=1e-4) for pair in zip(again, scored, strict=True))
    merged = merge(outcomes.values())
    merged.finish("tune-small", undefined=["lineage"])
    assert all(row["score"] > 50 for row in merged.rows)
    for part in ("dictionary", "router"):
        for name, value in getattr(store.load(file), part).state_dict().items():
            assert torch.equal(value, getattr(found, part).state_dict()[name])
    assert audit.missing("t") == []
    assert results.calibration("t").empty
    table = report.markdown("t")
    assert "| small | tuned | anchor |" in table
    assert "not defined" in table.split("| small | zero-shot, tuned | lineage |")[1]
    (entry,) = (e for c, e in runs.manifests("t").items() if c.name == "tune-small")
    known = {"undefined": ["lineage"], "rules": entry["rules"]}
    runs.write_manifest(borrower, "tune-small", entry["rows"][:-1], **known)
    assert audit.missing("t") == ["joy-s0/tune-small: untrained on test"]


SPLITS = {"train": (0, 40), "dev": (40, 50), "test": (50, 60), "unlabelled": (60, 80)}  # rows of each


def test_what_trains_or_tries_a_lent_adapter_in_another_way_is_refused(tiny_world, task, monkeypatch):
    borrower = Settings(**tiny_world.model_dump() | {"task": "film", "source_task": "mood"})
    with pytest.raises(UHLError, match="nothing is trained on film, which has the adapter of mood"):
        attempts.trained_otherwise(borrower, noise=0.3)
    with pytest.raises(UHLError, match="search on that task: --task mood"):
        search.run(borrower, "uhl-canonical", {"rate": 1e-3})
    with pytest.raises(UHLError, match="PyTorch names no part so"):
        Settings(source_task="train")
    with pytest.raises(UHLError, match="by a task's name alone; write 'mood'"):
        Settings(source_task="/data/mood.csv")
    film = replace(task, name="film", labels=("sad", "glad"))
    monkeypatch.setattr(stages.tasks, "load_task", lambda name: film if name == "film" else task)
    trained(Settings(**tiny_world.model_dump() | {"source_task": "mood"}))
    stages.pretrain(borrower, "canonical")
    adapter, _ = stages.adapter_for(borrower, "anchor")
    hosts = stages.load_encoder("big"), stages.load_encoder("small")
    with pytest.raises(UHLError, match="no way to port can be tried: the adapter was trained on mood, whose labels"):
        attempts.measure(borrower, adapter, *hosts, film, [])
    with pytest.raises(UHLError, match="nothing to measure on pruned copies: the adapter was trained on mood"):
        compression.measure(borrower)


def test_texts_are_cut_at_the_length_of_the_task_that_has_a_lent_adapter(tiny_world, monkeypatch):
    long = "good film " * 20
    borrower = Settings(**tiny_world.model_dump() | {"task": "film", "source_task": "mood", "max_length": 16})
    trained(Settings(**tiny_world.model_dump() | {"source_task": "mood"}))
    _, outcome = stages.pretrain(borrower, "canonical")
    adapter, target = store.load(outcome.paths[0]), stages.load_encoder("small")
    assert (adapter.anchors.length, adapter.task("film").length) == (64, 16)
    ported = port(adapter, target, "film")
    told, cut = (predict_texts(adapter, target, ported, [t])[0]["probability"] for t in (long, long[: 7 * 10]))
    assert told == cut


def test_a_head_for_other_labels_is_an_error(tiny_world, task, monkeypatch):
    trained(tiny_world)
    other = type(task)("mood", "sentence", ("sad", "glad"), task.data)
    monkeypatch.setattr(stages.tasks, "load_task", lambda name: other)
    with pytest.raises(UHLError, match="labels negative, positive; the task is a sentence task with labels sad, glad"):
        stages.zero_shot(tiny_world.model_copy(update={"arms": ("anchor",)}))
    with pytest.raises(UHLError, match="Add a task of its own to the adapter"):
        stages.tune(tiny_world, "anchor")
    assert [cell.name for cell in runs.cell_dir(tiny_world, "x").parent.iterdir()] == ["pretrain-canonical"]


def test_too_many_anchors(tiny_world, task):
    with pytest.raises(UHLError, match="lower `anchors`"):
        stages.anchor_texts(Settings(anchors=10_000), task)


def test_scores_that_do_not_match_their_predictions_are_refused(tiny_world):
    _, outcome = stages.pretrain(tiny_world, "canonical")
    outcome.finish("pretrain-canonical")
    path = runs.cell_dir(tiny_world, "pretrain-canonical") / "manifest.json"
    entry = json.loads(path.read_text())
    for row in entry["rows"]:
        row["score"] += 1.0
    path.write_text(json.dumps(entry))
    with pytest.raises(UHLError, match="manifests say .*, their predictions .*; delete the folders of these cells"):
        results.summary("t")


def test_predictions_of_other_examples_are_refused(tiny_world):
    """Another order has the same score, and would pair each example with another."""
    for seed in (0, 1):
        settings = tiny_world.model_copy(update={"seed": seed, "baselines": ("head",)})
        merge(stages.baselines(settings, "source").values()).finish("baselines-big")
    assert results.gather("t")
    path = runs.cell_dir(settings, "baselines-big") / "predictions.npz"
    with np.load(path) as stored:
        arrays = dict(stored)
    for change in (slice(None, None, -1), slice(-1)):
        np.savez(path, **{name: x[change] for name, x in arrays.items()})
        with pytest.raises(UHLError, match="scored on other test examples"):
            results.gather("t")
    np.savez(path, **{name: x for name, x in arrays.items() if "labels" not in name})
    with pytest.raises(UHLError, match="lacks test predictions of head; delete that folder"):
        results.gather("t")
    path.unlink()
    with pytest.raises(UHLError, match="lacks test predictions of head; delete that folder"):
        results.gather("t")


def test_ports_of_another_adapter_by_other_rules_or_with_fewer_arms_are_missed(tiny_world, monkeypatch):
    arms = ("dimension", "zero-atoms")
    for seed in (0, 1):
        settings = tiny_world.model_copy(update={"seed": seed, "arms": arms if seed else arms[:1]})
        for projector in ("canonical", "dimension"):
            stages.pretrain(settings, projector)[1].finish(f"pretrain-{projector}")
        stages.zero_shot(settings).finish("port-small")
        tuned = stages.tune(settings, "dimension")
        assert tuned.adapters.keys() == {"pretrain-dimension"}
        assert tuned.rules is None  # no anchor has a part in it
        assert tuned.details["head"] in {"ported", "fitted"}
    lacks = [f"mood-s0/port-small: zero-atoms on {split}" for split in ("dev", "test")]
    assert audit.missing("t") == lacks
    first, second = (runs.root() / "t" / f"mood-s{seed}" / "port-small" / "manifest.json" for seed in (0, 1))
    kept, said = second.read_text(), "ported by other rules than this release's"
    assert [json.loads(path.read_text())["rules"] for path in (first, second)] == [None, porting.RULES]
    for rules, asked in (
        (porting.LARGER_RULES + 1, "mood-s1"),
        (porting.RULES - 1, "mood-s1"),
        (porting.LARGER_RULES, None),
    ):
        second.write_text(json.dumps(json.loads(kept) | {"rules": rules}))
        assert [line.split("/")[0] for line in audit.missing("t") if said in line] == [asked] * (asked is not None)
    entry = json.loads(first.read_text())
    first.write_text(json.dumps(entry | {"rules": porting.RULES}))  # older than the other to the same host
    assert [line.split("/")[0] for line in audit.missing("t") if said in line] == ["mood-s0"]
    for path, asked in ((first, []), (second, ["mood-s1"])):  # a release told none; the first has no anchored port
        path.write_text(json.dumps({k: v for k, v in json.loads(path.read_text()).items() if k != "rules"}))
        assert [line.split("/")[0] for line in audit.missing("t") if said in line] == asked
    second.write_text(kept)
    words = [row | {"metric": "f1"} for row in entry["rows"]]  # a token task's, by its own rules
    first.write_text(json.dumps(entry | {"rules": porting.RULES, "rows": words}))
    assert not [line for line in audit.missing("t") if said in line]
    first.write_text(json.dumps(entry))
    second.write_text(kept)
    retrained = settings.model_copy(update={"rate": 5e-4})
    stages.pretrain(retrained, "canonical")[1].finish("pretrain-canonical")
    (found,) = set(audit.missing("t")) - set(lacks)
    assert found.startswith("mood-s1/port-small: pretrain-canonical has another adapter now")


def test_attempts_are_measured_on_dev_and_leave_the_adapter_as_it_was(tiny_world, task, make_encoder, monkeypatch):
    settings = Settings(**tiny_world.model_dump() | {"anchors": 30, "more_anchors": 10})
    adapter, outcome = stages.pretrain(settings, "canonical")
    outcome.finish("pretrain-canonical")
    assert (adapter.anchors.coded, len(adapter.anchors.texts)) == (30, 40)
    whole = adapter.anchors
    hosts = [stages.freeze(stages.load_encoder(name)) for name in ("big", "small")]
    listed = attempts.attempts(whole, ["head", "imitation", "targets", "maps", "dims", "bits", "taught"])
    refreshed = [a for a in attempts.attempts(whole, ["refresh"]) if a.arm == "refresh"]
    assert [a.way.confidence for a in refreshed] == [0, 0.5]
    listed += refreshed
    listed += [a for a in attempts.attempts(whole, ["perturbed"]) if a.noise == 0.3]
    listed += attempts.attempts(whole, ["turns"])
    listed.append(attempts.Attempt("texts", "20 coded", coded=20, texts=20))
    listed += [attempts.Attempt("choice", c, "zero-atoms", coded=20, texts=20, choice=c) for c in attempts.CHOICES]
    bias = adapter.task("mood").bias.clone()
    pool = stages.anchor_pool(settings, task)
    monkeypatch.setattr(stages.tasks, "generic_text", lambda: [*pool[:3], *(f"the  plot {i}" for i in range(9))])
    more = attempts.chosen(settings, adapter, hosts[0], task, "random", len(pool) + 7)
    assert len({*more.texts} & {*pool}) == len(pool)
    assert len({*more.texts} & {f"the plot {i}" for i in range(9)}) == 7
    choose, seen = attempts.chosen, []
    monkeypatch.setattr(attempts, "chosen", lambda *given: seen.append(given[1].anchors) or choose(*given))
    table = attempts.measure(settings, adapter, *hosts, task, listed)
    assert len(table) == len(listed)
    assert set(table["n"]) == {len(task.data["dev"])}
    assert adapter.anchors is whole
    assert torch.equal(adapter.task("mood").bias, bias)
    assert all(anchors is whole for anchors in seen)  # the basis is that of training
    assert len(seen) == len(attempts.CHOICES)
    assert table[["same", "dev"]].stack().dropna().between(0, 100).all()
    assert table["same"].isna().tolist() == [a.arm == attempts.ON_SOURCE for a in listed]
    sizes = table.set_index("attempt")["bytes"]
    assert sizes["4-bit codes"] < 0.7 * sizes["8-bit codes"]
    assert sizes["32 coordinates"] < sizes["256 coordinates"]
    assert sizes["20 coded"] < sizes["8-bit codes"]
    assert sizes["8-bit codes"] == budget.adapter_parts(adapter)["anchors"]
    with pytest.raises(UHLError, match="group of attempts"):
        attempts.attempts(whole, ["magic"])
    with pytest.raises(UHLError, match="profile t has no attempts"):
        results.attempts("t")
    for host in ("small", "big"):
        folder = runs.cell_dir(settings, f"attempts-{host}")
        folder.mkdir(parents=True)
        table.to_csv(folder / "attempts.csv", index=False)
    found = results.attempts("t")
    assert found.groupby(["task", "target", "seed"]).size().to_dict() == {
        ("mood", "big", 0): len(table),
        ("mood", "small", 0): len(table),
    }
    with pytest.raises(UHLError, match="`scale` among them"):
        viz.attempt_changes(found)
    usual = attempts.attempts(whole, ["scale"])[-1]
    found.loc[found["attempt"] == "8-bit codes", ["group", "attempt"]] = usual.group, usual.name
    fig = viz.attempt_changes(found)
    rows = {ax.get_title("left"): [label.get_text() for label in ax.get_yticklabels()] for ax in fig.axes}
    assert list(rows) == list(dict.fromkeys(found["group"]))
    assert "anchor, scale chosen without labels" in rows["scale"]
    assert sum(map(len, rows.values())) == len(table) - 2  # scores on the source are none of ports
    few = found[found["group"] == "bits"].assign(target="another")
    fig = viz.attempt_changes(pd.concat([found, few]))
    assert [t.get_text().split("\n")[1] for t in fig.axes[0].get_xticklabels()] == ["big", "small"]
    panels = viz.score_against_anchor_bytes(found).axes
    drawn = [line for line in panels[0].lines if line.get_marker() == "s"]
    assert sorted(drawn[0].get_xdata()) == sorted(table[table["group"] == "dims"]["bytes"])
    best = table.loc[table[table["group"] == "dims"]["dev"].idxmax()]
    share, (bars,) = best["dev"] / 100, [c for c in panels[0].containers if c.lines[0] is drawn[0]]
    reach = max(segment[1][1] for segment in bars.lines[2][0].get_segments())
    assert reach - best["dev"] == pytest.approx(100 * (share * (1 - share) / len(task.data["dev"])) ** 0.5)
    assert [ax.get_title() for ax in panels] == ["big", "small"]


def test_maps_a_little_off_train_another_adapter_once(tiny_world, monkeypatch):
    plain, _ = stages.pretrain(tiny_world, "canonical")
    of, first, score = attempts.trained_otherwise(tiny_world, 0.3)
    assert not torch.equal(first.dictionary.v, plain.dictionary.v)
    (entry,) = runs.manifests("t-perturbed-0.3").values()
    assert [(row["split"], row["score"]) for row in entry["rows"]] == [("dev", score)]
    with pytest.raises(UHLError, match="predictions.npz is missing"):
        stages.agreement(tiny_world, None, "dev")
    assert (runs.cell_dir(of, "pretrain-canonical") / "predictions.npz").is_file()
    with monkeypatch.context() as patch:
        patch.setattr(attempts, "pretrain", None)
        _, again, _ = attempts.trained_otherwise(tiny_world.model_copy(update={"target": "big", "tune_rate": 0.5}), 0.3)
        assert torch.equal(again.dictionary.v, first.dictionary.v)
        for change in ({"rate": 1e-4}, {"seed": 3}):
            with pytest.raises(TypeError):
                attempts.trained_otherwise(tiny_world.model_copy(update=change), 0.3)
        patch.setattr(runs, "PROTOCOL", runs.PROTOCOL + 1)
        with pytest.raises(TypeError):
            attempts.trained_otherwise(tiny_world, 0.3)

    host = stages.freeze(stages.load_encoder("big"))
    basis = basis_of(observe(host, stages.probe(tiny_world, stages.load_data(tiny_world))), plain.config.width)
    with attach(host.model, plain, "mood", basis.frame(find_slots(host.model))) as attached:
        seen = []
        for step in (0, 1, 0):
            Perturbed(attached, basis, 0.3, 0).on_step_begin(None, TrainerState(global_step=step))
            seen.append([t.clone() for t in (*next(iter(attached.frame.slots.values())), attached.frame.routes[0])])
    for off, other, same, true in zip(
        *seen, (basis.read[0], basis.write[0], basis.read[0] * basis.rms[0]), strict=True
    ):
        assert torch.equal(off, same)
        assert not torch.equal(off, other)
        assert 0.2 < (off - true).norm() / true.norm() < 0.4


def test_two_hosts_train_one_adapter_by_turns(tiny_world, monkeypatch):
    taken, frames, turn = [], [], ByTurns._turn

    def watched(self, place):
        turn(self, place)
        taken.append(self.classifier.model.config.hidden_size)
        frames.append(self.classifier.frame.head.shape)

    world = tiny_world.model_copy(update={"epochs": 3.0})
    plain, _ = stages.pretrain(world, "canonical")
    monkeypatch.setattr(ByTurns, "_turn", watched)
    settings, both, score = attempts.trained_otherwise(world, second="other")
    steps = taken[:-1]
    assert len(steps) > 4
    assert steps == ([24, 20] * len(steps))[: len(steps)]
    assert taken[-1] == 24  # the source's again
    assert set(frames) == {(plain.config.width, 24), (plain.config.width, 40)}  # the other's head reads two levels
    assert not torch.equal(both.dictionary.v, plain.dictionary.v)
    assert both.info["source"] == "big"
    assert both.anchors.texts == plain.anchors.texts
    assert not both.anchors.origin.startswith("before")
    (entry,) = runs.manifests("t-by-turns-other").values()
    assert entry["rows"][0]["score"] == score
    host, found = stages.freeze(stages.load_encoder("big")), store.load(stages.adapter_path(settings, "anchor"))
    asked = stages.probe(tiny_world, stages.load_data(tiny_world))
    frame = basis_of(observe(host, asked), found.config.width).frame(find_slots(host.model))
    with attach(host.model, found, "mood", frame) as attached:
        classifier = Classifier(host.model, found.task("mood"), None, attached)
        assert predict(classifier, host, stages.load_data(tiny_world), "dev").score == score


def test_hosts_of_two_vocabularies_are_not_trained_by_turns(tiny_world, monkeypatch):
    load = stages.load_encoder

    def another(name):
        found = load(name)
        if name == "other":
            found = replace(found, tokenizer=deepcopy(found.tokenizer))
            found.tokenizer.add_tokens(["unheard"])
        return found

    monkeypatch.setattr(stages, "load_encoder", another)
    with pytest.raises(UHLError, match="other has another vocabulary than big"):
        stages.pretrain(tiny_world, "canonical", second="other")


def test_half_of_the_labels_and_the_texts_of_either_half(tiny_world, task, monkeypatch):
    settings = Settings(**tiny_world.model_dump() | {"anchors": 30, "more_anchors": 10, "anchor_cuts": 1})
    adapter, outcome = stages.pretrain(settings, "canonical")
    outcome.finish("pretrain-canonical")
    hosts = [stages.freeze(stages.load_encoder(name)) for name in ("big", "small")]
    listed = attempts.attempts(adapter.anchors, ["data"])
    made, anew = {}, attempts.with_training_texts

    def watched(*given):
        made[given[3]] = anew(*given)
        return made[given[3]]

    monkeypatch.setattr(attempts, "with_training_texts", watched)
    table = attempts.measure(settings, adapter, *hosts, task, listed).set_index("attempt")
    half = len(task.data["train"]) // 2
    (entry,) = runs.manifests(f"t-{half}-labels").values()
    assert entry["parameters"]["train_size"] == half
    assert table.loc["source, half of the labels", "dev"] == entry["rows"][0]["score"]

    used = set(stages.load_data(settings.model_copy(update={"train_size": half})).data["train"]["text"])
    theirs = {seen: set(anchors.texts) - set(adapter.anchors.texts) for seen, anchors in made.items()}
    assert theirs[True] <= used
    assert theirs[False] <= set(task.data["train"]["text"]) - used
    assert theirs[False]
    for anchors in made.values():
        first, end = adapter.anchors.texts, adapter.anchors.probe.own
        assert anchors.texts[:end] == first[:end]
        assert anchors.coded == adapter.anchors.coded
        assert anchors.own == end + len(set(anchors.texts) - set(first))  # they count as the task's own texts
        assert len(anchors.decided()) == sum(anchors.probe.units())
    whole = stages.adapter_for(settings.model_copy(update={"profile": f"t-{half}-labels"}), "anchor")[0].anchors
    again = made[True].cut(texts=whole.probe.own)
    assert torch.allclose(again.decided()[:30], whole.decided()[:30], atol=0.05)  # in the coordinates of training

    data = table.loc["head trained on the training texts and labels"]
    assert data["texts"] == len(task.data["train"])
    assert data["bytes"] == budget.labelled_bytes(task.data["train"]["text"], 2)
    half_of, its, _ = attempts.trained_otherwise(settings, changed={"train_size": half})
    monkeypatch.setattr(attempts, "MOST", 3)
    assert len(anew(half_of, its, hosts[0], False).texts) <= len(its.anchors.texts) + 3
    with pytest.raises(UHLError, match="whole training split"):
        attempts.with_training_texts(settings, adapter, hosts[0], True)


def test_adapters_that_use_other_numbers_of_atoms(tiny_world, task):
    """Each trained once for all arms, at one charge for as many atoms as a token may use."""
    adapter, _ = stages.pretrain(tiny_world, "canonical")
    hosts = [stages.freeze(stages.load_encoder(name)) for name in ("big", "small")]
    listed = [a for a in attempts.attempts(adapter.anchors, ["sparsity"]) if a.atoms in {1, 4}]
    assert len(listed) == 8
    table = attempts.measure(tiny_world, adapter, *hosts, task, listed).set_index("attempt")
    for atoms, name in ((1, "1 atom"), (4, "4 atoms")):
        (entry,) = runs.manifests(f"t-{atoms}-atoms").values()
        assert entry["parameters"]["top_k"] == atoms
        assert entry["parameters"]["lambda_f"] == pytest.approx(tiny_world.lambda_f * tiny_world.top_k / atoms)
        assert table.loc[f"source, {name} a token", "dev"] == entry["rows"][0]["score"]
        own = stages.adapter_for(tiny_world.model_copy(update={"profile": f"t-{atoms}-atoms"}), "anchor")[0]
        assert own.config.top_k == atoms


@pytest.mark.parametrize("labels", [False, True])
def test_labels_teach_where_they_are_given(tiny_world, task, labels):
    settings = Settings(**tiny_world.model_dump() | {"epochs": 4})
    anchors = stages.pretrain(settings, "canonical")[0].anchors
    rows = task.data["train"]
    turned = Dataset.from_dict(rows.to_dict() | {"label": [1 - label for label in rows["label"]]})
    flipped = replace(task, data=DatasetDict(task.data | {"train": turned}))
    one, other = (
        attempts.taught(settings, anchors, stages.load_encoder("small"), seen, "head", labels)
        for seen in (task, flipped)
    )
    agree = np.mean(np.array(one.labels) == np.array(other.labels))
    assert agree < 0.2 if labels else agree == 1


@pytest.mark.parametrize("method", attempts.TAUGHT.values())
def test_what_is_taught_by_the_source_sees_no_label(tiny_world, task, method):
    settings = Settings(**tiny_world.model_dump() | {"epochs": 4, "anchor_cuts": 1})
    anchors = stages.pretrain(settings, "canonical")[0].anchors
    decided = anchors.decided()
    assert len(decided) > len(anchors.texts)  # fragments too
    leans = (decided[:, 0] - decided[:, 1]).quantile(torch.tensor([0.2, 0.8]))
    few, many = (replace(anchors, bias=anchors.bias + torch.tensor([-lean, 0.0])) for lean in leans)

    def flip(rows):
        return Dataset.from_dict(rows.to_dict() | {"label": [1 - label for label in rows["label"]]})

    other = {split: flip(task.data[split]) for split in ("train", "dev", "test")}
    flipped = replace(task, data=DatasetDict(task.data | other))

    def told(taught, seen):
        return attempts.taught(settings, taught, stages.load_encoder("small"), seen, method)

    one, other, third = told(few, task), told(few, flipped), told(many, task)
    assert one.labels == other.labels
    assert one.score + other.score == pytest.approx(100)
    assert sum(one.labels) < sum(third.labels)  # it says more often what it was told more often
    always = told(replace(anchors, bias=anchors.bias + torch.tensor([99.0, 0.0])), task)
    assert set(always.labels) == {0}
    assert always.score == pytest.approx(100 * task.data["dev"]["label"].count(0) / len(task.data["dev"]))


@pytest.mark.parametrize("choice", attempts.CHOICES)
def test_chosen_texts_are_distinct_and_repeat(choice):
    states = torch.randn(60, 8, generator=torch.Generator().manual_seed(0))
    states[30:] = states[:30] + 1e-3 * torch.randn(30, 8, generator=torch.Generator().manual_seed(1))  # near copies
    kept = attempts.select(states, choice, 20)
    assert kept == attempts.select(states, choice, 20)
    assert len(set(kept)) == 20
    if choice in {"k-means", "determinantal"}:  # the two that look for variety keep no near copies
        assert len({i % 30 for i in kept}) == 20
    with pytest.raises(UHLError, match="61 texts to choose"):
        attempts.select(states, choice, 61)


@pytest.mark.parametrize(("flops", "verdict"), [(3.3, "held"), (4.5, "held"), (4.6, "refuted")])
def test_fewer_flops_than_the_rivals_are_no_refutation(flops, verdict):
    from uhl import claims

    row = {"task": "t", "target": "h", "seeds": 1, "n": 9, "adapter_bytes": 10}
    table = pd.DataFrame(
        [
            row | {"arm": "anchor", "phase": "tuned", "extra_flops_pct": flops},
            row | {"arm": claims.RIVAL, "phase": "retrained", "extra_flops_pct": 4.5},
        ]
    )
    (found,) = (fact for fact in claims._memory(table) if "FLOPs" in fact[0])
    assert verdict in found
