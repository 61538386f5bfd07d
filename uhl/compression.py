"""A trained adapter on pruned copies of its own source: what is left of its score when the source is compressed.

A copy is not trained after it was pruned, so its own functions are damaged too. The control `head`, a head fitted to
the labels on the bare copy, says what the copy itself still knows. Notebook 10 shows the results.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace

from uhl import baselines, runs, stages
from uhl.anchors import observe
from uhl.config import Arm
from uhl.errors import UHLError
from uhl.files import sha256
from uhl.frame import Basis
from uhl.host import find_slots
from uhl.models import Encoder
from uhl.outcome import Outcome
from uhl.porting import Port, port, source_basis
from uhl.pruning import kept_share
from uhl.runs import Settings
from uhl.tasks import Task
from uhl.train import Classifier

ARMS: tuple[Arm, ...] = ("anchor", "zero-atoms", "random-p")
Told = Callable[[str], None]  # hears what is about to be measured


def measure(settings: Settings, told: Told | None = None) -> list[Outcome]:
    """Score the canonical adapter's file on test, on the source and on its pruned copies (the settings' ``copies``): by
    `lineage` where the width is the source's, by :data:`ARMS`, and a head fitted to labels (`head`). Rows go by the
    copy's name as ``target``.

    A copy that was measured before with the same file and data is read back. Raises :class:`UHLError` for a cut that
    the source does not allow.
    """
    settings = settings.model_copy(update={"splits": ("test",)})
    task, whole = stages.load_data(settings), stages.freeze(stages.load_encoder(settings.source))
    adapter, path = stages.adapter_for(settings, "anchor")
    stages.check_labels(adapter, settings.task_name, task)
    names = [settings.source, *(f"{settings.source}@{cut}" for cut in settings.copies)]
    copies = [stages.freeze(stages.load_encoder(name)) for name in names]  # wrong cuts fail before any work
    shared = {"adapter": sha256(path), "data": stages.digest(task), "labels": list(task.labels), "seed": settings.seed}
    basis: Basis | None = None
    outcomes = []
    for copy in copies:
        folder = runs.cell_dir(settings, "compress") / runs.slug(copy.name)
        about = shared | {"copy": copy.name, "revision": copy.revision, "kept": kept_share(copy.model, whole.model)}
        outcome = Outcome.kept(settings, task, folder, about)
        if outcome is None:
            if told:
                told(copy.name)
            basis = basis or source_basis(adapter, whole)
            outcome = _measured(settings, task, copy, basis)
            outcome.keep(folder, about)
        outcome.details["kept"] = about["kept"]
        outcomes.append(outcome)
    return outcomes


def _measured(settings: Settings, task: Task, copy: Encoder, basis: Basis) -> Outcome:
    """All arms on one copy, then the fitted head."""
    outcome = Outcome(settings, task)
    adapter, path = stages.adapter_for(settings, "anchor")
    free = {"phase": "zero-shot", "trainable_params": 0}
    for ported in _ports(settings, copy, basis):
        known = free | {"arm": ported.arm, "seconds": ported.report.get("seconds", 0.0)}
        outcome.score_adapter(adapter, path, copy, ported.frame, ported.scale, **known)
    probe = replace(stages.probe(settings, task).first(), words=0)
    begin = baselines.start(copy, task, probe, settings.max_length)
    size = baselines.head_size(begin.part, begin.frame)
    known = {"arm": "head", "phase": "retrained", "adapter_bytes": size, "extra_flops_pct": 0.0}
    known |= {"trainable_params": begin.part.head.numel() + begin.part.head_bias.numel(), "seconds": begin.seconds}
    outcome.score(Classifier(copy.model, begin.part, begin.frame), copy, **known)
    return outcome


def _ports(settings: Settings, copy: Encoder, basis: Basis) -> Iterator[Port]:
    adapter, _ = stages.adapter_for(settings, "anchor")
    if adapter.anchors is None:
        raise UHLError("the adapter has no anchors; pre-train a canonical one")
    if basis.read[0].shape[1] == copy.width:
        yield Port("lineage", basis.frame(find_slots(copy.model, adapter.config.types)), 1.0)
    seen = observe(copy, adapter.anchors.probe)
    for arm in ARMS:
        yield port(adapter, copy, settings.task_name, arm, seed=settings.seed, seen=seen)
