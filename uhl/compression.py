"""A trained adapter on pruned copies of its own source: what is left of its score when the source is compressed.

A copy is not trained after it was pruned, so its own functions are damaged too. The control `head`, a head fitted to
the labels on the bare copy, says what the copy itself still knows. Notebook 10 shows the results.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any

import pandas as pd

from uhl import baselines, pruning, runs, stages
from uhl.adapter import UHLAdapter
from uhl.config import Arm
from uhl.errors import UHLError
from uhl.files import sha256
from uhl.fits import Way
from uhl.frame import Basis
from uhl.host import find_slots
from uhl.models import Encoder
from uhl.outcome import Outcome
from uhl.porting import DOUBTFUL, RULES, Port, Shared, port, source_basis
from uhl.runs import Settings
from uhl.tasks import Task, digest

ARMS: tuple[Arm, ...] = ("anchor", "zero-atoms", "random-p")
Told = Callable[[str], None]  # hears what is about to be measured


def measure(settings: Settings, told: Told | None = None) -> list[Outcome]:
    """Score the canonical adapter's file on test, on the source and on its pruned copies (the settings' ``copies``): by
    `lineage` where the width is the source's, by :data:`ARMS`, and a head fitted to labels (`head`). Rows go by the
    copy's name as ``target``; ``details`` hold the share of weights ``kept`` and what each port said of itself.

    The source is ported to as if it were a stranger, so that its own point is made as those of its copies are. A copy
    that was measured before with the same file and data is read back. Raises :class:`UHLError` for a cut that the
    source does not allow.
    """
    settings = settings.model_copy(update={"splits": ("test",)})
    task, whole = stages.load_data(settings), stages.freeze(stages.load_encoder(settings.source))
    adapter, path = stages.adapter_for(settings, "anchor")
    stages.check_labels(adapter, settings.task_name, task)
    if reason := stages.not_taught(adapter, settings.task_name):
        raise UHLError(f"nothing to measure on pruned copies: {reason}")
    cuts = {f"{settings.source}@{text}": pruning.Cut.of(text) for text in settings.copies}
    for cut in cuts.values():  # before any work
        pruning.check(whole.model.config, cut)
    shared = {"adapter": sha256(path), "seed": settings.seed, "labels": list(task.labels), "rules": RULES}
    shared |= {"data": digest(task, _probe(settings, task).texts), "max_length": settings.max_length}
    basis: Basis | None = None
    outcomes = []
    for name, cut in [(settings.source, pruning.Cut()), *cuts.items()]:
        folder = runs.cell_dir(settings, "compress") / runs.slug(name)
        about = shared | {"copy": name, "source": whole.revision, "arms": list(ARMS)}
        outcome = Outcome.kept(settings, task, folder, about)
        if outcome is None:
            if told:
                told(name)
            basis = basis or source_basis(adapter, whole)
            copy = stages.freeze(stages.load_encoder(name))
            ports: dict[str, dict[str, object]] = {}
            kept = pruning.kept_share(copy.model, whole.model)
            outcome = Outcome(settings, task, details={"part": cut.part, "kept": kept, "ports": ports})
            for ported in _ports(settings, adapter, copy, basis):
                said, known = ported.report, {"arm": ported.arm, "phase": "zero-shot", "trainable_params": 0}
                known["seconds"] = said.get("seconds", 0.0)
                outcome.score_adapter(adapter, path, copy, ported.frame, ported.scale, **known)
                same = stages.agreement(settings, outcome.predictions[f"{ported.arm}/test"])
                told_by = {"predicted": said.get("agreement"), "kappa": said.get("kappa"), "measured": same}
                ports[ported.arm] = {"scale": ported.scale, **told_by}
            _score_head(settings, task, copy, outcome)
            outcome.keep(folder, about)
        outcomes.append(outcome)
    return outcomes


def _probe(settings: Settings, task: Task) -> stages.Probe:
    """What the fitted head's coordinates are taken from, as those of the baselines are."""
    return replace(stages.probe(settings, task).first(), words=0)


def _ports(settings: Settings, adapter: UHLAdapter, copy: Encoder, basis: Basis) -> Iterator[Port]:
    """The file as it is on the source, where the width allows; then the ports to a host of which nothing is known."""
    if basis.read[0].shape[1] == copy.width:
        yield Port("lineage", basis.frame(find_slots(copy.model, adapter.config.types)), 1.0)
    shared, way = Shared(), Way(known=False)
    for arm in ARMS:
        yield port(adapter, copy, settings.task_name, arm, seed=settings.seed, shared=shared, way=way)


def _score_head(settings: Settings, task: Task, copy: Encoder, outcome: Outcome) -> None:
    begin = baselines.start(copy, task, _probe(settings, task), settings.max_length)
    made = baselines.run_baseline("head", copy, task, begin, settings.train_config(), ".")
    sizes = {"adapter_bytes": made.bytes, "extra_flops_pct": made.extra_flops_pct}
    outcome.score(made.classifier, copy, arm="head", phase="retrained", **sizes, **made.log.costs())


PORT = ("scale", "predicted", "kappa", "measured")
COLUMNS = ("task", "copy", "part", "kept", "arm", *PORT, "warns below", "score", "low", "high", "seeds", "n")


def described(copy: str, details: dict[str, Any], ports: Sequence[dict[str, Any]], metric: str) -> dict[str, object]:
    """Columns of a copy and an arm: the copy's name, the ``part`` that was cut (`several` where it is more than one;
    empty for the source itself), the share of the linear layers' weights ``kept``; and, of the arm's ports, the means
    of the atoms' ``scale``, of the share of decisions shared with the source that the port ``predicted`` and that was
    ``measured`` on test, and of the predicted one's Cohen's ``kappa``; a port warns where that is less than
    ``warns below``.
    """
    known = {name: [p[name] for p in ports if p.get(name) is not None] for name in PORT}
    means = {name: sum(values) / len(values) if values else None for name, values in known.items()}
    return {"copy": copy, "part": details["part"], "kept": details["kept"], "warns below": DOUBTFUL[metric]} | means


def table(outcomes: Sequence[Outcome]) -> pd.DataFrame:
    """What one cell measured, in the columns of :func:`uhl.results.compressed`; intervals are over examples alone."""
    rows = []
    for outcome in outcomes:
        for row in outcome.table().to_dict("records"):
            made = [outcome.details["ports"].get(row["arm"], {})]
            rows.append(row | {"seeds": 1} | described(row["target"], outcome.details, made, row["metric"]))
    return pd.DataFrame(rows)[list(COLUMNS)]
