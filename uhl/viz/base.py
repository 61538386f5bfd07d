"""The look that all figures share: names and colours of the methods, marks with intervals, grids of panels."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import seaborn as sns
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from uhl.config import ARMS, CONTROLS, METHODS
from uhl.files import write_atomic, write_csv

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
    "tune-anchor": "tuning, by anchors",
}
ORDER = (
    *("no-adapter", "head", "uhl-dimension", "uhl-canonical"),
    *METHODS[1:],
    *(*ARMS, "untrained"),
)
DOTTED = (0, (1, 1.2))
OURS, CONTROL, BASELINE = "#0b6e99", "#909090", "#d98032"
FAMILIES = {  # the colour and the marks of each family's methods
    "ours": (OURS, "PXDs^ov", ("uhl-canonical", "uhl-dimension", *ARMS[:5])),
    "control": (CONTROL, "*sD^ov", CONTROLS),
    "PEFT baseline": (BASELINE, "oDs^vPX", METHODS[:7]),
    "SAT-LoRA": ("#7a5195", "p*", METHODS[7:9]),
    "full fine-tune": ("#202020", "h", METHODS[9:]),
}
LOOKS = {a: (colour, m) for colour, marks, arms in FAMILIES.values() for a, m in zip(arms, marks, strict=True)}


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


def interval_mark(
    ax: Axes, cell: pd.Series, at: float, upright: bool = False, hollow: bool = False, **look: Any
) -> None:
    """A score with its interval, at ``at`` of the other axis, with its method's mark and colour; the interval of one
    that is ``alone``, see :func:`with_alone`, is dotted.
    """
    colour, mark = LOOKS.get(cell["arm"], (OURS, "o"))
    error = np.abs([[cell["score"] - cell["low"]], [cell["high"] - cell["score"]]])
    points: dict[str, Any] = {"fmt": mark, "color": colour, "mfc": "white" if hollow else colour, "ms": 5}
    points |= {"yerr" if upright else "xerr": error} | look
    drawn = ax.errorbar(*((at, cell["score"]) if upright else (cell["score"], at)), **points)
    for bar in drawn.lines[2] if cell.get("alone") in (True,) else ():
        bar.set_linestyle(DOTTED)


def with_alone(table: pd.DataFrame) -> pd.DataFrame:
    """A summary with a column ``alone``: scores of one seed beside others of their task that have more."""
    if "seeds" not in table:
        return table.assign(alone=False)
    return table.assign(alone=(table["seeds"] == 1) & (table.groupby("task")["seeds"].transform("max") > 1))


def key_alone(table: pd.DataFrame) -> list[Line2D]:
    """What a key says of dotted intervals, where ``table`` has some."""
    return [Line2D([], [], color="#404040", linestyle=DOTTED, label="one seed")] if table["alone"].any() else []


def note(ax: Axes, text: str, x: float = 0.5, y: float = 0.5, across: Any = None, **look: Any) -> None:
    """Grey words where there is nothing to draw."""
    words: dict[str, Any] = {"ha": "center", "va": "center", "fontsize": 9, "color": "#606060", "style": "italic"}
    ax.text(x, y, text, transform=across or ax.transAxes, **words | look)


def empty_figure(text: str) -> Figure:
    """A figure of nothing but words that say why."""
    fig, ax = plt.subplots(figsize=(6, 1))
    note(ax, text)
    ax.set_axis_off()
    return fig


def stamp(fig: Figure, text: str) -> None:
    """Red words above a figure that is not to be taken for a whole one."""
    fig.text(0, 1.01, text, color="#b00020", fontsize=9, weight="bold", va="bottom")


def task_grid(
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


def key_mark(label: str, colour: str, mark: str = "o", **look: Any) -> Line2D:
    """A mark as a key shows it."""
    return Line2D([], [], linestyle="", color=colour, marker=mark, label=label, **look)


def key_below(fig: Figure, entries: Sequence[Line2D], columns: int = 5) -> None:
    """A key below all panels."""
    fig.legend(handles=entries, loc="outside lower center", ncols=columns, fontsize=9, frameon=False, handletextpad=0.2)


Place = tuple[str, str, str, str]  # task, target, phase, arm


def why_absent(task: str, target: str, phases: Iterable[str], arm: str, undefined: Sequence[Place]) -> str:
    """Why an arm has no score in some phases: `not defined` in one of them, or `not run`."""
    return "not defined" if any((task, target, phase, arm) in undefined for phase in phases) else "not run"


def in_order(arms: Iterable[str], order: Iterable[str] = ORDER) -> list[str]:
    """Those of ``order`` that are among ``arms``."""
    found = set(arms)
    return [arm for arm in order if arm in found]


def plain_ticks(ax: Axes, values: Sequence[int | float]) -> None:
    """Plain numbers on a logarithmic vertical axis: those of ``values`` that lie within its limits and 12 points apart,
    the earlier before the later.
    """
    low, high = ax.get_ylim()
    points = 72 * ax.get_window_extent().height / ax.figure.dpi / np.log(high / low)
    shown: list[float] = []
    for value in values:
        if low <= value <= high and all(points * abs(np.log(value / other)) >= 12 for other in shown):
            shown.append(value)
    ax.set_yticks(shown, [f"{v:g}" for v in shown])
    ax.minorticks_off()
