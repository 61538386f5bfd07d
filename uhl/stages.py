"""The workbook's stages as functions: pre-train, port, tune, baselines. Each returns result rows and what to plot.

Every score is that of an adapter read back from its file. Test labels are used for the reported score alone.
"""

from __future__ import annotations

import random
from pathlib import Path

import torch

from uhl import runs, store, tasks
from uhl.adapter import UHLAdapter
from uhl.anchors import DEPTHS, Anchors, Codes, Observed, final_means, observe
from uhl.baselines import Start, run_baseline, start
from uhl.config import ARMS
from uhl.errors import UHLError, one_of
from uhl.frame import Basis, Frame
from uhl.head import fit_head
from uhl.host import find_slots
from uhl.models import Encoder, load_encoder
from uhl.outcome import Outcome
from uhl.peft_method import attach
from uhl.port import Port, basis_of, port, why_not
from uhl.quant import fake_quantise
from uhl.runs import Settings
from uhl.tasks import Task
from uhl.train import Classifier, TrainLog, train

TUNED_ARMS = ("dimension", "lineage", "anchor", "zero-atoms", "random-p")


def load_data(settings: Settings) -> Task:
    """The task with a training subset drawn with the run's seed, and dev and test subsets that are the same for all."""
    task = tasks.load_task(settings.task_spec()).subset("train", settings.train_size, settings.seed)
    for split in ("dev", "test"):
        task = task.subset(split, settings.eval_size, tasks.SPLIT_SEED)
    return task


def anchor_texts(settings: Settings, task: Task) -> list[str]:
    """Anchor texts: the task's unlabelled split (in-domain, opt-in) or sentences of no task (generic); seeded."""
    one_of(settings.anchor_text, ("in-domain", "generic"), "anchor_text")
    if settings.anchor_text == "in-domain":
        if "unlabelled" not in task.data:
            raise UHLError(f"task {task.name} has no unlabelled text; set anchor_text to generic")
        pool = list(task.data["unlabelled"]["text"])
    else:
        pool = tasks.generic_text()
    pool = sorted({" ".join(text.split()) for text in pool})
    if settings.anchors > len(pool):
        raise UHLError(f"{settings.anchors} anchors wanted, {len(pool)} texts there; lower `anchors`")
    return random.Random(settings.seed).sample(pool, settings.anchors)


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
    texts: list[str],
    origin: str,
    words: int = 1,
    dims: int | None = None,
) -> Anchors:
    """Codes of a trained source: the head's input with the adapter at work, the bare stream's (``seen``) by depth.

    ``seen`` was observed with the same ``words`` a text; of the stream's coordinates the first ``dims`` are kept
    (None: all).
    """
    states, read = seen.stream(words), basis.read[0][:dims]
    stream = [Codes.of(states[seen.level(d)] @ read.T) for d in DEPTHS]
    with attach(encoder.model, adapter, task, frame) as attached:
        frame = attached.frame.to(torch.device("cpu"))
        head = Codes.of(frame.codes(final_means(encoder, texts)).detach())
    part = adapter.task(task)
    reads = fake_quantise(part.head.detach().cpu(), 8) if part.labels else None
    return Anchors(texts, origin, head, stream, words, DEPTHS, reads)


def pretrain(settings: Settings, projector: str) -> tuple[UHLAdapter, Outcome]:
    """Train an adapter on the source under one projector, write its file, and score the file read back."""
    task, encoder = load_data(settings), freeze(load_encoder(settings.source))
    texts = anchor_texts(settings, task)
    seen = observe(encoder, texts, settings.anchor_words)
    basis = basis_of(seen, settings.adapter_config(projector).width)
    slots = find_slots(encoder.model)
    frame = basis.frame(encoder.model, slots) if projector == "canonical" else None
    adapter = UHLAdapter(settings.adapter_config(projector))
    part = adapter.add_task(settings.task_name, task.labels, task.kind)
    part.bias.requires_grad_(False)  # the task bias is the target's to tune
    for p in adapter.projector.parameters():
        p.requires_grad_(projector == "dimension")
    config, folder = settings.train_config(), runs.cell_dir(settings, f"pretrain-{projector}")
    torch.manual_seed(settings.seed)
    with attach(encoder.model, adapter, settings.task_name, frame) as attached:
        classifier = Classifier(encoder.model, part, None, attached, config)
        fit_head(classifier, encoder, task, config.max_length)
        log = train(classifier, encoder, task, config, folder / "trainer", settings.model_dump_json())
    if projector == "canonical":
        origin = f"{settings.anchor_text}, {task.licence}"
        adapter.anchors = make_anchors(
            encoder,
            adapter,
            settings.task_name,
            seen,
            basis,
            frame,
            texts,
            origin,
            settings.anchor_words,
            settings.anchor_dims,
        )
    adapter.info = {
        "source": encoder.name,
        "revision": encoder.revision,
        "shape": encoder.shape,
        "layers": encoder.layers,
    }
    path = store.save(adapter, folder / "adapter.safetensors")
    found = store.load(path)
    frame = basis.frame(encoder.model, slots) if projector == "canonical" else None
    outcome = Outcome(settings, task, paths=[path], details={"log": log})
    known = {"arm": f"uhl-{projector}", "phase": "source", "trainable_params": log.trained, "seconds": log.seconds}
    outcome.score_adapter(found, path, encoder, frame, 1.0, **known)
    return found, outcome


def zero_shot(settings: Settings, arms: tuple[str, ...] = ARMS) -> Outcome:
    """Port the trained adapters to the target by every arm and control, and score without any label of the target."""
    task, target = load_data(settings), freeze(load_encoder(settings.target))
    source = freeze(load_encoder(settings.source))
    outcome = Outcome(settings, task, details={"reports": {}, "undefined": {}})
    outcome.score_majority(target)
    seen: Observed | None = None
    for arm in arms:
        adapter, path = adapter_for(settings, arm)
        reason = why_not(adapter, target, arm, source)
        if reason:
            outcome.details["undefined"][arm] = reason
            continue
        check_labels(adapter, settings.task_name, task)
        if adapter.anchors and seen is None:
            seen = observe(target, adapter.anchors.texts, adapter.anchors.words)
        ported = port(adapter, target, settings.task_name, arm, source, settings.seed, seen)
        outcome.details["reports"][arm] = ported.report
        known = {"arm": arm, "phase": "zero-shot", "trainable_params": 0, "seconds": ported.report["seconds"]}
        outcome.score_adapter(adapter, path, target, ported.frame, ported.scale, **known)
    return outcome


def adapter_for(settings: Settings, arm: str) -> tuple[UHLAdapter, Path]:
    """The trained adapter whose projector the arm needs, read from its file."""
    projector = "dimension" if arm == "dimension" else "canonical"
    path = runs.cell_dir(settings, f"pretrain-{projector}") / "adapter.safetensors"
    return store.load(path), path


def check_labels(adapter: UHLAdapter, name: str, task: Task) -> None:
    """Raise :class:`UHLError` when the task's kind or labels differ from those of the adapter's head."""
    part = adapter.task(name)
    if (part.kind, part.labels) != (task.kind, task.labels):
        raise UHLError(
            f"the adapter's head for {name!r} is a {part.kind} head with labels {', '.join(part.labels)}; the task is "
            f"a {task.kind} task with labels {', '.join(task.labels)}. Add a task of its own to the adapter"
        )


def tune(settings: Settings, arm: str, seen: Observed | None = None) -> Outcome | None:
    """Tune the 4-bit task bias and the head on the target for ``tune_steps`` steps; None where an arm is undefined.

    `zero-atoms` tunes the ported head alone. ``seen`` is what :func:`observe_target` returned. Scores are those of the
    tuned adapter's file.
    """
    one_of(arm, TUNED_ARMS, "arm to tune")
    task, target = load_data(settings), freeze(load_encoder(settings.target))
    source = freeze(load_encoder(settings.source))
    adapter, _ = adapter_for(settings, arm)
    if why_not(adapter, target, arm, source):
        return None
    check_labels(adapter, settings.task_name, task)
    ported = port(adapter, target, settings.task_name, arm, source, settings.seed, seen)
    folder = runs.cell_dir(settings, f"tune-{runs.slug(settings.target)}")
    log = tune_task(settings, adapter, target, task, ported, folder / f"trainer-{arm}")
    adapter.info |= {"tuned_on": target.name, "arm": arm, "scale": ported.scale, "port_seed": settings.seed}
    path = store.save(adapter, folder / f"adapter-{arm}.safetensors")
    outcome = Outcome(settings, task, paths=[path], details={"log": log, "scale": ported.scale})
    known = {"arm": arm, "phase": "tuned", "trainable_params": log.trained, "seconds": log.seconds}
    outcome.score_adapter(store.load(path), path, target, ported.frame, ported.scale, **known)
    return outcome


def observe_target(settings: Settings) -> Observed:
    """The target on the canonical adapter's anchors, once for all arms."""
    adapter, _ = adapter_for(settings, "anchor")
    if adapter.anchors is None:
        raise UHLError("the adapter has no anchors; pre-train a canonical one")
    return observe(load_encoder(settings.target), adapter.anchors.texts, adapter.anchors.words)


def tune_task(
    settings: Settings, adapter: UHLAdapter, target: Encoder, task: Task, ported: Port, folder: Path
) -> TrainLog:
    """The tuning itself: everything but the task bias and the head is frozen."""
    for p in adapter.parameters():
        p.requires_grad_(False)
    part = adapter.task(settings.task_name)
    part.head.requires_grad_(True)
    part.head_bias.requires_grad_(True)
    part.bias.requires_grad_(ported.arm != "zero-atoms")
    config = settings.train_config(
        steps=settings.tune_steps,
        batch=settings.tune_batch,
        mixer_rate=settings.tune_rate,
        head_rate=settings.tune_head_rate,
        lambda_f=0.0,
    )
    torch.manual_seed(settings.seed)
    if ported.arm == "zero-atoms":
        classifier = Classifier(target.model, part, ported.frame, None, config)
        return train(classifier, target, task, config, folder, settings.model_dump_json())
    with attach(target.model, adapter, settings.task_name, ported.frame, ported.scale) as attached:
        classifier = Classifier(target.model, part, None, attached, config)
        return train(classifier, target, task, config, folder, settings.model_dump_json())


def baseline_start(settings: Settings, host: str) -> Start:
    """The fitted head that all baselines of the `source` or the `target` begin with."""
    task, encoder = load_data(settings), load_encoder(settings.source if host == "source" else settings.target)
    return start(encoder, task, anchor_texts(settings, task), settings.max_length)


def baseline(settings: Settings, host: str, method: str, begin: Start) -> Outcome:
    """Train one baseline on the `source` or the `target` with the same labels and the same head at the start."""
    name = settings.source if host == "source" else settings.target
    task, encoder = load_data(settings), load_encoder(name)
    folder = runs.cell_dir(settings, f"baselines-{runs.slug(name)}")
    rate = {"head": settings.rate, "lora-r8": settings.lora_rate, "full": settings.full_rate}[method]
    config = settings.train_config(rate=rate)
    made = run_baseline(method, encoder, task, begin, config, folder / f"trainer-{method}")
    outcome = Outcome(settings, task, details={"log": made.log})
    outcome.score(
        made.classifier,
        encoder,
        arm=method,
        phase="source" if host == "source" else "retrained",
        adapter_bytes=made.bytes,
        trainable_params=made.log.trained,
        extra_flops_pct=made.extra_flops_pct,
        seconds=made.log.seconds,
    )
    return outcome
