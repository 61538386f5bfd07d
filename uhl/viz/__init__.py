"""Figures as pure functions of data, and the routing explorer. One palette, one size, readable in print.

Every figure is saved with the numbers that it shows: :func:`save_fig` writes a PNG and a CSV of the same name.
"""

from uhl.viz.base import (
    BASELINE,
    CONTROL,
    FAMILIES,
    LOOKS,
    NAMES,
    ORDER,
    OURS,
    in_order,
    save_fig,
    stamp,
    style,
    with_alone,
)
from uhl.viz.parts import heat, loss_curves, mixer_curves, mixer_table
from uhl.viz.ports import (
    OF_BYTES,
    attempt_changes,
    attempt_scores,
    calibration,
    compression,
    expected,
    foretold,
    losses,
    score_against_anchor_bytes,
)
from uhl.viz.results import arm_scores, gap_heat, learning_curves, panels, score_against, slopes
from uhl.viz.routing import routing_explorer, routing_map, routing_table
from uhl.viz.searches import search_history, search_importance, search_parallel, search_rates
from uhl.viz.speed import WAYS, roofline, speed_of_weights

__all__ = [
    "BASELINE",
    "CONTROL",
    "FAMILIES",
    "LOOKS",
    "NAMES",
    "OF_BYTES",
    "ORDER",
    "OURS",
    "WAYS",
    "arm_scores",
    "attempt_changes",
    "attempt_scores",
    "calibration",
    "compression",
    "expected",
    "foretold",
    "gap_heat",
    "heat",
    "in_order",
    "learning_curves",
    "loss_curves",
    "losses",
    "mixer_curves",
    "mixer_table",
    "panels",
    "roofline",
    "routing_explorer",
    "routing_map",
    "routing_table",
    "save_fig",
    "score_against",
    "score_against_anchor_bytes",
    "search_history",
    "search_importance",
    "search_parallel",
    "search_rates",
    "slopes",
    "speed_of_weights",
    "stamp",
    "style",
    "with_alone",
]
