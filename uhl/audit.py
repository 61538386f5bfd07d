"""What a profile's results lack, and what in them is not defined: no table may have holes and look complete."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from uhl import runs
from uhl.grid import Grid
from uhl.porting import FIXED, LARGER_RULES, RULES
from uhl.runs import Settings, filled, manifests
from uhl.stages import bearing, tuned_arms

Finished = Mapping[Path, Mapping[str, Any]]  # manifests by their cells


def missing(profile: str, compared: bool = True) -> list[str]:
    """What a profile's table lacks: cells of its grid (where it has one) that have not finished; and of finished ones
    the rows that the profile, or without a grid their own parameters or those of another seed's cell, ask for, as
    `<cell>: <arm> on <split>`; cells that were run with other settings than the profile has, or with a seed that it has
    not; cells of an older protocol than others'; ports by rules that no host has now, by older ones than others to the
    same host, or of an adapter that was trained again since; and, with ``compared``, the first of what the profile
    lacks that it is compared with.
    """
    folder = runs.root() / profile
    grid = Grid.known(profile)
    cells = grid.cells() if grid else []
    left = [c for c in cells if not (folder / c / "manifest.json").is_file()]
    if len(left) == len(cells) > 0:
        return left
    finished = manifests(profile)
    old = (cell.relative_to(folder) for cell in manifests(profile, older=True))
    left += [f"{cell}: measured by an older release than others; delete the folder, and run it again" for cell in old]
    asked = {folder / c: grid.settings(c) for c in cells if folder / c in finished} if grid else {}
    outdated, rows = _outdated(finished), _lacking(profile, grid, finished, asked)
    for cell, entry in finished.items():
        name = cell.relative_to(folder)
        if grid and entry["rows"]:
            left += [f"{name}: {why}" for why in _strange(name, grid, entry, asked.get(cell))]
        if cell in outdated:
            left.append(f"{name}: ported by other rules than this release's; delete the folder, and run it again")
        for lent, digest in entry.get("adapters", {}).items():
            made = finished.get(cell.parent / lent) or finished.get(folder / lent, {})  # of the task, or of another
            trained = made.get("artefacts", {}).get("adapter.safetensors", {})
            if trained.get("sha256", digest) != digest:
                left.append(f"{name}: {lent} has another adapter now; delete this folder, and run it again")
        left += [f"{name}: {row}" for row in rows[cell]]
    if grid and grid.beside and compared:
        other = missing(grid.beside, compared=False)
        if other and not manifests(grid.beside):
            left.append(f"{grid.beside}: nothing of it is here to compare with; uhl restore --profile {grid.beside}")
        elif other:
            left.append(f"{grid.beside}, to compare with, lacks {len(other)} cells or rows, first {other[0]}")
    return left


def _strange(name: Path, grid: Grid, entry: Mapping[str, Any], asked: Settings | None) -> list[str]:
    """Why a finished cell does not belong beside others of its profile's table; ``asked``: what the grid runs it with,
    None where it is not of the grid.
    """
    if asked is None:
        first = name.as_posix().replace(f"-s{entry['seed']}/", f"-s{grid.seeds[0]}/")
        if entry["seed"] not in grid.seeds and first in grid.cells():
            return [f"seed {entry['seed']} is not of the profile's grid; name it there, or delete the folder"]
        return []  # a target or a task of the user's own, with rows of its own
    ran = filled(entry["parameters"])
    if name.name.startswith("baselines-"):  # methods that were not run have no rate here
        there = {row["arm"] for row in entry["rows"]}
        asked = asked.model_copy(update={"baselines": tuple(m for m in asked.baselines if m in there)})
    wanted = asked.model_dump(mode="json", include=bearing(name.name, asked))
    apart = [f"{key} {ran[key]} (now {value})" for key, value in wanted.items() if ran[key] != value]
    return [f"run with {', '.join(apart)}; delete the folder, and run it again"] if apart else []


def _lacking(
    profile: str, grid: Grid | None, finished: Finished, wanted_of: Mapping[Path, Settings]
) -> dict[Path, list[str]]:
    """Rows that each finished cell lacks; ``wanted_of``: what the grid runs its cells with."""
    frame = runs.load_results(profile)
    keys = ["task", "seed", "target", "phase", "arm", "split"]
    there = set(frame[keys].itertuples(index=False, name=None))
    settings: dict[Path, Settings] = {}
    alike: dict[Path, tuple[str, str, bool]] = {}  # what a cell shares with those of other seeds
    wanted: dict[tuple[str, str, bool], dict[tuple[str, str, str, str], None]] = {}
    for cell, entry in finished.items():
        asked = Settings.model_construct(**entry["parameters"])  # unchecked: perhaps older
        port = finished.get(cell.parent / f"port-{runs.slug(asked.target)}", {})
        arms = port.get("parameters", {}).get("arms", asked.arms)  # tuned as they were ported
        if cell in wanted_of:
            asked = wanted_of[cell]
            arms = asked.arms
        stage, _, host = cell.name.partition("-")
        once = bool(stage == "baselines" and grid and grid.only_once(host, asked.task_name, asked.seed))
        settings[cell], alike[cell] = asked, (asked.task_name, cell.name, once)
        rows = [(*row, split) for row in _asked(cell.name, asked, arms, entry, port) for split in asked.splits]
        wanted.setdefault(alike[cell], {}).update(dict.fromkeys(rows))
    return {
        cell: [
            f"{arm} on {split}"
            for host, phase, arm, split in wanted[alike[cell]]
            if (asked.task_name, asked.seed, host, phase, arm, split) not in there
        ]
        for cell, asked in settings.items()
    }


def _outdated(finished: Finished) -> set[Path]:
    """Cells that were ported by rules that no host has now, or by older ones than another cell to the same host, of a
    task that is scored alike: words are not ported to a larger host as sentences are.

    Those of a cell with no anchored port are None; one that has one and tells none is of a release before there were.
    """
    by_host: dict[tuple[str, ...], dict[Path, int]] = {}
    for cell, entry in finished.items():
        kind, _, host = cell.name.partition("-")
        anchored = any(row["arm"] not in {*FIXED, "no-adapter"} for row in entry["rows"])
        if kind in {"port", "tune"} and (rules := entry.get("rules", 1 if anchored else None)):
            metrics = sorted({str(row["metric"]) for row in entry["rows"]})
            by_host.setdefault((host, *metrics), {})[cell] = rules
    return {
        cell
        for made in by_host.values()
        for cell, rules in made.items()
        if rules not in (RULES, LARGER_RULES) or rules < max(made.values())
    }


def _asked(
    cell: str, settings: Settings, ported: Sequence[str], own: Mapping[str, Any], port: Mapping[str, Any]
) -> Iterator[tuple[str, str, str]]:
    """(host, phase, arm) of the rows that a finished cell should have, of these arms; ``own``: its manifest, ``port``:
    that of the port to its target, which says what is not defined where its own does not.
    """
    stage, _, rest = cell.partition("-")
    undefined = own.get("undefined", port.get("undefined", ()))
    if stage == "pretrain":
        yield from ((settings.source, "source", arm) for arm in [f"uhl-{rest}"] if arm not in undefined)
    elif stage == "baselines":
        on_source = rest == runs.slug(settings.source)
        host, phase = (settings.source, "source") if on_source else (settings.target, "retrained")
        yield from ((host, phase, method) for method in settings.baselines)
    elif stage in {"port", "tune"}:
        port_of = ("zero-shot", ["no-adapter", *ported])
        phase, arms = port_of if stage == "port" else ("tuned", tuned_arms(ported))
        yield from ((settings.target, phase, arm) for arm in arms if arm not in undefined)


def undefined(profile: str) -> list[tuple[str, str, str, str]]:
    """(task, target, phase, arm) that manifests mark as not defined: on the source, in ports, and in tuning, which goes
    by the port where it says nothing of its own.
    """
    finished, found = manifests(profile), []
    for cell, entry in finished.items():
        asked, here = Settings.model_construct(**entry["parameters"]), entry.get("undefined", ())
        if cell.name.startswith("pretrain-"):
            found += [(asked.task_name, asked.source, "source", arm) for arm in here]
        elif cell.name.startswith("port-"):
            tuned = finished.get(cell.with_name(f"tune-{runs.slug(asked.target)}"), {}).get("undefined", here)
            for phase, arms in (("zero-shot", here), ("tuned", tuned)):
                found += [(asked.task_name, asked.target, phase, arm) for arm in arms]
    return list(dict.fromkeys(found))
