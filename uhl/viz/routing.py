"""Which atoms each token takes: tables, a map, and a widget."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import torch
from matplotlib.colors import hsv_to_rgb
from matplotlib.figure import Figure

from uhl.host import evaluating

if TYPE_CHECKING:
    from uhl.layer import Attached
    from uhl.models import Encoder

ROUTE_COLUMNS = ["layer", "position", "token", "rank", "atom", "gate"]


def routing_table(attached: Attached, encoder: Encoder, text: str) -> pd.DataFrame:
    """Which atoms each token takes in each layer: columns layer, position, token, rank, atom, gate.

    ``layer`` is a route's key in :attr:`Attached.routes`: a weight's path where each weight has its own.
    """
    inputs = encoder.tokenizer(text, return_tensors="pt", truncation=True, max_length=64)
    with evaluating(encoder.model) as model, torch.no_grad():
        model(**inputs)
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
