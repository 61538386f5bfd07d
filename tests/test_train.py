"""Training: it learns, resumes to the same weights, stops on NaN, and the stages keep their promises."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from conftest import sentences
from transformers import TrainerCallback

from uhl import runs, search, stages, store, train
from uhl.adapter import TaskPart, UHLAdapter
from uhl.baselines import METHODS, own_frame, run_baseline, start
from uhl.config import TrainConfig, UHLConfig
from uhl.errors import UHLError
from uhl.head import fit_head
from uhl.layer import attach
from uhl.runs import Settings
from uhl.train import Classifier, predict


def build(encoder, task, config, train_config, seed=0):
    adapter = UHLAdapter(config)
    part = adapter.add_task("mood", task.labels, task.kind)
    part.bias.requires_grad_(False)
    torch.manual_seed(seed)
    attached = attach(encoder.model, adapter, "mood")
    return adapter, attached, Classifier(encoder.model, part, None, attached, train_config)


def test_the_adapter_learns_and_the_host_does_not(encoder, task, config, tmp_path):
    settings = TrainConfig(steps=40, batch=16, rate=2e-2, head_rate=2e-2)
    before = {k: v.clone() for k, v in encoder.model.state_dict().items()}
    adapter, attached, classifier = build(encoder, task, config, settings)
    log = train.train(classifier, encoder, task, settings, tmp_path)
    assert log.losses[-1][1] < 0.8 * log.losses[0][1]
    assert adapter.dictionary.u.abs().sum() > 0
    attached.detach()
    assert all(torch.equal(v, before[k]) for k, v in encoder.model.state_dict().items())


class Stop(TrainerCallback):
    def __init__(self, step):
        self.step = step

    def on_save(self, args, state, control, **kwargs):
        if state.global_step >= self.step:
            raise KeyboardInterrupt


@pytest.mark.parametrize(("stop", "dropout"), [(6, 0.0), (9, 0.1)])  # at an epoch's end, and inside one
def test_killed_and_resumed_gives_the_same_bits(make_encoder, task, config, tmp_path, monkeypatch, stop, dropout):
    settings = TrainConfig(steps=12, batch=8, rate=1e-2)
    states = []
    for interrupted in (False, True):
        encoder = make_encoder()
        for module in encoder.model.modules():
            if isinstance(module, torch.nn.Dropout):
                module.p = dropout
        folder = tmp_path / str(interrupted)
        adapter, attached, classifier = build(encoder, task, config, settings)
        if interrupted:
            init = train.BudgetTrainer.__init__
            with monkeypatch.context() as patch:
                patch.setattr(
                    train.BudgetTrainer,
                    "__init__",
                    lambda self, *a, _init=init, **k: _init(self, *a, callbacks=[Stop(stop)], **k),
                )
                with pytest.raises(KeyboardInterrupt):
                    train.train(classifier, encoder, task, settings, folder)
            assert list(folder.glob("checkpoint-*"))
            attached.detach()
            adapter, attached, classifier = build(encoder, task, config, settings, seed=5)
        log = train.train(classifier, encoder, task, settings, folder)
        assert log.steps == 12
        assert not list(folder.glob("checkpoint-*"))
        states.append({k: v.clone() for k, v in adapter.state_dict().items()})
        attached.detach()
    assert all(torch.equal(states[0][k], states[1][k]) for k in states[0])


def test_a_loss_that_is_not_finite_stops(encoder, task, config, tmp_path):
    settings = TrainConfig(steps=4, batch=8)
    _, attached, classifier = build(encoder, task, config, settings)
    with torch.no_grad():
        classifier.part.head_bias.fill_(float("nan"))
    with pytest.raises(UHLError, match="the loss is nan at step 0; lower the learning rates"):
        train.train(classifier, encoder, task, settings, tmp_path)
    attached.detach()


def test_the_budget_term_closes_gates(make_encoder, task, config, tmp_path):
    used = []
    for weight in (0.0, 3.0):
        encoder = make_encoder()
        settings = TrainConfig(steps=40, batch=16, rate=3e-2, lambda_f=weight)
        _, attached, classifier = build(encoder, task, config, settings)
        train.train(classifier, encoder, task, settings, tmp_path / str(weight))
        used.append(predict(classifier, encoder, task, "dev").active)
        attached.detach()
    assert used[1] < 0.6 * used[0]


def test_prediction_keeps_the_split_order(encoder, task, config):
    _, attached, classifier = build(encoder, task, config, TrainConfig())
    found = predict(classifier, encoder, task, "test", batch=3)
    one_by_one = predict(classifier, encoder, task, "test", batch=1)
    assert found.gold == list(task.data["test"]["label"])
    np.testing.assert_allclose(np.stack(found.logits), np.stack(one_by_one.logits), atol=1e-5)
    attached.detach()


@pytest.mark.parametrize("method", METHODS)
def test_baselines_train_what_they_say(make_encoder, task, method, tmp_path):
    encoder = make_encoder()
    before = {k: v.clone() for k, v in encoder.model.state_dict().items()}
    begin = start(encoder, task, list(task.data["unlabelled"]["text"]))
    fitted = begin.part.head.clone()
    made = run_baseline(method, encoder, task, begin, TrainConfig(steps=8, batch=16, rate=1e-2), tmp_path)
    assert torch.equal(begin.part.head, fitted)
    assert torch.equal(made.classifier.part.head, fitted) == (method == "head")
    found = predict(made.classifier, encoder, task, "test")
    assert 0 <= found.score <= 100
    layers, width = 3, 24
    lora = layers * 2 * 8 * (width + width)
    head = 2 * 256 + 2
    whole = sum(p.numel() for p in make_encoder().model.parameters())
    assert made.log.trained == {"head": head, "lora-r8": lora + head, "full": whole + head}[method]
    assert made.extra_flops_pct == pytest.approx(100 * lora / (layers * 8 * width**2) if method == "lora-r8" else 0)
    moved = any(not torch.equal(v, before[k]) for k, v in encoder.model.state_dict().items() if k in before)
    assert moved == (method == "full")


def test_the_fitted_head_is_the_logistic_regression(encoder, task):
    part = TaskPart(UHLConfig(), task.labels, task.kind)
    classifier = Classifier(encoder.model, part, own_frame(encoder, list(task.data["unlabelled"]["text"])))
    fit_head(classifier, encoder, task)
    from sklearn.linear_model import LogisticRegression

    from uhl.anchors import final_means

    x, dev = (classifier.frame.codes(final_means(encoder, list(task.data[s]["text"]))) for s in ("train", "dev"))
    best = max(
        (
            LogisticRegression(C=c, max_iter=1000).fit(x, task.data["train"]["label"])
            for c in (0.001, 0.003, 0.01, 0.03, 0.1)
        ),
        key=lambda m: m.score(dev, task.data["dev"]["label"]),
    )
    ours = torch.softmax(part.classify(dev), -1)[:, 1].detach().numpy()
    np.testing.assert_allclose(ours, best.predict_proba(dev)[:, 1], atol=0.02)  # the head is stored at 8 bits


# --- stages on a tiny host -------------------------------------------------------------------------------------------


@pytest.fixture
def tiny_world(make_encoder, task, monkeypatch):
    """Stages see a tiny source, a tiny target and the toy task."""
    shapes = {"big": (3, 24), "small": (2, 16)}
    monkeypatch.setattr(stages, "load_encoder", lambda name: replace(make_encoder(*shapes[name]), name=name))
    monkeypatch.setattr(stages.tasks, "load_task", lambda name: task)
    return Settings(
        profile="t",
        source="big",
        target="small",
        task="mood",
        anchors=40,
        epochs=1,
        batch=16,
        tune_steps=4,
        tune_batch=8,
    )


def run_all(settings):
    for projector in ("canonical", "dimension"):
        _, outcome = stages.pretrain(settings, projector)
        stages.finish(settings, f"pretrain-{projector}", outcome)
    outcome = stages.zero_shot(settings)
    stages.finish(settings, "port-small", outcome)
    tuned = [o for o in (stages.tune(settings, arm) for arm in stages.TUNED_ARMS) if o]
    stages.finish(settings, "tune-small", stages.merge(tuned))
    for host, name in (("source", "big"), ("target", "small")):
        begin = stages.baseline_start(settings, host)
        made = [stages.baseline(settings, host, method, begin) for method in METHODS]
        stages.finish(settings, f"baselines-{name}", stages.merge(made))
    return outcome


def test_stages_fill_the_results_contract(tiny_world, monkeypatch):
    zero = run_all(tiny_world)
    frame = runs.load_results("t")
    assert tuple(frame.columns) == runs.COLUMNS
    test = frame[frame["split"] == "test"]
    cells = {phase: set(rows["arm"]) for phase, rows in test.groupby("phase")}
    assert cells["source"] == {"uhl-canonical", "uhl-dimension", *METHODS}
    assert cells["retrained"] == set(METHODS)
    assert cells["zero-shot"] == {"no-adapter", "dimension", "anchor", "zero-atoms", "random-p", "shuffled"}
    assert cells["tuned"] == {"dimension", "anchor", "zero-atoms", "random-p"}
    assert "equal widths" in zero.details["undefined"]["lineage"]
    assert (test["n"] == 16).all()
    from uhl import report

    table = report.summary("t")  # raises when a score differs from the stored predictions
    assert len(table) == len(test)
    assert not table[table["phase"] == "retrained"].set_index("arm").loc["full", "extra_flops_pct"]
    text = report.markdown("t")
    assert "shuffled anchors" in text
    assert "nan" not in text
    assert len(report.paired(report.gather("t"))) >= 8


def test_an_archive_gives_back_the_tables(tiny_world, tmp_path, monkeypatch):
    from uhl import report

    _, outcome = stages.pretrain(tiny_world, "canonical")
    stages.finish(tiny_world, "pretrain-canonical", outcome)
    before = report.summary("t")
    archive = runs.pack("t", tmp_path / "t.zip")
    assert runs.pack("t", tmp_path / "again.zip").read_bytes() == archive.read_bytes()
    assert runs.restore(archive) == []  # what is there stays
    monkeypatch.setenv("UHL_RUNS", str(tmp_path / "elsewhere"))
    (cell,) = runs.restore(archive)
    assert sorted(p.name for p in cell.iterdir()) == ["manifest.json", "predictions.npz"]
    assert report.summary("t").equals(before)
    with pytest.raises(UHLError, match="a cell restored from an archive has none"):
        stages.zero_shot(tiny_world, ("anchor",))


@pytest.mark.parametrize("name", ["../evil/x/manifest.json", "a-s0/x/run.sh", "/a-s0/x/manifest.json"])
def test_a_strange_archive_is_refused_and_writes_nothing(tmp_path, name):
    import zipfile

    path = tmp_path / "a.zip"
    path.write_bytes(b"no zip")
    with pytest.raises(UHLError, match="is not an archive of runs"):
        runs.restore(path)
    with zipfile.ZipFile(path, "w") as archive:
        manifest = '{"parameters": {"profile": "p"}, "rows": []}'
        for entry in ("a-s0/x/manifest.json", "a-s0/x/predictions.npz", name):
            archive.writestr(entry, manifest)
    with pytest.raises(UHLError, match="holds other files"):
        runs.restore(path)
    assert not runs.root().exists()


def test_a_search_tries_each_rate_once_and_never_scores_test(tiny_world, monkeypatch):
    monkeypatch.setattr(search, "RATES", {"uhl-canonical": (1e-3, 1e-2), "full": (1e-4,)})
    rows = list(search.search(tiny_world))
    assert [(r["method"], r["rate"], r["split"]) for r in rows] == [
        ("uhl-canonical", 1e-3, "dev"),
        ("uhl-canonical", 1e-2, "dev"),
        ("full", 1e-4, "dev"),
    ]
    assert len(list((runs.root() / "t-search").glob("*/*/trial/manifest.json"))) == 3
    monkeypatch.setattr(stages, "pretrain", None)  # a finished trial is read, not run
    assert list(search.search(tiny_world, ("uhl-canonical",))) == rows[:2]
    with pytest.raises(UHLError, match="unknown method to search 'lora'; choose one of: uhl-canonical, full"):
        list(search.search(tiny_world, ("lora",)))


def test_a_tuned_file_holds_what_was_scored(tiny_world):
    stages.pretrain(tiny_world, "canonical")
    outcome = stages.tune(tiny_world, "anchor")
    before = store.load(runs.cell_dir(tiny_world, "pretrain-canonical") / "adapter.safetensors")
    after = store.load(outcome.details["path"])
    assert torch.equal(before.dictionary.u, after.dictionary.u)
    assert torch.equal(before.router.weight, after.router.weight)
    assert not torch.equal(before.task("mood").bias, after.task("mood").bias)


@pytest.mark.parametrize("arm", ["anchor", "random-p", "zero-atoms"])
def test_a_tuned_file_ported_again_gives_the_scored_logits(tiny_world, arm, monkeypatch):
    from uhl.port import port

    monkeypatch.setattr("uhl.port.SCALES", (1.0,))  # atoms and bias at work in the fit
    stages.pretrain(tiny_world, "canonical")
    outcome = stages.tune(tiny_world, arm)
    found = store.load(outcome.details["path"])
    assert found.info["arm"] == arm
    assert arm == "zero-atoms" or found.task("mood").bias.abs().max() > 0
    target, data = stages.freeze(stages.load_encoder("small")), stages.load_data(tiny_world)
    ported = port(found, target, "mood", arm, seed=found.info["port_seed"])
    assert ported.scale == found.info["scale"]
    scored = outcome.predictions[f"{arm}/test"]
    if arm == "zero-atoms":
        again = predict(Classifier(target.model, found.task("mood"), ported.frame), target, data, "test")
    else:
        with attach(target.model, found, "mood", ported.frame, ported.scale) as attached:
            again = predict(Classifier(target.model, found.task("mood"), None, attached), target, data, "test")
    np.testing.assert_allclose(np.stack(again.logits), np.stack(scored.logits), atol=1e-4)


def test_a_checkpoint_of_another_run_is_not_resumed(make_encoder, task, config, tmp_path, monkeypatch):
    """Killed at one learning rate and started at another: as if the first run had never been."""
    states = []
    for rate, folder in ((1e-3, "a"), (1e-2, "a"), (1e-2, "b")):
        settings = TrainConfig(steps=8, batch=8, rate=rate)
        encoder = make_encoder()
        adapter, attached, classifier = build(encoder, task, config, settings)
        with monkeypatch.context() as patch:
            if rate == 1e-3:
                init = train.BudgetTrainer.__init__
                stopped = lambda self, *a, _init=init, **k: _init(self, *a, callbacks=[Stop(4)], **k)  # noqa: E731
                patch.setattr(train.BudgetTrainer, "__init__", stopped)
                with pytest.raises(KeyboardInterrupt):
                    train.train(classifier, encoder, task, settings, tmp_path / folder)
                assert list((tmp_path / folder).glob("checkpoint-*"))
            else:
                train.train(classifier, encoder, task, settings, tmp_path / folder)
        attached.detach()
        states.append({k: v.clone() for k, v in adapter.state_dict().items()})
    assert all(torch.equal(states[1][k], states[2][k]) for k in states[1])


def test_training_again_with_one_seed_gives_the_same_file(tiny_world):
    files = [stages.pretrain(tiny_world, "canonical")[1].details["path"].read_bytes() for _ in range(2)]
    assert files[0] == files[1]


def test_a_head_for_other_labels_is_an_error(tiny_world, task, monkeypatch):
    stages.pretrain(tiny_world, "canonical")
    other = type(task)("mood", "sentence", ("sad", "glad"), task.data)
    monkeypatch.setattr(stages.tasks, "load_task", lambda name: other)
    with pytest.raises(UHLError, match="labels negative, positive; the task is a sentence task with labels sad, glad"):
        stages.zero_shot(tiny_world, ("anchor",))


def test_too_many_anchors(tiny_world, task):
    with pytest.raises(UHLError, match="lower `anchors`"):
        stages.anchor_texts(Settings(anchors=10_000), task)


def test_scores_that_do_not_match_their_predictions_are_refused(tiny_world):
    import json

    from uhl import report

    _, outcome = stages.pretrain(tiny_world, "canonical")
    stages.finish(tiny_world, "pretrain-canonical", outcome)
    path = runs.cell_dir(tiny_world, "pretrain-canonical") / "manifest.json"
    entry = json.loads(path.read_text())
    for row in entry["rows"]:
        row["score"] += 1.0
    path.write_text(json.dumps(entry))
    runs.update_results("t")
    with pytest.raises(UHLError, match=r"results\.csv says"):
        report.summary("t")


def test_words_beyond_the_length_count_as_outside(encoder):
    """Gold tags are all of a sentence's, so truncation cannot flatter F1."""
    from datasets import Dataset, DatasetDict

    from uhl.tasks import Task

    words, tags = ["good", "film", "bad", "plot"] * 5, [1, 0, 1, 0] * 5
    rows = Dataset.from_dict({"tokens": [words, words[:3]], "tags": [tags, tags[:3]]})
    task = Task("ner", "token", ("O", "B-X"), DatasetDict({"test": rows}))
    part = TaskPart(UHLConfig(width=24), task.labels, "token")
    with torch.no_grad():
        part.head_bias[1] = 5.0  # every word that the model sees is an entity
    texts = sorted(set(sentences(40)))
    classifier = Classifier(encoder.model, part, own_frame(encoder, texts, 24))
    found = predict(classifier, encoder, task, "test", max_length=8)  # six words and two special tokens
    assert found.gold == [tags, tags[:3]]
    assert found.labels == [[1] * 6 + [0] * 14, [1] * 3]
    assert len(found.logits[0]) == 6
