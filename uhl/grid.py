"""A profile's grid: which cells a batch runs, read from ``params/<profile>/grid.yaml``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from pydantic import Field

from uhl import files
from uhl.config import ProjectorKind, _Strict
from uhl.errors import UHLError
from uhl.runs import Settings, read_yaml, slug

PARAMS = Path(__file__).parent.parent / "params"


def profiles() -> list[str]:
    """Names of all profiles that have a grid."""
    return sorted(path.parent.name for path in PARAMS.glob("*/grid.yaml"))


def target_of(profile: str, name: str) -> str:
    """The model that ``params/<profile>/<name>.yaml`` names: cells are called after it, so the two must agree."""
    values = read_yaml(PARAMS / profile / f"{name}.yaml")
    model = str(values.get("target", ""))
    if slug(model) != name:
        raise UHLError(
            f"params/{profile}/{name}.yaml has target {model!r}; name the file after the last part of its target: "
            f"{slug(model) or '<target>'}.yaml"
        )
    return model


def task_file(profile: str, name: str) -> Path | None:
    """``params/<profile>/<name>.yaml`` where a task of the user's own is described there, checked; else None."""
    path = PARAMS / profile / f"{name}.yaml"
    if not path.is_file():
        return None
    settings = Settings(**read_yaml(path))
    if settings.task_name != name:
        raise UHLError(
            f"params/{profile}/{name}.yaml has task {settings.task!r}; name the file after it: "
            f"{settings.task_name}.yaml"
        )
    return path


class Grid(_Strict):
    """Targets x tasks x seeds; notebooks 00 and 01 need no batch.

    ``ported`` are further targets, not tuned on and with the baselines that their own files name; those of them that
    are in ``once`` are treated like ``targets`` for the tasks named there, with the first seed. Where there is a
    ``source_task`` all tasks have the adapter that is trained on that one. ``beside``: a profile of the same source and
    tasks, whose cells differ by one setting, for :func:`uhl.results.beside`; baselines that it has are not run again.
    """

    profile: str
    source: str
    source_task: str | None = None
    targets: tuple[str, ...] = ()
    tasks: tuple[str, ...] = Field(min_length=1)
    seeds: tuple[int, ...] = Field(min_length=1)
    ported: tuple[str, ...] = ()
    once: dict[str, tuple[str, ...]] = Field({})
    projectors: tuple[ProjectorKind, ...] = ("canonical", "dimension")
    beside: str | None = None

    @classmethod
    def read(cls, profile: str) -> Grid:
        """The grid of a profile; its settings and its targets' files are checked too."""
        folder = PARAMS / profile
        if not (folder / "grid.yaml").is_file():
            raise UHLError(f"unknown profile {profile!r}; profiles: {', '.join(profiles())}")
        grid = cls(**(files.read_yaml(folder / "grid.yaml") or {}))
        settings = Settings(**read_yaml(folder / "settings.yaml"))
        for name, wanted in (("profile", profile), ("source", settings.source), ("source_task", settings.source_task)):
            if (found := getattr(grid, name)) != wanted:
                raise UHLError(f"params/{profile}/grid.yaml names {name} {found!r}; its settings.yaml has {wanted!r}")
        if not grid.hosts:
            raise UHLError(f"params/{profile}/grid.yaml has no model to port to; name some in `targets` or in `ported`")
        if stray := set(grid.once) - set(grid.ported):
            raise UHLError(f"params/{profile}/grid.yaml has {sorted(stray)[0]!r} in `once`; list it in `ported`, too")
        if strange := {task for tasks in grid.once.values() for task in tasks} - set(grid.tasks):
            raise UHLError(f"params/{profile}/grid.yaml has {sorted(strange)[0]!r} in `once`, and not in `tasks`")
        if grid.beside and grid.beside not in profiles():
            raise UHLError(f"params/{profile}/grid.yaml has `beside: {grid.beside}`, and there is no such profile")
        for name in grid.hosts:
            target_of(profile, name)
        for name in grid.trained:
            task_file(profile, name)
        return grid

    @classmethod
    def known(cls, profile: str) -> Grid | None:
        """The grid of a profile that has one; None of any other."""
        return cls.read(profile) if profile in profiles() else None

    @property
    def hosts(self) -> tuple[str, ...]:
        """All targets."""
        return (*self.targets, *self.ported)

    def only_once(self, target: str, task: str, seed: int) -> bool:
        """Whether the cells of a target, task and seed have more than those of its other seeds have."""
        return task in self.once.get(target, ()) and seed == self.seeds[0]

    @property
    def trained(self) -> tuple[str, ...]:
        """All tasks that have an adapter: those of the grid, and one that only lends its own."""
        return tuple(dict.fromkeys([*([self.source_task] if self.source_task else []), *self.tasks]))

    def lends(self, task: str) -> str | None:
        """The task whose adapter a task has; None where it has its own."""
        return None if self.source_task == task else self.source_task

    def files(self, task: str, stage: str) -> list[Path]:
        """Parameter files of a cell, such as ("movies", "port-minilm-l3"), in the order in which they are read: a later
        one's settings count. ``attempts`` is a stage with a target, ``compress`` one without.
        """
        kind, _, target = stage.partition("-")
        own = "source" if stage == f"baselines-{slug(self.source)}" else ""
        names = {
            "baselines": [own or "retrained"],
            "attempts": ["attempts", "retrained"],
            "compress": ["copies"],
        }.get(kind, [])
        folder = PARAMS / self.profile
        there = [path for name in names if (path := folder / f"{name}.yaml").is_file()]
        on_target = kind in {"port", "tune", "attempts", "baselines"} and not own
        there += [folder / f"{target}.yaml"] if on_target else []
        described = task_file(self.profile, task)
        return [folder / "settings.yaml", *there, *([described] if described else [])]

    def _given(self, task: str, seed: int, stage: str) -> dict[str, Any]:
        """Settings of a cell that no file of its has."""
        kind, _, rest = stage.partition("-")
        made: dict[str, Any] = {"seed": seed} | ({} if task_file(self.profile, task) else {"task": task})
        if kind == "pretrain":
            made["projectors"] = [rest]
        if kind == "baselines":
            made["hosts"] = ["source" if rest == slug(self.source) else "target"]
            if self.only_once(rest, task, seed):  # all methods, in place of the target's own
                made["baselines"] = list(Settings(**read_yaml(PARAMS / self.profile / "settings.yaml")).baselines)
        return made

    def settings(self, cell: str) -> Settings:
        """What a cell, such as `movies-s0/port-minilm-l3`, is run with."""
        place, _, stage = cell.partition("/")
        task, _, seed = place.rpartition("-s")
        values: dict[str, Any] = {}
        for file in self.files(task, stage):
            values |= read_yaml(file)
        return Settings(**values | self._given(task, int(seed), stage))

    def cells(self) -> list[str]:
        """Folders of all cells, relative to the profile's run folder."""
        made = [f"pretrain-{p}" for p in self.projectors]
        stages = [f"baselines-{slug(self.source)}"]
        stages += [f"{stage}-{t}" for t in self.hosts for stage in ("port", "baselines")]
        cells = []
        for seed in self.seeds:
            for task in self.trained:
                tuned = [f"tune-{t}" for t in self.hosts if t in self.targets or self.only_once(t, task, seed)]
                own = [*made, *stages, *tuned] if task in self.tasks else made
                cells += [f"{task}-s{seed}/{stage}" for stage in own]
        return cells
