"""Figures of ports: what they say of themselves, ways to port that were tried, pruned copies."""

from __future__ import annotations

from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import seaborn as sns
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.transforms import offset_copy

from uhl.errors import UHLError
from uhl.viz.base import BASELINE, CONTROL, LOOKS, NAMES, OURS, empty_figure, in_order, key_below, key_mark, task_grid

KAPPA = "Cohen's kappa"
TITLE = 1.3  # rows of a table that the title of a group of attempts takes
NOT_PORTED = "no port here can be compared with its source"
OF_BYTES = {"texts": (OURS, "o"), "dims": (BASELINE, "s"), "bits": ("#7a5195", "D")}  # attempts that change bytes


def calibration(table: pd.DataFrame) -> Figure:
    """Predicted against measured agreement with the source, a point a port; from :func:`uhl.results.calibration`.

    On the diagonal a port does what it says.
    """
    if table.empty:
        return empty_figure(NOT_PORTED)
    return _about_the_diagonal(table, "predicted", "measured", "agreement predicted at the port", ": measured on test")


def expected(trust: pd.DataFrame) -> Figure:
    """Points lost against the source over those that a port expected to lose, a point a port, from
    :func:`uhl.results.calibration`; of ports that expected any.
    """
    if trust.empty:
        return empty_figure(NOT_PORTED)
    shown = trust.assign(lost=trust["source score"] - trust["score"]).dropna(subset="expected")
    if shown.empty:
        return empty_figure("no port here says what it expects to lose")
    return _about_the_diagonal(shown, "expected", "lost", "points that the port expects to lose", ": lost on test")


def _about_the_diagonal(table: pd.DataFrame, x: str, y: str, below: str, beside: str) -> Figure:
    """A panel a task and target with the same range on both axes, and a line where they are equal."""
    fig, cells = task_grid(table, 2.9, 2.7, 0.6, below, beside, sharex=True, sharey=True)
    both = table[[x, y]].to_numpy()
    edge = 0.1 * np.ptp(both) or 1.0
    ends = both.min() - edge, both.max() + edge
    for ax, _, _, rows in cells:
        ax.plot(ends, ends, color=CONTROL, linewidth=1, zorder=0)
        _hollow_marks(ax, rows, x, y)
        ax.set(xlim=ends, ylim=ends, aspect="equal")
        ax.locator_params(nbins=5)
    key_below(fig, _hollow_key(table))
    return fig


def _attempt_colour(name: str, group: str) -> str:
    if group == "taught" or name.startswith("head trained"):
        return BASELINE
    return CONTROL if name.startswith(("random-p", "refresh-random")) else OURS


def _standard_error(rows: pd.DataFrame) -> pd.Series:
    """Of dev scores in percent, as if each were a share of ``n`` texts."""
    return (rows["dev"] * (100 - rows["dev"]) / rows["n"]) ** 0.5


def attempt_scores(table: pd.DataFrame) -> Figure:
    """Dev scores of the attempts of notebook 07, by group; the band reaches one standard error below the best of it."""
    groups = list(dict.fromkeys(table["group"]))
    sizes = [int((table["group"] == g).sum()) for g in groups]
    fig, axes = plt.subplots(
        len(groups),
        1,
        figsize=(7.5, 0.27 * sum(sizes) + 0.55 * len(groups)),
        squeeze=False,
        sharex=True,
        height_ratios=[n + 1 for n in sizes],
    )
    for ax, group in zip(axes[:, 0], groups, strict=True):
        rows = table[table["group"] == group]
        y = np.arange(len(rows))[::-1]
        best = rows["dev"].idxmax()
        ends = rows["dev"][best] - _standard_error(rows)[best], rows["dev"][best]
        ax.axvspan(*ends, color=CONTROL, alpha=0.3, linewidth=0)
        ax.scatter(rows["dev"], y, color=[_attempt_colour(a, group) for a in rows["attempt"]], zorder=3)
        ax.set_yticks(y, rows["attempt"], fontsize=8)
        ax.set(title=group, ylim=(-0.7, len(rows) - 0.3))
    axes[-1, 0].set_xlabel("dev score, %")
    fig.tight_layout()
    return fig


def score_against_anchor_bytes(table: pd.DataFrame) -> Figure:
    """Dev score against the bytes that anchors take, for the attempts that change them, and a standard error of the
    score to either side; a panel a task (row) and target (column) where the table names these. Dashed: 1 MB.
    """
    shown = table[table["group"].isin(OF_BYTES)]
    for name in {"task", "target"} - set(shown.columns):
        shown = shown.assign(**{name: ""})
    fig, cells = task_grid(shown, 3.0, 2.4, 1.6, "bytes of the anchors", " dev score, %", sharex=True, sharey="row")
    for ax, _, _, rows in cells:
        for group, (colour, mark) in OF_BYTES.items():
            points = rows[rows["group"] == group]
            look: dict[str, Any] = {"color": colour, "ms": 6, "mec": "white", "mew": 0.5, "elinewidth": 0.8}
            ax.errorbar(points["bytes"], points["dev"], _standard_error(points), fmt=mark, **look)
        ax.axvline(1e6, color=CONTROL, linestyle="--", linewidth=1)
        ax.set_xscale("log")
    key_below(fig, [key_mark(group, *look) for group, look in OF_BYTES.items() if group in set(shown["group"])])
    return fig


def attempt_changes(table: pd.DataFrame) -> Figure:
    """Attempts of notebook 07 on several tasks and targets: agreement with the source's decisions on dev, in points
    more or less than the port as it is has, whose own stands at the head of each column. A panel a group of attempts,
    down two halves of the page. A place where the port as it is was not measured has no column.
    """
    places = ["task", "target"]
    usual = table[table["attempt"] == "anchor, scale chosen without labels"].groupby(places)["same"].mean()
    if usual.empty:
        raise UHLError("the port as it is was not measured; set `attempts` to groups with `scale` among them")
    shown = table.set_index(places).loc[usual.index].reset_index()
    means = shown.pivot_table(index=["group", "attempt"], columns=places, values="same", sort=False) - usual
    heads = ["\n".join([*map(str, place), f"{own:.1f} %"]) for place, own in usual.items()]  # type: ignore[call-overload]
    halves = _halves({str(group): rows.droplevel(0) for group, rows in means.groupby(level=0, sort=False)})
    high = max(sum(len(rows) + TITLE for rows in half.values()) for half in halves)
    fig = plt.figure(figsize=(2 * (0.9 * len(usual) + 4.0), 0.27 * high + 1.2), layout="constrained")
    fig.suptitle("Decisions shared with the source on dev: points beside the port as it is", fontweight="bold")
    look: dict[str, Any] = {"cmap": "vlag_r", "center": 0, "vmin": -8, "vmax": 8, "cbar": False, "linewidths": 0.5}
    grid = fig.add_gridspec(1, 2)
    for side, half in enumerate(halves):
        if not half:  # there is one group
            continue
        column = fig.add_subfigure(grid[0, side])
        axes = column.subplots(len(half), 1, squeeze=False, height_ratios=[len(rows) for rows in half.values()])
        for k, (ax, (group, rows)) in enumerate(zip(axes[:, 0], half.items(), strict=True)):
            sns.heatmap(rows, annot=True, fmt="+.1f", annot_kws={"fontsize": 9}, yticklabels=True, ax=ax, **look)
            ax.tick_params(axis="y", length=0, labelsize=9, labelrotation=0)
            ax.tick_params(axis="x", length=0, labelsize=9)
            ax.xaxis.tick_top()
            ax.set_xticklabels([] if k else heads, rotation=0)
            ax.set(xlabel="", ylabel="")
            ax.set_title(group, loc="left", x=-0.02, ha="right", fontsize=10)
            ax.grid(False)
    return fig


def _halves(groups: dict[str, pd.DataFrame]) -> tuple[dict[str, pd.DataFrame], dict[str, pd.DataFrame]]:
    """Groups in their order, cut where the halves' heights differ least."""
    names = list(groups)
    high = np.cumsum([0, *(len(groups[name]) + TITLE for name in names)])
    cut = max(1, int(np.abs(2 * high - high[-1]).argmin()))
    return {n: groups[n] for n in names[:cut]}, {n: groups[n] for n in names[cut:]}


def compression(table: pd.DataFrame) -> Figure:
    """Score over the share of the source's weights that a pruned copy keeps, a panel a task (row) and part that was cut
    (column), from :func:`uhl.results.compressed`. The source itself begins every line.
    """
    parts = [part for part in dict.fromkeys(table["part"]) if part]
    tasks = list(dict.fromkeys(table["task"]))
    if not parts:
        raise UHLError("no pruned copy was measured; set `copies`")
    size = (3.1 * len(parts) + 2.2, 2.9 * len(tasks) + 0.3)
    fig, axes = plt.subplots(len(tasks), len(parts), figsize=size, squeeze=False, sharey="row", sharex=True)
    for i, task in enumerate(tasks):
        for j, part in enumerate(parts):
            cells = table[(table["task"] == task) & table["part"].isin(["", part])]
            _compressed_lines(axes[i, j], cells.sort_values("kept", ascending=False, kind="stable"))
            cut = {"width": "narrower", "several": "several parts"}.get(part, f"fewer {part}")
            axes[i, j].set(title=f"{task}: {cut}")
        own = table[table["task"] == task]
        axes[i, 0].set(ylabel="test score, %", ylim=(own["low"].min() - 2, own["high"].max() + 2))
    for ax in axes[-1]:
        ax.set(xlabel="% of the linear weights kept", xlim=(105, 100 * table["kept"].min() - 5))
    axes[0, -1].legend(fontsize=8, loc="upper left", bbox_to_anchor=(1.02, 1), frameon=False)
    fig.tight_layout()
    return fig


def losses(table: pd.DataFrame) -> Figure:
    """Points lost against the source over the Cohen's kappa that each anchored port predicted of itself, from
    :func:`uhl.results.compressed`; where it is grey a port warns. A point a copy, a colour a part that was cut.
    """
    own = table[(table["part"] == "") & (table["arm"] == "lineage")].set_index("task")["score"]
    shown = table[table["arm"] == "anchor"]
    lost = shown["task"].map(own) - shown["score"]
    shown = shown.assign(lost=lost, cut=shown["part"].replace("", "nothing")).rename(columns={"cut": "what was cut"})
    fig, ax = plt.subplots(figsize=(5.2, 3.6))
    sns.scatterplot(shown, x="kappa", y="lost", hue="what was cut", style="task", s=60, ax=ax)
    _warned(ax, shown)
    ax.set(title="Does a port know when it fails?", xlabel=f"{KAPPA} with the source, predicted at the port")
    ax.set(ylabel="points lost against the source")
    ax.legend(fontsize=7, loc="upper left", bbox_to_anchor=(1.02, 1), frameon=False)
    return fig


def foretold(trust: pd.DataFrame) -> Figure:
    """The same of a profile's ports, from :func:`uhl.results.calibration`: a point a port and seed."""
    if trust.empty:
        return empty_figure(NOT_PORTED)
    shown = trust.assign(lost=trust["source score"] - trust["score"])
    size = (2.6, 2.5, 0.6, f"{KAPPA}, predicted", ": points lost")
    fig, cells = task_grid(shown, *size, sharex=True, sharey="row")
    for ax, task, _, rows in cells:
        _warned(ax, shown[shown["task"] == task])
        _hollow_marks(ax, rows, "kappa", "lost")
        ax.locator_params(axis="x", nbins=5)
    key_below(fig, [*_hollow_key(shown), key_mark("the port warns", CONTROL, "s", alpha=0.25, ms=10)], columns=3)
    return fig


def _warned(ax: Axes, shown: pd.DataFrame) -> None:
    """The bands of predictions at which ports warn, and the line at which nothing is lost."""
    low = min(0.0, float(shown["kappa"].min()))
    for bound in shown["warns below"].unique():
        ax.axvspan(low, bound, color=CONTROL, alpha=0.25, linewidth=0, label="the port warns")
    ax.axhline(0, color="black", linewidth=0.8)


def _hollow_marks(ax: Axes, rows: pd.DataFrame, x: str, y: str) -> None:
    """A mark a row in its arm's look, hollow, so that arms that coincide are seen."""
    for arm, mine in rows.groupby("arm"):
        colour, mark = LOOKS[str(arm)]
        ax.plot(mine[x], mine[y], mark, color=colour, mfc="none", mew=1.4)


def _hollow_key(table: pd.DataFrame) -> list[Line2D]:
    """The key of :func:`_hollow_marks`."""
    return [key_mark(NAMES.get(a, a), *LOOKS[a], mfc="none", mew=1.4) for a in in_order(table["arm"])]


def _compressed_lines(ax: Axes, cells: pd.DataFrame) -> None:
    looks = {"lineage": ("#3aa655", "-", "s"), "anchor": (OURS, "-", "o"), "zero-atoms": (CONTROL, "--", "o")}
    looks |= {"random-p": (CONTROL, ":", "v"), "head": (BASELINE, "-", "^")}
    label = NAMES | {"lineage": "lineage (the file as it is)", "head": "head fitted to labels"}
    for place, (arm, rows) in enumerate(cells.groupby("arm", sort=False)):
        colour, line, mark = looks[str(arm)]
        error = np.abs([rows["score"] - rows["low"], rows["high"] - rows["score"]])
        line = "" if "several" in set(rows["part"]) else line  # cuts of several parts are no series
        style: dict[str, Any] = {"color": colour, "linestyle": line, "marker": mark, "label": label.get(str(arm), arm)}
        # beside one another, so that no bar hides another
        apart = offset_copy(ax.transData, ax.get_figure(root=True), x=2.0 * place, units="points")
        ax.errorbar(100 * rows["kept"], rows["score"], error, markersize=4, elinewidth=1, transform=apart, **style)
