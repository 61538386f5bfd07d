"""Learning rates by dev score: the same number of trials for every method, on the source, and no test label.

A trial is an ordinary run of :mod:`uhl.stages` that scores dev alone, in runs/<profile>-search/<method>-<rate>/.
A finished trial is not run again unless its settings changed. The defaults of ``uhl.runs.Settings`` are the best
rates of figures/search.csv (both projectors share the one that is best for `canonical`). It was made by
``python -m uhl search --profile offline-full --epochs 1 --train-size 3000``.
"""

from __future__ import annotations

import json
from collections.abc import Iterator

from uhl import runs, stages
from uhl.errors import one_of
from uhl.runs import Settings

RATES: dict[str, tuple[float, ...]] = {
    "uhl-canonical": (5e-4, 2e-3, 5e-3, 1e-2),
    "uhl-dimension": (5e-4, 2e-3, 5e-3, 1e-2),
    "lora-r8": (3e-4, 1e-3, 3e-3, 1e-2),
    "full": (2e-5, 5e-5, 1e-4, 2e-4),
}
SETTING = {"uhl-canonical": "rate", "uhl-dimension": "rate", "lora-r8": "lora_rate", "full": "full_rate"}


def trial(settings: Settings, method: str, rate: float) -> dict[str, object]:
    """Train a method on the source at one rate; its dev row, with the rate."""
    one_of(method, tuple(RATES), "method to search")
    profile = f"{settings.profile}-search/{method}-{rate:g}"
    chosen = settings.model_copy(update={"profile": profile, SETTING[method]: rate, "splits": ("dev",)})
    path = runs.cell_dir(chosen, "trial") / "manifest.json"
    others = set(SETTING.values()) - {SETTING[method]}  # rates that this method does not use
    if not path.is_file() or _without(json.loads(path.read_text())["parameters"], others) != _without(
        chosen.model_dump(mode="json"), others
    ):
        if method.startswith("uhl-"):
            _, outcome = stages.pretrain(chosen, method.removeprefix("uhl-"))
        else:
            outcome = stages.baseline(chosen, "source", method, stages.baseline_start(chosen, "source"))
        runs.write_manifest(chosen, "trial", outcome.rows)
    (row,) = json.loads(path.read_text())["rows"]
    size, epochs = settings.train_size, settings.epochs
    known = {"method": method, "rate": rate, "task": settings.task, "train_size": size, "epochs": epochs}
    return (
        known
        | {"seed": settings.seed}
        | {key: row[key] for key in ("split", "metric", "score", "n", "active_atoms", "seconds")}
    )


def _without(parameters: dict[str, object], names: set[str]) -> dict[str, object]:
    return {k: v for k, v in parameters.items() if k not in names}


def search(settings: Settings, methods: tuple[str, ...] = ()) -> Iterator[dict[str, object]]:
    """All trials of some methods (none named: of every one), one row each as they finish."""
    for method in methods or RATES:
        for rate in RATES[one_of(method, tuple(RATES), "method to search")]:
            yield trial(settings, method, rate)
