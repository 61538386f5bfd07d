"""Tables from files alone: scores with intervals per cell, gaps recovered, paired differences, costs.

Each is made of the manifests and predictions that a profile's cells left (:mod:`uhl.evidence`), by :mod:`uhl.stats`.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import pandas as pd

from uhl import compression, evidence, runs, stats
from uhl.baselines import SPARSE
from uhl.budget import LIMIT_BYTES, LIMIT_FLOPS_PCT
from uhl.config import ARMS, METHODS
from uhl.errors import UHLError
from uhl.files import sha256
from uhl.grid import Grid
from uhl.porting import DOUBTFUL, RULES
from uhl.runs import manifests
from uhl.viz import ORDER

STAGE_OF_PHASE = {"source": "baselines-", "zero-shot": "port-", "tuned": "tune-", "retrained": "baselines-"}


def cell_of(profile: str, task: str, seed: int, phase: str, target: str, arm: str) -> Path:
    """The folder of the cell that has a row of the results."""
    stage = (
        f"pretrain-{arm.removeprefix('uhl-')}" if arm.startswith("uhl-") else STAGE_OF_PHASE[phase] + runs.slug(target)
    )
    return runs.root() / profile / f"{runs.slug(task)}-s{seed}" / stage


K = TypeVar("K", bound=Hashable)
Key = tuple[str, str, str, str]
Cells = dict[Key, dict[int, np.ndarray]]
Groups = Mapping[str, np.ndarray | None]  # of each example of a task; None where examples stand alone


Scored = dict[str, tuple[Path, bytes]]  # of each task a cell, and what it was scored on


def gather(profile: str, split: str = "test", first: Scored | None = None) -> Cells:
    """Counts (n, 3) of each seed by (task, target, phase, arm), from predictions.

    Raises :class:`UHLError` where two cells of a task were scored on other examples, or on others' order; ``first``,
    which is filled, lets several profiles be held to the same.
    """
    frame = runs.load_results(profile)
    frame = frame[frame["split"] == split]
    out: Cells = {}
    first = {} if first is None else first
    for key, rows in frame.groupby(["task", "target", "phase", "arm"], sort=False):
        task, target, phase, arm = map(str, key)
        cells = out[task, target, phase, arm] = {}
        for seed, metric in zip(rows["seed"], rows["metric"], strict=True):
            cell = cell_of(profile, task, int(seed), phase, target, arm)
            scored = evidence.examples(cell, arm, split)
            other, known = first.setdefault(task, (cell, scored))
            if known != scored:
                raise UHLError(
                    f"{cell} and {other} were scored on other {split} examples, so they cannot be compared; delete the "
                    "older of the two folders and run its cell again"
                )
            cells[int(seed)] = evidence.counts(cell, arm, split, str(metric))
    return out


def groups_of(profile: str, task: str, split: str = "test") -> np.ndarray | None:
    """Group of each example of a task's split, as the cells' predictions hold them; None where examples stand alone."""
    for path in sorted((runs.root() / profile).glob(f"{task}-s*/*/predictions.npz")):
        own = re.fullmatch(rf"{re.escape(task)}-s\d+", path.parent.parent.name)  # `movies` is not `movies-short`
        if own and f"{split}/group" in (stored := evidence.predictions(path.parent)):
            return stored[f"{split}/group"]
    return None


def stack(tables: dict[int, np.ndarray], seeds: Iterable[int] | None = None) -> np.ndarray:
    """Counts (seeds, n, 3) of some seeds (by default all), in order of seed."""
    return np.stack([tables[s] for s in sorted(tables if seeds is None else seeds)])


def summary(profile: str, split: str = "test") -> pd.DataFrame:
    """One row a (task, target, phase, arm): mean score with its interval, seeds, n, budgets.

    Bytes and FLOPs are those of the seed with most, seconds the median over seeds, as a machine may sleep during one;
    ``top_k``: the most atoms of ours that a token could use.
    """
    frame = runs.load_results(profile)
    frame = frame[frame["split"] == split]
    if frame.empty:
        raise UHLError(f"profile {profile} has no rows of {split}; its cells score what `splits` names")
    tables = gather(profile, split)
    known, finished = _priors_of(tables), manifests(profile)
    rows = []
    for key, group in frame.groupby(["task", "target", "phase", "arm"], sort=False):
        task, target, phase, arm = map(str, key)
        made = stats.interval(stack(tables[task, target, phase, arm]), groups_of(profile, task, split), known.get(task))
        if abs(made.value - group["score"].mean()) > 0.05:
            said = f"manifests say {group['score'].mean():.2f}, their predictions {made.value:.2f}"
            raise UHLError(f"{', '.join(map(str, key))}: {said}; delete the folders of these cells and run them again")
        mean = group[list(runs.COLUMNS[runs.COLUMNS.index("adapter_bytes") :])].mean()
        for cost in ("adapter_bytes", "extra_flops_pct"):  # a seed's port may use no atoms
            mean[cost] = group[cost].max()
        mean["seconds"] = group["seconds"].median()
        cells = [cell_of(profile, task, int(s), phase, target, arm) for s in group["seed"]]
        mean["top_k"] = max(finished[cell]["parameters"]["top_k"] for cell in cells)
        rows.append(
            {"task": task, "target": target, "phase": phase, "arm": arm, "metric": str(group["metric"].iloc[0])}
            | {"score": made.value, "low": max(0.0, made.low)}
            | {"high": min(100.0, made.high), "seeds": len(group), "n": int(group["n"].iloc[0])}
            | mean.to_dict()
        )
    out = pd.DataFrame(rows)
    out["bytes at 8 bits"] = at_eight_bits(out)
    out["in budget"] = (out["adapter_bytes"] <= LIMIT_BYTES) & (out["extra_flops_pct"] <= LIMIT_FLOPS_PCT)
    rank = {phase: i for i, phase in enumerate(runs.PHASES)}
    out = out.assign(p=out["phase"].map(rank), a=out["arm"].map({a: i for i, a in enumerate(ORDER)}))
    return out.sort_values(["task", "p", "target", "a"]).drop(columns=["p", "a"]).reset_index(drop=True)


def at_eight_bits(table: pd.DataFrame) -> pd.Series:
    """What each method's file would have at 8 bits a number, as ours and the sparse ones have (or 4), for sizes at one
    precision: of the others' files, every number that trains beside the head, which has 8 already, is a float16 and
    takes a byte less. Of VB-LoRA, whose file does not hold what trains, about half. No scales are charged, and no lower
    score: files that are really written so (:func:`uhl.baselines.file_sizes`) are some larger, the smallest by a third.
    Where the method `head` was not run on the same model and task, its numbers are taken for theirs.
    """
    keys = ["task", "target", "phase"]
    heads = table[table["arm"] == "head"].set_index(keys)["trainable_params"]
    head = table[keys].join(heads.rename("head"), on=keys)["head"].fillna(0.0)
    numbers = (table["trainable_params"] - head).where(table["arm"] != "vb-lora", table["adapter_bytes"] / 2)
    return table["adapter_bytes"] - numbers.where(table["arm"].isin(set(METHODS) - {"head", *SPARSE}), 0)


def teachers(profile: str, split: str = "test") -> dict[str, dict[int, np.ndarray]]:
    """Counts, by task and seed, of what the teachers of a profile's adapters say; empty where they had none."""
    found: dict[str, dict[int, np.ndarray]] = {}
    for cell, entry in manifests(profile).items():
        if entry.get("teacher"):
            row = entry["rows"][0]
            told = evidence.counts(cell, evidence.TEACHER, split, row["metric"])
            found.setdefault(row["task"], {})[row["seed"]] = told
    return found


def gap_recovered(
    tables: Cells, groups: Groups | None = None, taught: Mapping[str, dict[int, np.ndarray]] | None = None
) -> pd.DataFrame:
    """(ported - no adapter) / (LoRA r8 retrained on the target - no adapter) with its interval, from :func:`gather`; to
    compare, that of a head alone which is fitted to the labels there.

    ``pgr`` is the performance gap recovered of Burns et al. (2023), of hosts that are better than what supervises the
    port: the same with its score in place of no adapter's. That is the adapter on its own source, whose logits the
    anchors have, or its teacher, whose they have where there is one (``taught``, from :func:`teachers`). Over the
    ``seeds`` that all cells have; NaN as :func:`uhl.stats.recovered` says, and ``pgr`` where the supervisor was not run
    with these, or where LoRA is not above it in almost all resamples, so that the ratio means nothing.
    """
    rows = []
    for (task, target, phase, arm), cell in tables.items():
        floor = tables.get((task, target, "zero-shot", "no-adapter"), {})
        ceiling = tables.get((task, target, "retrained", "lora-r8"), {})
        seeds = set(cell) & set(floor) & set(ceiling)
        if (phase in {"zero-shot", "tuned"} or (phase, arm) == ("retrained", "head")) and seeds:
            group, above = (groups or {}).get(task), stats.Interval(np.nan, np.nan, np.nan)
            ported, top = stack(cell, seeds), stack(ceiling, seeds)
            found = stats.recovered(ported, stack(floor, seeds), top, group)
            source = (taught or {}).get(task) or source_of(tables, task, arm)
            if seeds <= set(source):
                made = stats.recovered(ported, stack(source, seeds), top, group)
                above = above if np.isnan(made.low) else made
            rows.append((task, target, phase, arm, len(seeds), *found, *above))
    columns = ["task", "target", "phase", "arm", "seeds", "gap", "low", "high", "pgr", "pgr low", "pgr high"]
    return pd.DataFrame(rows, columns=columns)


def own_source(arm: str) -> str:
    """The adapter that an arm ports, as it is called on its source."""
    return "uhl-dimension" if arm == "dimension" else "uhl-canonical"


def source_of(tables: Cells, task: str, arm: str) -> dict[int, np.ndarray]:
    """Counts, by seed, of the adapter that an arm ports on its own source; empty where it was not scored there."""
    own = own_source(arm)
    return next((found for (t, _, p, a), found in tables.items() if (t, p, a) == (task, "source", own)), {})


def calibration(profile: str, split: str = "test") -> pd.DataFrame:
    """How often a ported adapter decides as its source did: ``predicted`` when it was ported, from the anchors, and
    ``measured`` on a split's examples (a token task: its words); the points that it ``expected`` to lose; and the
    scores of both. Ports whose ``kappa`` is below ``warns below`` warn. A row a ported cell and arm whose source's cell
    is there.
    """
    frame = runs.load_results(profile)
    scores = frame[frame["split"] == split].set_index(["task", "target", "phase", "arm", "seed"])["score"]
    rows, finished = [], manifests(profile)
    for cell, entry in finished.items():
        if not cell.name.startswith("port-") or cell.parent / "pretrain-canonical" not in finished:
            continue  # `audit.missing` names the latter
        row = entry["rows"][0]
        for arm, made in entry.get("reports", {}).items():
            if "agreement" in made and arm != "shuffled":  # which predicts for wrong pairs
                same = evidence.alike(cell, arm, split)
                if same is None:
                    continue  # the adapter of another task, with other labels
                task, target, seed = row["task"], row["target"], row["seed"]
                own = float(scores[task, row["source"], "source", "uhl-canonical", seed])
                ported = float(scores[task, target, "zero-shot", arm, seed])
                kappa = made.get("kappa", float("nan"))
                told = made["agreement"], same, kappa, DOUBTFUL[row["metric"]], made.get("expected_loss", float("nan"))
                rows.append((task, target, seed, arm, *told, own, ported))
    columns = ["task", "target", "seed", "arm", "predicted", "measured"]
    columns += ["kappa", "warns below", "expected", "source score", "score"]
    return pd.DataFrame(rows, columns=columns)


def compressed(profile: str) -> pd.DataFrame:
    """What notebook 10 measured on pruned copies of the source, over the seeds of each task; the columns are those of
    :func:`uhl.compression.table`.

    Raises :class:`UHLError` where there is nothing, or where a copy was not measured as the source was, or not as it is
    now: with fewer seeds, other examples, an adapter that was trained again since, or by other rules.
    """
    tables: dict[tuple[str, str, str], dict[int, np.ndarray]] = {}
    ports: dict[tuple[str, str, str], list[dict[str, object]]] = {}
    about: dict[str, dict[str, Any]] = {}
    metrics: dict[str, str] = {}
    remedy = f"delete the folders {profile}/*/compress and run again: make copies PROFILE={profile}"
    setups: dict[Path, set[str]] = {}
    for path in sorted((runs.root() / profile).glob("*-s*/compress/*/outcome.json")):
        entry, place = json.loads(path.read_text()), path.parents[2]
        file = place / "pretrain-canonical" / "adapter.safetensors"
        setup = {name: value for name, value in entry["about"].items() if name != "copy"}
        setups.setdefault(place, set()).add(json.dumps(setup, sort_keys=True))
        if len(setups[place]) > 1 or (file.is_file() and sha256(file) != setup["adapter"]):
            raise UHLError(f"{path.parent} was measured otherwise than the others, or with another adapter; {remedy}")
        if (setup.get("rules"), setup.get("protocol")) != (RULES, runs.PROTOCOL):
            raise UHLError(f"{path.parent} was measured by an earlier release, which ported otherwise; {remedy}")
        for row in entry["rows"]:
            key, details = (row["task"], row["target"], row["arm"]), entry["details"]
            counted = evidence.counts(path.parent, row["arm"], row["split"], row["metric"])
            tables.setdefault(key, {})[int(row["seed"])] = counted
            ports.setdefault(key, []).append(details["ports"].get(row["arm"], {}))
            about[row["target"]] = details
            metrics[row["task"]] = row["metric"]
    if not tables:
        raise UHLError(f"profile {profile} has no pruned copies; measure them first: make copies PROFILE={profile}")
    whole = {k[0]: {s: len(c) for s, c in cell.items()} for k, cell in tables.items() if not about[k[1]]["part"]}
    for (task, copy, arm), cell in tables.items():
        if {seed: len(c) for seed, c in cell.items()} != whole.get(task):
            raise UHLError(f"{arm} on {copy} ({task}) lacks seeds that the source has, or has other examples; {remedy}")
    known = priors((*key[:2], stats.score_of(stack(cell).sum(1))) for key, cell in tables.items())
    rows = []
    for (task, copy, arm), cell in tables.items():
        made = stats.interval(stack(cell), groups_of(profile, task), known[task])
        row = compression.described(copy, about[copy], ports[task, copy, arm], metrics[task])
        row |= {"task": task, "arm": arm, "seeds": len(cell), "n": len(next(iter(cell.values())))}
        rows.append(row | dict(zip(("score", "low", "high"), made, strict=True)))
    return pd.DataFrame(rows)[list(compression.COLUMNS)]


PAIRS = (
    ("source", "uhl-canonical", "source", "head"),
    ("source", "uhl-dimension", "source", "head"),
    ("source", "uhl-canonical", "source", "lora-r8"),
    ("source", "uhl-dimension", "source", "lora-r8"),
    ("zero-shot", "dimension", "zero-shot", "no-adapter"),
    ("zero-shot", "lineage", "zero-shot", "no-adapter"),
    ("zero-shot", "anchor", "zero-shot", "shuffled"),
    ("zero-shot", "anchor", "zero-shot", "zero-atoms"),
    ("zero-shot", "anchor", "zero-shot", "random-p"),
    ("zero-shot", "anchor", "retrained", "head"),
    ("zero-shot", "embedding", "zero-shot", "lineage"),
    ("zero-shot", "refresh", "zero-shot", "anchor"),
    ("zero-shot", "refresh", "zero-shot", "zero-atoms"),
    ("zero-shot", "refresh", "zero-shot", "refresh-random"),
    ("tuned", "anchor", "tuned", "zero-atoms"),
    ("tuned", "anchor", "tuned", "random-p"),
    ("tuned", "anchor", "tuned", "untrained"),
    ("tuned", "dimension", "tuned", "zero-atoms"),
    ("tuned", "lineage", "tuned", "zero-atoms"),
    ("tuned", "anchor", "retrained", "lora-r8"),
    ("tuned", "anchor", "retrained", "sat-lora"),
    ("tuned", "anchor", "retrained", "hf-sat-lora"),
)


def _pairs(tables: Cells) -> Iterator[tuple[Key, np.ndarray, np.ndarray]]:
    """(task, target, first, second) of :data:`PAIRS`, and the counts of both on the seeds that both have."""
    for task, target in dict.fromkeys((key[0], key[1]) for key in tables):
        for phase_a, a, phase_b, b in PAIRS:
            first, second = (tables.get((task, target, *cell), {}) for cell in ((phase_a, a), (phase_b, b)))
            if seeds := set(first) & set(second):
                yield (task, target, f"{phase_a} {a}", f"{phase_b} {b}"), stack(first, seeds), stack(second, seeds)


def priors(scores: Iterable[tuple[K, str, np.ndarray]]) -> dict[K, stats.Prior | None]:
    """How much seeds vary in each kind of cell, from (kind, model, what the seeds of a cell show); see
    :func:`uhl.stats.prior`. A kind is a task, or a task and more: tasks differ in it, not least by how many examples
    they are tested on. Cells that show the same count once: where a port uses no atoms, several arms are one.
    """
    found: dict[K, dict[tuple[float, ...], tuple[str, np.ndarray]]] = {}
    for kind, model, values in scores:
        found.setdefault(kind, {})[tuple(values.round(6))] = model, values
    return {kind: stats.prior(cells.values()) for kind, cells in found.items()}


def _usual(arm: str) -> bool:
    """Whether a cell tells of others how much seeds vary: codes of other texts make of a host whatever they will."""
    return not arm.endswith("shuffled")


def _priors_of(tables: Cells) -> dict[str, stats.Prior | None]:
    """How much seeds vary in the scores of each task."""
    return priors((*key[:2], stats.score_of(stack(cell).sum(1))) for key, cell in tables.items() if _usual(key[3]))


def _of_one(first: str, second: str) -> bool:
    """Whether two cells of a target, "phase arm", come of one trained adapter, by which most of what a seed does is
    common to both. Differences of what was trained apart, or on two models, vary more from seed to seed.
    """
    arms = set(ARMS) - {"dimension", "no-adapter"}
    return all(phase in {"zero-shot", "tuned"} and arm in arms for phase, arm in (first.split(), second.split()))


def priors_apart(tables: Cells) -> dict[tuple[str, bool], stats.Prior | None]:
    """How much seeds vary in the paired differences of each task, by those of :data:`PAIRS`, of one adapter (True) or
    of what was trained apart (False): for each table of differences, so that one has the same interval in all of them.
    """
    return priors(
        ((key[0], _of_one(*key[2:])), key[1], stats.seeds_apart(one, other))
        for key, one, other in _pairs(tables)
        if _usual(key[3])
    )


def paired(tables: Cells, groups: Groups | None = None) -> pd.DataFrame:
    """Paired differences of :data:`PAIRS` over the seeds that both have, from :func:`gather`.

    ``groups`` maps a task to the group of each example, see :func:`groups_of`. ``p holm`` is corrected over the whole
    table, and the verdict goes by it; a single seed decides nothing unless other cells show how much seeds vary. ``p
    mcnemar`` is the largest of the seeds', where the metric is an accuracy and examples stand alone.
    """
    known = priors_apart(tables)
    return _compared(_pairs(tables), ("first", "second"), lambda key: known.get((key[0], _of_one(*key[2:]))), groups)


def beside(profile: str) -> pd.DataFrame:
    """Paired differences of a profile's adapters from those of the one that its grid names: each arm that both have,
    on the source, without labels and tuned, over the seeds that both have, in the columns of :func:`paired`.

    Empty where the grid names none, or where nothing of that is here, which :func:`uhl.audit.missing` says.
    """
    other = grid.beside if (grid := Grid.known(profile)) else None
    if other is None or not manifests(other):
        return _compared([], ("phase", "arm"), lambda key: None)
    scored: Scored = {}
    own, others = gather(profile, first=scored), gather(other, first=scored)
    pairs = []
    for key in own:
        phase, arm = key[2:]
        ours = arm.startswith("uhl-") or (phase in {"zero-shot", "tuned"} and arm != "no-adapter" and _usual(arm))
        if ours and (seeds := set(own[key]) & set(others.get(key, {}))):
            pairs.append((key, stack(own[key], seeds), stack(others[key], seeds)))
    known = priors((*key[:2], stats.seeds_apart(one, two)) for key, one, two in pairs)
    groups = {task: groups_of(profile, task) for task in scored}
    return _compared(pairs, ("phase", "arm"), lambda key: known.get(key[0]), groups)


def _compared(
    pairs: Iterable[tuple[Key, np.ndarray, np.ndarray]],
    named: tuple[str, str],
    known: Callable[[Key], stats.Prior | None],
    groups: Groups | None = None,
) -> pd.DataFrame:
    """A table of differences, of which ``named`` are the third and fourth column; see :func:`paired`. ``known`` says
    how much seeds vary in such a difference.
    """
    rows, shown = [], []
    for key, one, other in pairs:
        group = (groups or {}).get(key[0])
        alone = (group is None or len(np.unique(group)) == len(group)) and bool((one[..., 1:] == 1).all())
        exact = max(map(stats.mcnemar, one, other)) if alone else float("nan")
        lent = known(key)
        shown.append(lent is not None)
        rows.append((*key, len(one), *stats.difference(one, other, group, lent), exact))
    columns = ["task", "target", *named, "seeds", "difference", "low", "high", "p", "p mcnemar"]
    table = pd.DataFrame(rows, columns=columns)
    table.insert(9, "p holm", stats.holm(table["p"].tolist()))
    sign = np.where(table["difference"] > 0, "better", "worse")
    told = (table["p holm"] < 0.05) & ((table["seeds"] > 1) | np.array(shown, dtype=bool))
    return table.assign(verdict=np.where(told, sign, "undecided"))


def before_and_after(table: pd.DataFrame, tables: Cells, groups: Groups) -> pd.DataFrame:
    """The rows of :func:`summary` without labels and tuned; where an arm was tuned with fewer seeds than it was ported
    with, its score without labels is over those, so that the two differ in nothing but the labels.
    """
    known = _priors_of(tables)
    shown = table[table["phase"].isin(["zero-shot", "tuned"])].copy()
    for place, row in shown[shown["phase"] == "zero-shot"].iterrows():
        before, after = (tables.get((row["task"], row["target"], p, row["arm"]), {}) for p in ("zero-shot", "tuned"))
        if (seeds := set(before) & set(after)) and seeds != set(before):
            made = stats.interval(stack(before, seeds), groups.get(row["task"]), known.get(row["task"]))
            values = [made.value, max(0.0, made.low), min(100.0, made.high), len(seeds)]
            shown.loc[place, ["score", "low", "high", "seeds"]] = values
    return shown.astype({"seeds": int})


def leaderboard(table: pd.DataFrame, moved: pd.DataFrame) -> pd.DataFrame:
    """What each way to adapt a target reaches and costs there, from :func:`summary`, best first within a target.

    The columns are those of PEFT's method_comparison, and the score without labels, of the same seeds, from
    :func:`before_and_after`: a row a (task, target, method). What was not tuned has its score without labels alone.
    ``memory`` is the peak of a training step beside the host's weights.
    """
    keys = ["task", "target", "arm"]
    zero = moved[moved["phase"] == "zero-shot"].set_index(keys)["score"].rename("zero-shot")
    trained = table[table["phase"].isin(["tuned", "retrained"])]
    rest = table[(table["phase"] == "zero-shot") & ~table.set_index(keys).index.isin(trained.set_index(keys).index)]
    both = pd.concat([trained, rest.assign(seconds=np.nan)]).join(zero, on=keys)  # its seconds are a port's
    out = both.assign(step=both["seconds"] / both["steps"].where(both["steps"] > 0))
    names = {"arm": "method", "trainable_params": "trainable", "adapter_bytes": "file size"}
    names |= {
        "bytes at 8 bits": "size at 8 bits",
        "peak_mb": "memory MB",
        "step": "s a step",
        "seconds": "train time s",
        "extra_flops_pct": "FLOPs %",
    }
    shown = ["task", "target", "phase", "arm", "metric", "score", "low", "high", "seeds", "n", "zero-shot"]
    shown += [
        "trainable_params",
        "adapter_bytes",
        "bytes at 8 bits",
        "peak_mb",
        "step",
        "seconds",
        "extra_flops_pct",
        "in budget",
    ]
    out = out.sort_values(["task", "target", "score"], ascending=[True, True, False], kind="stable")
    return out[shown].rename(columns=names).reset_index(drop=True)


def curves(profile: str) -> pd.DataFrame:
    """Training loss by step of every cell that trained: columns task, target, phase, arm, seed, step, loss."""
    rows = []
    for entry in manifests(profile).values():
        phases = {row["arm"]: (row["task"], row["target"], row["phase"]) for row in entry["rows"]}
        for arm, losses in entry.get("curves", {}).items():
            rows += [(*phases[arm], arm, entry["seed"], step, loss) for step, loss in losses]
    return pd.DataFrame(rows, columns=["task", "target", "phase", "arm", "seed", "step", "loss"])


def attempts(profile: str) -> pd.DataFrame:
    """What notebook 07 measured on dev, of all tasks, targets and seeds of a profile; see :func:`attempts.measure`."""
    frames = []
    for path in sorted((runs.root() / profile).glob("*-s*/attempts-*/attempts.csv")):
        task, _, seed = path.parent.parent.name.rpartition("-s")
        target = path.parent.name.removeprefix("attempts-")
        frames.append(pd.read_csv(path).assign(task=task, target=target, seed=int(seed)))
    if not frames:
        raise UHLError(f"profile {profile} has no attempts; measure them first: make attempts PROFILE={profile}")
    if any({"same", "n"} - set(frame) for frame in frames):
        raise UHLError(
            f"profile {profile} has attempts of an earlier release; delete its folders attempts-* and run again"
        )
    found = pd.concat(frames, ignore_index=True)
    return found[["task", "target", "seed", *(c for c in found.columns if c not in ("task", "target", "seed"))]]


def findings(table: pd.DataFrame, pairs: pd.DataFrame) -> list[str]:
    """One sentence a comparison, over all tasks and targets, with the counts of each verdict and the range."""
    lines = []
    for key, group in pairs.groupby(["first", "second"], sort=False):
        first, second = map(str, key)
        tally = ", ".join(f"{count} {verdict}" for verdict, count in group["verdict"].value_counts().items())
        low, high = group["difference"].min(), group["difference"].max()
        ends = " to ".join(dict.fromkeys((f"{low:+.1f}", f"{high:+.1f}")))
        lines.append(f"{first} against {second}: {tally} of {len(group)} cells; {ends} points")
    sizes = table[table["arm"].str.startswith("uhl-")]["adapter_bytes"]
    if len(sizes):
        lines.append(f"adapter files: {sizes.min():,.0f} to {sizes.max():,.0f} bytes")
    return lines
