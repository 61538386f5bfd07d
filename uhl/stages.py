"""The workbook's stages as functions: pre-train, port, tune, baselines. Each returns result rows and what to plot.

Every score is that of an adapter read back from its file. Test labels are used for the reported score alone.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers import TrainerCallback

from uhl import evidence, models, runs, store, tasks
from uhl.adapter import UHLAdapter
from uhl.anchors import DEPTHS, Anchors, Codes, Observed, Probe, observe, unit_states
from uhl.augment import ByTurns, Perturbed
from uhl.baselines import RATES, SPARSE, Start, run_baseline, start
from uhl.budget import LIMIT_BYTES
from uhl.config import PAIR
from uhl.errors import UHLError, one_of
from uhl.fileformat import MAX_TEXTS, MAX_UNITS
from uhl.files import sha256
from uhl.fits import Way, basis_of, upper_levels
from uhl.frame import LAST, Basis, Frame
from uhl.grid import Grid
from uhl.head import HeadFit, fit_head
from uhl.host import find_slots
from uhl.layer import Attached
from uhl.models import Encoder, load_encoder
from uhl.outcome import Outcome, merge
from uhl.peft_method import LOG, attach
from uhl.porting import FIXED, REFRESHED, Port, Shared, at_work, port, port_rules, source_basis, why_not
from uhl.quant import fake_quantise
from uhl.runs import Settings
from uhl.tasks import Task, digest
from uhl.teacher import Teacher, teach
from uhl.train import Classifier, Prediction, TrainLog, Watch, train

DATA = {
    *("profile", "source", "seed", "task", "kind", "columns", "labels", "config", "source_task", "train_size"),
    *("unlabelled", "eval_size", "max_length"),
}  # settings that every score depends on
TUNED_ARMS = ("dimension", "lineage", "anchor", "zero-atoms", "random-p", "untrained")


def bearing(stage: str, settings: Settings) -> set[str]:
    """Names of the settings that a cell's scores depend on, but of those that name its rows (methods, arms, splits) and
    of those that the adapter's file has, whose sha256 stands in the manifest.

    Cells whose rows stand side by side agree in them, but in seed, task and model; what is read again in place of a
    run agrees in all.
    """
    kind, _, rest = stage.partition("-")
    methods, on_source = settings.baselines, rest == runs.slug(settings.source)
    length = {"steps"} if settings.steps else {"steps", "epochs"}
    trained, sparse = {"head_rate", "bf16"}, {"mixer_rate", "lambda_q", "alpha", "top_k"}
    if kind == "pretrain" and not settings.borrowed:
        own = {"rate", *(name for name in Settings.model_fields if "anchor" in name)}
        own = {"dimension_rate"} if rest == "dimension" else own
        taught = {"teacher_weight"} | _rates([settings.teacher]) if settings.teacher else set()
        return DATA | trained | sparse | length | {"batch", "lambda_f", "teacher"} | own | taught
    if kind == "tune":
        return DATA | trained | {"target", "tune_steps", "tune_batch", "tune_rate", "lambda_q"}
    if kind == "port":
        return DATA | {"target"} | ({"refresh_steps"} if {*REFRESHED} & {*settings.arms} else set())
    if kind == "baselines":
        place = length | {"batch", "lambda_f"} if on_source else {"target", "tune_steps", "tune_batch"}
        shared = (DATA - {"source_task"}) | trained | {"anchors", "anchor_text"} | place | _rates(methods)
        return shared | sparse if {*SPARSE} & {*methods} else shared - {"lambda_f"}
    return set(DATA)


def _rates(methods: Sequence[str]) -> set[str]:
    """The settings of some methods' learning rates."""
    return {RATES[method] for method in methods if method in RATES}


def decisive(settings: Settings, stage: str, **only: tuple[str, ...]) -> dict[str, Any]:
    """The :func:`bearing` settings of a cell in which no more was asked than ``only`` (`arms` or `baselines`), and the
    splits that are scored.
    """
    names = bearing(stage, settings.model_copy(update=only))
    return settings.model_dump(mode="json", include={*names, "splits"})


def load_data(settings: Settings) -> Task:
    """The task with what is set aside as unlabelled, and dev and test subsets, the same for all seeds; and a training
    subset of the rest, drawn with the run's seed.
    """
    task = tasks.load_task(settings.task_spec()).set_aside(settings.unlabelled)
    task = task.subset("train", settings.train_size, settings.seed)
    for split in ("dev", "test"):
        task = task.subset(split, settings.eval_size, tasks.SPLIT_SEED)
    return task


def anchor_pool(settings: Settings, task: Task) -> list[str]:
    """What anchors are drawn from, as ``anchor_text`` says: the task's unlabelled split (in-domain, opt-in), its
    training split without the labels (train, opt-in), or sentences of no task (generic).
    """
    one_of(settings.anchor_text, ("in-domain", "train", "generic"), "anchor_text")
    split = {"in-domain": "unlabelled", "train": "train"}.get(settings.anchor_text)
    if split is None:
        pool = tasks.generic_text()
    elif split not in task.data:
        raise UHLError(
            f"task {task.name} has no unlabelled text; set `unlabelled` to a number, put a file unlabelled.jsonl into "
            "its folder, or set anchor_text to generic"
        )
    else:
        pool = tasks.plain_text(task, split)
    return sorted(set(map(_one_line, pool)))


def anchor_texts(settings: Settings, task: Task) -> tuple[list[str], int]:
    """Texts of :func:`probe`, those with codes first, and how many of them are of the pool; seeded.

    Those with codes and the ``more_anchors``, as many as there are, are of :func:`anchor_pool`; ``generic_anchors`` are
    sentences of no task.
    """
    pool = anchor_pool(settings, task)
    if settings.anchors > len(pool):
        raise UHLError(f"{settings.anchors} anchors wanted, {len(pool)} texts there; lower `anchors`")
    draw = random.Random(settings.seed)
    coded = draw.sample(pool, settings.anchors)
    left = sorted(set(pool) - set(coded))
    own = coded + draw.sample(left, min(settings.more_anchors, len(left)))
    generic: list[str] = []
    if settings.generic_anchors:
        generic = generic_texts(pool, settings.generic_anchors, draw)
    return own + generic, len(own)


def generic_texts(pool: Sequence[str], count: int, draw: random.Random) -> list[str]:
    """Texts of no task that are not in ``pool``, at most ``count``."""
    others = sorted(set(map(_one_line, tasks.generic_text())) - set(pool))
    return draw.sample(others, min(count, len(others)))


def _one_line(text: str) -> str:
    """A text as it is stored: single blanks, and a tab between the two parts of a pair."""
    return PAIR.join(" ".join(part.split()) for part in text.split(PAIR, 1))


def probe(settings: Settings, task: Task) -> Probe:
    """What source and targets are observed on."""
    if task.kind == "token" and not settings.anchor_words:
        raise UHLError("a token task's anchors are words; set anchor_words to 1 or more")
    texts, own = anchor_texts(settings, task)
    cuts = 0 if task.kind == "token" else settings.anchor_cuts  # a token task's words have logits
    size = settings.anchors, settings.max_length
    store.check_texts(texts)
    made = Probe(texts, task.kind, settings.anchor_words, *size, own=own, cuts=cuts)
    if len(texts) > MAX_TEXTS or sum(made.units()) > MAX_UNITS:
        raise UHLError(
            f"{len(texts):,} anchor texts with {sum(made.units()):,} units; a file holds at most {MAX_TEXTS:,} and "
            f"{MAX_UNITS:,}: lower `more_anchors`, `generic_anchors` or `anchor_cuts`"
        )
    return made


def freeze(encoder: Encoder) -> Encoder:
    """Freeze the host."""
    encoder.model.requires_grad_(False)
    return encoder


def make_anchors(
    encoder: Encoder,
    adapter: UHLAdapter,
    task: str,
    seen: Observed,
    basis: Basis,
    frame: Frame | None,
    probe: Probe,
    origin: str,
    dims: int | None = None,
    taught: Tensor | None = None,
) -> Anchors:
    """Codes of a trained source: the head's input with the adapter at work, the bare stream's (``seen``) by depth; and
    its logits where some units of ``probe`` have no code, or a teacher's for all of them (``taught``).

    ``seen`` was observed on the coded texts, or on all; of the stream's coordinates the first ``dims`` are kept (None:
    all).
    """
    coded, read, part = probe.first(), basis.read[0][:dims], adapter.task(task)
    states = seen.stream(probe.words)[:, : len(coded.texts) * max(probe.words, 1)]
    stream = [Codes.of(states[seen.level(d)] @ read.T) for d in DEPTHS]
    with attach(encoder.model, adapter, task, frame) as attached, torch.no_grad():
        frame = attached.frame.to(torch.device("cpu"))
        codes = frame.codes(unit_states(encoder, probe, frame.levels))
    rows = probe.coded_units()
    reads = fake_quantise(part.head.detach().cpu(), 8) if part.labels else None
    bias = part.head_bias.detach().cpu().half().float() if part.labels else None
    logits = None if reads is None or probe.covered() else Codes.of(codes @ reads.T)
    if taught is not None and bias is not None:
        logits = Codes.of(taught - bias)
    return Anchors(
        texts=list(probe.texts),
        origin=origin,
        head=Codes.of(codes[rows]),
        stream=stream,
        words=probe.words,
        depths=DEPTHS,
        reads=reads,
        bias=bias,
        logits=logits,
        kind=probe.kind,
        length=probe.length,
        task=task if part.labels else None,
        own=probe.own,
        cuts=probe.cuts,
    )


def pretrain(
    settings: Settings, projector: str, watch: Watch | None = None, noise: float = 0.0, second: str | None = None
) -> tuple[UHLAdapter, Outcome]:
    """Train an adapter on the source under one projector, write its file, and score the file read back.

    Of a `canonical` adapter ``noise`` is that of :class:`Perturbed`, and ``second`` names another host for every second
    step, see :class:`ByTurns`; the anchors are the source's all the same. Where the settings name a ``teacher`` it is
    trained first, once for both projectors, and the adapter for as many steps as without; its decisions are kept beside
    the adapter's. Where they name another task's adapter, it is read, and nothing is trained: :func:`adopt`.
    """
    if settings.borrowed:
        return adopt(settings, projector)
    task, encoder = load_data(settings), freeze(load_encoder(settings.source))
    asked = probe(settings, task)
    seen = observe(encoder, asked)
    basis = basis_of(seen, settings.adapter_config(projector).width)
    slots = find_slots(encoder.model)
    frame = basis.frame(slots) if projector == "canonical" else None
    adapter = UHLAdapter(settings.adapter_config(projector))
    part = adapter.add_task(settings.task_name, task.labels, task.kind)
    part.bias.requires_grad_(False)  # the task bias is the target's to tune
    for p in adapter.projector.parameters():
        p.requires_grad_(projector == "dimension")
    rate = settings.dimension_rate if projector == "dimension" else settings.rate
    steps = settings.train_config().steps_for(len(task.data["train"]))  # a teacher adds texts, and no steps
    config, folder = settings.train_config(rate=rate, steps=steps), runs.cell_dir(settings, f"pretrain-{projector}")
    teacher = None if settings.teacher is None else _teacher(settings, settings.teacher, task, asked)

    def anchored(origin: str) -> Anchors:
        dims = settings.anchor_dims
        by = None if teacher is None else teacher.anchors
        return make_anchors(encoder, adapter, settings.task_name, seen, basis, frame, asked, origin, dims, by)

    with attach(encoder.model, adapter, settings.task_name, frame) as attached:
        fit_head(Classifier(encoder.model, part, None, attached), encoder, task, config.max_length)
    adapter.anchors = anchored("before training") if second else None
    turns = _second_host(second, encoder, adapter, settings.task_name) if second else nullcontext()
    torch.manual_seed(settings.seed)
    with turns as other, attach(encoder.model, adapter, settings.task_name, frame) as attached:
        classifier = Classifier(encoder.model, part, None, attached, config)
        about, callbacks = settings.model_dump_json(), list[TrainerCallback]()
        if noise:
            about += f", noise {noise}"
            callbacks.append(Perturbed(attached, basis, noise, settings.seed))
        if other:
            about += f", by turns with {second}"
            callbacks.append(ByTurns(classifier, *other))
        lesson = task if teacher is None else teacher.taught(task)
        log = train(classifier, encoder, lesson, config, folder / "trainer", about, watch, callbacks)
    if projector == "canonical":
        origin = f"{settings.anchor_text}, {tasks.LICENCE if settings.anchor_text == 'generic' else task.licence}"
        if settings.generic_anchors:
            origin += f"; {settings.generic_anchors} generic, {tasks.LICENCE}"
        adapter.anchors = anchored(origin)
    adapter.info = {
        "source": encoder.known_as,
        "revision": encoder.revision,
        "shape": encoder.shape,
        "layers": encoder.layers,
    } | ({} if teacher is None else {"teacher": teacher.method})
    path = store.save(adapter, folder / "adapter.safetensors")
    if adapter.anchors and (size := path.stat().st_size) > LIMIT_BYTES:
        told = f"{size:,} bytes, more than {LIMIT_BYTES:,}"
        LOG.warning("%s has %s; lower `more_anchors`, `generic_anchors` or `anchors`", path, told)
    found = store.load(path)
    frame = basis.frame(slots) if projector == "canonical" else None
    outcome = Outcome(settings, task, paths=[path], curves={f"uhl-{projector}": log.losses})
    if teacher is not None:
        outcome.details["teacher"] = teacher.about
        for split in settings.splits:
            flat, _ = evidence.flat(tasks.gold_labels(task, split))
            said = Prediction(teacher.decided[split], flat.tolist(), [], teacher.scores[split], 0.0)
            outcome.predictions[f"{evidence.TEACHER}/{split}"] = said
    outcome.score_adapter(found, path, encoder, frame, 1.0, arm=f"uhl-{projector}", phase="source", **log.costs())
    return found, outcome


def _teacher(settings: Settings, method: str, task: Task, asked: Probe) -> Teacher:
    """What the source says when it was trained by ``method``, as a baseline is. The trials of a search, whose profiles
    are folders of one, have a teacher in common where they train it alike.
    """
    encoder, sizes = load_encoder(settings.source), settings.adapter_config("dimension")
    config = settings.train_config(rate=getattr(settings, RATES.get(method, "rate")))
    shared = settings.model_copy(update={"profile": settings.profile.partition("/")[0]})
    folder, about = runs.cell_dir(shared, f"teacher-{method}"), f"codes from {digest(task, asked.first().texts)}"

    def begin() -> Start:
        return baseline_start(settings, "source")

    return teach(method, encoder, task, begin, config, folder, asked, sizes, about, settings.splits)


def adopt(settings: Settings, projector: str) -> tuple[UHLAdapter, Outcome]:
    """The adapter that was trained on ``source_task``, as the task's: no label of the task has a part in it.

    It is scored on the task where its head is for the same labels of the same kind. Where it is not, the task's head is
    one of zeros, which tuning begins by fitting, and there is nothing to score. Raises :class:`UHLError` where the
    other task's cell was not run.
    """
    task, encoder = load_data(settings), freeze(load_encoder(settings.source))
    theirs = settings.model_copy(update={"task": settings.source_task})
    trained = runs.cell_dir(theirs, f"pretrain-{projector}")
    if not (file := trained / "adapter.safetensors").is_file():
        raise UHLError(
            f"{file} is missing; run notebook 02 with task {theirs.task} for the same profile and seed first"
        )
    adapter = store.load(file)
    part = adapter.hand_over(theirs.task_name, settings.task_name, task.labels, task.kind)
    if adapter.anchors is None or settings.max_length != adapter.anchors.length:
        part.length = settings.max_length
    adapter.info["source_task"] = theirs.task_name
    path = store.save(adapter, runs.cell_dir(settings, f"pretrain-{projector}") / "adapter.safetensors")
    found, arm = store.load(path), f"uhl-{projector}"
    outcome = Outcome(settings, task, paths=[path])
    outcome.adapters[f"{trained.parent.name}/{trained.name}"] = sha256(file)
    outcome.details["undefined"] = {arm: reason} if (reason := not_taught(found, settings.task_name)) else {}
    if not reason:
        frame = source_basis(found, encoder).frame(find_slots(encoder.model)) if projector == "canonical" else None
        known = {"arm": arm, "phase": "source", "trainable_params": 0, "seconds": 0.0}
        outcome.score_adapter(found, path, encoder, frame, 1.0, **known)
    return found, outcome


def not_taught(adapter: UHLAdapter, name: str) -> str | None:
    """Why an adapter says nothing of a task without its labels; None where a source has trained its head."""
    if adapter.task(name).own_head is None:
        return None
    lender = adapter.info.get("source_task")
    return f"the adapter was trained on {lender}, whose labels or kind are others, so the head of {name} is not trained"


@contextmanager
def _second_host(name: str, source: Encoder, adapter: UHLAdapter, task: str) -> Iterator[tuple[nn.Module, Attached]]:
    """Another host with the adapter at work, as its anchors put it there before it is trained; it has none then."""
    host = freeze(load_encoder(name))
    if host.tokenizer.get_vocab() != source.tokenizer.get_vocab():
        raise UHLError(f"{name} has another vocabulary than {source.name}; two hosts are trained on the same tokens")
    way = Way(known=False, scales=(source.layers / host.layers,))
    ported = port(adapter, host, task, way=way)
    adapter.anchors = None
    with attach(host.model, adapter, task, ported.frame, ported.scale) as attached:
        yield host.model, attached


def zero_shot(settings: Settings) -> Outcome:
    """Port the trained adapters to the target by the settings' arms, and score without any label of the target. Each
    arm is kept in a folder of its own as soon as it is scored, and a cell that was interrupted reads it back.
    """
    task, target = load_data(settings), freeze(load_encoder(settings.target))
    source = freeze(load_encoder(settings.source))
    stage, shared = f"port-{runs.slug(settings.target)}", Shared()
    folder = runs.cell_dir(settings, stage)
    common = {"data": digest(task), "revisions": [source.revision, target.revision]}
    outcome = Outcome(settings, task)
    outcome.score_majority(target)
    outcomes, used, reports, undefined = [outcome], dict[str, str](), {}, {}
    for arm in settings.arms:
        adapter, path = adapter_for(settings, arm)
        used[path.parent.name] = sha256(path)
        if reason := why_not(adapter, target, arm, source) or not_taught(adapter, settings.task_name):
            undefined[arm] = reason
            continue
        check_labels(adapter, settings.task_name, task)
        about = decisive(settings, stage, arms=(arm,)) | common
        about |= {"arm": arm, "adapter": used[path.parent.name], "rules": _rules(arm, adapter, target)}
        found = Outcome.kept(settings, task, folder / arm, about)
        if found is None:
            found = _zero_shot(settings, task, arm, adapter, path, target, source, shared)
            found.keep(folder / arm, about)
        reports[arm] = found.details["report"]
        outcomes.append(found)
    merged = merge(outcomes)
    merged.adapters, merged.details = used, {"reports": reports, "undefined": undefined}
    return merged


def _zero_shot(
    settings: Settings,
    task: Task,
    arm: str,
    adapter: UHLAdapter,
    path: Path,
    target: Encoder,
    source: Encoder,
    shared: Shared,
) -> Outcome:
    """One arm's port, scored; of one that refreshes the file that it wrote."""
    way = Way(refresh_steps=settings.refresh_steps)
    ported = port(adapter, target, settings.task_name, arm, source, settings.seed, shared, way)
    outcome = Outcome(settings, task, rules=_rules(arm, adapter, target), details={"report": ported.report})
    if arm in REFRESHED:
        _say_where(settings, adapter, target, ported)
        folder = runs.cell_dir(settings, f"port-{runs.slug(settings.target)}")
        path = store.save(adapter, folder / f"adapter-{arm}.safetensors")
        outcome.paths.append(path)
        adapter = store.load(path)
    trained = adapter.task(settings.task_name).bias.numel() if arm in REFRESHED else 0
    known = {"arm": arm, "phase": "zero-shot", "trainable_params": trained, "seconds": ported.report["seconds"]}
    outcome.score_adapter(adapter, path, target, ported.frame, ported.scale, **known)
    return outcome


def agreement(settings: Settings, found: Prediction, split: str = "test") -> float:
    """Share of a split's decisions that a prediction shares with the source's own adapter, or what taught that, as its
    cell stored them.
    """
    cell = runs.cell_dir(settings, "pretrain-canonical")
    path = cell / evidence.PREDICTIONS
    if not path.is_file():
        raise UHLError(f"{path} is missing; run notebook 02 for the same profile, task and seed")
    said = evidence.of_source(cell, split)
    said = np.empty(0) if said is None else said
    labels, _ = evidence.flat(found.labels)
    if len(labels) != len(said):
        raise UHLError(f"{path} has {len(said)} {split} decisions, {len(labels)} are needed; run notebook 02 likewise")
    return float((labels == said).mean())


def adapter_for(settings: Settings, arm: str) -> tuple[UHLAdapter, Path]:
    """The trained adapter whose projector the arm needs, read from its file."""
    path = adapter_path(settings, arm)
    return store.load(path), path


def adapter_path(settings: Settings, arm: str) -> Path:
    """File of the trained adapter whose projector the arm needs."""
    projector = "dimension" if arm == "dimension" else "canonical"
    return runs.cell_dir(settings, f"pretrain-{projector}") / "adapter.safetensors"


def rules_of(settings: Settings) -> int:
    """Rules of the anchored port to the settings' target; :class:`UHLError` for an adapter without anchors."""
    adapter, _ = adapter_for(settings, "anchor")
    if adapter.anchors is None:
        raise UHLError("the adapter has no anchors; pre-train a canonical one")
    return port_rules(adapter, load_encoder(settings.target))


def _rules(arm: str, adapter: UHLAdapter, target: Encoder) -> int | None:
    """Rules of an arm's port; None of one that no anchor has a part in."""
    return None if arm in FIXED else port_rules(adapter, target)


def check_labels(adapter: UHLAdapter, name: str, task: Task) -> None:
    """Raise :class:`UHLError` when the task's kind or labels differ from those of the adapter's head."""
    part = adapter.task(name)
    if (part.kind, part.labels) != (task.kind, task.labels):
        raise UHLError(
            f"the adapter's head for {name!r} is a {part.kind} head with labels {', '.join(part.labels)}; the task is "
            f"a {task.kind} task with labels {', '.join(task.labels)}. Add a task of its own to the adapter"
        )


def tune(
    settings: Settings,
    arm: str,
    shared: Shared | None = None,
    watch: Watch | None = None,
    trained: Settings | None = None,
) -> Outcome | None:
    """Tune the 4-bit task bias and the head on the target for ``tune_steps`` steps; None where an arm is undefined.

    Three are controls: `zero-atoms` tunes the ported head alone; `random-p` and `untrained` have the scale of `anchor`,
    the one with atoms behind random directions, the other random atoms and routes where the trained ones
    were (mixer and head stay). ``shared`` is what ports of other arms have in common with this one's; ``watch`` is
    :func:`uhl.train.train`'s. The adapter is the one that the settings ``trained`` have trained, by default these.
    Scores are those of the tuned adapter's file.
    """
    one_of(arm, TUNED_ARMS, "arm to tune")
    task, target = load_data(settings), freeze(load_encoder(settings.target))
    source = freeze(load_encoder(settings.source))
    adapter, file = adapter_for(trained or settings, arm)
    used = {file.parent.name: sha256(file)}
    rules = "anchor" if arm == "untrained" else arm
    if why_not(adapter, target, rules, source):
        return None
    check_labels(adapter, settings.task_name, task)
    if (part := adapter.task(settings.task_name)).own_head is not None:
        part.own_head = target.known_as
    way = Way()
    if arm == "untrained":
        made = port(adapter, target, settings.task_name, "anchor", source, settings.seed, shared)
        way = Way(scales=(made.scale,))
        adapter.redraw(settings.seed)
    ported = port(adapter, target, settings.task_name, rules, source, settings.seed, shared, way)
    folder = runs.cell_dir(settings, f"tune-{runs.slug(settings.target)}")
    head, log = tune_task(settings, adapter, target, task, ported, folder / f"trainer-{arm}", watch)
    _say_where(settings, adapter, target, ported)
    path = store.save(adapter, folder / f"adapter-{arm}.safetensors")
    details = {"scale": ported.scale, "head": "fitted" if head.fitted else "ported"}
    outcome = Outcome(settings, task, paths=[path], curves={arm: log.losses}, details=details)
    outcome.adapters, outcome.rules = used, _rules(arm, adapter, target)
    found = store.load(path)
    outcome.score_adapter(found, path, target, ported.frame, ported.scale, arm=arm, phase="tuned", **log.costs())
    return outcome


def tuned_arms(arms: Sequence[str]) -> list[str]:
    """What is tuned where these arms are ported: those of them that have a tuning, and the control `untrained`."""
    return [arm for arm in TUNED_ARMS if arm in {*arms, "untrained"}]


def tuned(settings: Settings, shared: Shared | None = None) -> dict[str, Outcome]:
    """:func:`tune` for those of the settings' arms that are defined, and `untrained`. Each is kept in a folder of its
    own as soon as it is scored, and a cell that was interrupted reads it back.
    """
    stage, task = f"tune-{runs.slug(settings.target)}", load_data(settings)
    folder, common = runs.cell_dir(settings, stage), decisive(settings, stage)
    common["data"], rules = digest(task), rules_of(settings)
    common["revisions"] = [_revision(name) for name in (settings.source, settings.target)]
    outcomes, shared = dict[str, Outcome](), shared or Shared()
    for arm in tuned_arms(settings.arms):
        about = common | {"arm": arm, "adapter": sha256(adapter_for(settings, arm)[1])}
        about["rules"] = None if arm in FIXED else rules
        outcome = Outcome.kept(settings, task, folder / arm, about)
        if outcome is None and (outcome := tune(settings, arm, shared)) is not None:
            outcome.keep(folder / arm, about)
        if outcome is not None:
            outcomes[arm] = outcome
    return outcomes


def _say_where(settings: Settings, adapter: UHLAdapter, target: Encoder, ported: Port) -> None:
    """Note in the adapter where and how it was ported before its task's parts were changed there."""
    adapter.info |= {"tuned_on": target.known_as, "arm": ported.arm, "scale": ported.scale, "port_seed": settings.seed}
    adapter.info["port_rules"] = port_rules(adapter, target)


def tune_task(
    settings: Settings,
    adapter: UHLAdapter,
    target: Encoder,
    task: Task,
    ported: Port,
    folder: Path,
    watch: Watch | None = None,
) -> tuple[HeadFit, TrainLog]:
    """The tuning itself: everything but the task bias and the head is frozen.

    The head starts as it was ported, or fitted to the labels, as every baseline's is, where that is better on dev, or
    where no head for these labels was ported.
    """
    for p in adapter.parameters():
        p.requires_grad_(False)
    part = adapter.task(settings.task_name)
    part.head.requires_grad_(True)
    part.head_bias.requires_grad_(True)
    learning = ported.arm != "zero-atoms"
    part.bias.requires_grad_(learning)
    config = settings.train_config(mixer_rate=settings.tune_rate, **_as_tuned(settings))
    torch.manual_seed(settings.seed)
    with at_work(adapter, target, settings.task_name, ported.frame, ported.scale, learning) as attached:
        classifier = Classifier(target.model, part, ported.frame, attached, config)
        head = fit_head(classifier, target, task, config.max_length, only_if_better=part.own_head is None)
        rules = port_rules(adapter, target)
        about = f"{settings.model_dump_json()}, port rules {rules}, scale {ported.scale}"
        return head, train(classifier, target, task, config, folder, about, watch)


def _revision(name: str) -> str:
    """A model's, for which it is loaded where nothing else tells."""
    found = models.revision(name)
    return load_encoder(name).revision if found == "unknown" else found


def _place(settings: Settings, host: str) -> tuple[str, Path]:
    """The model that is the `source` or the `target`, and the folder of its baselines."""
    name = settings.source if host == "source" else settings.target
    return name, runs.cell_dir(settings, f"baselines-{runs.slug(name)}")


def baseline_start(settings: Settings, host: str) -> Start:
    """The fitted head that all baselines of the `source` or the `target` begin with."""
    task, encoder = load_data(settings), load_encoder(_place(settings, host)[0])
    texts = replace(probe(settings, task).first(), words=0)
    levels = LAST if host == "source" else upper_levels(encoder.layers)  # as the heads of ours do
    return start(encoder, task, texts, settings.max_length, levels)


def baselines(settings: Settings, host: str) -> dict[str, Outcome]:
    """The settings' baselines on the `source` or the `target`, with the same labels and the same head at the start, and
    as many steps as ours: ``steps`` or ``epochs`` on the source, on the target what tuning has.

    Each is kept in a folder of its own as soon as it is scored. A cell that was interrupted, or that has more methods
    now, reads those back and trains the others; so it does with those of the profile that the grid names `beside`.
    """
    (name, folder), task = _place(settings, host), load_data(settings)
    shared: dict[str, Any] = {"host": name, "revision": _revision(name)}
    shared["data"] = digest(task, probe(settings, task).first().texts)
    if host == "target":
        shared |= _as_tuned(settings)
    begin: Start | None = None
    outcomes: dict[str, Outcome] = {}
    grid = Grid.known(settings.profile)
    for method in settings.baselines:
        about = decisive(settings, folder.name, baselines=(method,)) | shared
        about |= {"method": method, "rate": getattr(settings, RATES.get(method, "rate"))}
        outcome = Outcome.kept(settings, task, folder / method, about)
        if outcome is None and grid is not None and grid.beside is not None:
            outcome = _run_beside(grid.beside, settings, task, folder.name, method, name)
        if outcome is None:
            begin = begin or baseline_start(settings, host)
            outcome = baseline(settings, host, method, begin)
            outcome.keep(folder / method, about)
        outcomes[method] = outcome
    return outcomes


def _run_beside(profile: str, settings: Settings, task: Task, stage: str, method: str, host: str) -> Outcome | None:
    """A baseline as another profile has it, where it was run there with the same settings, data and host."""
    theirs = settings.model_copy(update={"profile": profile})
    cell = runs.cell_dir(theirs, stage)
    entry = runs.same(cell / "manifest.json", decisive(theirs, stage, baselines=(method,)))
    if entry is None or entry.get("models", {}).get(host) != models.revision(host):
        return None
    return Outcome.of_cell(settings, task, cell, entry, method)


def _as_tuned(settings: Settings) -> dict[str, int | float]:
    """How every method is trained on a target: ours, which is tuned there, and baselines; sparse ones at no charge for
    the atoms that they use.
    """
    return {"steps": settings.tune_steps, "batch": settings.tune_batch, "lambda_f": 0.0}


def baseline(settings: Settings, host: str, method: str, begin: Start, watch: Watch | None = None) -> Outcome:
    """Train one baseline on the `source` or the `target`."""
    name, folder = _place(settings, host)
    task, encoder = load_data(settings), load_encoder(name)
    own = _as_tuned(settings) if host == "target" else {}
    config = settings.train_config(rate=getattr(settings, RATES.get(method, "rate")), **own)
    place, sizes = folder / f"trainer-{method}", settings.adapter_config("dimension")
    about = f"levels {begin.frame.levels} of codes from {digest(task, probe(settings, task).first().texts)}"
    made = run_baseline(method, encoder, task, begin, config, place, watch, sizes, about)
    outcome = Outcome(settings, task, curves={method: made.log.losses})
    outcome.score(
        made.classifier,
        encoder,
        arm=method,
        phase="source" if host == "source" else "retrained",
        adapter_bytes=made.bytes,
        extra_flops_pct=made.extra_flops_pct,
        **made.log.costs(),
    )
    return outcome
