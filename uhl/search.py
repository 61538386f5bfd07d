"""Settings by dev score, with Optuna: each method's search space on the source, and no test label.

With `hosts: [target]` trials run on a target: the baselines as they are retrained there, for as many steps as tuning
takes, whose best rates go to ``params/<profile>/retrained.yaml``; and, where it is named, tuning: `tune-anchor` tunes
the profile's trained adapter, ported there by its anchors. Workers that share a database share its study where they
have the same file of that adapter.

``params/<profile>/search.yaml`` maps a method to settings, and a setting to what may be tried: a list of values, or a
range `{low: .., high: .., log: true}`. A method whose settings are all lists has every combination tried; others are
sampled (TPE). A study of a method, its settings and its space lives in a database (SQLite under runs/<profile>-search/,
or any that SQLAlchemy knows, for many workers); it goes on where it was stopped, and runs an interrupted trial again. A
trial is an ordinary run of :mod:`uhl.stages` that scores dev alone, in a folder named by its values, so that
equal values are run once. Trials that at a quarter, half or three quarters of their steps lie below the median of the
earlier ones are pruned.

The default rates of ``uhl.runs.Settings`` are the best of the first rows of figures/search.csv: trials on the source
with 3,000 labels of movies, one epoch with batches of 32 (94 steps), in the order of their values. Those of 500 steps
are of ``uhl search --profile offline-full``, with and without ``--host target``; the best of them are in that
profile's ``settings.yaml``, ``source.yaml`` and ``retrained.yaml``.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import re
import shutil
import sys
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import optuna
import pandas as pd
import yaml
from optuna.exceptions import ExperimentalWarning
from optuna.storages import BaseStorage, RDBStorage, RetryHeartbeatStaleTrialCallback, fail_stale_trials
from optuna.trial import FrozenTrial, Trial, TrialState
from pydantic import Field, model_validator

from uhl import runs, stages
from uhl.baselines import RATES, Start
from uhl.config import _Strict
from uhl.errors import DivergenceError, UHLError, one_of
from uhl.files import read_yaml, sha256, write_text
from uhl.grid import PARAMS, Grid
from uhl.outcome import Outcome
from uhl.runs import Settings
from uhl.train import Watch

TUNE, CANONICAL = "tune-anchor", "uhl-canonical"
METHODS = (CANONICAL, "uhl-dimension", TUNE, *RATES)
OWN = {m: {rate} for m, rate in RATES.items()} | {"uhl-dimension": {"dimension_rate"}, TUNE: {"tune_rate", "lambda_q"}}
BEAT = 60  # seconds between a worker's signs of life; a trial without them is run again by another


class SearchSettings(Settings):
    """Parameters of notebook 09."""

    methods: tuple[str, ...] = Field((), description="methods of the search file; none: all")
    trials: int | None = Field(None, ge=1, description="of each method, at most; None: a whole grid, else 12")
    storage: str | None = Field(None, description="URL of the database, for several workers; None: SQLite in runs/")
    save: bool = Field(False, description="write the best values into params/<profile>; see search.save")

    @property
    def of_a_trial(self) -> Settings:
        """The settings that every trial has."""
        return Settings(**{name: getattr(self, name) for name in Settings.model_fields})


class Range(_Strict):
    """Numbers from ``low`` to ``high``, both allowed; whole ones where both are whole. ``log``: evenly in the log."""

    low: int | float
    high: int | float
    log: bool = Field(False)

    @model_validator(mode="after")
    def _ordered(self) -> Range:
        if self.low > self.high or (self.log and self.low <= 0):
            raise ValueError("low must be at most high, and above 0 with log")
        return self

    def ask(self, trial: Trial, name: str) -> int | float:
        """A value for a trial."""
        whole = isinstance(self.low, int) and isinstance(self.high, int)
        ask: Callable[..., int | float] = trial.suggest_int if whole else trial.suggest_float
        return ask(name, self.low, self.high, log=self.log)


Space = Mapping[str, Range | Sequence[Any]]


def read_spaces(path: Path) -> dict[str, Space]:
    """A search file, checked: known methods, known settings, values that the settings take."""
    if not path.is_file():
        raise UHLError(f"{path} does not exist; it maps methods to settings and to what may be tried")
    found = read_yaml(path)
    if not isinstance(found, dict) or not all(isinstance(v, dict) and v for v in found.values()):
        raise UHLError(f"{path} must map methods to settings and to what may be tried")
    spaces: dict[str, Space] = {}
    for method, settings in found.items():
        one_of(method, METHODS, "method to search")
        space: dict[str, Range | Sequence[Any]] = {}
        for setting, tried in settings.items():
            if not isinstance(tried, (list, dict)) or not tried:
                raise UHLError(f"{path}, {method}, {setting}: expected a list of values or a range, got {tried!r}")
            space[setting] = Range(**tried) if isinstance(tried, dict) else tried
            for value in (tried["low"], tried["high"]) if isinstance(tried, dict) else tried:
                Settings(**{setting: value})
        spaces[method] = space
    return spaces


# --- trials ----------------------------------------------------------------------------------------------------------


def ask(trial: Trial, space: Space) -> dict[str, Any]:
    """Values for a trial."""
    return {
        name: tried.ask(trial, name) if isinstance(tried, Range) else trial.suggest_categorical(name, list(tried))
        for name, tried in space.items()
    }


def run(
    settings: Settings,
    method: str,
    values: Mapping[str, Any],
    watch: Watch | None = None,
    begun: dict[str, Start] | None = None,
) -> dict[str, object]:
    """Train a method with ``values`` for some settings; its dev row. A finished run is read.

    ``watch`` is told dev scores on the way and may raise, which ends the run; its folder is then removed. Of several
    processes one runs, and the others wait for it. ``begun`` keeps what baselines begin with, for the trials of one
    search, which mostly differ in rates alone.
    """
    begun = {} if begun is None else begun
    host = _host(settings)
    if method.startswith("uhl-") and settings.borrowed:
        raise UHLError(
            f"{method} is not trained on {settings.task_name}, which has the adapter of {settings.source_task}; search "
            f"on that task: --task {settings.source_task}"
        )
    named = [f"{method}-{runs.slug(settings.target)}"] if host == "target" else [method]
    profile = f"{settings.profile}-search/" + "-".join([*named, *(f"{k}-{_text(v)}" for k, v in values.items())])
    chosen = settings.model_copy(update={"profile": profile, "splits": ("dev",), **values})
    path = runs.cell_dir(chosen, "trial") / "manifest.json"
    wanted = chosen.model_dump(mode="json", include=_bearing(settings, method) | {*values})
    own = _adapter(settings, method)
    with runs.locked(runs.root() / profile / ".lock"):
        found = runs.same(path, wanted)  # another default elsewhere makes no other trial
        if found is None or found.get("adapter") != own:
            try:
                if method.startswith("uhl-"):
                    _, outcome = stages.pretrain(chosen, method.removeprefix("uhl-"), watch)
                elif method == TUNE:
                    outcome = _tuned(chosen, watch, settings)
                else:
                    about = chosen.model_dump_json(exclude={"profile", *RATES.values()})
                    if about not in begun:
                        begun[about] = stages.baseline_start(chosen, host)
                    outcome = stages.baseline(chosen, host, method, begun[about], watch)
            except optuna.TrialPruned:
                shutil.rmtree(path.parent.parent)  # of this task and seed
                raise
            runs.write_manifest(chosen, "trial", outcome.rows, adapter=own)
        (row,) = json.loads(path.read_text())["rows"]
    return dict(row)


def _tuned(chosen: Settings, watch: Watch | None, trained: Settings) -> Outcome:
    outcome = stages.tune(chosen, "anchor", watch=watch, trained=trained)
    if outcome is None:
        raise UHLError(f"{stages.adapter_path(trained, 'anchor')} has no anchors, by which {TUNE} ports it")
    return outcome


def _host(settings: Settings) -> str:
    """Where trials run: `source` or `target`."""
    if len(settings.hosts) != 1:
        raise UHLError(f"a search is on one host, got hosts {', '.join(settings.hosts)}; name `source` or `target`")
    return settings.hosts[0]


def _bearing(settings: Settings, method: str) -> set[str]:
    """Settings that a method's trials depend on."""
    kind, on_host = ("tune", settings.target) if method == TUNE else ("baselines", getattr(settings, _host(settings)))
    stage = method.replace("uhl", "pretrain") if method.startswith("uhl-") else f"{kind}-{runs.slug(on_host)}"
    return stages.bearing(stage, settings.model_copy(update={"baselines": (method,)}))


def methods_on(host: str) -> tuple[str, ...]:
    """Methods that may be searched on a `source` or a `target`."""
    return tuple(m for m in METHODS if (m != TUNE if host == "source" else not m.startswith("uhl-")))


def methods_of(spaces: Mapping[str, Space], host: str, named: Sequence[str] = ()) -> dict[str, Space]:
    """The spaces of some methods, by default of all that train on the host from nothing. Raises :class:`UHLError`."""
    known = [m for m in spaces if m in methods_on(host)]
    chosen = named or [m for m in known if m != TUNE]
    return {one_of(method, tuple(known), f"method to search on the {host}"): spaces[method] for method in chosen}


def check(settings: Settings, method: str, space: Space) -> None:
    """Raise :class:`UHLError` where a space has settings that have no part in the method's trials, or that say what
    these are scored on.
    """
    may = _bearing(settings, method) - stages.DATA
    if stray := sorted(set(space) - may):
        raise UHLError(
            f"{method} on the {_host(settings)} is not searched over {stray[0]!r}, which has no part in its training; "
            f"it may be over {', '.join(sorted(may))}"
        )


def settings_of(
    profile: str, method: str, task: str, seed: int = 0, host: str = "source", target: str | None = None
) -> Settings:
    """What a batch runs a method with on the `source` or a ``target`` of the profile, by default its first."""
    grid = Grid.read(profile)
    theirs = runs.slug(target or grid.hosts[0])
    stage = f"tune-{theirs}" if method == TUNE else method.replace("uhl", "pretrain")
    if method in RATES:
        stage = f"baselines-{theirs if host == 'target' else runs.slug(grid.source)}"
    return grid.settings(f"{task}-s{seed}/{stage}").model_copy(update={"hosts": (host,)})


def _adapter(settings: Settings, method: str) -> str | None:
    """Hash of the file that `tune-anchor` tunes, and the rules of its port; None for other methods."""
    if method != TUNE:
        return None
    path = stages.adapter_path(settings, "anchor")
    if not path.is_file():
        raise UHLError(
            f"{TUNE} tunes a trained adapter, and {path} is missing; train it first: make port "
            f"PROFILE={settings.profile} TARGET={runs.slug(settings.target)} TASK={settings.task_name} "
            f"SEED={settings.seed}"
        )
    return f"{sha256(path)}, port rules {stages.rules_of(settings)}"


def _text(value: object) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)


# --- studies ---------------------------------------------------------------------------------------------------------


class _Storage(RDBStorage):
    """A database of which one worker at a time takes a trial: SQLite locks no rows, so that two that look at once would
    both take the same.
    """

    def set_trial_state_values(self, trial_id: int, state: TrialState, values: Sequence[float] | None = None) -> bool:
        """Under a lock beside a SQLite file; False where another worker has taken the trial."""
        file = self.engine.url.database
        if self.engine.name != "sqlite" or not file:
            return super().set_trial_state_values(trial_id, state, values)
        with runs.locked(Path(f"{file}.lock")):
            return super().set_trial_state_values(trial_id, state, values)


def storage(settings: Settings, url: str | None = None) -> BaseStorage:
    """The database of a profile's studies: ``url`` as SQLAlchemy writes them, by default SQLite beside the trials."""
    if url is None:
        folder = runs.root() / f"{settings.profile}-search"
        folder.mkdir(parents=True, exist_ok=True)
        url = f"sqlite:///{folder / 'optuna.db'}"
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ExperimentalWarning)
            again = RetryHeartbeatStaleTrialCallback(max_retry=3)
            return _Storage(url, heartbeat_interval=BEAT, heartbeat_stale_trial_callback=again)
    except Exception as error:  # of SQLAlchemy, of a driver, of Alembic
        raise UHLError(
            f"the database {url} cannot be used ({type(error).__name__}: {error}); give a URL such as "
            f"sqlite:///file.db or postgresql://user@host/name, and install its driver"
        ) from error


def study(settings: Settings, method: str, space: Space, url: str | None = None) -> optuna.Study:
    """The study of a method with these settings and this space: a new one, or the one that the database has.

    In the profile's own database a new study is seeded; workers that share one draw by chance.
    """
    kept = settings.model_dump(mode="json", include=_bearing(settings, method) - {*space, "profile"})
    kept |= {"protocol": runs.PROTOCOL}
    tried = {name: t.model_dump() if isinstance(t, Range) else list(t) for name, t in sorted(space.items())}
    own = _adapter(settings, method)
    mark = hashlib.sha256(json.dumps([kept, tried, *([own] if own else [])], sort_keys=True).encode()).hexdigest()[:8]
    with runs.locked(runs.root() / f"{settings.profile}-search" / ".study.lock"):  # another worker may begin as well
        made = optuna.create_study(
            study_name=f"{settings.profile}, {method}, {settings.task_name}, seed {settings.seed}, {mark}",
            storage=storage(settings, url),
            pruner=optuna.pruners.MedianPruner(n_startup_trials=4),
            direction="maximize",
            load_if_exists=True,
        )
        new = "method" not in made.user_attrs
        made.set_user_attr("method", method)
        made.set_user_attr("settings", settings.model_dump(mode="json"))
        for values in grid(space) or ():
            made.enqueue_trial(values, skip_if_exists=True)
    seed = settings.seed if new and not url else None
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ExperimentalWarning)
        made.sampler = optuna.samplers.TPESampler(seed=seed, constant_liar=True)
    return made


def grid(space: Space) -> list[dict[str, Any]] | None:
    """Every combination of a space of lists; None where it has ranges."""
    lists = {name: list(tried) for name, tried in space.items() if not isinstance(tried, Range)}
    if len(lists) < len(space):
        return None
    return [dict(zip(lists, values, strict=True)) for values in itertools.product(*lists.values())]


def search(
    settings: Settings,
    method: str,
    space: Space,
    trials: int | None = None,
    url: str | None = None,
    tell: Callable[[dict[str, object]], None] = lambda row: None,
) -> optuna.Study:
    """Try settings of a method until its study has ``trials`` finished ones; None: a whole grid, else 12.

    ``url``: of the database, see :func:`storage`. ``tell`` is given each new row of :func:`table`. A loss that is not
    finite fails a trial and not the search; anything else ends the search, and the trial is run again by the next.
    """
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    if trials is not None and trials < 1:
        raise UHLError(f"{trials} trials wanted; give 1 or more")
    host = _host(settings)
    check(settings, one_of(method, methods_on(host), f"method to search on the {host}"), space)
    made = study(settings, method, space, url)
    whole = grid(space)
    wanted = trials or 12 if whole is None else min(trials or len(whole), len(whole))
    begun: dict[str, Start] = {}

    def objective(trial: Trial) -> float:
        def watch(quarter: int, score: float) -> None:
            trial.report(score, quarter)
            if trial.should_prune():
                raise optuna.TrialPruned

        if (
            whole is not None and "fixed_params" not in made.get_trials(deepcopy=False)[trial.number].system_attrs
        ):  # another worker took the last one
            raise optuna.TrialPruned
        # Optuna's own thread may be later than a kill, and a trial without any sign of life is never called stale
        made._storage.record_heartbeat(trial._trial_id)  # type: ignore[attr-defined]
        values = ask(trial, space)
        try:
            row = run(settings, method, values, watch, begun)
        except DivergenceError:
            trial.set_user_attr("diverged", True)
            raise
        except optuna.TrialPruned:
            raise
        except BaseException:
            made.enqueue_trial(values)
            raise
        for key in ("metric", "n", "active_atoms", "seconds", "steps", "peak_mb"):
            trial.set_user_attr(key, row[key])
        return float(row["score"])  # type: ignore[arg-type]

    def told(study: optuna.Study, trial: FrozenTrial) -> None:
        if _is_finished(trial):
            tell(_row(study, trial))

    waited = False
    while True:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ExperimentalWarning)
            fail_stale_trials(made)  # queues those of killed workers again
        so_far = made.get_trials(deepcopy=False)
        states = {t.state for t in so_far}
        finished = [str(t.params) for t in so_far if _is_finished(t)]
        if len(finished if whole is None else set(finished)) >= wanted:  # several machines may queue a grid twice
            return made
        if whole is None or TrialState.WAITING in states:
            made.optimize(objective, 1, catch=(DivergenceError,), callbacks=[told])
        elif TrialState.RUNNING in states:  # by another worker, or by one that was killed just now
            if not waited:
                print(
                    f"waiting for a trial of another worker (one that was killed is run again in {2 * BEAT} s) ...",
                    file=sys.stderr,
                    flush=True,
                )
            waited = True
            time.sleep(BEAT / 10)
        else:  # three workers died of one trial
            return made


def _is_finished(trial: FrozenTrial) -> bool:
    """Whether it told something: a trial that was interrupted did not."""
    done = trial.state in (TrialState.COMPLETE, TrialState.PRUNED) or "diverged" in trial.user_attrs
    return done and bool(trial.params)


def _row(study: optuna.Study, trial: FrozenTrial) -> dict[str, object]:
    settings = study.user_attrs["settings"]
    score = trial.value
    if trial.state == TrialState.PRUNED and trial.intermediate_values:
        score = trial.intermediate_values[max(trial.intermediate_values)]
    known = {"method": study.user_attrs["method"], "trial": trial.number, "state": trial.state.name.lower()}
    values = ", ".join(f"{name} {_text(value)}" for name, value in trial.params.items())
    known |= {"settings": values, "task": Settings(**settings).task_name}
    there = settings["hosts"] == ["target"]
    known |= {"target": settings["target"] if there else None, "train_size": settings["train_size"]}
    known |= {"steps": trial.user_attrs.get("steps"), "seed": settings["seed"]}
    known |= {"split": "dev", "score": score}
    return known | {key: trial.user_attrs.get(key) for key in ("metric", "n", "active_atoms", "seconds")}


def table(studies: Sequence[optuna.Study]) -> pd.DataFrame:
    """A row a finished trial: method, number, state, settings as text, dev score (of a pruned one its last)."""
    rows = [_row(s, t) for s in studies for t in s.trials if _is_finished(t)]
    return pd.DataFrame(rows)


def best(studies: Sequence[optuna.Study]) -> dict[str, Any]:
    """Values of each study's best trial. Of several methods, those that are not a method's :data:`OWN`, such as the
    batch, are as they are best for `uhl-canonical`.
    """
    values: dict[str, Any] = {}
    for one in sorted(studies, key=lambda s: s.user_attrs["method"] == CANONICAL):
        if any(t.state == TrialState.COMPLETE for t in one.trials):
            shared = len(studies) == 1 or one.user_attrs["method"] == CANONICAL
            values |= {name: value for name, value in one.best_params.items() if shared or name in _own(one)}
    return values


def _own(study: optuna.Study) -> set[str]:
    """Settings that a study's method has alone."""
    return OWN.get(study.user_attrs["method"], set())


def save(settings: Settings, studies: Sequence[optuna.Study]) -> list[str]:
    """Write the best values into a profile's parameter files, and return the names of those that were left out: what
    methods share is `uhl-canonical`'s to choose, of which all go to `settings.yaml`.

    Those of baselines go to the files that a batch reads for them alone, `retrained.yaml` on a target and on the source
    `source.yaml`, where there is one: a changed `settings.yaml` makes every cell run again.
    """
    folder, files, left = PARAMS / settings.profile, dict[Path, dict[str, Any]](), dict[str, None]()
    for one in studies:
        name = "settings.yaml"
        if one.user_attrs["method"] in RATES and _host(settings) == "target":
            name = "retrained.yaml"
        elif one.user_attrs["method"] in RATES and (folder / "source.yaml").is_file():
            name = "source.yaml"
        for setting, value in best([one]).items():
            if one.user_attrs["method"] == CANONICAL or setting in _own(one):
                files.setdefault(folder / name, {})[setting] = value
            else:
                left[setting] = None
    for file, values in files.items():
        write_settings(file, values)
    return [setting for setting in left if not any(setting in values for values in files.values())]


def write_settings(path: Path, values: Mapping[str, Any]) -> None:
    """Set values in a parameter file of one setting a line; its other lines and comments stay as they are."""
    text = path.read_text(encoding="utf-8") if path.is_file() else ""
    for name, value in values.items():
        line = f"{name}: {json.dumps(value)}"
        text, count = re.subn(rf"(?m)^{name}:.*$", line, text)
        text = text if count else f"{text.rstrip()}\n{line}\n".lstrip()
    Settings(**yaml.safe_load(text))
    write_text(path, text)
