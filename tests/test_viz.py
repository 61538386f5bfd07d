"""Figures show what their tables hold: every method, also the free ones, and in words what is missing."""

import numpy as np
import pandas as pd
import pytest
from matplotlib.colors import to_hex

from uhl import viz

CELLS = [  # target, phase, arm, score, bytes
    ("s", "source", "uhl-canonical", 82.0, 9e5),
    ("s", "source", "full", 84.0, 5e7),
    ("x", "zero-shot", "no-adapter", 50.0, 0),
    ("x", "zero-shot", "anchor", 70.0, 9e5),
    ("x", "tuned", "anchor", 75.0, 9e5),
    ("x", "zero-shot", "embedding", 60.0, 9e5),
    ("x", "tuned", "untrained", 74.0, 9e5),
    ("y", "zero-shot", "anchor", 65.0, 9e5),
]


@pytest.fixture
def table():
    frame = pd.DataFrame(CELLS, columns=["target", "phase", "arm", "score", "bytes"])
    return frame.assign(task="movies", low=frame["score"] - 1, high=frame["score"] + 2)


def words(ax):
    return [text.get_text() for text in ax.texts]


def drawn(ax):
    """Places of the points, with their intervals' ends, of a panel whose intervals stand upright."""
    bars = [box.lines for box in ax.containers]
    places = [(float(points.get_xdata()[0]), float(points.get_ydata()[0])) for points, _, _ in bars]
    ends = [tuple(stem[0].get_segments()[0][:, 1]) for _, _, stem in bars]
    return dict(zip(places, ends, strict=True))


def test_each_method_has_its_own_look():
    assert set(viz.ORDER) == set(viz.LOOKS)
    assert len(set(viz.LOOKS.values())) == len(viz.LOOKS)


def test_what_costs_nothing_is_drawn_too(table):
    fig = viz.score_against(table, "bytes", "bytes", 1e6, "1 MB")
    assert [ax.get_title() for ax in fig.axes] == ["s", "x", "y"]
    for ax, target in zip(fig.axes, "sxy", strict=True):
        mine = table[table["target"] == target]
        ends = zip(mine["low"], mine["high"], strict=True)
        assert drawn(ax) == dict(zip(zip(mine["bytes"], mine["score"], strict=True), ends, strict=True))
        low, high = ax.get_xlim()
        assert low < 0 < 5e7 < high
        assert words(ax) == [" budget\n 1 MB"]
    assert [t.get_text() for t in fig.axes[0].get_xticklabels()] == ["0", "1M", "10M", "100M"]


def test_marks_of_one_cost_stand_side_by_side_and_low_scores_on_a_smaller_scale(table):
    """A mark moves on the page alone, tied to its place; below the trained methods six points take the room of one."""
    close = [
        ("y", "tuned", arm, score, 9e5) for arm, score in (("anchor", 76.0), ("lineage", 76.1), ("embedding", 90.0))
    ]
    more = pd.DataFrame(close, columns=["target", "phase", "arm", "score", "bytes"])
    more = more.assign(task="movies", low=more["score"] - 1, high=more["score"] + 2)
    fig = viz.score_against(pd.concat([table, more], ignore_index=True), "bytes", "bytes", 1e6, "1 MB")
    ax = fig.axes[2]
    apart = {
        float(box.lines[0].get_ydata()[0]): box.lines[0].get_transform().transform((9e5, 76.0))[0]
        - ax.transData.transform((9e5, 76.0))[0]
        for box in ax.containers
    }
    moved = sorted(value for score, value in apart.items() if score in {76.0, 76.1})
    assert moved[0] < -5  # not to the right, where the budget ends
    assert moved[1] == pytest.approx(0)
    ties = [text for text in ax.texts if getattr(text, "arrow_patch", None) is not None]
    assert [tie.xy[0] for tie in ties] == [9e5]
    beyond = more[:2].assign(bytes=1.1e6)
    ax = viz.score_against(pd.concat([table, beyond], ignore_index=True), "bytes", "bytes", 1e6, "1 MB").axes[2]
    places = [box.lines[0].get_transform().transform((1.1e6, 76.0))[0] for box in ax.containers]
    assert max(places) > ax.transData.transform((1.1e6, 76.0))[0] + 5
    assert apart[90.0] == pytest.approx(0)
    heights = ax.transData.transform([(1, 60.0), (1, 66.0), (1, 76.0), (1, 77.0)])[:, 1]
    assert heights[1] - heights[0] == pytest.approx(heights[3] - heights[2])
    level = viz.score_against(table[table["score"] > 73].assign(low=72.0), "bytes", "bytes", 1e6, "1 MB").axes[0]
    assert level.get_yscale() == "linear"  # nothing is far below


def test_no_mark_covers_another_where_many_cost_the_same():
    """In the layout that is drawn, with its key."""
    arms = [arm for arm in viz.LOOKS if arm in viz.FAMILIES["ours"][2] or arm in viz.FAMILIES["PEFT baseline"][2]]
    table = pd.DataFrame({"arm": arms, "score": np.linspace(74.0, 79.0, len(arms)), "bytes": 9e5})
    table = table.assign(target="x", task="movies", phase="tuned", low=table["score"] - 1, high=table["score"] + 1)
    fig = viz.score_against(table, "bytes", "bytes", 1e6, "1 MB")
    fig.draw_without_rendering()
    marks = [box.lines[0] for box in fig.axes[0].containers]
    drawn = [mark.get_transform().transform(mark.get_xydata())[0] * 72 / fig.dpi for mark in marks]
    apart = [np.abs(one - other) for i, one in enumerate(drawn) for other in drawn[:i]]
    assert all(x >= 5.4 or y >= 4.4 for x, y in apart)


def test_a_score_of_one_seed_beside_others_has_a_dotted_interval(table):
    few = table.assign(seeds=np.where(table["phase"] == "tuned", 1, 3))
    for fig in (viz.panels(few, ["tuned"]), viz.slopes(few), viz.score_against(few, "bytes", "bytes", 1e6, "1 MB")):
        bars = [bar for ax in fig.axes for box in ax.containers for bar in box.lines[2]]
        dotted = [bar for bar in bars if bar.get_linestyle()[0][1] is not None]
        assert len(dotted) == 2  # anchor and untrained
        assert "one seed" in [text.get_text() for text in fig.legends[0].get_texts()]
    alike = viz.panels(table.assign(seeds=1), ["tuned"])
    assert "one seed" not in [text.get_text() for text in alike.legends[0].get_texts()]


def test_rows_of_all_panels_agree(table):
    fig = viz.panels(table, ["zero-shot"])
    left, right = fig.axes
    assert [t.get_text() for t in left.get_yticklabels()] == ["no adapter (majority)", "embedding", "anchor"]
    assert words(left) == ["50.0", "60.0", "70.0"]
    assert words(right) == ["not run", "not run", "65.0"]
    absent = [("movies", "y", "zero-shot", "embedding"), ("movies", "y", "tuned", "no-adapter")]
    assert words(viz.panels(table, ["zero-shot"], absent).axes[1]) == ["not run", "not defined", "65.0"]
    assert words(viz.panels(table, ["zero-shot"], [("books", *absent[0][1:])]).axes[1])[1] == "not run"
    assert left.get_xlim() == right.get_xlim()
    assert [t.get_text() for t in fig.legends[0].get_texts()] == ["ours", "control", "the adapter on its source"]


def test_a_phase_that_was_not_run_is_said(table):
    """A batch may only port, and a table of an unfinished one is looked at too."""
    ported = table[table["phase"] == "zero-shot"]
    for fig, said in (
        (viz.panels(ported, ["tuned", "retrained"]), "nothing tuned or retrained was run"),
        (viz.slopes(ported), "nothing was tuned"),
    ):
        (ax,) = fig.axes
        assert words(ax) == [said]


def test_scores_stand_beside_the_sources_and_a_retrained_loras(table):
    retrained = (
        table[table["phase"] == "source"].tail(1).assign(target="x", phase="retrained", arm="lora-r8", score=88.0)
    )
    fig = viz.panels(pd.concat([table, retrained]), ["zero-shot"])
    lines = [
        [x for line in ax.lines for x in line.get_xdata() if line.get_linestyle() in {"--", ":"}] for ax in fig.axes
    ]
    assert lines == [[82.0, 82.0, 88.0, 88.0], [82.0, 82.0]]
    assert [t.get_text() for t in fig.legends[0].get_texts()][2:] == [
        "the adapter on its source",
        "LoRA r8 retrained there",
    ]
    assert len(viz.panels(table, ["tuned"]).legends[0].get_texts()) == 2


def test_arms_without_a_tuned_score_say_so(table):
    left, right = viz.slopes(table).axes
    assert words(left) == ["not tuned", "not tuned", "no zero-shot"]  # no adapter, embedding; untrained atoms
    assert words(right) == ["not run", "not run", "not tuned", "not run"]
    absent = [("movies", "y", phase, "embedding") for phase in ("zero-shot", "tuned")]
    right = viz.slopes(table, absent).axes[1]
    assert words(right) == ["not run", "not defined", "not tuned", "not run"]
    left, _ = viz.slopes(table, [("movies", "x", "tuned", "embedding")]).axes
    assert words(left) == ["not tuned", "not defined", "no zero-shot"]
    fills = [to_hex(box.lines[0].get_markerfacecolor()) for box in left.containers]
    assert fills == ["#ffffff", "#ffffff", "#ffffff", viz.OURS, viz.CONTROL]  # hollow without labels


def test_where_nothing_was_ported_to_the_figures_say_so(table):
    for draw in (viz.calibration, viz.foretold, viz.expected):
        (ax,) = draw(pd.DataFrame(columns=["task", "target", "kappa"])).axes
        assert words(ax) == ["no port here can be compared with its source"]


def test_a_gap_has_its_interval_or_says_why_not():
    rows = [("x", "anchor", 0.5), ("y", "anchor", np.nan), ("x", "lineage", 0.25)]
    gaps = pd.DataFrame(rows, columns=["target", "arm", "gap"]).assign(task="movies", phase="tuned")
    for bounds in (False, True):
        shown = gaps.assign(low=gaps["gap"] - 0.1, high=gaps["gap"] + 0.2) if bounds else gaps
        (ax,) = viz.gap_heat(shown).axes
        texts = {text.get_position(): text.get_text() for text in ax.texts}  # lineage above anchor
        numbers = ["0.25\n0.15 to 0.45", "0.50\n0.40 to 0.70"] if bounds else ["0.25", "0.50"]
        assert [texts[0.5, 0.5], texts[0.5, 1.5]] == numbers
        assert [texts[1.5, 0.5], texts[1.5, 1.5]] == ["not run", "no gap"]
    (ax,) = viz.gap_heat(gaps.assign(low=np.nan, high=np.nan), [("movies", "y", "tuned", "lineage")]).axes
    assert sorted(words(ax)) == ["0.25", "0.50", "no gap", "not defined"]


def test_losses_are_smoothed_within_a_seed():
    losses = {0: [1.0, 3.0, 5.0, 1.0], 1: [3.0, 1.0, 1.0, 3.0]}
    rows = [("full", seed, step, loss) for seed, some in losses.items() for step, loss in enumerate(some)]
    rows += [("bitfit", 0, step, 2.0) for step in range(4)]
    table = pd.DataFrame(rows, columns=["arm", "seed", "step", "loss"]).assign(
        task="movies", target="x", phase="source"
    )
    axes = viz.learning_curves(table, window=3).axes
    assert [ax.get_ylabel() for ax in axes] == ["movies\nLoRA to full", "movies\nsmall PEFT"]
    (line,), (band,) = axes[0].lines, axes[0].collections
    seeds = np.array([[2, 3, 3, 3], [2, 5 / 3, 5 / 3, 2]])  # of two losses at either end
    np.testing.assert_allclose(line.get_ydata(), seeds.mean(0))
    edges = band.get_paths()[0].vertices
    assert [(edges[edges[:, 0] == 1, 1]).min(), edges[edges[:, 0] == 1, 1].max()] == pytest.approx([5 / 3, 3])
    (empty,) = viz.learning_curves(table.iloc[:0]).axes
    assert words(empty) == ["these runs kept no losses"]


def test_ports_are_drawn_about_the_diagonal():
    rows = [("x", "anchor", 0.8, 0.9), ("x", "zero-atoms", 0.8, 0.9), ("y", "anchor", 0.7, 0.75)]
    table = pd.DataFrame(rows, columns=["target", "arm", "predicted", "measured"]).assign(task="movies")
    left, right = viz.calibration(table).axes
    assert [line.get_xydata().tolist() for line in left.lines[1:]] == [[[0.8, 0.9]]] * 2
    assert [line.get_xydata().tolist() for line in right.lines[1:]] == [[[0.7, 0.75]]]
    assert left.get_xlim() == left.get_ylim() == right.get_xlim() == pytest.approx((0.68, 0.92))
    assert len({line.get_marker() for line in left.lines[1:]}) == 2
    told = table.assign(expected=[12.0, 9.0, np.nan], score=[60.0, 70.0, 81.0], **{"source score": 80.0})
    (first,) = viz.expected(told).axes
    assert [line.get_xydata().tolist() for line in first.lines[1:]] == [[[12, 20]], [[9, 10]]]
    assert first.lines[0].get_xydata() == pytest.approx(np.array([[7.9, 7.9], [21.1, 21.1]]))
    assert words(viz.expected(told.iloc[2:]).axes[0]) == ["no port here says what it expects to lose"]
    told = table.assign(kappa=[0.3, 0.7, 0.8], score=[60.0, 70.0, 81.0], **{"warns below": 0.4, "source score": 80.0})
    panels = viz.foretold(told).axes
    assert [ax.get_title() for ax in panels] == ["x", "y"]
    points = [[line.get_xydata().tolist() for line in ax.lines[1:]] for ax in panels]
    assert points == [[[[0.3, 20]], [[0.7, 10]]], [[[0.8, -1]]]]
    assert [(ax.patches[0].get_x(), ax.patches[0].get_width()) for ax in panels] == [(0, 0.4)] * 2


def test_ticks_that_would_run_together_stand_lower():
    base = {"tokens": 8, "d_in": 768, "d_out": 768, "atoms": 4, "top_k": 2}
    sizes = [base | {"d_in": width, "d_out": width} for width in (312, 768, 1024, 8192)]
    rows = [
        s | {"step": "gather", "train": t, "ratio": 2, "ratio low": 1, "ratio high": 3} for s in sizes for t in (0, 1)
    ]
    fig, _ = viz.speed_of_weights(pd.DataFrame(rows).astype({"train": bool}), base)
    assert [t.get_text() for t in fig.axes[1].get_xticklabels()] == ["312", "768", "\n1k", "8k"]
