"""Figures as pure functions of data, and the routing explorer. One palette, one size, readable in print.

Every figure is saved with the numbers that it shows: :func:`save_fig` writes a PNG and a CSV of the same name.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import seaborn as sns
import torch
from matplotlib.axes import Axes
from matplotlib.colors import hsv_to_rgb
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import EngFormatter, MaxNLocator, NullFormatter
from matplotlib.transforms import offset_copy

from uhl.config import ARMS, METHODS, WEIGHT_TYPES
from uhl.errors import UHLError
from uhl.files import write_atomic, write_csv
from uhl.mixer import type_features

if TYPE_CHECKING:
    from uhl.adapter import UHLAdapter
    from uhl.layer import Attached
    from uhl.models import Encoder

NAMES = {
    "head": "head only",
    "bitfit": "BitFit",
    "lora-r8": "LoRA r8 (q, v)",
    "lora-1mb": "LoRA, 1 MB (all weights)",
    "vera": "VeRA r256 (q, v)",
    "vb-lora": "VB-LoRA (q, v)",
    "uni-lora": "Uni-LoRA (q, v)",
    "sat-lora": "SAT-LoRA",
    "hf-sat-lora": "HF-SAT-LoRA",
    "full": "full fine-tune",
    "uhl-canonical": "UHL, canonical",
    "uhl-dimension": "UHL, dimension",
    "no-adapter": "no adapter (majority)",
    "zero-atoms": "ported head, no atoms",
    "random-p": "ported head, random P",
    "shuffled": "shuffled anchors",
    "refresh": "anchor, refreshed",
    "refresh-random": "refreshed, random P",
    "untrained": "ported head, untrained atoms",
}
ORDER = (
    *("no-adapter", "head", "uhl-dimension", "uhl-canonical"),
    *METHODS[1:],
    *(*ARMS, "untrained"),
)
CONTROLS = ("no-adapter", "zero-atoms", "random-p", "shuffled", "refresh-random", "untrained")
OURS, CONTROL, BASELINE = "#0b6e99", "#909090", "#d98032"
FAMILIES = {  # the colour and the marks of each family's methods
    "ours": (OURS, "PXDs^ov", ("uhl-canonical", "uhl-dimension", *ARMS[:5])),
    "control": (CONTROL, "*sD^ov", CONTROLS),
    "PEFT baseline": (BASELINE, "oDs^vPX", METHODS[:7]),
    "SAT-LoRA": ("#7a5195", "p*", METHODS[7:9]),
    "full fine-tune": ("#202020", "h", METHODS[9:]),
}
LOOKS = {a: (colour, m) for colour, marks, arms in FAMILIES.values() for a, m in zip(arms, marks, strict=True)}
LEARNERS = {  # whose learning curves share a panel
    "UHL, controls": FAMILIES["ours"][2] + CONTROLS,
    "small PEFT": ("bitfit", "vera", "vb-lora", "uni-lora"),
    "LoRA to full": ("lora-r8", "lora-1mb", "sat-lora", "hf-sat-lora", "full"),
}
WAYS = {"bare": "#404040", "LoRA r8": BASELINE, "dense": CONTROL, "gather": OURS, "reference": "#7a5195"}
WAYS |= {"gather, compiled": "#3aa655"}  # of one weight's update
ROUTE_COLUMNS = ["layer", "position", "token", "rank", "atom", "gate"]


def style() -> None:
    """The workbook's look; call it once a notebook."""
    sns.set_theme(context="notebook", style="whitegrid", font_scale=0.9)
    plt.rcParams.update({"figure.dpi": 100, "savefig.dpi": 150, "axes.titlesize": 10, "axes.titleweight": "bold"})


def save_fig(fig: Figure, path: str | Path, data: pd.DataFrame) -> Path:
    """Write ``path`` as PNG and its numbers as CSV beside it."""
    path = Path(path).with_suffix(".png")
    write_atomic(path, lambda tmp: fig.savefig(tmp, bbox_inches="tight"))
    write_csv(path.with_suffix(".csv"), data)
    return path


def heat(matrix: np.ndarray, title: str, x: str, y: str, ax: Axes | None = None) -> Figure:
    """A signed matrix as a picture, zero white."""
    if ax is None:
        _, ax = plt.subplots(figsize=(6, 3))
    limit = float(np.abs(matrix).max()) or 1.0
    picture = ax.imshow(matrix, aspect="auto", cmap="RdBu_r", vmin=-limit, vmax=limit, interpolation="nearest")
    ax.set(title=title, xlabel=x, ylabel=y)
    ax.grid(False)
    ax.figure.colorbar(picture, ax=ax, shrink=0.8)
    return ax.figure  # type: ignore[return-value]


def mixer_table(adapter: UHLAdapter, atoms: Sequence[int], points: int = 41) -> pd.DataFrame:
    """Mixer strengths g(depth, type) of some atoms over depth: columns depth, type, atom, strength."""
    rows = []
    with torch.no_grad():
        for kind in WEIGHT_TYPES:
            for depth in np.linspace(0, 1, points):
                values = adapter.mixer(type_features(float(depth), kind))
                rows += [{"depth": depth, "type": kind, "atom": a, "strength": float(values[a])} for a in atoms]
    return pd.DataFrame(rows)


def mixer_curves(table: pd.DataFrame) -> Figure:
    """Strength of a few atoms over relative depth, a panel a weight type."""
    grid = sns.relplot(
        table, x="depth", y="strength", hue="atom", col="type", kind="line", height=2.4, aspect=0.95, palette="viridis"
    )
    grid.set_axis_labels("relative depth", "strength g")
    return grid.figure


def loss_curves(table: pd.DataFrame) -> Figure:
    """Training loss over steps, a line a run: columns step, loss, run."""
    fig, ax = plt.subplots(figsize=(6, 3))
    sns.lineplot(table, x="step", y="loss", hue="run", ax=ax)
    ax.set(title="Training loss", xlabel="step", ylabel="loss")
    ax.legend(title=None)
    return fig


def _interval(ax: Axes, cell: pd.Series, at: float, upright: bool = False, hollow: bool = False, **look: Any) -> None:
    """A score with its interval, at ``at`` of the other axis, with its method's mark and colour."""
    colour, mark = LOOKS.get(cell["arm"], (OURS, "o"))
    error = np.abs([[cell["score"] - cell["low"]], [cell["high"] - cell["score"]]])
    points: dict[str, Any] = {"fmt": mark, "color": colour, "mfc": "white" if hollow else colour, "ms": 5}
    points |= {"yerr" if upright else "xerr": error} | look
    ax.errorbar(*((at, cell["score"]) if upright else (cell["score"], at)), **points)


def _note(ax: Axes, text: str, x: float = 0.5, y: float = 0.5, across: Any = None, **look: Any) -> None:
    """Grey words where there is nothing to draw."""
    words: dict[str, Any] = {"ha": "center", "va": "center", "fontsize": 9, "color": "#606060", "style": "italic"}
    ax.text(x, y, text, transform=across or ax.transAxes, **words | look)


def _nothing(text: str) -> Figure:
    fig, ax = plt.subplots(figsize=(6, 1))
    _note(ax, text)
    ax.set_axis_off()
    return fig


def _grid(
    table: pd.DataFrame, wide: float, high: float, beside: float, x: str, y: str = "", **shared: Any
) -> tuple[Figure, list[tuple[Axes, str, str, pd.DataFrame]]]:
    """A panel a task (row) and model (column, the source first), with both names and its rows; sizes in inches."""
    own = table["phase"] == "source" if "phase" in table else np.zeros(len(table), bool)
    tasks, hosts = list(dict.fromkeys(table["task"])), list(dict.fromkeys([*table["target"][own], *table["target"]]))
    size = (wide * len(hosts) + beside, high * len(tasks) + 0.8)
    fig, axes = plt.subplots(len(tasks), len(hosts), figsize=size, squeeze=False, layout="constrained", **shared)
    for j, host in enumerate(hosts):
        axes[0, j].set_title(host)
        axes[-1, j].set_xlabel(x)
    for i, task in enumerate(tasks):
        axes[i, 0].set_ylabel(task + y)
    places = [(ax, tasks[i], hosts[j]) for (i, j), ax in np.ndenumerate(axes)]
    return fig, [(ax, t, h, table[(table["task"] == t) & (table["target"] == h)]) for ax, t, h in places]


def _mark(label: str, colour: str, mark: str = "o", **look: Any) -> Line2D:
    return Line2D([], [], linestyle="", color=colour, marker=mark, label=label, **look)


def _key(fig: Figure, entries: Sequence[Line2D], columns: int = 5) -> None:
    fig.legend(handles=entries, loc="outside lower center", ncols=columns, fontsize=9, frameon=False, handletextpad=0.2)


def _absent(target: str, arm: str, undefined: Iterable[tuple[str, str]]) -> str:
    return "not defined" if (target, arm) in undefined else "not run"


def _present(arms: Iterable[str], order: Iterable[str] = ORDER) -> list[str]:
    found = set(arms)
    return [arm for arm in order if arm in found]


def _arm_rows(ax: Axes, table: pd.DataFrame, absent: Callable[[str], str] = str) -> None:
    y = np.arange(len(table), dtype=float)[::-1]
    for place, (_, cell) in zip(y, table.iterrows(), strict=True):
        if np.isnan(cell["score"]):
            _note(ax, absent(cell["arm"]), y=place, across=ax.get_yaxis_transform())
            continue
        _interval(ax, cell, place, fmt="o", capsize=2)
        ax.annotate(f"{cell['score']:.1f}", (cell["score"], place), (0, 4), textcoords="offset points", fontsize=8)
    ax.set_yticks(y, [NAMES.get(a, a) for a in table["arm"]])
    ax.set_ylim(-0.6, len(table) - 0.2)
    ax.margins(x=0.08)


def arm_scores(table: pd.DataFrame, title: str) -> Figure:
    """Scores by arm with intervals, coloured by family. Columns arm, score, low, high."""
    fig, ax = plt.subplots(figsize=(6, 0.4 * len(table) + 1))
    _arm_rows(ax, table)
    ax.set(title=title, xlabel="test score, %")
    return fig


def calibration(table: pd.DataFrame) -> Figure:
    """Predicted against measured agreement with the source, a point a ported cell; from :func:`report.calibration`.

    Marks are hollow, so that arms that coincide are seen; on the diagonal a port does what it says.
    """
    size = (2.9, 2.7, 0.6, "agreement predicted at the port", ": measured on test")
    fig, cells = _grid(table, *size, sharex=True, sharey=True)
    both = table[["predicted", "measured"]].to_numpy()
    ends = both.min() - 0.02, both.max() + 0.02
    for ax, _, _, rows in cells:
        ax.plot(ends, ends, color=CONTROL, linewidth=1, zorder=0)
        for arm, mine in rows.groupby("arm"):
            colour, mark = LOOKS[str(arm)]
            ax.plot(mine["predicted"], mine["measured"], mark, color=colour, mfc="none", mew=1.4)
        ax.set(xlim=ends, ylim=ends, aspect="equal")
        ax.locator_params(nbins=5)
    _key(fig, [_mark(NAMES.get(a, a), *LOOKS[a], mfc="none", mew=1.4) for a in _present(table["arm"])])
    return fig


def _attempt_colour(name: str, group: str) -> str:
    return BASELINE if group == "taught" else CONTROL if name.startswith("random-p") else OURS


def attempt_scores(table: pd.DataFrame, error: float) -> Figure:
    """Dev scores of the attempts of notebook 07, by group; the band is one standard error about the best of a group."""
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
        ax.axvspan(rows["dev"].max() - error, rows["dev"].max(), color=CONTROL, alpha=0.3, linewidth=0)
        ax.scatter(rows["dev"], y, color=[_attempt_colour(a, group) for a in rows["attempt"]], zorder=3)
        ax.set_yticks(y, rows["attempt"], fontsize=8)
        ax.set(title=group, ylim=(-0.7, len(rows) - 0.3))
    axes[-1, 0].set_xlabel("dev score, %")
    fig.tight_layout()
    return fig


def score_against_anchor_bytes(table: pd.DataFrame) -> Figure:
    """Dev score against the bytes that anchors take, for the attempts that change them."""
    shown = table[table["group"].isin(["texts", "dims", "bits"])]
    fig, ax = plt.subplots(figsize=(6, 3.6))
    sns.scatterplot(shown, x="bytes", y="dev", hue="group", style="group", s=70, ax=ax)
    ax.set(title="Dev score against the bytes of the anchors", xlabel="bytes", ylabel="dev score, %", xscale="log")
    ax.axvline(1e6, color=CONTROL, linestyle="--", linewidth=1)
    ax.legend(title=None)
    return fig


def panels(table: pd.DataFrame, phases: Sequence[str], undefined: Sequence[tuple[str, str]] = ()) -> Figure:
    """:func:`arm_scores` for every task (row) and target (column) of some phases of a summary, on one scale.

    ``undefined``: (target, arm) that cannot be there, from :func:`uhl.report.undefined`.
    """
    table = table[table["phase"].isin(phases)]
    arms = list(dict.fromkeys(a for phase in phases for a in _present(table["arm"][table["phase"] == phase])))
    fig, cells = _grid(table, 2.4, 0.27 * len(arms), 2.2, "test score, %", sharex=True, sharey=True)
    for ax, _, host, rows in cells:
        absent = partial(_absent, host, undefined=undefined)
        _arm_rows(ax, rows.set_index("arm").reindex(arms).reset_index(), absent)
    families = {name: colour for name, (colour, _, members) in FAMILIES.items() if set(members) & set(arms)}
    _key(fig, [_mark(name, colour) for name, colour in families.items()])
    return fig


def attempt_changes(table: pd.DataFrame) -> Figure:
    """Attempts of notebook 07 (rows) on several tasks and targets (columns): agreement with the source's decisions on
    dev, in points more or less than the port as it is has, whose own stands below each column.
    """
    places = ["task", "target"]
    usual = table[table["attempt"] == "anchor, scale chosen without labels"].groupby(places)["same"].mean()
    if usual.empty:
        raise UHLError("the port as it is was not measured; set `attempts` to groups with `scale` among them")
    shown = table.assign(attempt=table["group"] + ": " + table["attempt"])
    wide = shown.pivot_table(index="attempt", columns=places, values="same", sort=False)
    usual = usual.reindex(wide.columns)
    fig, ax = plt.subplots(figsize=(1.3 * wide.shape[1] + 4.2, 0.27 * len(wide) + 1.2))
    sns.heatmap(wide - usual, annot=True, fmt="+.1f", cmap="vlag_r", center=0, vmin=-8, vmax=8, cbar=False, ax=ax)
    labels = ["\n".join([*map(str, place), f"{own:.1f} %"]) for place, own in usual.items()]  # type: ignore[call-overload]
    ax.set_xticklabels(labels, rotation=0, fontsize=8)
    ax.tick_params(axis="y", labelsize=7)
    ax.grid(False)
    ax.set(xlabel="", ylabel="", title="Decisions shared with the source on dev: points beside the port as it is")
    fig.tight_layout()
    return fig


def compression(table: pd.DataFrame) -> Figure:
    """Score over the share of the source's weights that a pruned copy keeps, a panel a task (row) and part that was cut
    (column), from :func:`report.compressed`. The source itself begins every line.
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
        axes[i, 0].set_ylabel("test score, %")
    for ax in axes[-1]:
        ax.set(xlabel="% of the linear weights kept", xlim=(105, 100 * table["kept"].min() - 5))
    axes[0, -1].legend(fontsize=8, loc="upper left", bbox_to_anchor=(1.02, 1), frameon=False)
    fig.tight_layout()
    return fig


def losses(table: pd.DataFrame, doubtful: float) -> Figure:
    """Points lost against the source over the Cohen's kappa that each anchored port predicted of itself, from
    :func:`report.compressed`; below ``doubtful`` a port warns. A point a copy, a colour a part that was cut.
    """
    own = table[(table["part"] == "") & (table["arm"] == "lineage")].set_index("task")["score"]
    shown = table[table["arm"] == "anchor"]
    lost = shown["task"].map(own) - shown["score"]
    shown = shown.assign(lost=lost, part=shown["part"].replace("", "nothing"))
    fig, ax = plt.subplots(figsize=(5.2, 3.6))
    sns.scatterplot(shown, x="kappa", y="lost", hue="part", style="task", s=60, ax=ax)
    ax.axvspan(min(0.0, float(shown["kappa"].min())), doubtful, color=CONTROL, alpha=0.25, linewidth=0)
    ax.axhline(0, color="black", linewidth=0.8)
    ax.set(title="Does a port know when it fails?", xlabel="Cohen's kappa with the source, predicted at the port")
    ax.set(ylabel="points lost against the source")
    ax.legend(fontsize=7, loc="upper left", bbox_to_anchor=(1.02, 1), frameon=False)
    return fig


def _compressed_lines(ax: Axes, cells: pd.DataFrame) -> None:
    looks = {"lineage": ("#3aa655", "-", "s"), "anchor": (OURS, "-", "o"), "zero-atoms": (CONTROL, "--", "o")}
    looks |= {"random-p": (CONTROL, ":", "v"), "head": (BASELINE, "-", "^")}
    label = NAMES | {"lineage": "lineage (the file as it is)", "head": "head fitted to labels"}
    for place, (arm, rows) in enumerate(cells.groupby("arm", sort=False)):
        colour, line, mark = looks[str(arm)]
        error = np.abs([rows["score"] - rows["low"], rows["high"] - rows["score"]])
        line = "" if "several" in set(rows["part"]) else line  # cuts of several parts are no series
        style: dict[str, Any] = {"color": colour, "linestyle": line, "marker": mark, "label": label.get(str(arm), arm)}
        apart = 100 * rows["kept"] + 0.7 * place  # so that bars do not hide one another
        ax.errorbar(apart, rows["score"], yerr=error, markersize=4, elinewidth=1, **style)


def gap_heat(table: pd.DataFrame, undefined: Sequence[tuple[str, str]] = ()) -> Figure:
    """Gap recovered by arm (rows), task and target (columns), a panel a phase: 0 is no adapter, 1 is LoRA retrained
    there. Hatched where there is no gap to recover or no port (``undefined`` as in :func:`panels`); with intervals
    where the table has ``low`` and ``high``.
    """
    if table["gap"].isna().all():
        return _nothing("no gap to recover: LoRA was not run here or is not above no adapter")
    bounds = {"low", "high"} <= set(table.columns)
    places = list(dict.fromkeys(zip(table["task"], table["target"], strict=True)))
    phases = {phase: rows.set_index(["arm", "task", "target"]) for phase, rows in table.groupby("phase", sort=False)}
    arms = {phase: _present(rows.index.get_level_values("arm")) for phase, rows in phases.items()}
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
            if low <= high:
                text.set_text(f"{text.get_text()}\n{low:.2f} to {high:.2f}")
            text.set_fontsize(8.5)
        for i, j in np.argwhere(gaps.isna()):
            arm, (task, target) = arms[phase][i], places[j]
            why = "no gap" if (arm, task, target) in rows.index else _absent(target, arm, undefined)
            _note(ax, why, j + 0.5, i + 0.5, ax.transData)
        ax.set_yticklabels([NAMES.get(arm, arm) for arm in arms[phase]], rotation=0)
        ax.set_xticklabels([f"{task}\n{target}" for task, target in places], rotation=0)
        ax.set(title=phase, xlabel="", ylabel="")
        ax.grid(False)
    fig.suptitle("Gap recovered (1: rank-8 LoRA retrained there)", fontsize=10, weight="bold")
    return fig


def score_against(table: pd.DataFrame, column: str, label: str, limit: float, budget: str) -> Figure:
    """Score over what a method adds to the host (``column``), a panel a task and model, with the budget's ``limit``.

    Hollow marks had no labels, and stand a little left of what costs the same; controls are bars behind.
    """
    fig, cells = _grid(table, 2.25, 2.3, 0.6, label, ": test score, %", sharex=True, sharey=True)
    fig.set_figheight(fig.get_figheight() + 1.0)  # for the key
    least, most = float(table[column][table[column] > 0].min()), 2.5 * float(table[column].max())
    for ax, _, _, rows in cells:
        left = offset_copy(ax.transData, fig, x=-4.0, units="points")
        for _, cell in rows.iterrows():
            hollow, control = cell["phase"] == "zero-shot", cell["arm"] in CONTROLS
            look: dict[str, Any] = {"mec": "white", "mew": 0.5, "ms": 6.5, "zorder": 3 + (cell["arm"] not in METHODS)}
            if control:
                look = {"fmt": "_", "ms": 10, "zorder": 2}
            elif hollow:
                look = {"zorder": 4, "transform": left}
            _interval(ax, cell, float(cell[column]), upright=True, hollow=hollow, elinewidth=0.8, **look)
        ax.axvline(limit, color="black", linestyle=":", linewidth=1)
        _note(ax, f" budget\n {budget}", limit, 0.02, ax.get_xaxis_transform(), ha="left", va="bottom", fontsize=8)
        ax.set_xscale("symlog", linthresh=least, linscale=0.5)
        ax.set(xlim=(-0.7 * least, most), ylim=(table["low"].min() - 2, table["high"].max() + 2))
    first, last = np.ceil(np.log10(least)), np.log10(most)
    powers = 10.0 ** np.arange(first, last, 1 if last - first < 4 else 2)
    ax.set_xticks([0, *powers], ["0", *(f"{v:g}" if v < 1000 else EngFormatter(sep="")(v) for v in powers)])
    named = [_mark(NAMES.get(a, a), *LOOKS[a]) for a in _present(table["arm"], LOOKS) if a not in CONTROLS]
    hollow_mark, filled = _mark("without labels", OURS, mfc="white"), _mark("trained with labels", OURS)
    _key(fig, [*named, _mark("control", CONTROL, "_", ms=10), hollow_mark, filled], 3)
    return fig


def slopes(table: pd.DataFrame, undefined: Sequence[tuple[str, str]] = ()) -> Figure:
    """Each arm's score without labels (hollow) joined to its score after tuning (filled), a panel a task and target.

    ``undefined`` as in :func:`panels`.
    """
    shown = table[table["phase"].isin(["zero-shot", "tuned"])]
    arms = _present(shown["arm"])
    fig, cells = _grid(shown, 2.4, 0.3 * len(arms), 2.2, "test score, %", sharex=True, sharey=True)
    for ax, _, host, rows in cells:
        for place, arm in zip(np.arange(len(arms), dtype=float), arms, strict=True):
            pair = rows[rows["arm"] == arm].set_index("phase").reindex(["zero-shot", "tuned"])
            heights, middle = [place - 0.17, place + 0.17], pair["score"].mean()
            ax.plot(pair["score"], heights, color=LOOKS[arm][0], linewidth=1)
            if np.isnan(middle):
                _note(ax, _absent(host, arm, undefined), y=place, across=ax.get_yaxis_transform())
                continue
            for (phase, cell), at in zip(pair.iterrows(), heights, strict=True):
                if np.isnan(cell["score"]):
                    _note(ax, "not tuned" if phase == "tuned" else "not run", middle, at, ax.transData, fontsize=8)
                else:
                    _interval(ax, cell, at, hollow=phase == "zero-shot", fmt="o")
        ax.set_yticks(range(len(arms)), [NAMES.get(arm, arm) for arm in arms])
        ax.set_ylim(len(arms) - 0.4, -0.6)
        ax.margins(x=0.12)
    _key(fig, [_mark("zero-shot", OURS, mfc="white"), _mark("tuned", OURS), _mark("control", CONTROL)])
    return fig


def learning_curves(table: pd.DataFrame, window: int = 5) -> Figure:
    """Training loss by task and family (rows) and model (columns, the source first): means over seeds, bands from the
    least to the greatest seed. Batches are grouped by length, so losses are means of ``window`` logged ones in turn.
    A family whose runs kept no losses has no row.
    """
    if table.empty:
        return _nothing("these runs kept no losses")
    run = table.sort_values("step").groupby(["task", "target", "phase", "arm", "seed"])["loss"]
    shown = table.assign(loss=run.transform(lambda v: v.rolling(window, center=True, min_periods=1).mean()))
    family = {arm: name for name, members in LEARNERS.items() for arm in members}
    shown = shown.assign(task=shown["task"] + "\n" + shown["arm"].map(family)).sort_values("task", kind="stable")
    fig, cells = _grid(shown, 1.4, 1.5, 3.3, "step", sharey="row")
    ends = {task: ax for ax, task, *_ in cells}.values()  # the last of each row
    for ax, task, _, rows in cells:
        for k, arm in enumerate(_present(shown["arm"][shown["task"] == task])):
            loss = rows[rows["arm"] == arm].groupby("step")["loss"].agg(["mean", "min", "max"])
            ax.plot(loss["mean"], color=f"C{k}", linestyle=("-", "--", ":", "-.")[k % 4], label=NAMES.get(arm, arm))
            ax.fill_between(loss.index, loss["min"], loss["max"], color=f"C{k}", alpha=0.15, linewidth=0)
        if ax in ends:
            ax.legend(fontsize=9, loc="upper left", bbox_to_anchor=(1.02, 1.05), frameon=False)
    fig.supylabel(f"training loss, mean of {window} logged losses; band: range of seeds", fontsize=10)
    return fig


# --- routing ---------------------------------------------------------------------------------------------------------


def search_history(table: pd.DataFrame) -> Figure:
    """Dev scores of a study's trials in their order, pruned ones grey, with the best so far."""
    fig, ax = plt.subplots(figsize=(5.5, 2.8))
    whole = table["state"] == "complete"
    ax.plot(table["trial"][whole], table["score"][whole], "o", color=OURS, label="finished")
    ax.plot(table["trial"][~whole], table["score"][~whole], "o", color=CONTROL, label="pruned")
    ax.step(table["trial"], table["score"].where(whole).cummax(), where="post", color="black", label="best so far")
    ax.xaxis.set_major_locator(MaxNLocator(integer=True))
    ax.set(xlabel="trial", ylabel="dev score, %")
    ax.legend(bbox_to_anchor=(1.02, 1), loc="upper left", frameon=False)
    fig.tight_layout()
    return fig


def search_importance(importance: dict[str, float]) -> Figure:
    """How much each setting matters, as shares."""
    fig, ax = plt.subplots(figsize=(5.5, 0.5 + 0.4 * len(importance)))
    ax.barh(list(importance)[::-1], list(importance.values())[::-1], color=OURS)
    ax.set(xlabel="importance", xlim=(0, 1))
    fig.tight_layout()
    return fig


def search_parallel(values: pd.DataFrame, scores: pd.Series, logs: Sequence[str] = ()) -> Figure:
    """A line a trial over its settings, each axis from the least to the most that was tried; the best lines are dark.

    ``logs`` names the settings whose axes are logarithmic.
    """
    names = [str(name) for name in values.columns]
    ends = {name: (values[name].min(), values[name].max()) for name in names}
    scaled = values.astype(float)
    for name in names:
        column = np.log(scaled[name]) if name in logs else scaled[name]
        scaled[name] = (column - column.min()) / max(column.max() - column.min(), 1e-12)
    fig, ax = plt.subplots(figsize=(2.0 * len(ends) + 1.5, 3.0))
    shades = plt.get_cmap("Blues")
    spread = max(scores.max() - scores.min(), 1e-12)
    for row in np.argsort(scores.to_numpy()):
        shade = 0.25 + 0.75 * (scores.iloc[row] - scores.min()) / spread
        ax.plot(names, scaled.iloc[row], color=shades(shade), linewidth=2)
    for place, (low, high) in enumerate(ends.values()):
        ax.axvline(place, color="#606060", linewidth=0.8)
        ax.text(place, -0.04, f"{low:.3g}", ha="center", va="top", fontsize=8)
        ax.text(place, 1.03, f"{high:.3g}", ha="center", va="bottom", fontsize=8)
    ax.tick_params(axis="x", pad=14)
    ax.set(yticks=[], ylim=(-0.02, 1.02))
    for side in ax.spines.values():
        side.set_visible(False)
    norm = plt.Normalize(scores.min() - spread / 3, scores.max())
    fig.colorbar(plt.cm.ScalarMappable(norm=norm, cmap=shades), ax=ax, label="dev score, %")
    fig.tight_layout()
    return fig


def search_rates(table: pd.DataFrame) -> Figure:
    """Dev score against each method's learning rate (``value``), a panel a method, the best one black.

    Scores more than 12 points below the best of all lie on the lower edge.
    """
    methods, columns = [m for m in ORDER if m in set(table["method"])], 4
    rows = -(-len(methods) // columns)
    floor = table["score"].max() - 12
    fig, axes = plt.subplots(rows, columns, figsize=(9, 2.0 * rows), sharey=True, squeeze=False)
    for ax in axes.flat[len(methods) :]:
        ax.set_visible(False)
    for ax, method in zip(axes.flat, methods, strict=False):
        mine = table[table["method"] == method].sort_values("value")
        scores = mine["score"].clip(lower=floor)
        ax.plot(mine["value"], scores, "o-", color=LOOKS[method][0], markersize=4)
        best = int(scores.to_numpy().argmax())
        ax.plot(mine["value"].iloc[best], scores.iloc[best], "o", color="black", markersize=5)
        ax.set(xscale="log", xlim=(mine["value"].min() / 2, mine["value"].max() * 2))
        ax.xaxis.set_minor_formatter(NullFormatter())
        ax.set_title(NAMES.get(method, method), fontsize=9)
    for ax in axes[:, 0]:
        ax.set_ylabel("dev score, %")
    fig.supxlabel("learning rate", fontsize=9)
    fig.tight_layout()
    return fig


def routing_table(attached: Attached, encoder: Encoder, text: str) -> pd.DataFrame:
    """Which atoms each token takes in each layer: columns layer, position, token, rank, atom, gate.

    ``layer`` is a route's key in :attr:`Attached.routes`: a weight's path where each weight has its own.
    """
    inputs = encoder.tokenizer(text, return_tensors="pt", truncation=True, max_length=64)
    with torch.no_grad():
        encoder.model.eval()(**inputs)
    tokens = encoder.tokenizer.convert_ids_to_tokens(inputs["input_ids"][0])
    rows: list[dict[str, Any]] = []
    for layer, made in sorted(attached.routes.items(), key=lambda item: str(item[0]).zfill(4)):
        for position, token in enumerate(tokens):
            for rank in range(made.index.shape[-1]):
                atom, gate = int(made.index[0, position, rank]), float(made.gate[0, position, rank])
                rows.append(dict(zip(ROUTE_COLUMNS, (layer, position, token, rank, atom, gate), strict=True)))
    return pd.DataFrame(rows, columns=ROUTE_COLUMNS)


def routing_map(table: pd.DataFrame, layers: Sequence[int] | None = None) -> Figure:
    """Tokens by layers; a cell names its open atoms and has the colour of the first one, white where none is open.

    An atom has one colour everywhere: neighbouring numbers are a golden angle of hue apart.
    """
    shown = sorted(table["layer"].unique()) if layers is None else list(layers)
    tokens = table.drop_duplicates("position").sort_values("position")["token"].tolist()
    colours = np.ones((len(shown), len(tokens), 3))
    names = np.full(colours.shape[:2], "", dtype=object)
    opened = table[(table["gate"] > 0.5) & table["layer"].isin(shown)].sort_values("rank")
    for key, rows in opened.groupby(["layer", "position"]):
        layer, position = tuple(key)  # type: ignore[arg-type]
        place = shown.index(layer), int(str(position))
        colours[place] = hsv_to_rgb((rows["atom"].iloc[0] * 0.618 % 1.0, 0.35, 0.97))
        names[place] = "\n".join(map(str, rows["atom"]))
    fig, ax = plt.subplots(figsize=(0.52 * len(tokens) + 1.5, 0.5 * len(shown) + 1.2))
    ax.imshow(colours, aspect="auto")
    for (i, j), name in np.ndenumerate(names):
        ax.text(j, i, name, ha="center", va="center", fontsize=7)
    ax.set_xticks(range(len(tokens)), tokens, rotation=60, ha="right", fontsize=8)
    ax.set_yticks(range(len(shown)), [n if isinstance(n, str) else f"layer {n}" for n in shown])
    ax.set_title("Atoms that each token takes")
    ax.grid(False)
    return fig


def routing_explorer(attached: Attached, encoder: Encoder, text: str) -> Any:
    """A text box and a layer slider over :func:`routing_map`, for a live notebook; a box shows all layers at once."""
    import ipywidgets as widgets

    layers = sorted({s.layer for s in attached.slots})
    box = widgets.Text(value=text, description="text", layout=widgets.Layout(width="90%"), continuous_update=False)
    slider = widgets.IntSlider(min=layers[0], max=layers[-1], value=layers[0], description="layer")
    every = widgets.Checkbox(value=False, description="all layers")
    out = widgets.Output()

    def draw(_change: object = None) -> None:
        table = routing_table(attached, encoder, box.value or " ")
        fig = routing_map(table, None if every.value else [slider.value])
        with out:
            from IPython.display import clear_output, display

            clear_output(wait=True)
            display(fig)
        plt.close(fig)

    for control in (box, slider, every):
        control.observe(draw, names="value")
    draw()
    return widgets.VBox([box, widgets.HBox([slider, every]), out])


def _plain_ticks(ax: Axes, values: Sequence[int | float]) -> None:
    """Plain numbers on a logarithmic vertical axis: those of ``values`` that lie within its limits."""
    low, high = ax.get_ylim()
    shown = [v for v in values if low <= v <= high]
    ax.set_yticks(shown, [f"{v:g}" for v in shown])
    ax.minorticks_off()


def speed_of_weights(measured: pd.DataFrame, base: dict[str, int]) -> tuple[Figure, pd.DataFrame]:
    """Time of one weight over the bare weight's, as each size is varied about ``base``; forward above, training below.

    ``measured`` as from :func:`uhl.bench.weights`. Bars span the quartiles of the rounds' ratios.
    """
    names = {"tokens": "tokens T", "d_in": "width D", "atoms": "atoms A", "top_k": "active atoms K"}
    colours = {step: WAYS[step] for step in WAYS if step != "bare" and step in set(measured["step"])}
    fig, axes = plt.subplots(2, len(names), figsize=(12, 6), sharey="row")
    for row, train in zip(axes, (False, True), strict=True):
        for ax, (name, label) in zip(row, names.items(), strict=True):
            fixed = [k for k in base if k != name and not (name == "d_in" and k == "d_out")]
            here = measured[(measured[fixed] == pd.Series(base)[fixed]).all(axis=1) & (measured["train"] == train)]
            if name != "d_in":
                here = here[(here["d_in"] == base["d_in"])]
            for step, colour in colours.items():
                line = here[here["step"] == step].sort_values(name)
                error = [line["ratio"] - line["ratio low"], line["ratio high"] - line["ratio"]]
                ax.errorbar(line[name], line["ratio"], error, color=colour, marker="o", ms=4, label=step)
            ax.axhline(1, color="black", lw=0.8)
            ax.set(xscale="log", xlabel=label)
            values = sorted(here[name].unique())
            places = np.log(values) / np.log(values[-1] / values[0] if len(values) > 1 else 2)
            low = ["\n" if gap < 0.12 else "" for gap in np.diff(places, prepend=-np.inf)]  # else they run together
            plain = [f"{v / 1024:g}k" if v % 1024 == 0 else f"{v:g}" for v in values]
            ax.set_xticks(values, [drop + text for drop, text in zip(low, plain, strict=True)], fontsize=9)
            ax.minorticks_off()
        row[0].set(yscale="log", ylabel=f"{'training' if train else 'forward'}: time / bare weight")
        _plain_ticks(row[0], (1, 1.5, 2, 3, 4, 6, 8, 12))
    axes[0][0].legend(fontsize=8)
    fig.tight_layout()
    return fig, measured


def roofline(points: pd.DataFrame, roofs: dict[str, float]) -> tuple[Figure, pd.DataFrame]:
    """What each way achieves at each size, below the machine's roofs; forward left, training right.

    ``points`` from :func:`uhl.roofline.roofline`, ``roofs`` from :func:`uhl.roofline.machine`; both logarithmic.
    """
    fig, axes = plt.subplots(1, 2, figsize=(11, 4), sharey=True)
    span = np.geomspace(points["FLOP/byte"].min() / 2, points["FLOP/byte"].max() * 2, 200)
    for ax, train in zip(axes, (False, True), strict=True):
        here = points[points["train"] == train]
        ax.plot(span, np.minimum(roofs["GFLOP/s"], roofs["GB/s"] * span), color="black", lw=1.5)
        for step, mark in zip(WAYS, "osD^vP", strict=True):
            found = here[here["step"] == step]
            if len(found):
                ax.plot(found["FLOP/byte"], found["GFLOP/s"], mark, color=WAYS[step], ms=5, alpha=0.8, label=step)
        ax.set(xscale="log", yscale="log", xlabel="FLOPs a byte that must move")
        ticks = [2.0**n for n in range(-2, 12) if span[0] <= 2.0**n <= span[-1]]
        ax.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
        ax.minorticks_off()
        ax.set_title("training" if train else "forward")
    label = f"{roofs['GFLOP/s']:.0f} GFLOP/s, {roofs['GB/s']:.0f} GB/s"
    axes[0].annotate(label, (span[-1], roofs["GFLOP/s"]), (0, 4), textcoords="offset points", ha="right", fontsize=8)
    axes[0].set_ylabel("GFLOP/s")
    _plain_ticks(axes[0], (1, 2, 5, 10, 20, 50, 100, 200, 500, 1000))
    axes[0].legend(fontsize=8, loc="lower right")
    fig.tight_layout()
    return fig, points
