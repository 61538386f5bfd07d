"""Tables from files alone: scores with intervals per cell, gap recovered, and the README's table."""

from __future__ import annotations

import json
import shutil
from functools import lru_cache
from pathlib import Path

import numpy as np
import pandas as pd

from uhl import runs, stats
from uhl.budget import LIMIT_BYTES, LIMIT_FLOPS_PCT
from uhl.errors import UHLError
from uhl.files import write_text
from uhl.grid import Grid

STAGE_OF_PHASE = {"source": "baselines-", "zero-shot": "port-", "tuned": "tune-", "retrained": "baselines-"}
NAMES = {
    "head": "head only",
    "lora-r8": "LoRA r8 (q, v)",
    "full": "full fine-tune",
    "uhl-canonical": "UHL, canonical",
    "uhl-dimension": "UHL, dimension",
    "no-adapter": "no adapter (majority)",
    "zero-atoms": "ported head, no atoms",
    "random-p": "ported head, random P",
    "shuffled": "shuffled anchors",
}
ORDER = (
    *("no-adapter", "head", "uhl-dimension", "uhl-canonical", "lora-r8", "full"),
    *("dimension", "lineage", "anchor", "zero-atoms", "random-p", "shuffled"),
)
CONTROLS = ("no-adapter", "zero-atoms", "random-p", "shuffled")
START, END = "<!-- results: made by make table -->", "<!-- end of results -->"


@lru_cache(maxsize=256)
def _predictions(path: Path) -> dict[str, np.ndarray]:
    with np.load(path) as stored:
        return {name: stored[name] for name in stored.files}


def cell_counts(cell: Path, arm: str, split: str, metric: str) -> np.ndarray:
    """Counts (n, 3) of one arm from a cell's predictions; see :mod:`uhl.stats`."""
    stored = _predictions(cell / "predictions.npz")
    labels, gold, length = (stored[f"{arm}/{split}/{part}"] for part in ("labels", "gold", "length"))
    if metric != "f1":
        return stats.counts(labels, gold)
    names = json.loads((cell / "manifest.json").read_text())["labels"]
    cuts = np.cumsum(length)[:-1]
    return stats.counts(np.split(labels, cuts), np.split(gold, cuts), names)


def _cell(profile: str, task: str, seed: int, phase: str, target: str, arm: str) -> Path:
    stage = (
        f"pretrain-{arm.removeprefix('uhl-')}" if arm.startswith("uhl-") else STAGE_OF_PHASE[phase] + runs.slug(target)
    )
    return runs.root() / profile / f"{runs.slug(task)}-s{seed}" / stage


def gather(profile: str, split: str = "test") -> dict[tuple[str, str, str, str], np.ndarray]:
    """Counts (seeds, n, 3) by (task, target, phase, arm), from predictions."""
    frame = runs.load_results(profile)
    frame = frame[frame["split"] == split]
    out = {}
    for key, rows in frame.groupby(["task", "target", "phase", "arm"], sort=False):
        task, target, phase, arm = map(str, key)
        tables = [
            cell_counts(_cell(profile, task, int(s), phase, target, arm), arm, split, str(m))
            for s, m in zip(rows["seed"], rows["metric"], strict=True)
        ]
        out[task, target, phase, arm] = np.stack(tables)
    return out


def summary(profile: str, split: str = "test") -> pd.DataFrame:
    """One row a (task, target, phase, arm): mean score with its interval, seeds, n, budgets."""
    frame = runs.load_results(profile)
    frame = frame[frame["split"] == split]
    tables = gather(profile, split)
    rows = []
    for key, group in frame.groupby(["task", "target", "phase", "arm"], sort=False):
        task, target, phase, arm = map(str, key)
        made = stats.interval(tables[task, target, phase, arm])
        if abs(made.value - group["score"].mean()) > 0.05:
            raise UHLError(f"{key}: results.csv says {group['score'].mean():.2f}, its predictions {made.value:.2f}")
        mean = group[["adapter_bytes", "trainable_params", "extra_flops_pct", "active_atoms", "seconds"]].mean()
        rows.append(
            {"task": task, "target": target, "phase": phase, "arm": arm, "score": made.value, "low": made.low}
            | {"high": made.high, "seeds": len(group), "n": int(group["n"].iloc[0])}
            | mean.to_dict()
        )
    out = pd.DataFrame(rows)
    out["in budget"] = (out["adapter_bytes"] <= LIMIT_BYTES) & (out["extra_flops_pct"] <= LIMIT_FLOPS_PCT)
    rank = {phase: i for i, phase in enumerate(runs.PHASES)}
    out = out.assign(p=out["phase"].map(rank), a=out["arm"].map({a: i for i, a in enumerate(ORDER)}))
    return out.sort_values(["task", "p", "target", "a"]).drop(columns=["p", "a"]).reset_index(drop=True)


def gap_recovered(table: pd.DataFrame) -> pd.DataFrame:
    """(ported - no adapter) / (LoRA r8 retrained on the target - no adapter), from :func:`summary`."""
    rows = []
    for (task, target), group in table.groupby(["task", "target"], sort=False):
        floor = group[group["arm"] == "no-adapter"]["score"]
        ceiling = group[(group["arm"] == "lora-r8") & (group["phase"] == "retrained")]["score"]
        if len(floor) == 1 and len(ceiling) == 1:
            ported = group[group["phase"].isin(["zero-shot", "tuned"])]
            for _, cell in ported.iterrows():
                share = (cell["score"] - floor.iloc[0]) / (ceiling.iloc[0] - floor.iloc[0])
                rows.append({"task": task, "target": target, "phase": cell["phase"], "arm": cell["arm"], "gap": share})
    return pd.DataFrame(rows, columns=["task", "target", "phase", "arm", "gap"])


def missing_cells(profile: str) -> list[str]:
    """Cells of the profile's grid that have not finished."""
    folder = runs.root() / profile
    return [c for c in Grid.read(profile).cells() if not (folder / c / "manifest.json").is_file()]


def markdown(profile: str, target: str | None = None) -> str:
    """The results as Markdown: tasks side by side, a row a (target, phase, arm), score with its 95 % interval."""
    table = summary(profile)
    if target:
        table = table[table["target"] == target]
        if table.empty:
            raise UHLError(f"profile {profile} has no results for target {target!r}")
    tasks = list(dict.fromkeys(table["task"]))
    lines = ["| model | phase | arm | " + " | ".join(tasks) + " | bytes | trained | FLOPs |"]
    lines.append("|---|---|---|" + "---|" * (len(tasks) + 3))
    for key, rows in table.groupby(["phase", "target", "arm"], sort=False):
        phase, model, arm = map(str, key)
        by_task = rows.set_index("task")
        cells = [_cell_text(by_task.loc[t]) if t in by_task.index else "" for t in tasks]
        first = rows.iloc[0]
        budget = [
            f"{first['adapter_bytes']:,.0f}",
            f"{first['trainable_params']:,.0f}",
            f"{first['extra_flops_pct']:.1f} %",
        ]
        label = f"*{NAMES.get(arm, arm)}*" if arm in CONTROLS else NAMES.get(arm, arm)
        lines.append("| " + " | ".join([model, phase, label, *cells, *budget]) + " |")
    return "\n".join(lines) + "\n\n" + _caption(profile, table)


def _cell_text(cell: pd.Series) -> str:
    return f"{cell['score']:.1f} [{cell['low']:.1f}, {cell['high']:.1f}]"


def _caption(profile: str, table: pd.DataFrame) -> str:
    manifests = [json.loads(p.read_text()) for p in sorted((runs.root() / profile).glob("*/*/manifest.json"))]
    hardware, commits = ({m[k] for m in manifests} for k in ("hardware", "commit"))
    sizes = {m["parameters"]["train_size"] for m in manifests if m["rows"]}
    labels = (
        "all training labels" if sizes == {None} else f"{', '.join(map(str, sorted(sizes, key=str)))} training labels"
    )
    return (
        f"Profile `{profile}`: test scores in percent, mean of {table['seeds'].max()} seed(s), with 95 % bootstrap "
        f"intervals over seeds and test examples (n = {', '.join(map(str, sorted(set(table['n']))))}); {labels}. "
        f"Italics: controls. Bytes: what the method adds to the bare host, head included. FLOPs: added per token, in "
        f"percent of the host's linear layers. Ran on {' and '.join(sorted(hardware))}; "
        f"commit {', '.join(sorted(commits))}.\n"
    )


def update_readme(profile: str, readme: Path, figures: Path) -> None:
    """Put the table into the README between its two marks, and the profile's figures with their CSVs into figures/."""
    left = missing_cells(profile)
    if left:
        raise UHLError(f"profile {profile} is not complete, {len(left)} cells are missing, first {left[0]}")
    text = readme.read_text(encoding="utf-8")
    if START not in text or END not in text:
        raise UHLError(f"{readme.name} has no place for the table; expected the lines {START} and {END}")
    before, after = text.split(START)[0], text.split(END)[1]
    write_text(readme, f"{before}{START}\n\n{markdown(profile)}\n{END}{after}")
    for file in sorted((runs.root() / profile / "analysis").glob("*.*")):
        if file.suffix in {".png", ".csv"}:
            shutil.copyfile(file, figures / file.name)
    shutil.copyfile(runs.root() / profile / "results.csv", figures / "results.csv")
