"""Training: it learns, resumes to the same weights, stops on NaN, and the stages keep their promises."""

import numpy as np
import pytest
import torch
from datasets import Dataset, DatasetDict
from torch.utils._python_dispatch import _get_current_dispatch_mode
from transformers import TrainerCallback
from world import sentences

from uhl import tasks, train
from uhl.adapter import TaskPart, UHLAdapter
from uhl.anchors import Probe
from uhl.baselines import SPARSE, own_frame, peft_method, run_baseline, start
from uhl.config import METHODS, Sizes, TrainConfig
from uhl.errors import UHLError
from uhl.head import fit_head
from uhl.host import find_slots
from uhl.peft_method import attach
from uhl.quant import dequantise
from uhl.sat import SATAdapter
from uhl.tasks import Task
from uhl.train import Classifier, predict

pytestmark = pytest.mark.unchecked


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


def reference_loss(logits, labels, teacher, weight):
    """The equation at the head of uhl.teacher, row by row."""
    rows = []
    for logit, label, told in zip(logits, labels.tolist(), teacher, strict=True):
        log = logit.log_softmax(-1)
        by_teacher = None if told.isnan().any() else -(told.softmax(-1) * log).sum()
        if label != tasks.IGNORE and by_teacher is not None:
            rows.append((1 - weight) * -log[label] + weight * by_teacher)
        elif label != tasks.IGNORE or by_teacher is not None:
            rows.append(-log[label] if by_teacher is None else by_teacher)
    return torch.stack(rows).mean()


@pytest.mark.parametrize("shape", [(6,), (2, 3)])
def test_a_teacher_speaks_beside_labels_and_alone_where_there_are_none(encoder, task, config, shape):
    _, attached, classifier = build(encoder, task, config, TrainConfig(teacher_weight=0.3))
    classifier.eval()  # no budget terms
    logits = torch.randn(*shape, 2, requires_grad=True)
    labels = torch.tensor([0, 1, tasks.IGNORE, 1, tasks.IGNORE, 0]).view(shape)
    teacher = torch.randn(6, 2)
    teacher[3:5] = torch.nan  # a label alone, and neither
    found = classifier.loss(logits, labels, teacher.view(*shape, 2))
    wanted = reference_loss(logits.flatten(0, -2), labels.flatten(), teacher, 0.3)
    torch.testing.assert_close(found, wanted)
    torch.testing.assert_close(*(torch.autograd.grad(x, logits, retain_graph=True)[0] for x in (found, wanted)))
    silent = classifier.loss(logits, labels, torch.full((*shape, 2), torch.nan))
    torch.testing.assert_close(silent, classifier.loss(logits, labels))
    attached.detach()


def test_a_teacher_s_words_are_on_their_first_pieces_and_padding_has_none(encoder):
    rows = {"tokens": [["goodfilm", "was"], ["dull"]], "tags": [[1, 0], [tasks.IGNORE]]}
    rows["teacher"] = [[[1.0, 2.0], [3.0, 4.0]], [[5.0, 6.0]]]
    made = tasks.encode("token", Dataset.from_dict(rows), encoder.tokenizer)
    assert made["labels"] == [[-100, 1, -100, 0, -100], [-100, -100, -100]]
    batch = train.collator(encoder, Task("t", "token", ("O", "B-X"), DatasetDict()))(list(made))
    told = batch["teacher"]
    assert told.shape == (2, 5, 2)
    assert told[0, [1, 3]].tolist() == [[1, 2], [3, 4]]
    assert told[1, 1].tolist() == [5, 6]
    assert int(told.isnan().all(-1).sum()) == 7


@pytest.mark.parametrize("bf16", [False, True])
def test_bf16_is_for_training_alone(encoder, task, config, tmp_path, bf16):
    settings = TrainConfig(steps=40, batch=16, rate=2e-2, head_rate=2e-2, bf16=bf16)
    _, attached, classifier = build(encoder, task, config, settings)
    seen = {True: set(), False: set()}
    some = encoder.model.get_submodule(find_slots(encoder.model)[-1].path).register_forward_hook(
        lambda module, _, out: seen[classifier.training].add(out.dtype)
    )
    log = train.train(classifier, encoder, task, settings, tmp_path)
    assert log.losses[-1][1] < 0.8 * log.losses[0][1]
    found = predict(classifier, encoder, task, "dev")
    some.remove()
    assert seen == {True: {torch.bfloat16 if bf16 else torch.float32}, False: {torch.float32}}
    assert {p.dtype for p in classifier.parameters()} == {torch.float32}
    assert np.stack(found.logits).dtype == np.float32
    attached.detach()


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
            (left,) = folder.glob("checkpoint-*")
            (left / "seconds.txt").write_text("1000.5")  # that an interrupted run took so far
            attached.detach()
            adapter, attached, classifier = build(encoder, task, config, settings, seed=5)
        log = train.train(classifier, encoder, task, settings, folder)
        assert log.steps == 12
        assert 1000 * interrupted < log.seconds < 1000 * interrupted + 200
        assert not list(folder.glob("checkpoint-*"))
        states.append({k: v.clone() for k, v in adapter.state_dict().items()})
        attached.detach()
    assert all(torch.equal(states[0][k], states[1][k]) for k in states[0])


def test_a_checkpoint_that_was_being_written_is_not_resumed(make_encoder, task, config, tmp_path, monkeypatch):
    settings, states = TrainConfig(steps=8, batch=8, rate=1e-2), []
    for stopped in (True, False):
        encoder = make_encoder()
        adapter, attached, classifier = build(encoder, task, config, settings)
        if stopped:
            with monkeypatch.context() as patch:
                patch.setattr(train.BudgetTrainer, "_save_rng_state", interrupt)
                with pytest.raises(KeyboardInterrupt):
                    train.train(classifier, encoder, task, settings, tmp_path / "a")
            assert [left.name for left in (tmp_path / "a").glob("checkpoint-*")] == ["checkpoint-2"]
            attached.detach()
            adapter, attached, classifier = build(encoder, task, config, settings)
        train.train(classifier, encoder, task, settings, tmp_path / "a")
        assert not list((tmp_path / "a").glob("checkpoint-*"))
        attached.detach()
        states.append({k: v.clone() for k, v in adapter.state_dict().items()})
    assert all(torch.equal(states[0][k], states[1][k]) for k in states[0])


def interrupt(*_):
    raise KeyboardInterrupt


def test_a_loss_that_is_not_finite_stops(encoder, task, config, tmp_path):
    settings = TrainConfig(steps=4, batch=8)
    _, attached, classifier = build(encoder, task, config, settings)
    with torch.no_grad():
        classifier.part.head_bias.fill_(float("nan"))
    with pytest.raises(UHLError, match="the loss is nan at step 0; lower the learning rates"):
        train.train(classifier, encoder, task, settings, tmp_path)
    assert _get_current_dispatch_mode() is None  # what watched the step's memory has stopped
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


def trained_beside_the_head(method, encoder):
    """How many values a baseline trains on the tiny host, of 3 layers, D = 24 and D_ffn = 48."""
    own = dict(encoder.model.named_parameters())
    shapes = [(24, 24), (24, 48), (48, 24)]
    sat = sum(128 * (d_in + d_out) for d_in, d_out in shapes) + 128 * 24 + 128  # atoms, router, its offset
    return {
        "head": 0,
        "bitfit": sum(p.numel() for n, p in own.items() if n.endswith("bias")),
        "lora-r8": 3 * 2 * 8 * (24 + 24),
        "lora-1mb": peft_method("lora-1mb", find_slots(encoder.model))[2] * 3 * (8 * 24 + 2 * (24 + 48)),
        "vera": 3 * 2 * (256 + 24),
        "vb-lora": 960 * 24 + 3 * 2 * 2 * 4 * 960,  # the bank, and each vector's logits over it
        "uni-lora": 23_040,
        "sat-lora": sat + 3 * 6 * 128,
        "hf-sat-lora": sat + 14 * 7 + 128 * 15,
        "full": sum(p.numel() for p in own.values()),
    }[method]


@pytest.mark.parametrize("method", METHODS)
def test_baselines_train_what_they_say(make_encoder, task, method, tmp_path):
    encoder = make_encoder()
    before = {k: v.clone() for k, v in encoder.model.state_dict().items()}
    begin = start(encoder, task, Probe(list(task.data["unlabelled"]["text"])))
    fitted, wanted = begin.part.head.clone(), trained_beside_the_head(method, encoder)
    made = run_baseline(method, encoder, task, begin, TrainConfig(steps=8, batch=16, rate=1e-2), tmp_path)
    assert torch.equal(begin.part.head, fitted)
    assert torch.equal(made.classifier.part.head, fitted) == (method == "head")
    found = predict(made.classifier, encoder, task, "test")
    assert 0 <= found.score <= 100
    assert made.log.trained == wanted + 2 * 256 + 2
    assert made.log.steps == (0 if method == "head" else 8)
    assert (made.log.peak_mb is None) == (method == "head")
    moved = any(not torch.equal(v, before[k]) for k, v in encoder.model.state_dict().items() if k in before)
    assert moved == (method in {"full", "bitfit"})
    if method not in {"head", "full", "bitfit"}:
        assert made.extra_flops_pct > 0
    assert made.bytes <= 1_000_000
    stored = 1 if method in SPARSE else 0 if method == "vb-lora" else 2  # bytes a value, VB-LoRA's top ones alone
    assert made.bytes >= stored * wanted * 0.95


def test_sparse_baselines_start_as_the_host_and_are_what_their_file_holds(make_encoder, task):
    """SAT-LoRA's update is zero at the start; its stored integers give back the parameters it computes with."""
    encoder = make_encoder()
    slots = find_slots(encoder.model)
    for functional in (False, True):
        adapter = SATAdapter(Sizes(), slots, encoder.width, functional)
        adapter.add_task("main", task.labels, task.kind)
        ids = torch.arange(5, 13)[None]
        with torch.no_grad():
            bare = encoder.model(input_ids=ids).last_hidden_state
            frame = own_frame(encoder, Probe(list(task.data["unlabelled"]["text"])))
            with attach(encoder.model, adapter, "main", frame) as attached:
                assert torch.equal(encoder.model(input_ids=ids).last_hidden_state, bare)
                for atoms in adapter.dictionary.values():
                    atoms.u.copy_(torch.randn(atoms.u.shape))
                assert (encoder.model(input_ids=ids).last_hidden_state - bare).abs().max() > 1e-3
                v, u, strength = attached.folded.atoms[slots[4].path]
        stored = adapter.stored("main")
        name = f"dictionary.{slots[4].d_in}x{slots[4].d_out}.u"
        torch.testing.assert_close(dequantise(stored[name], stored[f"{name}.scale"]), u)
        assert (v.shape, u.shape) == ((128, slots[4].d_in), (128, slots[4].d_out))
        assert len(strength) == 128
        rows = {"mixer.first", "mixer.second"} if functional else {"mixer.first"}
        assert rows <= set(stored)
        assert not any(n.startswith("tasks.main.head") for n in stored)


def test_the_peak_of_memory_is_that_of_a_step(make_encoder, task, tmp_path):
    """More tokens at a time take more; AdamW's moments and the gradients of all parameters are in it."""
    found = {}
    for name, method, batch in (("few", "lora-r8", 8), ("many", "lora-r8", 32), ("full", "full", 8)):
        encoder = make_encoder()
        begin = start(encoder, task, Probe(list(task.data["unlabelled"]["text"])))
        config = TrainConfig(steps=2, batch=batch)
        found[name] = run_baseline(method, encoder, task, begin, config, tmp_path / name).log.peak_mb
    assert found["many"] > 2 * found["few"]
    whole = sum(p.numel() for n, p in make_encoder().model.named_parameters() if "pooler" not in n)
    assert found["full"] - found["few"] > 2 * 4 * whole / 1e6  # the moments alone


def test_the_fitted_head_is_the_logistic_regression(encoder, task):
    part = TaskPart(Sizes(), task.labels, task.kind)
    classifier = Classifier(encoder.model, part, own_frame(encoder, Probe(list(task.data["unlabelled"]["text"]))))
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


def test_a_head_is_fitted_only_where_that_is_better_on_dev(encoder, task):
    part = TaskPart(Sizes(), task.labels, task.kind)
    classifier = Classifier(encoder.model, part, own_frame(encoder, Probe(list(task.data["unlabelled"]["text"]))))
    fit_head(classifier, encoder, task, only_if_better=True)  # than zeros
    fitted = part.head.detach().clone()
    assert fitted.any()
    fit_head(classifier, encoder, task, only_if_better=True)  # than itself
    assert torch.equal(part.head, fitted)
    with torch.no_grad():
        part.head.neg_()
    fit_head(classifier, encoder, task, only_if_better=True)
    assert torch.equal(part.head, fitted)
    with torch.no_grad():
        part.head.mul_(2.0)  # decides nearly as before
    doubled = part.head.detach().clone()
    fit_head(classifier, encoder, task)
    assert not torch.equal(part.head, doubled)


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


def test_words_beyond_the_length_count_as_outside(encoder):
    """Gold tags are all of a sentence's, so truncation cannot flatter F1."""
    from datasets import Dataset, DatasetDict

    from uhl.tasks import Task

    words, tags = ["good", "film", "bad", "plot"] * 5, [1, 0, 1, 0] * 5
    rows = Dataset.from_dict({"tokens": [words, words[:3]], "tags": [tags, tags[:3]]})
    task = Task("ner", "token", ("O", "B-X"), DatasetDict({"test": rows}))
    part = TaskPart(Sizes(width=24), task.labels, "token")
    with torch.no_grad():
        part.head_bias[1] = 5.0  # every word that the model sees is an entity
    texts = sorted(set(sentences(40)))
    classifier = Classifier(encoder.model, part, own_frame(encoder, Probe(texts), 24))
    found = predict(classifier, encoder, task, "test", max_length=8)  # six words and two special tokens
    assert found.gold == [tags, tags[:3]]
    assert found.labels == [[1] * 6 + [0] * 14, [1] * 3]
    assert len(found.logits[0]) == 6
