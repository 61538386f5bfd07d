"""Figures of studies of settings."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator, NullFormatter

from uhl.viz.base import CONTROL, LOOKS, NAMES, ORDER, OURS, in_order

BEST: dict[str, Any] = {"linestyle": "", "marker": "o", "color": "black", "mfc": "none", "mew": 1.3, "markersize": 8}


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
    """Dev score against each method's learning rate (``value``), a panel a method, a line a ``host``, the best ringed.

    Hosts are drawn solid, dashed and so on in the order in which the table has them. Scores more than 12 points below
    the best of all are triangles on the lower edge.
    """
    methods, columns = in_order(table["method"], dict.fromkeys((*ORDER, *table["method"]))), 4
    styles = dict(zip(dict.fromkeys(table["host"]), ("-", "--", ":", "-."), strict=False))
    rows = -(-len(methods) // columns)
    floor = table["score"].max() - 12
    fig, axes = plt.subplots(rows, columns, figsize=(9, 2.0 * rows), sharey=True, squeeze=False)
    for ax in axes.flat[len(methods) :]:
        ax.set_visible(False)
    for ax, method in zip(axes.flat, methods, strict=False):
        of_method, colour = table[table["method"] == method], LOOKS.get(method, (OURS,))[0]
        for host, mine in of_method.sort_values("value").groupby("host", sort=False):
            scores = mine["score"].clip(lower=floor)
            ax.plot(mine["value"], scores, styles[host], marker="o", color=colour, markersize=4)
            low = mine["score"] < floor
            ax.plot(mine["value"][low], scores[low], "v", color=colour, markersize=7)
            best = int(scores.to_numpy().argmax())
            ax.plot(mine["value"].iloc[best], scores.iloc[best], **BEST)
        ax.set(xscale="log", xlim=(of_method["value"].min() / 2, of_method["value"].max() * 2))
        ax.xaxis.set_minor_formatter(NullFormatter())
        ax.set_title(NAMES.get(method, method), fontsize=9)
    for ax in axes[:, 0]:
        ax.set_ylabel("dev score, %")
    lines = [Line2D([], [], color=CONTROL, linestyle=style, label=host) for host, style in styles.items()]
    lines += [Line2D([], [], color=CONTROL, linestyle="", marker="v", label="below the scale")]
    lines += [Line2D([], [], **BEST, label="best")]
    fig.supxlabel("learning rate", fontsize=9, y=0.06)
    fig.tight_layout(rect=(0, 0.06, 1, 1))
    fig.legend(handles=lines, loc="lower center", ncol=len(lines), frameon=False, fontsize=9)
    return fig
