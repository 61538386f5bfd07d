"""The head before training: logistic regression on the host's fixed codes, the same start for every method.

Starting from a fitted head keeps the first steps from distorting the host's features (linear probing, then
fine-tuning; Kumar et al. 2022, arXiv:2202.10054). The penalty is chosen on dev.
"""

from __future__ import annotations

import random
import time
from typing import Any, NamedTuple

import numpy as np
import torch
from sklearn.linear_model import LogisticRegression
from torch import Tensor

from uhl.errors import UHLError
from uhl.models import Encoder
from uhl.tasks import IGNORE, Task, encode, score
from uhl.train import Classifier, collator, eval_batches

STRENGTHS = (0.001, 0.003, 0.01, 0.03, 0.1)  # inverse penalties tried on dev
MOST_ROWS = 20_000  # sentences and words that the regression sees, drawn with a fixed seed


class HeadFit(NamedTuple):
    """What :func:`fit_head` did: ``seconds`` that it took, and whether the head is ``fitted`` or the one before."""

    seconds: float
    fitted: bool


@torch.no_grad()
def features(
    classifier: Classifier, encoder: Encoder, task: Task, split: str, max_length: int
) -> tuple[Tensor, Tensor, list[int]]:
    """Codes and labels of a split as the head sees them (a row a sentence or word), and the rows of each example."""
    data = task.data[split]
    if split == "train" and len(data) > MOST_ROWS:
        data = data.select(_drawn(len(data)))
    rows = encode(task.kind, data, encoder.tokenizer, max_length)
    collate = collator(encoder, task)
    codes: list[Tensor] = [torch.empty(0)] * len(rows)
    labels: list[Tensor] = [torch.empty(0)] * len(rows)
    classifier.eval()
    for chosen in eval_batches(rows, 64):
        inputs = collate([rows[i] for i in chosen]).to(next(classifier.parameters()).device)
        truth = inputs.pop("labels")
        out = classifier.codes(**inputs)
        for place, row, answer in zip(chosen, out, truth, strict=True):
            keep = answer != IGNORE
            codes[place] = row[keep].cpu() if task.kind == "token" else row[None].cpu()
            labels[place] = answer[keep].cpu() if task.kind == "token" else answer[None].cpu()
    return torch.cat(codes), torch.cat(labels), [len(x) for x in labels]


def fit_head(
    classifier: Classifier, encoder: Encoder, task: Task, max_length: int = 64, only_if_better: bool = False
) -> HeadFit:
    """Fit the classifier's head on frozen codes; dev chooses among :data:`STRENGTHS`, and with ``only_if_better`` keeps
    the head that is there where none is better.
    """
    begun = time.time()
    x, y, _ = features(classifier, encoder, task, "train", max_length)
    dev_x, dev_y, lengths = features(classifier, encoder, task, "dev", max_length)
    if len(x) > MOST_ROWS:
        chosen = _drawn(len(x))
        x, y = x[chosen], y[chosen]
    if len(classes := y.unique()) < 2:
        raise UHLError(
            f"{task.name}, training split: every label is {task.labels[int(classes[0])]!r}; a head needs two classes"
        )
    best: tuple[float, LogisticRegression] | None = None
    for strength in STRENGTHS:
        model = LogisticRegression(C=strength, max_iter=1000).fit(x.numpy(), y.numpy())
        value = _dev_score(task, model.predict(dev_x.numpy()), dev_y.numpy(), lengths)
        if best is None or value > best[0]:
            best = (value, model)
    assert best is not None
    part = classifier.part
    with torch.no_grad():
        there = part.classify(dev_x.to(part.head.device)).argmax(-1).cpu().numpy()
    if fitted := not only_if_better or best[0] > _dev_score(task, there, dev_y.numpy(), lengths):
        _install(classifier, best[1])
    return HeadFit(time.time() - begun, fitted)


def _drawn(count: int) -> list[int]:
    """:data:`MOST_ROWS` of ``count`` rows, in order."""
    return sorted(random.Random(0).sample(range(count), MOST_ROWS))


def _dev_score(task: Task, guess: Any, gold: Any, lengths: list[int]) -> float:
    if task.kind != "token":
        return score(task, guess, gold)
    cuts = np.cumsum(lengths)[:-1]
    return score(task, np.split(guess, cuts), np.split(gold, cuts))


def _install(classifier: Classifier, model: LogisticRegression) -> None:
    """Copy coefficients into the head; classes that training text never shows get a score below all others."""
    weight, bias = model.coef_, model.intercept_
    if len(model.classes_) == 2:  # one row of scores becomes two of opposite sign
        weight, bias = np.concatenate([-weight, weight]) / 2, np.concatenate([-bias, bias]) / 2
    part = classifier.part
    with torch.no_grad():
        part.head.zero_()
        part.head_bias.fill_(float(bias.min()) - 10.0)
        part.head[model.classes_] = torch.from_numpy(weight).to(part.head)
        part.head_bias[model.classes_] = torch.from_numpy(bias).to(part.head)
