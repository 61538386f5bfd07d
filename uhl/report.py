"""A profile's results where people read them: the Markdown table, its README and figures, a PEFT folder with a card."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.figure import Figure
from peft.utils import SAFETENSORS_WEIGHTS_NAME

from uhl import archives, card, runs, store, viz
from uhl.audit import missing, undefined
from uhl.budget import LIMIT_BYTES, LIMIT_FLOPS_PCT
from uhl.config import ARMS, CONTROLS, UHLConfig
from uhl.errors import UHLError
from uhl.files import sha256, write_atomic, write_csv, write_text
from uhl.results import cell_of, groups_of, summary
from uhl.runs import manifests
from uhl.viz import NAMES, in_order

README = Path("README.md")  # the first page
FIRST = "offline-full"  # whose figures lie in figures/ itself, others' in a folder of their name there
PUBLISHED = (".png", ".csv")  # of an analysis
ALONE = "¹"  # beside a score of one seed
MARKS = ("<!-- results: made by make table -->", "<!-- end of results -->")  # around those of FIRST, on two pages
SHORT = {  # the arms of each phase that the first page shows
    "source": ("head", "uhl-canonical", "lora-r8"),
    "zero-shot": ("no-adapter", "dimension", "anchor", "zero-atoms", "shuffled"),
    "tuned": ("anchor", "zero-atoms"),
    "retrained": ("head", "lora-r8", "sat-lora"),
}


def finish(profile: str, figures: dict[str, tuple[Figure, pd.DataFrame]], tables: dict[str, pd.DataFrame]) -> Path:
    """Write the analysis's figures, tables and manifest; beside them missing.csv, what the profile lacks, which figures
    bear on them too, and cells.csv, where and from which commit each cell ran. Those of an earlier analysis are
    removed.
    """
    folder, left = runs.root() / profile / "analysis", missing(profile)
    for file in [file for kind in PUBLISHED for file in folder.glob(f"*{kind}")]:
        file.unlink()
    for name, (fig, data) in figures.items():
        if left:
            viz.stamp(fig, f"Not complete: {len(left)} cells or rows of {profile} are missing or old")
        viz.save_fig(fig, folder / name, data)
    cells = [
        (c.relative_to(folder.parent).as_posix(), e["hardware"], e["commit"]) for c, e in manifests(profile).items()
    ]
    tables = tables | {"missing": pd.DataFrame({"missing": left}, dtype=str)}
    tables |= {"cells": pd.DataFrame(cells, columns=["cell", "hardware", "commit"])}
    for name, data in tables.items():
        write_csv(folder / f"{name}.csv", data, digits=10)  # none that another machine rounds its own way
    files = {f.name: {"bytes": f.stat().st_size, "sha256": sha256(f)} for f in sorted(folder.glob("*.*"))}
    about = {"stage": "analysis", "parameters": {"profile": profile}, "versions": runs.versions()}
    entry = about | {"hardware": runs.hardware(), "commit": runs.commit(), "artefacts": files}
    return write_text(folder / "manifest.json", json.dumps(entry, indent=1))


def markdown(profile: str, target: str | None = None, short: bool = False) -> str:
    """The results as Markdown: tasks side by side, a row a (target, phase, arm), score with its 95 % interval.

    ``short``: the arms of :data:`SHORT` alone, target by target, and the caption without what each cell ran on.
    """
    table = viz.with_alone(summary(profile))
    if target:
        table = table[table["target"].map(runs.slug) == runs.slug(target)]
        if table.empty:
            raise UHLError(f"profile {profile} has no results for target {target!r}")
    tasks = list(dict.fromkeys(table["task"]))
    ported = set(table["task"][table["phase"] != "source"])
    not_defined = undefined(profile)
    lack = {t: "not run" if t in ported or not ported else "" for t in tasks}  # some only lend others their adapter
    lines = ["| model | phase | arm | " + " | ".join(tasks) + " | bytes | trained | FLOPs |"]
    lines.append("|---|---|---|" + "---|" * (len(tasks) + 3))
    if short:
        kept = [arm in SHORT[phase] for phase, arm in zip(table["phase"], table["arm"], strict=True)]
        places = {target: k for k, target in enumerate(dict.fromkeys(table["target"]))}
        table = table[kept].sort_values("target", key=lambda column: column.map(places), kind="stable")
    for key, rows in table.groupby(["phase", "target", "arm"], sort=False):
        phase, model, arm = map(str, key)
        by_task = rows.set_index("task")
        why = {t: "not defined" if (t, model, phase, arm) in not_defined else lack[t] for t in tasks}
        cells = [_cell_text(by_task.loc[t]) if t in by_task.index else why[t] for t in tasks]
        size, trained, cost = (rows[c].max() for c in ("adapter_bytes", "trainable_params", "extra_flops_pct"))
        over = ["†" if value > limit else "" for value, limit in ((size, LIMIT_BYTES), (cost, LIMIT_FLOPS_PCT))]
        budget = [f"{size:,.0f}{over[0]}", f"{trained:,.0f}", f"{cost:.1f} %{over[1]}"]
        label = f"*{NAMES.get(arm, arm)}*" if arm in CONTROLS else NAMES.get(arm, arm)
        lines.append("| " + " | ".join([model, phase, label, *cells, *budget]) + " |")
    shown = set(table[["target", "arm"]].itertuples(index=False, name=None))
    for model, arm in dict.fromkeys((m, a) for _, m, _, a in not_defined if not short):
        if model in set(table["target"]) and (model, arm) not in shown:
            phases = [p for p in runs.PHASES if any((t, model, p, arm) in not_defined for t in tasks)]
            cells = ["not defined" if (t, model, phases[0], arm) in not_defined else lack[t] for t in tasks]
            lines.append(f"| {model} | {', '.join(phases)} | {NAMES.get(arm, arm)} | {' | '.join(cells)} | | | |")
    return "\n".join(lines) + "\n\n" + _caption(profile, table, short)


def _cell_text(cell: pd.Series) -> str:
    return f"{cell['score']:.1f} [{cell['low']:.1f}, {cell['high']:.1f}]{ALONE if cell['alone'] else ''}"


def _phases(manifest: Mapping[str, Any]) -> set[str]:
    return {row["phase"] for row in manifest["rows"]}


def _length(parameters: Mapping[str, Any]) -> str:
    if steps := parameters.get("steps"):  # which older manifests do not have
        return f"{steps:,} steps"
    epochs = f"{parameters['epochs']:g}"
    return f"{epochs} epoch{'' if epochs == '1' else 's'}"


def _caption(profile: str, table: pd.DataFrame, short: bool) -> str:
    finished = manifests(profile).values()
    hardware = {part for m in finished for part in m["hardware"].split(" and ")}
    commits = {part for m in finished for part in m["commit"].split(", ")}
    trained = [m["parameters"] for m in finished if m["rows"]]
    sizes = {p["train_size"] for p in trained}
    most = ", ".join(f"{size:,}" for size in sorted(filter(None, sizes)))
    either = [f"at most {most} training labels"] if most else []
    labels = " or ".join([*either, "all training labels"] if None in sizes else either)
    if any(p.get("unlabelled") for p in trained):
        labels += " but those of texts set aside for anchors"
    lengths = _list(sorted({_length(m["parameters"]) for m in finished if _phases(m) & {"source"}}))
    if lent := {p["source_task"] for p in trained if p.get("source_task")}:
        lengths += f" (adapters: with the labels of {_list(sorted(lent))} alone; baselines: with each task's own)"
    if taught := {m["teacher"]["method"] for m in finished if m.get("teacher")}:
        lengths += f" (adapters: as many more for their teacher, the source trained by {_list(sorted(taught))})"
    on_targets = [m["parameters"] for m in finished if _phases(m) & {"tuned", "retrained"}]
    steps = sorted({p["tune_steps"] for p in on_targets})
    tuned = f", then {_list(f'{n:,}' for n in steps)} steps on a target" if steps else ""
    groups = [
        f"{task} on {_list(rows['target'])}: seeds {seeds}, n = {_examples(profile, str(task), rows['n'])}"
        for (task, seeds, _), rows in table.groupby(["task", "seeds", "n"], sort=False)
    ]
    if halved := {p["target"] for p in on_targets if p.get("bf16")}:
        tuned += f" ({_list(sorted(halved))}: under bfloat16 autocast)"
    over = "seeds and test examples" if table["seeds"].max() > 1 else "test examples alone"
    single = f" {ALONE}: one seed, where others of the task have more." if table["alone"].any() else ""
    left = missing(profile)
    alone = "" if short else _not_run(table, undefined(profile))
    page = readme_of(profile).as_posix()
    ran = f"Ran on {' and '.join(sorted(hardware))}; commit {', '.join(sorted(commits))}."
    ran = f"All arms and baselines, and what ran where: [{page}]({page})." if short else ran
    state = f"**Not complete: {len(left)} cells or rows are missing or old, first {left[0]}.** " if left else ""
    if any(runs.protocol(m) < runs.PROTOCOL for m in finished):
        state += "**Measured by an older release, whose settings meant something else.** "
    return (
        f"{state}Profile `{profile}`: test scores in percent, mean over seeds, with 95 % intervals over "
        f"{over} ({'; '.join(groups)}); {labels}, "
        f"{lengths or 'nothing'} on the source{tuned}. {alone}"
        f"Italics: controls. Bytes: what the method adds to the bare host, head included; files of ours and SAT-LoRA's "
        f"hold 8 and 4 bits, the others' 16 (their heads 8). FLOPs: added per token, in percent of the host's linear "
        f"layers (both: the larger task's). †: beyond 1 MB or 10 %.{single} {ran}\n"
    )


def _examples(profile: str, task: str, known: pd.Series) -> str:
    """How many test examples a task has, all of ``known``, and of how many groups they are, such as reviews, where they
    do not stand alone.
    """
    n, group = int(known.iloc[0]), groups_of(profile, task)
    count = n if group is None else len(np.unique(group))
    return f"{n:,} of {count:,} groups" if count < n else f"{n:,}"


def _not_run(table: pd.DataFrame, undefined: Sequence[tuple[str, str, str, str]]) -> str:
    """A sentence a target that says which rows other targets of the table have and it has not; empty where none."""
    places = table[table["phase"] != "source"].groupby("target", sort=False)
    own = {str(target): set(zip(rows["phase"], rows["arm"], strict=True)) for target, rows in places}
    every, said, nowhere = set().union(*own.values()), "", {place[1:] for place in undefined}
    for target, there in own.items():
        parts = []
        for phase in runs.PHASES:
            left = in_order(a for p, a in every - there if p == phase and (target, p, a) not in nowhere)
            if left and not any(p == phase for p, _ in there):
                parts.append(f"all of {phase}")
            elif left:
                parts.append(f"{phase} {_list(f'“{NAMES.get(arm, arm)}”' for arm in left)}")
        if parts:
            said += f"Not run on {target}: {'; '.join(parts)}. "
    return said


def export(profile: str, task: str, seed: int, projector: str, folder: Path) -> Path:
    """A trained cell's adapter as a PEFT folder: its file, the configuration, and a card with the profile's scores.

    Raises :class:`UHLError` where the cell or its file is missing, or ``folder`` is none and cannot be made.
    """
    file = cell_of(profile, task, seed, "source", "", f"uhl-{projector}") / "adapter.safetensors"
    adapter = store.load(file)
    name = next(iter(adapter.tasks))
    sizes = adapter.config.model_dump() | {"types": list(adapter.config.types)}
    config = UHLConfig(**sizes, task=name, base_model_name_or_path=str(adapter.info.get("source", "")))
    config.inference_mode = True
    table = summary(profile)
    arms = {f"uhl-{projector}"} | set(ARMS if projector == "canonical" else ("dimension",))
    rows = table[(table["task"] == task) & table["arm"].isin(arms) & table["phase"].isin(["source", "zero-shot"])]
    rows = rows[(rows["arm"] != "dimension") | (projector == "dimension")].rename(columns={"target": "host"})
    store.save(adapter, folder / SAFETENSORS_WEIGHTS_NAME)
    config.save_pretrained(folder)
    card.write(folder, rows.to_dict("records"))  # type: ignore[arg-type]
    return folder


def _copy(file: Path, into: Path) -> None:
    write_atomic(into, lambda tmp: shutil.copyfile(file, tmp))


def _list(values: Iterable[object]) -> str:
    return ", ".join(map(str, dict.fromkeys(values)))


def figures_of(profile: str) -> Path:
    """Where a profile's figures and their CSVs lie in the repository."""
    return Path("figures") if profile == FIRST else Path("figures", profile)


def readme_of(profile: str) -> Path:
    """Where in the repository a profile's results stand in full, beside its figures."""
    return figures_of(profile) / "README.md"


def adapters_of(profile: str) -> Path:
    """Where in the repository a profile's trained adapters lie, if they do."""
    return Path("adapters", profile)


def update_readme(profile: str, place: Path, verdicts: str = "", short: str = "", partial: bool = False) -> None:
    """Put the table and, below it, the ``verdicts`` on the claims into :func:`readme_of` the repository at ``place``,
    and the figures with their CSVs into :func:`figures_of`; of :data:`FIRST` also a short table, with the ``short``
    verdicts, into the first page. Manifests and predictions go into one archive. Where :func:`adapters_of` is there,
    adapters go into it.

    Raises :class:`UHLError` where a cell is newer than its figures, and when cells are missing, unless ``partial``:
    then the caption says how many.
    """
    left, analysis = missing(profile), runs.root() / profile / "analysis"
    drawn = analysis / "manifest.json"
    newest = max(manifests(profile), key=lambda cell: (cell / "manifest.json").stat().st_mtime, default=None)
    if drawn.is_file() and newest and drawn.stat().st_mtime < (newest / "manifest.json").stat().st_mtime:
        raise UHLError(f"{analysis} has figures from before {newest} was run; make table PROFILE={profile}")
    if left and not partial:
        raise UHLError(
            f"profile {profile} is not complete, {len(left)} cells or rows are missing or old, first {left[0]}"
        )
    page, into, results = readme_of(profile), place / figures_of(profile), f"{markdown(profile)}\n{verdicts}\n"
    into.mkdir(parents=True, exist_ok=True)
    if profile == FIRST:
        first = f"{markdown(profile, short=True)}\n{short}\n"
        texts = {path: _between_marks(place, path, part) for path, part in ((README, first), (page, results))}
    else:
        texts = {page: f"# Results of the profile `{profile}`\n\nMade by `make table`.\n\n{results}"}
    for path, text in texts.items():
        write_text(place / path, text)
    for file in sorted(file for kind in PUBLISHED for file in analysis.glob(f"*{kind}")):
        _copy(file, into / file.name)
    _copy(runs.root() / profile / "results.csv", into / "results.csv")
    archives.pack(profile, place / "figures" / f"{profile}.zip")
    if (folder := place / adapters_of(profile)).is_dir():
        archives.keep_adapters(profile, folder)


def _between_marks(place: Path, page: Path, results: str) -> str:
    """The text of a page that people write, with the results in their place."""
    start, end = MARKS
    text = (place / page).read_text(encoding="utf-8")
    if start not in text or end not in text:
        raise UHLError(f"{page} has no place for the table; expected the lines {start} and {end}")
    before, after = text.split(start)[0], text.split(end)[1]
    return f"{before}{start}\n\n{results}\n{end}{after}"
