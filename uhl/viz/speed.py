"""Figures of what the layers cost in time."""

from __future__ import annotations

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from uhl.viz.base import BASELINE, CONTROL, OURS, plain_ticks

WAYS = {"bare": "#404040", "LoRA r8": BASELINE, "VeRA r256": "#b07aa1", "VB-LoRA": "#3aa655", "dense": CONTROL}
WAYS |= {"gather": OURS, "reference": "#7a5195"}  # of one weight's update
COMPILED = ", compiled"


def speed_of_weights(measured: pd.DataFrame, base: dict[str, int]) -> tuple[Figure, pd.DataFrame]:
    """Time of one weight over the bare weight's, as each size is varied about ``base``; forward above, training below.

    ``measured`` as from :func:`uhl.bench.weights`. Bars span the quartiles of the rounds' ratios.
    """
    names = {"tokens": "tokens T", "d_in": "width D", "atoms": "atoms A", "top_k": "active atoms K"}
    there = set(measured["step"]) - {"bare"}
    ways = [step for way in WAYS for step in (way, way + COMPILED) if step in there]
    fig, axes = plt.subplots(2, len(names), figsize=(12, 6), sharey="row")
    for row, train in zip(axes, (False, True), strict=True):
        for ax, (name, label) in zip(row, names.items(), strict=True):
            fixed = [k for k in base if k != name and not (name == "d_in" and k == "d_out")]
            here = measured[(measured[fixed] == pd.Series(base)[fixed]).all(axis=1) & (measured["train"] == train)]
            if name != "d_in":
                here = here[(here["d_in"] == base["d_in"])]
            for step in ways:
                line = here[here["step"] == step].sort_values(name)
                error = [line["ratio"] - line["ratio low"], line["ratio high"] - line["ratio"]]
                look = {"color": WAYS[step.removesuffix(COMPILED)], "ls": "--" if step.endswith(COMPILED) else "-"}
                ax.errorbar(line[name], line["ratio"], error, marker="o", ms=4, label=step, **look)
            ax.axhline(1, color="black", lw=0.8)
            ax.set(xscale="log", xlabel=label)
            values = sorted(here[name].unique())
            places = np.log(values) / np.log(values[-1] / values[0] if len(values) > 1 else 2)
            low = ["\n" if gap < 0.12 else "" for gap in np.diff(places, prepend=-np.inf)]  # else they run together
            plain = [f"{v / 1024:g}k" if v % 1024 == 0 else f"{v:g}" for v in values]
            ax.set_xticks(values, [drop + text for drop, text in zip(low, plain, strict=True)], fontsize=9)
            ax.minorticks_off()
        row[0].set(yscale="log", ylabel=f"{'training' if train else 'forward'}: time / bare weight")
        plain_ticks(row[0], (1, 2, 4, 8, 16, 32, 64, 1.5, 3, 6, 12, 24, 48))
    lines, labels = axes[0][0].get_legend_handles_labels()
    fig.tight_layout(rect=(0, 0.09, 1, 1))
    fig.legend(lines, labels, ncol=6, loc="lower center", fontsize=8, frameon=False, handlelength=3.5)
    return fig, measured


def roofline(points: pd.DataFrame, roofs: dict[str, float]) -> tuple[Figure, pd.DataFrame]:
    """What each way achieves at each size, below the machine's roofs; forward left, training right.

    ``points`` from :func:`uhl.roofline.roofline`, ``roofs`` from :func:`uhl.roofline.machine`; both logarithmic. The
    level roof is the most that was reached, by the product that ``roofs`` had or by any point: machines vary.
    """
    level, slope = max(roofs["GFLOP/s"], points["GFLOP/s"].max()), roofs["GB/s"]
    fig, axes = plt.subplots(1, 2, figsize=(11, 4), sharey=True)
    span = np.geomspace(points["FLOP/byte"].min() / 2, points["FLOP/byte"].max() * 2, 200)
    for ax, train in zip(axes, (False, True), strict=True):
        here = points[points["train"] == train]
        ax.plot(span, np.minimum(level, slope * span), color="black", lw=1.5)
        for way, mark in zip(WAYS, "osXpD^v", strict=True):
            for step, filled in ((way, True), (way + COMPILED, False)):
                found = here[here["step"] == step]
                if len(found):
                    look = {"color": WAYS[way], "mfc": WAYS[way] if filled else "none", "ms": 5, "alpha": 0.8}
                    ax.plot(found["FLOP/byte"], found["GFLOP/s"], mark, label=step, **look)
        ax.set(xscale="log", yscale="log", xlabel="FLOP a byte that must move")
        ticks = [2.0**n for n in range(-2, 12) if span[0] <= 2.0**n <= span[-1]]
        ax.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
        ax.minorticks_off()
        ax.set_title("training" if train else "forward")
    label = f"roofs: {level:.0f} GFLOP/s, {slope:.0f} GB/s"
    axes[0].annotate(label, (0.98, 0.03), xycoords="axes fraction", ha="right", fontsize=8)
    axes[0].set_ylabel("GFLOP/s")
    plain_ticks(axes[0], (*(10.0**n for n in range(-3, 6)), *(m * 10.0**n for n in range(-3, 6) for m in (2, 5))))
    lines, labels = axes[0].get_legend_handles_labels()
    fig.tight_layout(rect=(0, 0.08, 1, 1))
    fig.legend(lines, labels, ncol=7, loc="lower center", fontsize=8, frameon=False)
    return fig, points
