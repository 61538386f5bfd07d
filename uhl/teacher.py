"""A teacher: the source itself, trained by another method on the same labels, such as full fine-tuning.

A source decides better with all its weights trained than with an adapter. The adapter learns from labels and teacher,

    loss = (1 - w) cross-entropy(label) + w cross-entropy(teacher),     where there is no label the latter alone,

at temperature 1 (Hinton et al. 2015, arXiv:1503.02531), on the training texts and on the task's unlabelled ones; and
the logits of the anchors in its file are the teacher's. No label is used that the adapter does not have itself.
"""

from __future__ import annotations

import hashlib
import json
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import Dataset, DatasetDict, concatenate_datasets
from jaxtyping import Float
from torch import Tensor

from uhl import runs
from uhl.anchors import Probe, unit_states
from uhl.baselines import Baseline, Start, run_baseline
from uhl.config import Sizes, TrainConfig
from uhl.evidence import BROKEN, flat
from uhl.files import write_npz
from uhl.models import Encoder
from uhl.tasks import IGNORE, Task, digest, plain_text
from uhl.train import predict

SPLITS = ("train", "unlabelled")  # that it teaches on


@dataclass(frozen=True)
class Teacher:
    """What a teacher says: logits of the units of the training split, of the unlabelled one (none where there is none)
    and of the anchors' probe, (units, labels) each; its decisions on each split that is scored, one behind the other,
    and their scores; and the seconds that it took to train.
    """

    method: str
    train: Float[Tensor, "n labels"]
    unlabelled: Float[Tensor, "m labels"]
    anchors: Float[Tensor, "U labels"]
    decided: dict[str, list[int]]
    scores: dict[str, float]
    seconds: float

    @property
    def about(self) -> dict[str, object]:
        """For a cell's manifest."""
        return {"method": self.method, "scores": self.scores, "seconds": self.seconds}

    def taught(self, task: Task) -> Task:
        """The task with a column ``teacher`` in its training split, logits of each text or word, and the unlabelled
        texts behind the labelled ones, with labels to be ignored.
        """
        texts = [c for c in ("text", "text_pair", "tokens") if c in task.data["train"].column_names]
        label = "tags" if task.kind == "token" else "label"
        parts = []
        for split, logits in zip(SPLITS, (self.train, self.unlabelled), strict=True):
            if split not in task.data or not set(texts) <= set(task.data[split].column_names):
                continue
            rows = {name: list(task.data[split][name]) for name in texts}
            units = _probe(plain_text(task, split), task, 0).units()
            said = [x.tolist() for x in logits.split(units)]
            if task.kind == "token":
                none: list[Any] = [[IGNORE] * len(words) for words in rows["tokens"]]
                nothing = [math.nan] * logits.shape[1]  # where what a task calls words is not what blanks divide
                pairs = zip(said, rows["tokens"], strict=True)
                said = [x if len(x) == len(words) else [nothing] * max(len(words), 1) for x, words in pairs]
            else:
                said, none = [x[0] for x in said], [IGNORE] * len(said)
            known = list(task.data[split][label]) if split == "train" else none
            parts.append(Dataset.from_dict({**rows, label: known, "teacher": said}))
        return replace(task, data=DatasetDict({**task.data, "train": concatenate_datasets(parts)}))


def teach(
    method: str,
    encoder: Encoder,
    task: Task,
    begin: Callable[[], Start],
    config: TrainConfig,
    folder: Path,
    asked: Probe,
    sizes: Sizes,
    about: str,
    splits: Sequence[str],
) -> Teacher:
    """Train one of the baselines on the source, ``encoder``, which is changed, ask it about the task's texts and those
    of ``asked``, and score it on ``splits``. ``begin`` makes the start of all baselines, ``sizes`` are a sparse
    method's, ``about`` is :func:`uhl.train.train`'s.

    What it says is kept in ``folder`` and read from there where all is the same, also by a process that waited for
    another to make it; its weights are not kept.
    """
    texts = [plain_text(task, split) if split in task.data else [] for split in SPLITS]
    known = [runs.PROTOCOL, method, encoder.name, encoder.revision, about, texts, list(asked.observed)]
    known += [config.model_dump(exclude={"teacher_weight"}), sizes.model_dump(), digest(task)]
    mark = hashlib.sha256(json.dumps(known, default=str).encode()).hexdigest()
    with runs.locked(folder / ".lock"):
        if (kept := _kept(folder / "says.npz", method, mark, splits)) is not None:
            return kept
        begun = time.time()
        made = run_baseline(method, encoder, task, begin(), config, folder / "trainer", sizes=sizes, about=about)
        seconds = time.time() - begun
        train, unlabelled = (_says(made, encoder, _probe(part, task, config.max_length)) for part in texts)
        scored = {s: predict(made.classifier, encoder, task, s, max_length=config.max_length) for s in splits}
        decided = {s: flat(p.labels)[0].tolist() for s, p in scored.items()}
        scores = {split: p.score for split, p in scored.items()}
        found = Teacher(method, train, unlabelled, _says(made, encoder, asked), decided, scores, seconds)
        _keep(found, folder / "says.npz", mark)
    return found


def _keep(teacher: Teacher, file: Path, mark: str) -> None:
    arrays = {name: getattr(teacher, name).numpy() for name in (*SPLITS, "anchors")}
    arrays |= {split: np.array(labels, dtype=np.int16) for split, labels in teacher.decided.items()}
    arrays["about"] = np.array(json.dumps({"mark": mark, "scores": teacher.scores, "seconds": teacher.seconds}))
    write_npz(file, arrays)


def _probe(texts: Sequence[str], task: Task, length: int) -> Probe:
    return Probe(texts, task.kind, length=length, most=None)


def _says(made: Baseline, encoder: Encoder, probe: Probe) -> Float[Tensor, "U labels"]:
    """Logits of every unit, by the trained source."""
    part, frame = made.classifier.part, made.classifier.frame
    codes = frame.to(torch.device("cpu")).codes(unit_states(encoder, probe, frame.levels))
    with torch.no_grad():
        return part.classify(codes.to(part.head.device)).cpu()


def _kept(file: Path, method: str, mark: str, splits: Sequence[str]) -> Teacher | None:
    """What was kept of a teacher that is the same, with its decisions on ``splits``; None where nothing is, or of
    another, or not on these.
    """
    try:
        with np.load(file) as stored:
            about = json.loads(str(stored["about"]))
            if about["mark"] != mark:
                return None
            train, unlabelled, anchors = (torch.from_numpy(stored[name]) for name in (*SPLITS, "anchors"))
            decided = {split: stored[split].tolist() for split in splits}
            scores = {split: float(about["scores"][split]) for split in splits}
        return Teacher(method, train, unlabelled, anchors, decided, scores, about["seconds"])
    except BROKEN:
        return None
