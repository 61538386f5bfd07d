"""Runs: checked parameters, one folder and one manifest a cell, and the results table made from the manifests.

A *cell* is one notebook run for one task, seed and, where it has one, target. Its folder holds the executed notebook,
its files and `manifest.json` (parameters, seed, versions, model revisions, result rows, artefacts with bytes and
sha256). The manifest is written last, so a cell without one is not done. `results.csv`, for people, is the rows of all
manifests of a profile, in a fixed order; it is made again whenever a manifest is written, and never read.
"""

from __future__ import annotations

import ast
import fcntl
import json
import logging
import os
import platform
import re
import subprocess
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import lru_cache
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal, TypeVar

import numpy as np
import pandas as pd
import torch
import transformers
from pydantic import Field, field_validator

from uhl import files, pruning
from uhl.adapter import check_task_name
from uhl.config import ARMS, Arm, Kind, Method, ProjectorKind, Sizes, TrainConfig, _Strict
from uhl.errors import UHLError
from uhl.files import sha256, write_csv, write_text
from uhl.progress import batch as batch
from uhl.readers import TaskSpec

COLUMNS = (
    *("profile", "source", "target", "task", "arm", "phase", "seed", "split", "metric", "score", "n"),
    *("adapter_bytes", "trainable_params", "extra_flops_pct", "active_atoms", "seconds"),
    *("steps", "peak_mb"),
)
MAY_LACK = ("steps", "peak_mb")  # of what does not train
PROTOCOL = 2  # raised whenever the same settings begin to measure something else; see manifests
PHASES = ("source", "zero-shot", "tuned", "retrained")
VERSIONED = ("torch", "transformers", "peft", "datasets", "numpy", "safetensors", "scikit-learn")
LITERALS = (str, int, float, bool, list, tuple, dict, type(None))


S = TypeVar("S", bound=_Strict)


class Settings(_Strict):
    """Parameters of the workbook's notebooks: every name that a parameter file or papermill may set."""

    profile: str = Field("demo", description="names the folder under runs/")
    source: str = Field("minilm-l6", description="model that the adapter is trained on")
    target: str = Field("minilm-l3", description="model that the adapter is ported to")
    hosts: tuple[Literal["source", "target"], ...] = Field(("source",), description="where the baselines run")
    projectors: tuple[ProjectorKind, ...] = Field(("canonical", "dimension"), description="adapters to pre-train")
    task: str = Field("movies", description="task, by name, hub id or path ($VARIABLES too)")
    kind: Kind | None = Field(None, description="of a task by hub id or path: sentence, pair or token")
    columns: dict[str, str] = Field({}, description="of such a task: our column names to its own")
    labels: tuple[str, ...] = Field((), description="of such a task: its classes in order; none: sorted")
    config: str | None = Field(None, description="of a task by hub id that has several: which one")
    source_task: str | None = Field(
        None, description="task whose adapter is used, by its name in the same profile, and not trained; None: the task"
    )
    seed: int = Field(0, ge=0, lt=1 << 32)
    train_size: int | None = Field(None, ge=8, description="labelled examples; None: all")
    unlabelled: int = Field(0, ge=0, description="training texts set aside without labels, for in-domain anchors")
    eval_size: int | None = Field(None, ge=8, description="most examples of dev and of test; None: all")
    splits: tuple[Literal["dev", "test"], ...] = Field(("dev", "test"), min_length=1, description="splits to score")
    anchors: int = Field(512, ge=16)
    more_anchors: int = Field(0, ge=0, description="at most so many further texts, which have the logits alone")
    generic_anchors: int = Field(0, ge=0, description="sentences of no task beside these, which have the logits alone")
    anchor_words: int = Field(1, ge=0, le=16, description="words of each anchor text that have codes of the stream")
    anchor_cuts: int = Field(3, ge=0, le=16, description="fragments of each text but the generic, with logits alone")
    anchor_dims: int | None = Field(None, ge=1, description="coordinates of these codes; None: all")
    anchor_text: str = Field("generic", description="generic, in-domain (the task's unlabelled split), or train")
    steps: int | None = Field(None, ge=1, description="of training on the source; None: ``epochs`` passes")
    epochs: float = Field(2.0, gt=0)
    batch: int = Field(32, ge=1)
    max_length: int = Field(64, ge=8)
    bf16: bool = Field(False, description="train under bfloat16 autocast; ports and scores stay float32")
    teacher: Method | None = Field(
        None,
        description="method that trains the source on the same labels first, to teach the adapter; None: no teacher",
    )
    teacher_weight: float = Field(0.7, ge=0, le=1, description="of its word beside a label")
    rate: float = Field(5e-3, gt=0, description="dictionary and router of a canonical adapter")
    dimension_rate: float = Field(1e-2, gt=0, description="dictionary, router and projector of a dimension adapter")
    mixer_rate: float = Field(1e-2, gt=0)
    head_rate: float = Field(1e-3, gt=0, description="of every method, on the source and on targets")
    baselines: tuple[Method, ...] = Field(("head", "lora-r8", "full"), min_length=1, description="methods to compare")
    bitfit_rate: float = Field(1e-3, gt=0, description="learning rate of each method beside its head")
    lora_rate: float = Field(3e-3, gt=0)
    lora_1mb_rate: float = Field(3e-3, gt=0)
    vera_rate: float = Field(1e-1, gt=0)
    vb_lora_rate: float = Field(1e-2, gt=0)
    uni_lora_rate: float = Field(1e-2, gt=0)
    sat_lora_rate: float = Field(5e-3, gt=0)
    hf_sat_lora_rate: float = Field(5e-3, gt=0)
    full_rate: float = Field(1e-4, gt=0)
    lambda_f: float = Field(0.01, ge=0)
    lambda_q: float = Field(1e-5, ge=0)
    alpha: float = Field(1.0, gt=0)
    top_k: int = Field(2, ge=1)
    arms: tuple[Arm, ...] = Field(ARMS, min_length=1, description="arms and controls that are ported")
    refresh_steps: int = Field(200, ge=1, description="label-free steps of the arms that refresh")
    attempts: tuple[str, ...] = Field(("head", "scale"), description="groups of notebook 07; uhl.attempts.GROUPS")
    copies: tuple[str, ...] = Field(
        ("layers=4", "heads=6", "neurons=768", "width=256"), description="pruned copies of the source; uhl.pruning"
    )
    tune_steps: int = Field(500, ge=1)
    tune_batch: int = Field(16, ge=1)
    tune_rate: float = Field(1e-2, gt=0, description="learning rate of the task bias")

    @field_validator("labels", "arms", "splits", "baselines", "projectors", "hosts")
    @classmethod
    def _each_once(cls, names: tuple[str, ...]) -> tuple[str, ...]:
        if twice := [name for name in names if names.count(name) > 1]:
            raise ValueError(f"{twice[0]!r} stands there twice; name each once")
        return names

    @field_validator("copies")
    @classmethod
    def _cuts(cls, copies: tuple[str, ...]) -> tuple[str, ...]:
        for cut in copies:
            pruning.Cut.of(cut)
        return copies

    @field_validator("task")
    @classmethod
    def _named(cls, task: str) -> str:
        check_task_name(slug(task).split(".")[0])
        return task

    @field_validator("source_task")
    @classmethod
    def _by_name(cls, task: str | None) -> str | None:
        if task is not None and task != (name := slug(task).split(".")[0]):
            raise ValueError(f"cells are called by a task's name alone; write {name!r}")
        return None if task is None else cls._named(task)

    @property
    def task_name(self) -> str:
        """What adapters, cells and result rows call the task: the last part of its name, without a suffix."""
        return slug(self.task).split(".")[0]

    @property
    def borrowed(self) -> bool:
        """Whether the adapter is that of another task."""
        return self.source_task not in {None, self.task_name}

    def task_spec(self) -> str | TaskSpec:
        """What :func:`uhl.tasks.load_task` takes. Environment variables in the task's path are filled in; one that is
        not set is a :class:`UHLError`.
        """
        path = os.path.expandvars(self.task)
        if unset := re.search(r"\$\{?(\w+)", path):
            raise UHLError(f"task {self.task}: set {unset[1]} in the environment, to the folder that holds the data")
        if self.kind is not None:
            return TaskSpec(path, self.kind, self.columns, self.labels, self.config)
        if self.columns or self.labels or self.config:
            raise UHLError("`columns`, `labels` and `config` describe a task by hub id or path; set `kind` too")
        return path

    def adapter_config(self, projector: str) -> Sizes:
        """Sizes of an adapter trained under these settings."""
        return Sizes(projector=projector, seed=self.seed, alpha=self.alpha, top_k=self.top_k)

    def train_config(self, **changes: object) -> TrainConfig:
        """Training settings; ``changes`` override single ones."""
        shared = {k: getattr(self, k) for k in TrainConfig.model_fields if hasattr(self, k)}
        return TrainConfig(**{**shared, **changes})


def read_parameters(namespace: Mapping[str, object], kind: type[S] = Settings) -> S:  # type: ignore[assignment]
    """Check a notebook's parameters: the names that its parameters cell, or papermill, set to plain values.

    In a live kernel these are the cells of nothing but literals before the calling one, so that a notebook may be run
    again where later cells have left plain values behind. Elsewhere all plain values of ``namespace`` count. Raises
    :class:`UHLError` for a name that is no setting (papermill itself only warns) and for a wrong value.
    """
    found = {
        k: v for k, v in namespace.items() if not k.startswith("_") and isinstance(v, LITERALS) and k not in _IPYTHON
    }
    cells = namespace.get("In")
    if isinstance(cells, list) and (names := _parameter_names(cells[:-1])):
        found = {k: v for k, v in found.items() if k in names}
    return kind(**found)


_IPYTHON = {"In", "Out"}


def _parameter_names(cells: Sequence[str]) -> set[str]:
    """Names set in the last unbroken run of executed cells that hold only assignments of literals."""
    names: set[str] = set()
    for cell in reversed(cells):
        assigned = _literal_names(cell)
        if names and assigned is None:
            break
        names |= assigned or set()
    return names


def _literal_names(cell: str) -> set[str] | None:
    """Names that a cell sets to literals; None for a cell that does anything else."""
    try:
        body = ast.parse(cell).body
        for statement in body:
            if not isinstance(statement, ast.Assign):
                return None
            ast.literal_eval(statement.value)
    except (SyntaxError, ValueError):
        return None
    return {t.id for s in body if isinstance(s, ast.Assign) for t in s.targets if isinstance(t, ast.Name)}


def read_yaml(path: str | Path) -> dict[str, Any]:
    """A parameter file as a dictionary, its settings checked."""
    path = Path(path)
    if not path.is_file():
        raise UHLError(f"parameter file {path} does not exist; see the folder params/")
    values = files.read_yaml(path) or {}
    if not isinstance(values, dict) or not all(isinstance(name, str) for name in values):
        raise UHLError(f"{path} must map names of settings to values")
    Settings(**values)
    return values


# --- cells -----------------------------------------------------------------------------------------------------------


def root() -> Path:
    """The folder of all runs: ``UHL_RUNS`` where it is set, else ``runs/`` beside the package."""
    return Path(os.environ.get("UHL_RUNS") or Path(__file__).parent.parent / "runs")


def cell_dir(settings: Settings, stage: str) -> Path:
    """Folder of a cell: runs/<profile>/<task>-s<seed>/<stage>."""
    return root() / settings.profile / f"{settings.task_name}-s{settings.seed}" / stage


def slug(name: str) -> str:
    """The last part of a model's or a task's name, as cells are named."""
    return Path(name).name


def row(settings: Settings, **values: object) -> dict[str, object]:
    """A result row with every column of the contract; unknown columns and phases are errors."""
    made: dict[str, object] = dict.fromkeys(COLUMNS)
    made |= {"profile": settings.profile, "source": settings.source, "task": settings.task_name, "seed": settings.seed}
    made |= values
    unknown = set(made) - set(COLUMNS)
    if unknown or made["phase"] not in PHASES:
        raise UHLError(f"result row: unknown column {unknown or ''} or phase {made['phase']!r}; phases: {PHASES}")
    return made


def write_manifest(
    settings: Settings,
    stage: str,
    rows: Sequence[Mapping[str, object]],
    artefacts: Sequence[str | Path] = (),
    **extra: object,
) -> Path:
    """Finish a cell: write its manifest, then make the profile's results.csv again."""
    folder = cell_dir(settings, stage)
    files = {Path(a).name: {"bytes": Path(a).stat().st_size, "sha256": sha256(a)} for a in artefacts}
    entry = {
        "stage": stage,
        "protocol": PROTOCOL,
        "parameters": settings.model_dump(),
        "seed": settings.seed,
        "versions": versions(),
        "hardware": hardware(),
        "commit": commit(),
        "rows": list(rows),
        "artefacts": files,
        **extra,
    }
    path = write_text(folder / "manifest.json", json.dumps(entry, indent=1))
    update_results(settings.profile)
    return path


def filled(parameters: Mapping[str, Any]) -> dict[str, Any]:
    """A manifest's parameters; settings that are newer than it have their defaults."""
    return Settings().model_dump(mode="json") | dict(parameters)


def manifests(profile: str, older: bool = False) -> dict[Path, dict[str, Any]]:
    """Folder to manifest of the finished cells of a profile, in order; files that did not change are parsed once.

    Cells of different protocols are not to be compared: those of the newest that is there, or the ``older`` ones.
    """
    paths = sorted((root() / profile).glob("*-s*/*/manifest.json"))
    found = {path.parent: manifest(path) for path in paths}
    newest = max(map(protocol, found.values()), default=PROTOCOL)
    return {cell: entry for cell, entry in found.items() if (protocol(entry) < newest) == older}


def protocol(entry: Mapping[str, Any]) -> int:
    """By which :data:`PROTOCOL` a cell was measured, from its manifest; the first was not named."""
    return int(entry.get("protocol", 1))


def manifest(path: Path) -> dict[str, Any]:
    """A cell's manifest."""
    return _read_manifest(path, path.stat().st_mtime_ns)


def same(path: Path, asked: Mapping[str, Any]) -> dict[str, Any] | None:
    """A cell's manifest, where there is one that was made by this protocol with such settings (JSON values)."""
    found = manifest(path) if path.is_file() else {"parameters": {}}
    had = filled(found["parameters"])
    return found if protocol(found) == PROTOCOL and all(had[name] == asked[name] for name in asked) else None


@lru_cache(maxsize=4096)
def _read_manifest(path: Path, _changed: int) -> dict[str, Any]:
    remedy = "delete its folder and run the cell again"
    try:
        entry = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UHLError(f"{path} is damaged ({error}); {remedy}") from error
    if not isinstance(entry, dict) or "rows" not in entry:
        raise UHLError(f"{path} is not a cell's manifest; {remedy}")
    return entry


def update_results(profile: str) -> Path:
    """Make ``results.csv`` of a profile from its :func:`manifests`, under a lock, and return its path."""
    folder = root() / profile
    with locked(folder / ".results.lock"):
        return write_csv(folder / "results.csv", _rows(profile))


def _rows(profile: str) -> pd.DataFrame:
    rows = [row for entry in manifests(profile).values() for row in entry["rows"]]
    return pd.DataFrame(rows, columns=list(COLUMNS))


def load_results(profile: str) -> pd.DataFrame:
    """The rows of a profile's :func:`manifests`, checked: one profile, no repeated cell, and numbers that are numbers
    and, but in :data:`MAY_LACK`, there.
    """
    place, frame = root() / profile, _rows(profile)
    if not manifests(profile):
        raise UHLError(f"{place} has no finished cells; run the profile first: make run PROFILE={profile}")
    keys = ["target", "task", "arm", "phase", "seed", "split"]
    words = {"profile", "source", "metric", *keys} - {"seed"}
    for name in (column for column in COLUMNS if column not in words):
        numbers = pd.to_numeric(frame[name], errors="coerce")
        if (wrong := ~np.isfinite(numbers) & (frame[name].notna() | (name not in MAY_LACK))).any():
            row = frame[wrong].iloc[0]
            said = "nothing" if pd.isna(row[name]) else repr(row[name])
            raise UHLError(
                f"{place}: {said} for {name} of {', '.join(str(row[key]) for key in keys)}, and {int(wrong.sum())} "
                "such rows in all; delete the folders of these cells and run them again"
            )
        frame[name] = numbers
    if others := sorted(set(frame["profile"].map(str)) - {profile}):
        raise UHLError(f"{place} holds rows of profile {', '.join(others)}; move their cells to a folder of that name")
    if len(repeated := frame[frame.duplicated(keys)]):
        rows = "; ".join(", ".join(map(str, row)) for row in repeated[keys].drop_duplicates().head(3).values)
        raise UHLError(
            f"{place} holds {len(repeated)} repeated rows, such as {rows}: two cells measured the same; delete one of "
            "their folders"
        )
    return frame


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """Wait until no other process holds the file, and hold it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "w") as handle:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield


def hardware() -> str:
    """The processor or accelerator and the number of threads, in words."""
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    name = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.is_file():
        lines = [line for line in info.read_text().splitlines() if line.startswith("model name")]
        name = lines[0].split(":", 1)[1].strip() if lines else name
    return f"{name}, {torch.get_num_threads()} threads"


def versions() -> dict[str, str]:
    """What the results depend on, with its version."""
    return {name: version(name) for name in VERSIONED}


def commit() -> str:
    """Short hash of the checked-out commit, `-dirty` where files differ, or `unknown` outside a checkout.

    UHL_COMMIT says it where git cannot: in a copy on another machine.
    """
    if said := os.environ.get("UHL_COMMIT"):
        return said
    call = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty", "--abbrev=10"]
    done = subprocess.run(call, capture_output=True, text=True, check=False)
    return done.stdout.strip() or "unknown"


def resumed(
    measure: Callable[..., pd.DataFrame], keys: Sequence[dict[str, Any]], file: str | Path | None
) -> pd.DataFrame:
    """``measure(**key)`` of each distinct key, with the key's columns, the machine's and the commit's.

    With ``file`` (CSV) each is kept as soon as it is measured, and what is in it of this machine and commit is not
    measured again, where that commit is known and the files are as it has them.
    """
    keys = [dict(items) for items in dict.fromkeys(tuple(key.items()) for key in keys)]
    text = {"machine": str, "commit": str}  # a hash may look like a number
    kept = pd.read_csv(file, dtype=text) if file is not None and Path(file).exists() else pd.DataFrame()
    where = {"machine": hardware(), "commit": commit()}
    if re.search("dirty|unknown", where["commit"]) and "commit" in kept.columns:
        kept = kept[kept["commit"] != where["commit"]]  # of other files, perhaps
    parts = []
    for number, key in enumerate(keys, 1):
        columns = key | where
        known = set(columns) <= set(kept.columns)
        part = kept[(kept[list(columns)] == pd.Series(columns)).all(axis=1)] if known else kept[:0]
        if part.empty:
            what = ", ".join(f"{k} {v}" for k, v in key.items())
            logging.getLogger("uhl").info("%d of %d: %s", number, len(keys), what)
            part = measure(**key).assign(**columns)
            kept = pd.concat([kept, part], ignore_index=True)
            if file is not None:
                write_csv(file, kept)
        parts.append(part)
    return pd.concat(parts, ignore_index=True)


def quiet() -> None:
    """No progress bars and no chatter, for batch runs and for notebooks whose output is compared.

    What is odd about data or a file is still said. A poor port is said in its report, and not logged beside.
    """
    import datasets

    logging.getLogger("uhl").setLevel(logging.WARNING)
    logging.getLogger("uhl.porting").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", message=".*is_gradient_checkpointing.*")  # transformers warns itself
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    datasets.disable_progress_bars()
