"""What a stage leaves: result rows, per-example predictions and details, gathered as scores are measured.

A cell ends with :meth:`Outcome.finish`, which writes predictions, figures and, last, the manifest.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from uhl import budget, evidence, models, runs, stats, tasks, viz
from uhl.adapter import UHLAdapter
from uhl.files import sha256, write_npz, write_text
from uhl.frame import Frame
from uhl.host import find_slots
from uhl.layer import Attached
from uhl.models import Encoder
from uhl.porting import at_work
from uhl.runs import Settings
from uhl.tasks import Task
from uhl.train import Classifier, Prediction, predict


def flops_pct(attached: Attached, encoder: Encoder) -> float:
    """An adapter's FLOPs on its host in percent of the host's linear layers."""
    slots = find_slots(encoder.model)
    return budget.extra_flops_pct(attached.adapter.config, attached.slots, slots, encoder.width, attached.stream)


@dataclass
class Outcome:
    """Rows of the results contract, predictions by arm and split, files written, and details for figures."""

    settings: Settings
    task: Task
    rows: list[dict[str, object]] = field(default_factory=list)
    predictions: dict[str, Prediction] = field(default_factory=dict)
    paths: list[Path] = field(default_factory=list)
    curves: dict[str, list[tuple[int, float]]] = field(default_factory=dict)  # training loss by step, of each arm
    commits: set[str] = field(default_factory=set)  # of rows that an earlier process measured, and where it ran
    hardware: set[str] = field(default_factory=set)
    adapters: dict[str, str] = field(default_factory=dict)  # sha256 of the trained files in use, by their stage
    rules: int | None = None  # of the anchored ports that were scored, uhl.porting.port_rules; None where none was
    details: dict[str, Any] = field(default_factory=dict)

    def score(self, classifier: Classifier, encoder: Encoder, **known: object) -> None:
        """Predict the splits that are scored and add a row for each; ``known`` are the row's other columns."""
        for split in self.settings.splits:
            found = predict(classifier, encoder, self.task, split, max_length=self.settings.max_length)
            self._add(encoder, split, found, known)

    def score_adapter(
        self, adapter: UHLAdapter, path: Path, encoder: Encoder, frame: Frame | None, scale: float, **known: object
    ) -> None:
        """Score an adapter read from ``path`` in a host's frame; where no atom acts, no FLOPs are paid."""
        name = self.settings.task_name
        with at_work(adapter, encoder, name, frame, scale) as attached:
            classifier = Classifier(encoder.model, adapter.task(name), frame, attached)
            cost = flops_pct(attached, encoder) if attached else 0.0
            self.score(classifier, encoder, adapter_bytes=path.stat().st_size, extra_flops_pct=cost, **known)

    def score_majority(self, encoder: Encoder) -> None:
        """Rows of the most frequent training class: what a host without an adapter and without labels can say."""
        zeros: dict[str, object] = dict.fromkeys(("adapter_bytes", "trainable_params", "extra_flops_pct", "seconds"), 0)
        for split in self.settings.splits:
            guess, value = tasks.majority(self.task, split)
            found = Prediction(guess, tasks.gold_labels(self.task, split), [], value, 0.0)
            self._add(encoder, split, found, zeros | {"arm": "no-adapter", "phase": "zero-shot"})

    def _add(self, encoder: Encoder, split: str, found: Prediction, known: Mapping[str, object]) -> None:
        self.predictions[f"{known['arm']}/{split}"] = found
        place = {"target": encoder.name, "split": split, "metric": self.task.metric}
        measured = {"score": found.score, "n": len(found.gold), "active_atoms": found.active}
        self.rows.append(runs.row(self.settings, **place, **measured, **known))

    def counts(self, arm: str, split: str = "test") -> np.ndarray:
        """Counts (1, n, 3) of an arm's predictions, see :func:`uhl.stats.counts`."""
        found = self.predictions[f"{arm}/{split}"]
        return stats.counts(found.labels, found.gold, self.task.labels if self.task.kind == "token" else None)[None]

    def groups(self, split: str = "test") -> np.ndarray | None:
        """The group of each example, where the task's examples come in groups: of one review, on one passage."""
        return tasks.groups(self.task, split)

    @property
    def split(self) -> str:
        """The one to report: test, where it is scored."""
        return "test" if "test" in self.settings.splits else self.settings.splits[-1]

    def table(self, split: str | None = None) -> pd.DataFrame:
        """A split's rows, by default :attr:`split`'s, with the interval of each score, columns ``low`` and ``high``."""
        split = split or self.split
        rows = pd.DataFrame([row for row in self.rows if row["split"] == split])
        made = [stats.interval(self.counts(arm, split), self.groups(split)) for arm in rows["arm"]]
        return rows.assign(low=[i.low for i in made], high=[i.high for i in made])

    def difference(self, first: str, second: str, split: str | None = None) -> stats.Difference:
        """Paired difference of two arms in points, on the same split by default."""
        split = split or self.split
        return stats.difference(self.counts(first, split), self.counts(second, split), self.groups(split))

    def finish(
        self, stage: str, figures: Mapping[str, tuple[Figure, pd.DataFrame]] | None = None, **extra: object
    ) -> Path:
        """Write the cell's predictions, figures and, last, its manifest; returns the manifest's path."""
        folder = runs.cell_dir(self.settings, stage)
        written = [self._save_predictions(folder / evidence.PREDICTIONS)]
        made = [viz.save_fig(fig, folder / name, data) for name, (fig, data) in (figures or {}).items()]
        written += [file for picture in made for file in (picture, picture.with_suffix(".csv"))]
        used = dict.fromkeys([self.settings.source, *(str(row["target"]) for row in self.rows)])
        extra |= {"data": tasks.digest(self.task), "labels": list(self.task.labels)}
        extra |= {"models": {name: models.revision(name) for name in used}}
        extra |= {"curves": self.curves, "commit": ", ".join(sorted({*self.commits, runs.commit()}))}
        extra |= {"adapters": self.adapters, "rules": self.rules} if self.adapters else {}
        extra["hardware"] = " and ".join(sorted(self.hardware or {runs.hardware()}))
        return runs.write_manifest(self.settings, stage, self.rows, written + self.paths, **extra)

    def keep(self, folder: Path, about: Mapping[str, object]) -> None:
        """Write rows, predictions, curves and details into a folder of their own, for :meth:`kept`; ``about`` says what
        ran. Files that were written stay beside that folder.
        """
        (folder / "outcome.json").unlink(missing_ok=True)  # it says that the predictions are those of its run
        self._save_predictions(folder / evidence.PREDICTIONS)
        self.hardware = {runs.hardware()}
        where = {"commit": runs.commit(), "hardware": runs.hardware()}
        entry: dict[str, Any] = {"about": _dated(about), **where, "rows": self.rows, "curves": self.curves}
        entry |= {"details": self.details, "adapters": self.adapters, "rules": self.rules}
        entry["files"] = {path.name: sha256(path) for path in self.paths}
        write_text(folder / "outcome.json", json.dumps(entry, indent=1))

    @classmethod
    def kept(cls, settings: Settings, task: Task, folder: Path, about: Mapping[str, object]) -> Outcome | None:
        """What :meth:`keep` wrote about the same run, for an interrupted cell to go on with; else None."""
        try:
            entry = json.loads((folder / "outcome.json").read_text(encoding="utf-8"))
            told = runs.filled(entry["about"])
            if any(told.get(name) != value for name, value in json.loads(json.dumps(_dated(about))).items()):
                return None
            found = cls._read(settings, task, folder, entry["rows"], entry)
            found.details = entry.get("details", {})
            found.adapters, found.rules = entry.get("adapters", {}), entry.get("rules")
            found.paths = [folder.parent / name for name in entry.get("files", {})]
            if any(sha256(path) != entry["files"][path.name] for path in found.paths):
                return None
        except evidence.BROKEN:
            return None  # there is none, or it is not whole
        return found

    @classmethod
    def of_cell(cls, settings: Settings, task: Task, cell: Path, entry: Mapping[str, Any], arm: str) -> Outcome | None:
        """One arm of a finished cell, whose manifest is ``entry``, as an outcome of these settings; None where the arm
        is not there or not whole, or the cell's data was other, as far as it tells.
        """
        rows = [{**row, "profile": settings.profile} for row in entry["rows"] if row["arm"] == arm]
        data = tasks.digest(task)
        if entry.get("data", data) != data:
            return None
        try:
            found = cls._read(settings, task, cell, rows, {**entry, "curves": {arm: entry["curves"][arm]}})
        except evidence.BROKEN:
            return None
        wanted = {f"{arm}/{split}": tasks.gold_labels(task, split) for split in settings.splits}
        return found if {name: said.gold for name, said in found.predictions.items()} == wanted else None

    @classmethod
    def _read(
        cls, settings: Settings, task: Task, folder: Path, rows: list[dict[str, object]], entry: Mapping[str, Any]
    ) -> Outcome:
        """Rows with their predictions, curves, and where they ran; raises one of :data:`uhl.evidence.BROKEN`."""
        curves = {arm: [(step, loss) for step, loss in losses] for arm, losses in entry["curves"].items()}
        found = cls(settings, task, rows, curves=curves, commits=set(entry["commit"].split(", ")))
        found.hardware = set(entry["hardware"].split(" and "))
        with np.load(folder / evidence.PREDICTIONS) as arrays:
            for row in rows:
                name = f"{row['arm']}/{row['split']}"
                found.predictions[name] = _stored(arrays, name, row, task.kind == "token")
        return found

    def _save_predictions(self, path: Path) -> Path:
        """Predictions and gold labels, compressed, so that scores can be recomputed without a model.

        Where the task's examples come in groups (of one review), each example's group is stored too.
        """
        arrays = {f"{split}/group": g for split in ("dev", "test") if (g := self.groups(split)) is not None}
        for name, found in self.predictions.items():
            arrays[f"{name}/labels"], _ = evidence.flat(found.labels)
            arrays[f"{name}/gold"], arrays[f"{name}/length"] = evidence.flat(found.gold)
        return write_npz(path, arrays)


def _dated(about: Mapping[str, object]) -> dict[str, object]:
    return {**about, "protocol": runs.PROTOCOL}


def _stored(arrays: Mapping[str, np.ndarray], name: str, row: Mapping[str, Any], words: bool) -> Prediction:
    """A prediction as ``_save_predictions`` wrote it; logits are not stored."""
    cuts = np.cumsum(arrays[f"{name}/length"])[:-1]
    labels, gold = (
        [part.tolist() for part in np.split(x, cuts)] if words else x.tolist()
        for x in (arrays[f"{name}/labels"], arrays[f"{name}/gold"])
    )
    return Prediction(labels, gold, [], float(row["score"]), float(row["active_atoms"]))


def merge(outcomes: Iterable[Outcome]) -> Outcome:
    """Several outcomes of one cell as one."""
    first, *rest = outcomes
    merged = Outcome(first.settings, first.task, list(first.rows), dict(first.predictions), list(first.paths))
    merged.curves, merged.commits, merged.hardware = dict(first.curves), set(first.commits), set(first.hardware)
    merged.adapters = dict(first.adapters)
    for outcome in rest:
        merged.rows += outcome.rows
        merged.predictions |= outcome.predictions
        merged.paths += outcome.paths
        merged.curves |= outcome.curves
        merged.commits |= outcome.commits
        merged.hardware |= outcome.hardware
        merged.adapters |= outcome.adapters
    merged.rules = max((outcome.rules for outcome in (first, *rest) if outcome.rules), default=None)
    return merged


def learning(outcomes: Mapping[Any, Outcome]) -> pd.DataFrame:
    """Training loss of several outcomes, named by their keys: columns step, loss, run, as
    :func:`uhl.viz.loss_curves` draws them.
    """
    names = {key: key if isinstance(key, str) else " ".join(key) for key in outcomes}
    rows = [
        (step, loss, names[key])
        for key, outcome in outcomes.items()
        for losses in outcome.curves.values()
        for step, loss in losses
    ]
    return pd.DataFrame(rows, columns=["step", "loss", "run"])
