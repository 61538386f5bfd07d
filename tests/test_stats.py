import numpy as np
import pytest
from scipy.stats import binomtest, bootstrap, norm
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


def test_the_bootstrap_is_scipys():
    """Ends of both intervals of one seed's accuracy, and of a paired difference, on the same examples."""
    a, b = seeds_of(0, 1, 1000, 0.0, (0.3, 0.0))
    for given, found in (
        (100 * a[0, :, 0], stats.interval(a)),
        (100 * (a - b)[0, :, 0], stats.difference(a, b)),
    ):
        theirs = bootstrap((given,), np.mean, n_resamples=4000, method="percentile", rng=0).confidence_interval
        assert (found.low, found.high) == pytest.approx((theirs.low, theirs.high), abs=0.35)


def test_a_share_of_a_gap_has_its_interval():
    """Delta method of a ratio with a fixed gap: a share's interval is the score's, in units of the gap."""
    floor = np.zeros((1, 4000, 3))
    floor[..., 1:] = 1
    ceiling = floor.copy()
    ceiling[..., 0] = 1
    cell = draw(0, n=4000)
    made, score = stats.recovered(cell, floor, ceiling), stats.interval(cell)
    assert made == pytest.approx([x / 100 for x in score])
    assert np.isnan(stats.recovered(cell, ceiling, floor)).all()
    near = floor.copy()
    near[0, 0, 0] = 1  # a gap of one example, which resamples lose
    assert np.isnan(stats.recovered(cell, floor, near)[1:]).all()
    held = 0
    for trial in range(60):
        drawn = (draw(trial + start, 3, 1000, p) for start, p in ((0, 0.7), (1000, 0.5), (2000, 0.8)))
        found = stats.recovered(*drawn)
        held += found.low <= 2 / 3 <= found.high
    assert held / 60 >= 0.9


def test_a_paired_difference_is_narrower_than_two_intervals_and_sees_zero():
    a = draw(0, n=1000)
    b = a.copy()
    b[0, :20, 0] = 1 - b[0, :20, 0]
    found, alone = stats.difference(a, b), stats.interval(a)
    assert found.high - found.low < 0.5 * (alone.high - alone.low)
    same = stats.difference(a, a)
    assert same == (0, 0, 0, 1)
    with pytest.raises(ValueError, match="one shape"):
        stats.difference(a, a[:, :5])


def test_groups_widen_intervals_and_so_do_seeds():
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
    low, high = stats.interval(spread)[1:]
    assert (high - low) / 2 == pytest.approx(4.303 * 100 * np.std([0.6, 0.7, 0.8], ddof=1) / np.sqrt(3), rel=0.1)


ENTITIES, FALSE = 1.5, 0.6  # of a sentence's: on average, and how many are found that are none, at even odds


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


def seeds_of(trial, seeds, n, spread, shift=(0.0, 0.0), entities=False):
    """Two methods on the same examples: how hard an example is and how good a seed is are drawn anew; ``shift`` is how
    much better than that each method is, in logits. An example has one label, or a sentence's entities.
    """
    rng = np.random.default_rng(trial)
    hard, own = rng.normal(1.2, 1.5, n), rng.normal(0, spread, (2, seeds))
    gold = rng.poisson(ENTITIES, n) if entities else np.ones(n, int)
    tables = []
    for o, s in zip(own, shift, strict=True):
        chance = sigmoid(hard + o[:, None] + s)
        right = rng.binomial(gold, chance)
        false = rng.poisson(FALSE * (1 - chance)) if entities else 1 - right
        tables.append(np.stack([right, right + false, np.broadcast_to(gold, right.shape)], 2).astype(float))
    return tables


@pytest.fixture(scope="module")
def truth():
    """The score of a method in the long run: the mean over seeds, each at its expected counts."""
    hard = norm.ppf((np.arange(2000) + 0.5) / 2000, 1.2, 1.5)
    seeds = norm.ppf((np.arange(200) + 0.5) / 200)

    def of(spread, shift=0.0, entities=False):
        found = sigmoid(hard + spread * seeds[:, None] + shift).mean(1)
        gold, false = (ENTITIES, FALSE * (1 - found)) if entities else (1.0, 1 - found)
        return float(stats.score_of(np.stack([found * gold, found * gold + false, 0 * found + gold], 1)).mean())

    return of


@pytest.mark.parametrize("entities", [False, True])
@pytest.mark.parametrize(("spread", "least"), [(0.05, 0.95), (0.4, 0.93)])  # of about 1 and 8 points in accuracy
def test_intervals_of_three_seeds_have_their_coverage(truth, spread, least, entities):
    wanted, held = truth(spread, entities=entities), 0
    for trial in range(150):
        low, high = stats.interval(seeds_of(trial, 3, 500, spread, entities=entities)[0])[1:]
        held += low <= wanted <= high
    assert held / 150 >= least


@pytest.mark.parametrize("entities", [False, True])
def test_equal_methods_are_rarely_told_apart_and_unequal_ones_often(entities):
    false = [stats.difference(*seeds_of(t, 3, 500, 0.05, entities=entities)).p < 0.05 for t in range(150)]
    true = [stats.difference(*seeds_of(t, 3, 500, 0.05, (0.8, 0.0), entities)).p < 0.05 for t in range(50)]
    assert np.mean(false) <= 0.05
    assert np.mean(true) > 0.75


@pytest.mark.parametrize("entities", [False, True])
def test_a_method_at_the_margin_is_rarely_called_non_inferior(truth, entities):
    """The one-sided error of the test is at most 2.5 %: here the truth lies on the margin itself."""
    shift = -0.3
    margin = truth(0.05, shift, entities) - truth(0.05, entities=entities)
    drawn = (seeds_of(t, 3, 500, 0.05, (shift, 0.0), entities) for t in range(150))
    made = [stats.verdict(stats.difference(*tables), margin) for tables in drawn]
    assert made.count("held") / 150 <= 0.04
    assert stats.verdict(stats.Difference(0.0, -0.9, 0.9, 1.0), -1.0) == "held"
    assert stats.verdict(stats.Difference(0.0, -1.1, 0.9, 1.0), -1.0) == "not decidable"
    assert stats.verdict(stats.Difference(-3.0, -5.0, -1.2, 0.0), -1.0) == "refuted"


def test_cells_of_a_table_lend_one_another_how_much_seeds_vary():
    """The prior finds the spread that made the cells; intervals get shorter and keep their coverage."""
    rng = np.random.default_rng(0)
    same = stats.prior(enumerate(rng.normal(70, 2, (200, 3))))
    assert same.variance == pytest.approx(4, rel=0.3)
    assert same.df > 20
    apart = stats.prior(enumerate(rng.normal(70, np.exp(rng.normal(0, 1.5, 200))[:, None], (200, 3))))
    assert apart.df < 5
    assert stats.prior(enumerate([np.array([1.0, 2.0]), np.array([3.0])])) is None
    cells = [np.array([1.0, 2.0]), np.array([3.0, 4.1]), np.array([5.0, 6.2])]
    few = stats.prior(enumerate(cells))
    assert few.df == np.inf  # alike by chance; their three degrees of freedom are all that there is
    assert stats._between(np.array([1.0, 2.0]), few)[1] == 3
    assert stats.prior(("model", cell) for cell in cells) == few._replace(most=1)  # of one model they are worth one
    held = widths = 0.0
    pairs = [seeds_of(t, 3, 500, 0.15) for t in range(150)]
    known = stats.prior(enumerate(stats.seeds_apart(*pair) for pair in pairs))
    for pair in pairs:
        made, alone = stats.difference(*pair, None, known), stats.difference(*pair)
        held += made.low <= 0 <= made.high
        widths += (made.high - made.low) / (alone.high - alone.low)
        assert (made.p < 0.05) == (made.low > 0 or made.high < 0) or abs(made.p - 0.05) < 0.01
    assert held / 150 >= 0.95
    assert widths / 150 < 0.95


def test_one_seed_beside_a_table_of_three_is_as_careful():
    """Equal methods whose seeds differ: told apart by one seed's examples far too often, and rarely with the prior."""
    known = stats.prior((t, stats.seeds_apart(*seeds_of(t, 3, 1000, 0.15))) for t in range(1000, 1040))
    pairs = [seeds_of(t, 1, 1000, 0.15) for t in range(150)]
    assert np.mean([stats.difference(*pair).p < 0.05 for pair in pairs]) > 0.2
    assert np.mean([stats.difference(*pair, None, known).p < 0.05 for pair in pairs]) <= 0.07


def test_p_and_interval_say_the_same():
    """p is 0.05 where the interval ends at zero; near it, both are on the same side."""
    for trial in range(60):
        made = stats.difference(*seeds_of(trial, 3, 300, 0.1, (0.25, 0.0)))
        if abs(made.p - 0.05) > 0.01:
            assert (made.p < 0.05) == (made.low > 0 or made.high < 0)


def test_p_of_a_bound_is_that_of_the_interval_ending_there():
    for trial in range(20):
        one, other = seeds_of(trial, 3, 300, 0.1, (0.25, 0.0))
        made = stats.difference(one, other)
        for end in made.low, made.high:
            assert stats.difference(one, other, bound=end).p == pytest.approx(0.05, abs=0.02)
        assert stats.difference(one, other, bound=made.value).p > 0.99


def test_mcnemar_is_the_binomial_test_of_the_discordant_pairs():
    a, b = (table[0] for table in seeds_of(0, 1, 400, 0.0, (0.6, 0.0)))
    first, second = ((a[:, 0] > b[:, 0]).sum(), (b[:, 0] > a[:, 0]).sum())
    assert stats.mcnemar(a, b) == pytest.approx(binomtest(int(first), int(first + second)).pvalue)
    assert stats.mcnemar(a, a) == 1


def test_holm_steps_down():
    p = [0.04, 0.001, 0.03, 0.2]
    assert stats.holm(p) == pytest.approx([0.09, 0.004, 0.09, 0.2])
    assert len(stats.holm([])) == 0
