"""Intervals from stored predictions: a bootstrap over test examples and seeds.

Every metric here is 100 * 2 TP / (predicted + gold) summed over examples: for entity F1 the counts are entities, for
accuracy they are (correct, 1, 1), where the formula is the accuracy. So one bootstrap over rows of counts serves all
kinds of task. Seeds and examples are resampled independently (crossed), as both vary: Efron & Tibshirani 1993. Where
examples come in groups, whole groups are drawn. Means over S resampled seeds vary (S - 1) / S as much as means over S
new seeds do, which is put right. In simulations (tests/test_stats.py) an interval of three seeds holds the truth in 95 %
of cases or more where seeds differ by a point or two in accuracy, and in 86 % where they differ by eight.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from seqeval.metrics.sequence_labeling import get_entities

REPEATS = 2000


class Interval(NamedTuple):
    """A point estimate and its 95 % interval."""

    value: float
    low: float
    high: float


def counts(labels: Any, gold: Any, names: Sequence[str] | None = None) -> np.ndarray:
    """(n, 3) counts of true positives, predicted and gold; ``names`` are a token task's tags."""
    if names is None:
        right = (np.asarray(labels) == np.asarray(gold)).astype(float)
        return np.stack([right, np.ones_like(right), np.ones_like(right)], 1)
    rows = []
    for guess, truth in zip(labels, gold, strict=True):
        a, b = (set(get_entities([names[t] for t in tags])) for tags in (guess, truth))
        rows.append((len(a & b), len(a), len(b)))
    return np.array(rows, dtype=float)


def score_of(total: np.ndarray) -> np.ndarray:
    """The metric in percent from summed counts (..., 3)."""
    below = total[..., 1] + total[..., 2]
    return np.where(below > 0, 200.0 * total[..., 0] / np.maximum(below, 1e-12), 0.0)


def bootstrap(
    tables: np.ndarray, groups: np.ndarray | None = None, seed: int = 0, repeats: int = REPEATS
) -> np.ndarray:
    """Bootstrap scores (repeats,) of counts (seeds, n, 3): the mean over seeds, examples shared by all seeds.

    ``groups`` (n,) are what is drawn where examples are not independent: the sentences of one review stay together.
    """
    rng = np.random.default_rng(seed)
    seeds, n, _ = tables.shape
    names, place = np.unique(np.arange(n) if groups is None else groups, return_inverse=True)
    count = len(names)
    units = np.zeros((count, seeds, 3))
    np.add.at(units, place, tables.transpose(1, 0, 2))
    scores = np.empty((repeats, seeds))
    for begin in range(0, repeats, step := max(1, 2_000_000 // count)):
        rows = min(step, repeats - begin)
        drawn = rng.integers(0, count, (rows, count)) + count * np.arange(rows)[:, None]
        weight = np.bincount(drawn.ravel(), minlength=rows * count).reshape(rows, count)
        scores[begin : begin + rows] = score_of((weight @ units.reshape(count, -1)).reshape(rows, seeds, 3))
    chosen = np.take_along_axis(scores, rng.integers(0, seeds, (repeats, seeds)), 1).mean(1)
    if seeds == 1:
        return chosen
    whole = scores.mean(1)
    return whole + np.sqrt(seeds / (seeds - 1)) * (chosen - whole)


def interval(tables: np.ndarray, groups: np.ndarray | None = None, seed: int = 0) -> Interval:
    """Mean score over seeds with its percentile interval. ``tables`` is (seeds, n, 3); ``groups`` as above."""
    value = float(score_of(tables.sum(1)).mean())
    low, high = np.percentile(bootstrap(tables, groups, seed), [2.5, 97.5])
    return Interval(value, float(low), float(high))


def difference(a: np.ndarray, b: np.ndarray, groups: np.ndarray | None = None, seed: int = 0) -> Interval:
    """Paired difference a - b on the same seeds and examples, both (seeds, n, 3)."""
    if a.shape != b.shape:
        raise ValueError(f"paired tables need one shape, got {a.shape} and {b.shape}")
    value = float((score_of(a.sum(1)) - score_of(b.sum(1))).mean())
    low, high = np.percentile(bootstrap(a, groups, seed) - bootstrap(b, groups, seed), [2.5, 97.5])
    return Interval(value, float(low), float(high))
