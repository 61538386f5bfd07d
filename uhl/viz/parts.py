"""Figures of an adapter's parts and of one training run."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import seaborn as sns
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from uhl.config import WEIGHT_TYPES
from uhl.mixer import type_features

if TYPE_CHECKING:
    from uhl.adapter import UHLAdapter


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
    sns.lineplot(table, x="step", y="loss", hue="run", style="run", ax=ax)  # dashed, as runs may coincide
    ax.set(title="Training loss", xlabel="step", ylabel="loss")
    ax.xaxis.set_major_locator(MaxNLocator(integer=True))
    if len(table):  # nothing is trained where an adapter is lent
        ax.legend(title=None, loc="upper left", bbox_to_anchor=(1.02, 1), frameon=False)
    return fig
