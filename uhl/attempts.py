"""What moves between models: an anchored port made in other ways, and from fewer anchors, measured on dev.

Notebook 07 shows the results. One adapter, trained once, serves all attempts: its anchors are cut or exchanged, its
dictionary stays. Scores are of dev: they are there to choose by, not to report.
"""

from __future__ import annotations

import hashlib
import json
import random
from collections.abc import Iterator, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass, field, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Literal

import numpy as np
import pandas as pd
from datasets import Dataset, DatasetDict
from jaxtyping import Float
from sklearn.cluster import KMeans
from torch import Tensor

from uhl import budget, runs, store, tasks
from uhl.adapter import UHLAdapter
from uhl.anchors import Anchors, Observed, Probe, final_means, observe
from uhl.baselines import RATES, run_baseline, start
from uhl.config import PAIR, Method
from uhl.errors import UHLError, one_of
from uhl.files import sha256
from uhl.fits import Way, upper_levels
from uhl.host import find_slots
from uhl.models import Encoder
from uhl.porting import Shared, at_work, port, port_rules, source_basis
from uhl.runs import Settings
from uhl.stages import (
    adapter_for,
    agreement,
    anchor_pool,
    decisive,
    generic_texts,
    load_data,
    make_anchors,
    not_taught,
    pretrain,
)
from uhl.tasks import Task, score
from uhl.train import Classifier, Prediction, predict

CHOICES = ("random", "k-means", "leverage", "determinantal")
GROUPS = (
    *(
        "head",
        "imitation",
        "targets",
        "maps",
        "layers",
        "rank",
        "scale",
        "refresh",
        "perturbed",
        "turns",
        "taught",
        "data",
        "sparsity",
    ),
    *("texts", "dims", "bits", "choice"),
)
SECOND = ("minilm-4x312", "minilm-l3", "minilm-l6")  # to train on by turns with the source: the first other host
ON_SOURCE = "source"  # no port, but the score of another adapter where it was trained
COLUMNS = ["bytes", "texts", "scale", "change", "explained", "agreement", "same", "dev"]  # what is measured of one
MOST = 4_000  # texts of the training split that are added to a file's
TAUGHT: dict[str, Method] = {"head": "head", "LoRA r8": "lora-r8", "all weights": "full"}


@dataclass(frozen=True)
class Attempt:
    """One way to port. ``coded``, ``texts``, ``dims``, ``bits`` and ``cuts`` are those of :meth:`Anchors.cut`;
    ``choice`` draws the coded texts anew from the source's unlabelled text. ``noise`` ports another adapter,
    trained on the source under maps that are so much off (:class:`uhl.augment.Perturbed`); ``turns`` one that was
    trained on a host of :data:`SECOND` as well (:class:`uhl.augment.ByTurns`); ``half`` one that was trained on half of
    the training texts, with its own anchors (file), or with its logits for that half (seen) or for the other half
    (unseen) beside them; ``atoms`` one that lets a token use so many at a time, of which all cost as much together at
    the most as those of the settings. ``taught`` ports nothing: a baseline is trained on the target with the source's
    decisions on the anchors in place of labels, or (``labels``) on the training texts and their labels, whose bytes are
    then those of the attempt.
    """

    group: str
    name: str
    arm: str = "anchor"
    way: Way = field(default_factory=Way)
    coded: int | None = None
    texts: int | None = None
    dims: int | None = None
    bits: int = 8
    cuts: bool = True
    choice: str | None = None
    noise: float = 0.0
    turns: bool = False
    half: Literal["file", "seen", "unseen"] | None = None
    atoms: int | None = None
    taught: Method | None = None
    labels: bool = False


def attempts(anchors: Anchors, groups: Sequence[str] = GROUPS) -> list[Attempt]:
    """The attempts of some groups, for a file's anchors."""
    for group in groups:
        one_of(group, GROUPS, "group of attempts")
    return [attempt for attempt in _all(anchors) if attempt.group in groups]


def _all(anchors: Anchors) -> Iterator[Attempt]:
    last, bare = Way(reads="last"), Way(scales=(0.0,))
    yield Attempt("head", "head on the last states, no atoms", "zero-atoms", last)
    yield Attempt("head", "head on three levels at most, no atoms", "zero-atoms")
    if anchors.cuts:
        yield Attempt("head", "head on three levels, without fragments", "zero-atoms", cuts=False)
    yield Attempt("head", "head on three levels, the coded texts alone", "zero-atoms", texts=anchors.coded, cuts=False)
    if anchors.logits is not None:
        close, loose = Way(imitation="closest"), Way(imitation="one-se")
        yield Attempt("imitation", "head as close as it can be, no atoms", "zero-atoms", close)
        yield Attempt("imitation", "head within a standard error, no atoms", "zero-atoms", loose)
        yield Attempt("imitation", "anchor, head as close as it can be", way=close)
        yield Attempt("imitation", "anchor, head within a standard error", way=loose)
    if anchors.bias is not None:
        fits = {
            f"{t}, {s} shares": Way(targets=t, shares=s)
            for s in ("fitted", "source")
            for t in ("logits", "probabilities")
        }
        for name, way in fits.items():
            yield Attempt("targets", f"head fitted to {name}, no atoms", "zero-atoms", way)
        for name in ("logits, fitted shares", "probabilities, source shares"):
            yield Attempt("targets", f"anchor, head fitted to {name}", way=fits[name])
    for maps in ("shared", "level"):
        yield Attempt("maps", f"{maps} maps, scale 1", way=Way(maps=maps, scales=(1.0,)))
    ways: dict[str, dict[str, str]] = {
        "depths matched by CKA": {"depths": "cka"},
        "depths matched by CKA, level maps": {"depths": "cka", "maps": "level"},
        "penalties for what atoms read": {"penalties": "atoms"},
        "writer inverse to the reader": {"writer": "inverse"},
    }
    for name, changes in ways.items():
        yield Attempt("maps", f"{name}, scale 1", way=Way(**changes, scales=(1.0,)))  # type: ignore[arg-type]
    for layers in ("upper", "last"):
        for arm in ("anchor", "random-p"):
            yield Attempt("layers", f"{arm}, atoms in the {layers} layers", arm, Way(layers=layers))
    for arm in ("anchor", "random-p"):  # where they act, one map of the final states is all that counts
        yield Attempt("layers", f"{arm}, in the last, behind its own map", arm, Way(layers="last", maps="level"))
    for rank in (8, 32, 128):
        for kind in ("principal", "canonical"):
            yield Attempt("rank", f"anchor, {rank} {kind} directions", way=Way(rank=rank, directions=kind))
    for scale in (0.5, 1.0, 2.0, 4.0, 8.0):
        for arm in ("anchor", "random-p"):
            yield Attempt("scale", f"{arm}, scale {scale:g}", arm, Way(scales=(scale,)))
    yield Attempt("scale", "anchor, scale chosen without labels")
    if anchors.reads is not None and anchors.bias is not None:
        for confidence in (0.0, 0.5):
            for arm in ("refresh", "refresh-random"):
                yield Attempt("refresh", f"{arm}, confidence {confidence:g}", arm, Way(confidence=confidence))
    for noise in (0.3, 1.0):
        for arm in (ON_SOURCE, "zero-atoms", "anchor", "random-p"):
            yield Attempt("perturbed", f"{arm}, trained under maps {noise:g} off", arm, noise=noise)
    for arm in (ON_SOURCE, "zero-atoms", "anchor", "random-p"):
        yield Attempt("turns", f"{arm}, trained on another host by turns", arm, turns=True)
    if anchors.kind != "token" and anchors.reads is not None and anchors.bias is not None:
        for what, method in TAUGHT.items():
            yield Attempt("taught", f"{what} trained on the source's decisions", taught=method)
    if anchors.logits is not None:
        yield Attempt("data", "source, half of the labels", ON_SOURCE, half="file")
        yield Attempt("data", "half of the labels: head, no atoms", "zero-atoms", half="file")
        yield Attempt("data", "half of the labels: with logits of the other half's texts", "zero-atoms", half="unseen")
        yield Attempt("data", "half of the labels: with logits of its own texts", "zero-atoms", half="seen")
    if anchors.kind != "token":
        yield Attempt("data", "head trained on the training texts and labels", taught="head", labels=True)
    for atoms in (1, 2, 4, 8, 16, 32):
        for arm in (ON_SOURCE, "zero-atoms", "anchor", "random-p"):
            yield Attempt("sparsity", f"{arm}, {atoms} atom{'s' * (atoms > 1)} a token", arm, atoms=atoms)
    counts = [n for n in (64, 128, 256, 512) if n <= anchors.coded]
    for count in counts:
        yield Attempt("texts", f"{count} coded texts alone", coded=count, texts=count, cuts=False)
    for count in (1024, 2048) if anchors.coded >= 512 else ():
        yield Attempt("texts", f"{count} coded texts alone, drawn anew", coded=count, texts=count, choice="random")
    for count in counts[:-1]:
        yield Attempt("texts", f"{count} coded texts, logits of all", coded=count)
    if len(anchors.texts) > anchors.coded + 500:
        yield Attempt("texts", f"{anchors.coded} coded texts, logits of 500 more", texts=anchors.coded + 500)
    for dims in (32, 64, 128, 256):
        yield Attempt("dims", f"{dims} coordinates", dims=dims)
    for bits in (8, 4):
        yield Attempt("bits", f"{bits}-bit codes", bits=bits)
    for count in counts[:2]:
        for choice in CHOICES:
            yield Attempt("choice", f"{count} texts, {choice}", way=bare, coded=count, texts=count, choice=choice)


def measure(
    settings: Settings,
    adapter: UHLAdapter,
    source: Encoder,
    target: Encoder,
    task: Task,
    tried: Sequence[Attempt],
    file: Path | None = None,
) -> pd.DataFrame:
    """Port ``adapter`` by each attempt and score it on dev: columns group, attempt, bytes of the file's anchors, texts,
    scale, change (of what the head reads, by the atoms), explained (of the source's logits), agreement (with its
    decisions) as the port predicts them, same (the agreement on dev, in percent: less noisy than a score), dev; and n,
    the texts of dev.

    Not of an adapter that had a teacher. ``file``: see :func:`uhl.runs.resumed`; what it has is of these settings and
    this adapter.
    """
    whole = adapter.anchors
    if whole is None:
        raise UHLError("the adapter has no anchors; pre-train a canonical one")
    if reason := not_taught(adapter, settings.task_name):
        raise UHLError(f"no way to port can be tried: {reason}")
    if adapter.info.get("teacher"):  # attempts draw anchors anew, with the adapter's own logits
        raise UHLError("this adapter's anchors have a teacher's logits; try ways to port one without a teacher")
    seen, named = observe(target, whole.probe), {(a.group, a.name): a for a in tried}

    def one(group: str, attempt: str, **_: object) -> pd.DataFrame:
        row = _measure(settings, adapter, source, target, task, seen, named[group, attempt])
        return pd.DataFrame([row], columns=COLUMNS)

    with TemporaryDirectory() as folder:
        own = sha256(store.save(adapter, Path(folder) / "adapter.safetensors"))
    known = [settings.model_dump(exclude={"attempts"}, exclude_defaults=True), own, port_rules(adapter, target)]
    about = hashlib.sha256(json.dumps([*known, runs.PROTOCOL], default=str).encode())
    keys = [{"group": a.group, "attempt": a.name, "about": about.hexdigest()} for a in tried]
    return runs.resumed(one, keys, file)[["group", "attempt", *COLUMNS]].assign(n=len(task.data["dev"]))


def _measure(
    settings: Settings, adapter: UHLAdapter, source: Encoder, target: Encoder, task: Task, seen: Observed, a: Attempt
) -> tuple[object, ...]:
    """One attempt's :data:`COLUMNS`; ``seen`` is the target on the adapter's probe."""
    whole, none = adapter.anchors, float("nan")
    assert whole is not None
    if a.taught:
        found = taught(settings, whole, deepcopy(target), task, a.taught, a.labels)
        same = 100 * agreement(settings, found, "dev")
        texts = tasks.plain_text(task, "train") if a.labels else whole.texts
        size = budget.labelled_bytes(texts, len(task.labels)) if a.labels else budget.anchor_bytes(whole)
        return size, len(texts), *4 * (none,), same, found.score
    of, own = settings, deepcopy(adapter)  # a port may change what it ports
    if a.noise or a.turns or a.half or a.atoms:
        second = next(name for name in SECOND if name not in {source.name, target.name}) if a.turns else None
        changes: dict[str, object] = {"train_size": len(task.data["train"]) // 2} if a.half else {}
        if a.atoms:
            changes |= {"top_k": a.atoms, "lambda_f": settings.lambda_f * settings.top_k / a.atoms}
        of, own, on_source = trained_otherwise(settings, a.noise, second, changes)
        if a.arm == ON_SOURCE:
            return budget.anchor_bytes(whole), len(whole.texts), *5 * (none,), on_source
    assert own.anchors is not None
    own.anchors = own.anchors.cut(a.coded, a.texts, a.dims, a.bits, a.cuts)
    if a.choice:
        assert a.coded is not None
        own.anchors = chosen(settings, adapter, source, task, a.choice, a.coded)
    if a.half in {"seen", "unseen"}:
        own.anchors = with_training_texts(of, own, source, a.half == "seen")
    asked = own.anchors.probe
    known = own.anchors.texts == whole.texts[: len(own.anchors.texts)]
    shared = Shared.of(seen.cut(whole.probe, asked), asked) if known else Shared()
    way = a.way.model_copy(update={"refresh_steps": settings.refresh_steps})
    made = port(own, target, settings.task_name, a.arm, seed=settings.seed, shared=shared, way=way)
    with at_work(own, target, settings.task_name, made.frame, made.scale) as attached:
        classifier = Classifier(target.model, own.task(settings.task_name), made.frame, attached)
        found = predict(classifier, target, task, "dev", max_length=settings.max_length)
    size = budget.anchor_bytes(own.anchors, a.bits)
    told = (made.scale, *(made.report.get(name) for name in ("change", "final_fit", "agreement")))
    return size, len(own.anchors.texts), *told, 100 * agreement(of, found, "dev"), found.score


def trained_otherwise(
    settings: Settings, noise: float = 0.0, second: str | None = None, changed: Mapping[str, object] | None = None
) -> tuple[Settings, UHLAdapter, float]:
    """The canonical adapter that :func:`uhl.stages.pretrain` trains with such a ``noise``, by turns with a ``second``
    host, or with ``changed`` settings; the settings of its run, and its dev score on the source. One that was trained
    is read from its file.
    """
    if settings.borrowed:
        raise UHLError(f"nothing is trained on {settings.task_name}, which has the adapter of {settings.source_task}")
    changes = dict(changed or {})
    how = {"train_size": "labels", "top_k": "atoms"}
    names = [f"by-turns-{runs.slug(second)}"] if second else [f"perturbed-{noise:g}"] if noise else []
    names += [f"{value}-{how[name]}" for name, value in changes.items() if name in how]
    base = runs.cell_dir(settings, "pretrain-canonical") / "manifest.json"
    if base.is_file():  # the target may train otherwise than the source does
        changes["bf16"] = runs.filled(runs.manifest(base)["parameters"])["bf16"]
    own = settings.model_copy(update=changes | {"profile": "-".join([settings.profile, *names]), "splits": ("dev",)})
    cell = runs.cell_dir(own, "pretrain-canonical")
    asked = decisive(own, "pretrain-canonical")
    with runs.locked(cell / ".lock"):
        file = cell / "manifest.json"
        if (found := runs.same(file, asked)) is None:
            _, outcome = pretrain(own, "canonical", noise=noise, second=second)
            found = runs.manifest(outcome.finish("pretrain-canonical"))
    (row,) = found["rows"]
    return own, adapter_for(own, "anchor")[0], row["score"]


def taught(
    settings: Settings, anchors: Anchors, target: Encoder, task: Task, method: Method, labels: bool = False
) -> Prediction:
    """Train a baseline on ``target`` (which changes) with the source's decisions on the anchors, and predict dev.

    No label of the task is seen but by the source (and in choosing learning rates): a fifth of the task's own texts,
    with the source's decisions, stands in for dev. It says what the file's texts and decisions teach a host by usual
    means, without codes or atoms: decisions are hard, and every text counts alike. Where the source decides one label
    alone, so does what it has taught.

    With ``labels`` the training texts and their labels take the place of anchors and decisions: what a file that held
    no adapter, but the data, would teach.
    """
    probe = anchors.probe
    if labels:
        texts, decided = tasks.plain_text(task, "train"), tasks.gold_labels(task, "train")
        own, origins = len(texts), list(range(len(texts)))
    else:
        texts, decided = probe.observed, anchors.decided().argmax(1).tolist()
        own, origins = len(anchors.texts) if anchors.own is None else anchors.own, probe.origins
    held = set(random.Random(settings.seed).sample(range(own), max(1, own // 5)))
    rows: dict[str, list[dict[str, object]]] = {"train": [], "dev": []}
    for row, (text, label, origin) in enumerate(zip(texts, decided, origins, strict=True)):
        made: dict[str, object] = {"text": text, "label": label}
        if task.kind == "pair":
            made["text"], _, made["text_pair"] = text.partition(PAIR)
        if origin not in held:
            rows["train"].append(made)
        elif row < own:  # fragments of what is held out are left out
            rows["dev"].append(made)
    if len(known := {row["label"] for row in rows["train"]}) == 1:
        gold = tasks.gold_labels(task, "dev")
        guess = [*known] * len(gold)
        return Prediction(guess, gold, [], score(task, guess, gold), 0.0)
    data = {split: Dataset.from_list(found) for split, found in rows.items()}
    pseudo = replace(task, data=DatasetDict(data | {"test": task.data["dev"]}))
    levels = upper_levels(target.layers)
    begin = start(target, pseudo, replace(probe.first(), words=0), settings.max_length, levels)
    config = settings.train_config(rate=getattr(settings, RATES.get(method, "rate")))
    with TemporaryDirectory() as folder:
        trained = run_baseline(method, target, pseudo, begin, config, folder)
    return predict(trained.classifier, target, pseudo, "test", max_length=settings.max_length)


def chosen(settings: Settings, adapter: UHLAdapter, source: Encoder, task: Task, choice: str, count: int) -> Anchors:
    """Anchors of a trained adapter made anew from ``count`` of the texts that its own were drawn from, and of generic
    ones where these are too few.
    """
    pool = anchor_pool(settings, task)
    if count > len(pool):
        pool += generic_texts(pool, count - len(pool), random.Random(settings.seed))
    texts = [pool[i] for i in select(final_means(source, pool), choice, count, settings.seed)]
    probe = Probe(texts, task.kind, settings.anchor_words, None, settings.max_length)
    return anew(settings, adapter, source, probe)


def with_training_texts(settings: Settings, adapter: UHLAdapter, source: Encoder, seen: bool) -> Anchors:
    """An adapter's anchors, made anew with logits for texts of the training split among those of the own pool: for
    those that it was trained on, by these ``settings``, or for as many others, at most :data:`MOST`. Raises
    :class:`UHLError` where there are none.
    """
    own = settings.model_copy(update={"anchor_text": "train"})
    trained = anchor_pool(own, load_data(own))
    whole = own.model_copy(update={"train_size": None})
    others = sorted(set(anchor_pool(own, load_data(whole))) - set(trained))
    if not others:
        raise UHLError("the adapter was trained on the whole training split; there are no other texts to compare")
    count, draw = min(len(trained), len(others), MOST), random.Random(settings.seed)
    assert adapter.anchors is not None
    texts, kept = adapter.anchors.texts, adapter.anchors.probe
    more = [t for t in draw.sample(trained if seen else others, count) if t not in set(texts)]
    end = len(texts) if kept.own is None else kept.own
    return anew(
        settings, adapter, source, replace(kept, texts=[*texts[:end], *more, *texts[end:]], own=end + len(more))
    )


def anew(settings: Settings, adapter: UHLAdapter, source: Encoder, probe: Probe) -> Anchors:
    """Anchors of a trained adapter from another probe, in the coordinates that it was trained in."""
    basis = source_basis(adapter, source)
    frame = basis.frame(find_slots(source.model, adapter.config.types))
    return make_anchors(
        source, adapter, settings.task_name, observe(source, probe.first()), basis, frame, probe, "attempt"
    )


def select(states: Float[Tensor, "n D"], choice: str, count: int, seed: int = 0) -> list[int]:
    """Rows to keep: at random; those nearest to k-means centres; drawn by ridge leverage scores; or greedily, each the
    one that the others explain least (near the mode of a determinantal process with a Gaussian kernel; pivoted Cholesky
    factors). Raises :class:`UHLError` for more rows than there are.
    """
    one_of(choice, CHOICES, "choice of anchors")
    if count > len(states):
        raise UHLError(f"{count} texts to choose, {len(states)} there")
    x = (states - states.mean(0)).double().numpy()
    draw = np.random.default_rng(seed)
    if choice == "random":
        return sorted(random.Random(seed).sample(range(len(x)), count))
    if choice == "k-means":
        distances = KMeans(count, n_init=1, random_state=seed).fit(x).transform(x)
        kept: list[int] = []
        for centre in distances.T:
            kept.append(next(int(i) for i in np.argsort(centre) if int(i) not in kept))
        return sorted(kept)
    if choice == "leverage":
        left, values, _ = np.linalg.svd(x, full_matrices=False)
        scores = (left**2 * (values**2 / (values**2 + (values**2).mean()))).sum(1)
        return sorted(map(int, draw.choice(len(x), count, replace=False, p=scores / scores.sum())))
    square = (x**2).sum(1)
    apart = np.maximum(square[:, None] + square - 2 * x @ x.T, 0)
    kernel = np.exp(-apart / np.median(apart))
    factors, left_over, order = np.zeros((len(x), count)), np.ones(len(x)), []
    for step in range(count):
        best = int(left_over.argmax())
        order.append(best)
        column = (kernel[:, best] - factors[:, :step] @ factors[best, :step]) / np.sqrt(max(left_over[best], 1e-12))
        factors[:, step] = column
        left_over = left_over - column**2
        left_over[order] = -np.inf
    return sorted(order)
