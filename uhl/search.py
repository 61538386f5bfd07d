"""Settings by dev score: what ``params/<profile>/search.yaml`` lists for each method, on the source, and no test label.

The file maps a method to settings and the values to try; a trial changes one of them and keeps the profile's others.
A trial is an ordinary run of :mod:`uhl.stages` that scores dev alone, under
runs/<profile>-search/<method>-<setting>-<value>/. A finished trial is not run again unless its settings changed. The
default rates of ``uhl.runs.Settings`` are the best of figures/search.csv (both projectors share the one that is best
for `canonical`). It was made by ``uhl search --profile offline-full --epochs 1 --train-size 3000``.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import yaml

from uhl import runs, stages
from uhl.baselines import RATES
from uhl.errors import UHLError, one_of
from uhl.runs import Settings

METHODS = ("uhl-canonical", "uhl-dimension", *RATES)
UNUSED = {*RATES.values(), "baselines", "arms"}  # settings that belong to one baseline alone, or to none
Ranges = Mapping[str, Mapping[str, list[Any]]]


def read_ranges(path: Path) -> Ranges:
    """A search file, checked: known methods, known settings, lists of values that the settings take."""
    if not path.is_file():
        raise UHLError(f"{path} does not exist; it maps methods to settings and lists of values to try")
    found = yaml.safe_load(path.read_text(encoding="utf-8"))
    if not isinstance(found, dict) or not all(isinstance(v, dict) for v in found.values()):
        raise UHLError(f"{path} must map methods to settings and lists of values")
    for method, ranges in found.items():
        one_of(method, METHODS, "method to search")
        for setting, values in ranges.items():
            if not isinstance(values, list) or not values:
                raise UHLError(f"{path}, {method}, {setting}: expected a list of values to try, got {values!r}")
            for value in values:
                Settings(**{setting: value})
    return found


def trial(settings: Settings, method: str, setting: str, value: Any) -> dict[str, object]:
    """Train a method on the source with one setting changed; its dev row, with the setting."""
    one_of(method, METHODS, "method to search")
    profile = f"{settings.profile}-search/{method}-{setting}-{value:g}"
    chosen = settings.model_copy(update={"profile": profile, setting: value, "splits": ("dev",)})
    path = runs.cell_dir(chosen, "trial") / "manifest.json"
    others = UNUSED - {setting}  # another default there makes no other trial
    if not path.is_file() or _without(json.loads(path.read_text())["parameters"], others) != _without(
        chosen.model_dump(mode="json"), others
    ):
        if method.startswith("uhl-"):
            _, outcome = stages.pretrain(chosen, method.removeprefix("uhl-"))
        else:
            outcome = stages.baseline(chosen, "source", method, stages.baseline_start(chosen, "source"))
        runs.write_manifest(chosen, "trial", outcome.rows)
    (row,) = json.loads(path.read_text())["rows"]
    known = {"method": method, "setting": setting, "value": value, "task": settings.task_name}
    known |= {"train_size": settings.train_size, "epochs": settings.epochs, "seed": settings.seed}
    return known | {key: row[key] for key in ("split", "metric", "score", "n", "active_atoms", "seconds")}


def _without(parameters: dict[str, object], names: set[str]) -> dict[str, object]:
    return {k: v for k, v in parameters.items() if k not in names}


def search(settings: Settings, ranges: Ranges, methods: tuple[str, ...] = ()) -> Iterator[dict[str, object]]:
    """All trials of some methods (none named: of every one in ``ranges``), one row each as they finish."""
    for method in methods or tuple(ranges):
        for setting, values in ranges[one_of(method, tuple(ranges), "method to search")].items():
            for value in values:
                yield trial(settings, method, setting, value)
