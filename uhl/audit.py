"""What a profile's results lack, and what in them is not defined: no table may have holes and look complete."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from uhl import runs
from uhl.grid import PARAMS, Grid
from uhl.porting import LARGER_RULES, RULES
from uhl.runs import Settings, manifests
from uhl.stages import tuned_arms


def missing(profile: str) -> list[str]:
    """What a profile's table lacks: cells of its grid (where it has one) that have not finished; and of finished ones
    the rows that their parameters, or those of another seed's cell (but what the grid has only once), ask for, as
    `<cell>: <arm> on <split>`; cells of an older protocol than others'; ports by rules that no host has now, by older
    ones than others to the same host, or of an adapter that was trained again since; and the profile that it is
    compared with.
    """
    folder = runs.root() / profile
    grid = Grid.known(profile)
    cells = grid.cells() if grid else []
    left = [c for c in cells if not (folder / c / "manifest.json").is_file()]
    if len(left) == len(cells) > 0:
        return left
    frame = runs.load_results(profile)
    keys = ["task", "seed", "target", "phase", "arm", "split"]
    there = set(frame[keys].itertuples(index=False, name=None))
    finished = manifests(profile)
    old = (cell.relative_to(folder) for cell in manifests(profile, older=True))
    left += [f"{cell}: measured by an older release than others; delete the folder, and run it again" for cell in old]
    settings = {c: Settings.model_construct(**e["parameters"]) for c, e in finished.items()}  # unchecked: perhaps older
    once = {
        cell
        for cell, asked in settings.items()
        if grid
        and cell.name.startswith("baselines-")
        and grid.only_once(cell.name.partition("-")[2], asked.task_name, asked.seed)
    }
    shared = runs.read_yaml(PARAMS / profile / "settings.yaml") if grid else {}
    if once:
        every = {"baselines": Settings(**shared).baselines}
        settings |= {cell: settings[cell].model_copy(update=every) for cell in once}
    alike = {cell: (asked.task_name, cell.name, cell in once) for cell, asked in settings.items()}  # less their seeds
    wanted: dict[tuple[str, str, bool], dict[tuple[str, str, str, str], None]] = {}
    for cell, asked in settings.items():
        port = finished.get(cell.parent / f"port-{runs.slug(asked.target)}", {})
        rows = [(*row, split) for row in _asked(cell.name, asked, finished[cell], port) for split in asked.splits]
        wanted.setdefault(alike[cell], {}).update(dict.fromkeys(rows))
    hosts = {name: shared | runs.read_yaml(PARAMS / profile / f"{name}.yaml") for name in grid.hosts} if grid else {}
    outdated = _outdated(finished)
    for cell, entry in finished.items():
        asked, name = settings[cell], cell.relative_to(folder)
        stage, _, host = cell.name.partition("-")
        if stage in {"tune", "baselines"} and host in hosts and asked.bf16 != hosts[host].get("bf16", False):
            how = "under bfloat16 autocast" if asked.bf16 else "in float32"
            left.append(f"{name}: trained {how}, unlike what {host}.yaml says; delete the folder, and run it again")
        if cell in outdated:
            left.append(f"{name}: ported by other rules than this release's; delete the folder, and run it again")
        for lent, digest in entry.get("adapters", {}).items():
            made = finished.get(cell.parent / lent) or finished.get(folder / lent, {})  # of the task, or of another
            trained = made.get("artefacts", {}).get("adapter.safetensors", {})
            if trained.get("sha256", digest) != digest:
                left.append(f"{name}: {lent} has another adapter now; delete this folder, and run it again")
        left += [
            f"{name}: {arm} on {split}"
            for host, phase, arm, split in wanted[alike[cell]]
            if (asked.task_name, asked.seed, host, phase, arm, split) not in there
        ]
    if grid and grid.beside and not manifests(grid.beside):
        left.append(f"{grid.beside}: nothing of it is here to compare with; uhl restore --profile {grid.beside}")
    return left


def _outdated(finished: Mapping[Path, Mapping[str, Any]]) -> set[Path]:
    """Cells that were ported by rules that no host has now, or by older ones than another cell to the same host.

    Cells of earlier releases do not tell theirs; those of a cell with no anchored port are None.
    """
    rules = {c: e.get("rules", RULES) for c, e in finished.items() if c.name.startswith(("port-", "tune-"))}
    newest: dict[str, int] = {}
    for cell, made in rules.items():
        host = cell.name.partition("-")[2]
        newest[host] = max(newest.get(host, 0), made or 0)
    return {
        cell
        for cell, made in rules.items()
        if made and (made not in (RULES, LARGER_RULES) or made < newest[cell.name.partition("-")[2]])
    }


def _asked(
    cell: str, settings: Settings, own: Mapping[str, Any], port: Mapping[str, Any]
) -> Iterator[tuple[str, str, str]]:
    """(host, phase, arm) of the rows that a finished cell should have; ``own``: its manifest, ``port``: that of the
    port to its target, which says what is not defined where its own does not.
    """
    stage, _, rest = cell.partition("-")
    ported = port.get("parameters", {}).get("arms", settings.arms)
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
