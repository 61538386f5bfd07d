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
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import Dataset, DatasetDict, concatenate_datasets
from jaxtyping import Float
from torch import Tensor

from uhl.anchors import Probe, unit_states
from uhl.baselines import Baseline, Start, run_baseline
from uhl.config import TrainConfig
from uhl.evidence import UNREADABLE
from uhl.files import write_atomic
from uhl.models import Encoder
from uhl.tasks import IGNORE, Task, plain_text
from uhl.train import predict

SPLITS = ("train", "unlabelled")


@dataclass(frozen=True)
class Teacher:
    """What a teacher says: logits of the units of the training split, of the unlabelled one (none where there is none)
    and of the anchors' probe, (units, labels) each; its score on dev, and the seconds that it took to train.
    """

    method: str
    train: Float[Tensor, "n labels"]
    unlabelled: Float[Tensor, "m labels"]
    anchors: Float[Tensor, "U labels"]
    score: float
    seconds: float

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
    method: str, encoder: Encoder, task: Task, begin: Start, config: TrainConfig, folder: Path, asked: Probe, about: str
) -> Teacher:
    """Train one of the baselines on the source, ``encoder``, which is changed, and ask it about the task's texts and
    those of ``asked``. What it says is kept in ``folder`` and read from there where all is the same; its weights are
    not.
    """
    texts = [plain_text(task, split) if split in task.data else [] for split in SPLITS]
    told = [method, encoder.name, encoder.revision, config.model_dump(), about, texts, list(asked.observed)]
    mark = hashlib.sha256(json.dumps(told, default=str).encode()).hexdigest()
    file = folder / "says.npz"
    if (kept := _kept(file, method, mark)) is not None:
        return kept
    begun = time.time()
    made = run_baseline(method, encoder, task, begin, config, folder / "trainer", about=about)
    seconds = time.time() - begun
    score = predict(made.classifier, encoder, task, "dev", max_length=config.max_length).score
    train, unlabelled = (_says(made, encoder, _probe(part, task, config.max_length)) for part in texts)
    found = Teacher(method, train, unlabelled, _says(made, encoder, asked), score, seconds)
    arrays = {name: getattr(found, name).numpy() for name in (*SPLITS, "anchors")}
    arrays |= {"mark": np.array(mark), "score": np.array(score), "seconds": np.array(seconds)}

    def write(tmp: Path) -> None:
        with tmp.open("wb") as out:  # numpy would add a suffix to a name
            np.savez_compressed(out, **arrays)  # type: ignore[arg-type]

    write_atomic(file, write)
    return found


def _probe(texts: Sequence[str], task: Task, length: int) -> Probe:
    return Probe(texts, task.kind, length=length, most=None)


def _says(made: Baseline, encoder: Encoder, probe: Probe) -> Float[Tensor, "U labels"]:
    """Logits of every unit, by the trained source."""
    part, frame = made.classifier.part, made.classifier.frame
    codes = frame.to(torch.device("cpu")).codes(unit_states(encoder, probe, frame.levels))
    with torch.no_grad():
        return part.classify(codes.to(part.head.device)).cpu()


def _kept(file: Path, method: str, mark: str) -> Teacher | None:
    """What was kept of a teacher that is the same; None where nothing is, or of another."""
    try:
        with np.load(file) as stored:
            if str(stored["mark"]) != mark:
                return None
            train, unlabelled, anchors = (torch.from_numpy(stored[name]) for name in (*SPLITS, "anchors"))
            return Teacher(method, train, unlabelled, anchors, float(stored["score"]), float(stored["seconds"]))
    except (*UNREADABLE, KeyError):
        return None
