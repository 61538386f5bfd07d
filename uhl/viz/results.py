"""Figures of a profile's results: scores, gaps, budgets, learning curves."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import seaborn as sns
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patheffects import withStroke
from matplotlib.ticker import EngFormatter
from matplotlib.transforms import offset_copy

from uhl.config import CONTROLS, METHODS
from uhl.viz.base import (
    CONTROL,
    FAMILIES,
    LOOKS,
    NAMES,
    OURS,
    Place,
    empty_figure,
    in_order,
    interval_mark,
    key_alone,
    key_below,
    key_mark,
    note,
    task_grid,
    why_absent,
    with_alone,
)

LEARNERS = {  # whose learning curves share a panel
    "UHL, controls": FAMILIES["ours"][2] + CONTROLS,
    "small PEFT": ("bitfit", "vera", "vb-lora", "uni-lora"),
    "LoRA to full": ("lora-r8", "lora-1mb", "sat-lora", "hf-sat-lora", "full"),
}
REFERENCES = {  # lines beside scores without labels
    ("source", "uhl-canonical"): ("the adapter on its source", "--"),
    ("retrained", "lora-r8"): ("LoRA r8 retrained there", ":"),
}
HALO = [withStroke(linewidth=2.5, foreground="white")]


FOLD = 6  # times that scores of no interest are drawn smaller


def _folded(fold: float, scores: np.ndarray) -> np.ndarray:
    return np.where(scores < fold, fold - (fold - scores) / FOLD, scores)


def _unfolded(fold: float, places: np.ndarray) -> np.ndarray:
    return np.where(places < fold, fold - (fold - places) * FOLD, places)


def _arm_rows(ax: Axes, table: pd.DataFrame, absent: Callable[[str], str] = str) -> None:
    y = np.arange(len(table), dtype=float)[::-1]
    for place, (_, cell) in zip(y, table.iterrows(), strict=True):
        if np.isnan(cell["score"]):
            note(ax, absent(cell["arm"]), y=place, across=ax.get_yaxis_transform())
            continue
        interval_mark(ax, cell, place, fmt="o", capsize=2)
        look: dict[str, Any] = {"textcoords": "offset points", "fontsize": 8, "path_effects": HALO}
        ax.annotate(f"{cell['score']:.1f}", (cell["score"], place), (0, 4), **look)
    ax.set_yticks(y, [NAMES.get(a, a) for a in table["arm"]])
    ax.set_ylim(-0.6, len(table) - 0.2)
    ax.margins(x=0.08)


def arm_scores(table: pd.DataFrame, title: str) -> Figure:
    """Scores by arm with intervals, coloured by family. Columns arm, score, low, high."""
    fig, ax = plt.subplots(figsize=(6, 0.4 * len(table) + 1))
    _arm_rows(ax, table)
    ax.set(title=title, xlabel="test score, %")
    return fig


def panels(table: pd.DataFrame, phases: Sequence[str], undefined: Sequence[Place] = ()) -> Figure:
    """:func:`arm_scores` for every task (row) and target (column) of some phases of a summary, on one scale, with lines
    at :data:`REFERENCES` where there are scores without labels.

    ``undefined``: what cannot be there, from :func:`uhl.audit.undefined`.
    """
    table = with_alone(table)
    others = table[~table["phase"].isin(phases)]
    table = table[table["phase"].isin(phases)]
    if table.empty:
        return empty_figure(f"nothing {' or '.join(phases)} was run")
    arms = list(dict.fromkeys(a for phase in phases for a in in_order(table["arm"][table["phase"] == phase])))
    fig, cells = task_grid(table, 2.4, max(0.27 * len(arms) + 0.4, 0.9), 2.2, "test score, %", sharex=True, sharey=True)
    families = {name: colour for name, (colour, _, members) in FAMILIES.items() if set(members) & set(arms)}
    key = {name: key_mark(name, colour) for name, colour in families.items()}
    for ax, task, host, rows in cells:
        absent = partial(why_absent, task, host, phases, undefined=undefined)
        _arm_rows(ax, rows.set_index("arm").reindex(arms).reset_index(), absent)
        for (phase, arm), (name, line) in REFERENCES.items() if "zero-shot" in phases else ():
            known = others[(others["task"] == task) & (others["phase"] == phase) & (others["arm"] == arm)]
            for score in known["score"][(known["target"] == host) | (phase == "source")]:
                key[name] = ax.axvline(score, color=LOOKS[arm][0], linestyle=line, linewidth=1.2, zorder=1, label=name)
    key_below(fig, [*key.values(), *key_alone(table)])
    return fig


def gap_heat(table: pd.DataFrame, undefined: Sequence[Place] = ()) -> Figure:
    """Gap recovered by arm (rows), task and target (columns), a panel a phase: 0 is no adapter, 1 is LoRA retrained
    there. Hatched where there is no gap to recover or no port (``undefined`` as in :func:`panels`); with intervals
    where the table has ``low`` and ``high``.
    """
    if table["gap"].isna().all():
        return empty_figure("no gap to recover: LoRA was not run here or is not above no adapter")
    bounds = {"low", "high"} <= set(table.columns)
    places = list(dict.fromkeys(zip(table["task"], table["target"], strict=True)))
    phases = {phase: rows.set_index(["arm", "task", "target"]) for phase, rows in table.groupby("phase", sort=False)}
    arms = {phase: in_order(rows.index.get_level_values("arm")) for phase, rows in phases.items()}
    sizes = [len(shown) for shown in arms.values()]
    size = (1.1 * len(places) + 2.1, (0.42 if bounds else 0.3) * sum(sizes) + 0.4 * len(sizes) + 0.6)
    shared: dict[str, Any] = {"squeeze": False, "sharex": True, "height_ratios": sizes, "layout": "constrained"}
    fig, axes = plt.subplots(len(sizes), 1, figsize=size, **shared)
    for ax, (phase, rows) in zip(axes[:, 0], phases.items(), strict=True):
        gaps = rows["gap"].unstack(["task", "target"]).reindex(index=arms[phase], columns=places)
        ax.patch.set(hatch="///", edgecolor="#c0c0c0", facecolor="white")
        sns.heatmap(gaps, annot=True, fmt=".2f", cmap="Blues", vmin=0, vmax=1.2, cbar=False, ax=ax, linewidths=1)
        for text in ax.texts if bounds else ():
            i, j = (int(place) for place in reversed(text.get_position()))
            low, high = (rows[end].loc[(arms[phase][i], *places[j])] for end in ("low", "high"))
            if "seeds" in rows and rows["seeds"].loc[(arms[phase][i], *places[j])] == 1:
                text.set_text(f"{text.get_text()}\n1 seed")  # an interval would leave out how much seeds vary
            elif low <= high:
                text.set_text(f"{text.get_text()}\n{low:.2f} to {high:.2f}")
            text.set_fontsize(8.5)
        for i, j in np.argwhere(gaps.isna()):
            arm, (task, target) = arms[phase][i], places[j]
            why = (
                "no gap"
                if (arm, task, target) in rows.index
                else why_absent(task, target, [str(phase)], arm, undefined)
            )
            note(ax, why, j + 0.5, i + 0.5, ax.transData)
        ax.set_yticklabels([NAMES.get(arm, arm) for arm in arms[phase]], rotation=0)
        ax.set_xticklabels([f"{task}\n{target}" for task, target in places], rotation=0)
        ax.set(title=phase, xlabel="", ylabel="")
        ax.grid(False)
    fig.suptitle("Gap recovered (1: rank-8 LoRA retrained there)", fontsize=10, weight="bold")
    return fig


def _spread(ax: Axes, places: np.ndarray, limit: float) -> np.ndarray:
    """Points (1/72 inch) by which each of ``places`` (n x 2, of the axes' data) stands aside, to the right where
    positive, so that no mark hides another: the first stay, later ones take the nearest room on their side of the
    budget's ``limit``.
    """
    wide, tall = 5.5, 4.5  # of a mark
    points, line = (ax.transData.transform(p) * 72 / ax.figure.dpi for p in (places, [(limit, 1.0)]))
    steps = sorted(np.arange(-400, 401) / 2, key=abs)
    moved = np.zeros(len(points))
    for i, (x, y) in enumerate(points):
        near = np.abs(points[:i, 1] - y) < tall
        taken = points[:i, 0][near] + moved[:i][near]
        own = (step for step in steps if step == 0 or (x + step - line[0, 0]) * (x - line[0, 0]) > 0)
        moved[i] = next(step for step in own if (np.abs(x + step - taken) > wide - 0.01).all())
    return moved


def _tie(ax: Axes, place: tuple[float, float], moved: float, colour: str) -> None:
    """A dot at ``place`` and a line from there to the mark that stands ``moved`` points to the right of it."""
    ends: dict[str, Any] = {"xycoords": "data", "textcoords": "offset points"}
    line = {"arrowstyle": "-", "color": colour, "linewidth": 0.8, "shrinkA": 0, "shrinkB": 0}
    ax.annotate("", place, (moved, 0), arrowprops=line, **ends)
    ax.plot(*place, ".", color=colour, ms=3, zorder=5)


def _scale_axes(
    cells: Sequence[tuple[Axes, str, str, pd.DataFrame]], table: pd.DataFrame, column: str, limit: float
) -> None:
    """Costs on a logarithmic scale with a place for 0, scores on one that is folded below all trained methods."""
    costs = table[column][table[column] > 0]
    least, most = float(costs.min()) if len(costs) else 1.0, max(2.5 * float(table[column].max()), 5 * limit)
    for ax, task, _, _ in cells:
        own = table[table["task"] == task]
        trained = own["low"][(own["phase"] != "zero-shot") & ~own["arm"].isin(CONTROLS)]
        fold, bottom, top = np.floor(trained.min()), own["low"].min() - 3, own["high"].max() + 1
        ax.set_xscale("symlog", linthresh=least, linscale=0.5)
        if fold - own["score"].min() > 10:
            ax.set_yscale("function", functions=(partial(_folded, fold), partial(_unfolded, fold)))
            ax.axhspan(bottom, fold, color="#f3f3f3", zorder=0)
            ax.set_yticks([*range(0, int(fold) - 4, 20), *range(int(5 * np.ceil(fold / 5)), 101, 5)])
        ax.set(xlim=(-0.7 * least, most), ylim=(bottom, top))
    first, last = np.ceil(np.log10(least)), np.log10(most)
    powers = 10.0 ** np.arange(first - 1, last, 1 if last - first < 4 else 2)
    ticks = [m * v for v in powers for m in ((1, 3) if last - first < 2 else (1,)) if least < m * v < most]
    ax.set_xticks([0, *ticks], ["0", *(f"{v:g}" if v < 1000 else EngFormatter(sep="")(v) for v in ticks)])


def score_against(table: pd.DataFrame, column: str, label: str, limit: float, budget: str) -> Figure:
    """Score over what a method adds to the host (``column``), a panel a task and model, with the budget's ``limit``.

    Hollow marks had no labels; controls are bars behind. Marks that would cover one another stand side by side, each
    tied to a dot at what it costs, and none across the budget's limit. Shaded, below all trained methods: a scale a
    sixth of that above.
    """
    table = with_alone(table)
    fig, cells = task_grid(table, 2.25, 2.6, 0.6, label, ": test score, %", sharex=True, sharey="row")
    fig.set_figheight(fig.get_figheight() + 1.0)  # for the key
    _scale_axes(cells, table, column, limit)
    named = [key_mark(NAMES.get(a, a), *LOOKS[a]) for a in in_order(table["arm"], LOOKS) if a not in CONTROLS]
    hollow_mark, filled = key_mark("without labels", OURS, mfc="white"), key_mark("trained with labels", OURS)
    key_below(fig, [*named, key_mark("control", CONTROL, "_", ms=10), hollow_mark, filled, *key_alone(table)], 3)
    fig.draw_without_rendering()  # the layout that marks are spread in
    for ax, _, _, rows in cells:
        rows = rows.assign(last=rows["arm"].isin(CONTROLS)).sort_values(["last", column], ascending=[True, False])
        shown = rows[~rows["last"]]
        moved = dict(zip(shown.index, _spread(ax, shown[[column, "score"]].to_numpy(float), limit), strict=True))
        for place, cell in rows.iterrows():
            hollow, control = cell["phase"] == "zero-shot", bool(cell["last"])
            look: dict[str, Any] = {"mec": "white", "mew": 0.5, "ms": 6, "zorder": 3 + (cell["arm"] not in METHODS)}
            if control:
                look = {"fmt": "_", "ms": 10, "zorder": 2}
            elif hollow:
                look = {"zorder": 4}
            if moved.get(place):
                look["transform"] = offset_copy(ax.transData, fig, x=moved[place], units="points")
                _tie(ax, (float(cell[column]), float(cell["score"])), moved[place], LOOKS[cell["arm"]][0])
            interval_mark(ax, cell, float(cell[column]), upright=True, hollow=hollow, elinewidth=0.8, **look)
        ax.axvline(limit, color="black", linestyle=":", linewidth=1)
        note(ax, f" budget\n {budget}", limit, 0.02, ax.get_xaxis_transform(), ha="left", va="bottom", fontsize=8)
    return fig


def slopes(table: pd.DataFrame, undefined: Sequence[Place] = ()) -> Figure:
    """Each arm's score without labels (hollow) joined to its score after tuning (filled), a panel a task and target.

    ``undefined`` as in :func:`panels`.
    """
    shown = with_alone(table[table["phase"].isin(["zero-shot", "tuned"])])
    if "tuned" not in set(shown["phase"]):
        return empty_figure("nothing was tuned")
    arms = in_order(shown["arm"])
    fig, cells = task_grid(shown, 2.4, 0.3 * len(arms), 2.2, "test score, %", sharex=True, sharey=True)
    for ax, task, host, rows in cells:
        for place, arm in zip(np.arange(len(arms), dtype=float), arms, strict=True):
            pair = rows[rows["arm"] == arm].set_index("phase").reindex(["zero-shot", "tuned"])
            heights, middle = [place - 0.17, place + 0.17], pair["score"].mean()
            ax.plot(pair["score"], heights, color=LOOKS[arm][0], linewidth=1)
            if np.isnan(middle):
                why = why_absent(task, host, ["zero-shot", "tuned"], arm, undefined)
                note(ax, why, y=place, across=ax.get_yaxis_transform())
                continue
            for (phase, cell), at in zip(pair.iterrows(), heights, strict=True):
                if np.isnan(cell["score"]):
                    why = "not tuned" if phase == "tuned" else "no zero-shot" if arm == "untrained" else "not run"
                    why = "not defined" if (task, host, phase, arm) in undefined else why
                    note(ax, why, middle, at, ax.transData, fontsize=8)
                else:
                    interval_mark(ax, cell, at, hollow=phase == "zero-shot", fmt="o")
        ax.set_yticks(range(len(arms)), [NAMES.get(arm, arm) for arm in arms])
        ax.set_ylim(len(arms) - 0.4, -0.6)
        ax.margins(x=0.12)
    entries = [key_mark("zero-shot", OURS, mfc="white"), key_mark("tuned", OURS), key_mark("control", CONTROL)]
    key_below(fig, [*entries, *key_alone(shown)])
    return fig


def learning_curves(table: pd.DataFrame, window: int = 5) -> Figure:
    """Training loss by task and family (rows) and model (columns, the source first): means over seeds, bands from the
    least to the greatest seed. Batches are grouped by length, so losses are means of ``window`` logged ones in turn.
    A family whose runs kept no losses has no row.
    """
    if table.empty:
        return empty_figure("these runs kept no losses")
    run = table.sort_values("step").groupby(["task", "target", "phase", "arm", "seed"])["loss"]
    shown = table.assign(loss=run.transform(lambda v: v.rolling(window, center=True, min_periods=1).mean()))
    family = {arm: name for name, members in LEARNERS.items() for arm in members}
    shown = shown.assign(task=shown["task"] + "\n" + shown["arm"].map(family)).sort_values("task", kind="stable")
    fig, cells = task_grid(shown, 1.4, 1.6, 3.3, "step", sharex=True, sharey="row")
    ends = {task: ax for ax, task, *_ in cells}.values()  # the last of each row
    there = set(shown["arm"])
    families = [[arm for arm in in_order(members) if arm in there] for members in LEARNERS.values()]
    wheel = sns.color_palette("tab10", max(map(len, families)))
    colours = {arm: wheel[k] for members in families for k, arm in enumerate(members)}  # the same for all tasks
    for ax, task, _, rows in cells:
        for k, arm in enumerate(in_order(shown["arm"][shown["task"] == task])):
            loss = rows[rows["arm"] == arm].groupby("step")["loss"].agg(["mean", "min", "max"])
            line: dict[str, Any] = {"color": colours[arm], "linestyle": ("-", "--", ":", "-.")[k % 4]}
            ax.plot(loss["mean"], label=NAMES.get(arm, arm), **line)
            ax.fill_between(loss.index, loss["min"], loss["max"], color=colours[arm], alpha=0.15, linewidth=0)
        if rows.empty:
            note(ax, "not run")
        if ax in ends:
            ax.legend(fontsize=9, loc="upper left", bbox_to_anchor=(1.02, 1.05), frameon=False)
    fig.supylabel(f"training loss, mean of {window} logged losses; band: range of seeds", fontsize=10)
    return fig
