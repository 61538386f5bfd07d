import numpy as np
import pytest
from seqeval.metrics import f1_score
from sklearn.metrics import accuracy_score

from uhl import stats


def draw(seed, seeds=1, n=300, p=0.8):
    rng = np.random.default_rng(seed)
    right = (rng.random((seeds, n)) < p).astype(float)
    return np.stack([right, np.ones_like(right), np.ones_like(right)], 2)


def test_counts_give_the_libraries_scores():
    labels, gold = [0, 1, 1, 0], [0, 1, 0, 0]
    assert stats.score_of(stats.counts(labels, gold).sum(0)) == pytest.approx(100 * accuracy_score(gold, labels))
    names = ["O", "B-X", "I-X", "B-Y"]
    gold, guess = [[1, 2, 0, 3], [0, 3]], [[1, 0, 0, 3], [1, 3]]
    wanted = 100 * f1_score([[names[t] for t in r] for r in gold], [[names[t] for t in r] for r in guess])
    assert stats.score_of(stats.counts(guess, gold, names).sum(0)) == pytest.approx(wanted)


def test_interval_has_its_coverage():
    """Of 200 samples with a known accuracy, about 95 % of the intervals hold it."""
    held = sum(low <= 80 <= high for _, low, high in (stats.interval(draw(s)) for s in range(200)))
    assert 180 <= held <= 199


def test_interval_width_is_the_binomial_one():
    found = stats.interval(draw(0, n=1000))
    standard = 100 * np.sqrt(0.8 * 0.2 / 1000)
    assert (found.high - found.low) / 2 == pytest.approx(1.96 * standard, rel=0.15)


def test_a_paired_difference_is_narrower_than_two_intervals_and_sees_zero():
    a = draw(0, n=1000)
    b = a.copy()
    b[0, :20, 0] = 1 - b[0, :20, 0]
    found, alone = stats.difference(a, b), stats.interval(a)
    assert found.high - found.low < 0.5 * (alone.high - alone.low)
    same = stats.difference(a, a)
    assert same == (0, 0, 0)
    with pytest.raises(ValueError, match="one shape"):
        stats.difference(a, a[:, :5])


def test_groups_widen_intervals_and_seeds_are_resampled():
    """Examples that come in tens with one outcome carry a tenth of the evidence; seeds that differ widen it too."""
    rng = np.random.default_rng(0)
    right = np.repeat((rng.random(100) < 0.7).astype(float), 10)[None, :, None]
    table = np.concatenate([right, np.ones((1, 1000, 2))], -1)
    alone, grouped = stats.interval(table), stats.interval(table, np.repeat(np.arange(100), 10))
    rate = right.mean()
    width = 2 * 1.96 * 100 * np.sqrt(rate * (1 - rate) / 100)
    assert grouped.high - grouped.low == pytest.approx(width, rel=0.15)
    assert alone.high - alone.low == pytest.approx(width / np.sqrt(10), rel=0.15)
    spread = np.concatenate([draw(s, n=4000, p=p) for s, p in ((0, 0.6), (1, 0.7), (2, 0.8))])
    assert stats.bootstrap(spread).std() == pytest.approx(100 * np.std([0.6, 0.7, 0.8]) / np.sqrt(3), rel=0.2)
