"""The hypothesis's claims, judged from a profile's files: held, refuted or not decidable here, for each arm.

    1  zero-shot, less than 1 point is lost against the source
    2  after tuning, as good as SAT-LoRA retrained there (margin 1 point), with 97 % less memory and no more FLOPs
    3  on a narrow host, at least 1.1 points over plain LoRA of the same budget
    4  at most 1 MB, 10 % more FLOPs and two active atoms a token

Claims about scores are tests of a bound against the 95 % interval of a paired difference, on the same test examples and
seeds, each by itself; ``p holm`` says what is left of each when all of them are corrected for how many there are. A
single seed decides none, unless other cells show how much seeds vary. Beside the arms they are judged for two controls,
:data:`WITHOUT`, which have the ported head and no trained atom: what these hold too is not the atoms' merit. Claims
about budgets hold or do not. The claims name BERT-base, BERT-large and TinyBERT; which models stand in for them is what
the profile says, and each claim is judged on all of its targets: the first names a larger host, the third a narrower
one.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd

from uhl import stats
from uhl.audit import undefined
from uhl.budget import LIMIT_BYTES, LIMIT_FLOPS_PCT
from uhl.config import ARMS, CONTROLS
from uhl.report import figures_of
from uhl.results import Cells, Groups, gather, groups_of, own_source, priors_apart, source_of, stack, summary
from uhl.viz import NAMES

PORTED = tuple(arm for arm in ARMS if arm not in CONTROLS)
WITHOUT = ("zero-atoms", "random-p")
JUDGED = (*PORTED, *WITHOUT)
RIVAL, SAME_BUDGET = "sat-lora", "lora-1mb"
NOT_RUN, NOT_DEFINED = "not run", "not defined"
ALIKE = 300.0  # n x points: where n independent examples are alike, a share of up to 3 / n may differ (rule of three)
COLUMNS = ["claim", "arm", "target", "task", "effect", "low", "high", "bound", "p", "seeds", "n", "verdict", "reason"]


class Compared(NamedTuple):
    """Two cells, of which a claim says by how much the first is above the second."""

    claim: str
    arm: str
    task: str
    target: str
    cells: tuple[dict[int, np.ndarray], dict[int, np.ndarray]]
    bound: float
    rival: str

    @property
    def seeds(self) -> set[int]:
        """Those that both cells have."""
        return set(self.cells[0]) & set(self.cells[1])

    @property
    def stacked(self) -> tuple[np.ndarray, np.ndarray]:
        """Counts (seeds, n, 3) of both."""
        return stack(self.cells[0], self.seeds), stack(self.cells[1], self.seeds)


def judge(
    table: pd.DataFrame, tables: Cells, groups: Groups, undefined: Sequence[tuple[str, str, str, str]] = ()
) -> pd.DataFrame:
    """A row a claim, arm, target and task, from :func:`uhl.results.summary` and :func:`uhl.results.gather`; what is
    ``undefined``, from :func:`uhl.audit.undefined`, is said to be.

    ``effect`` is in points for claims about scores, else in the unit that the claim names; ``p`` is of its being the
    bound, ``p holm`` the same corrected over all claims about scores. How much seeds vary is
    :func:`uhl.results.priors_apart`'s to say, of what was trained apart: so are our adapter and its rival in claims 2
    and 3, and the differences of two models in claim 1 vary as much.
    """
    zero_shot, tuned, narrow = (list(compared(tables)) for compared in (_zero_shot, _tuned, _narrow))
    known = priors_apart(tables)

    def rows(compared: Iterable[Compared]) -> list[list[object]]:
        return [_judged(c, groups.get(c.task), known.get((c.task, False))) for c in compared]

    found = [*rows(zero_shot), *rows(tuned), *_memory(table), *rows(narrow), *_budgets(table)]
    judged = pd.DataFrame(found, columns=COLUMNS)
    tested = judged["p"].notna()
    corrected = pd.Series(stats.holm(judged.loc[tested, "p"].tolist()), judged.index[tested], dtype=float)
    judged.insert(COLUMNS.index("p") + 1, "p holm", corrected.reindex(judged.index))
    for place, row in judged[judged["verdict"] == NOT_RUN].iterrows():
        phase = "zero-shot" if row["claim"].startswith("1") else "tuned"
        if (row["task"], row["target"], phase, row["arm"]) in undefined:
            judged.loc[place, ["verdict", "reason"]] = [NOT_DEFINED, f"{row['arm']} is not defined there"]
    return judged


def _judged(compared: Compared, group: np.ndarray | None, known: stats.Prior | None) -> list[object]:
    """One row: the difference of two cells against a bound."""
    claim, arm, task, target, cells, bound, rival = compared
    if not compared.seeds:
        lacks = f"{rival} was not run" if cells[0] else f"{arm} is not defined there, or was not run in this phase"
        if all(cells):
            lacks = f"{arm} and {rival} have no seed in common"
        return _unknown(claim, (arm, target, task), bound, lacks)
    one, other = compared.stacked
    made = stats.difference(one, other, group, known, bound=bound)
    p: float | None = made.p
    found = stats.verdict(made, bound)
    told = {"held": "all of the interval is above", "refuted": "none of the interval is above"}
    reason = f"{told.get(found, 'the interval holds')} {bound:+.1f}"
    alone = one.shape[1] if group is None else len(np.unique(group))  # examples, or groups of them, such as reviews
    if np.array_equal(one, other) and alone * abs(bound) < ALIKE:
        on = f"{alone} examples" if alone == one.shape[1] else f"{one.shape[1]} examples of {alone} groups"
        found, reason, p = "not decidable", f"no difference on {on}, too few to exclude one", None
    if len(one) == 1 and known is None:
        found, reason, p = "not decidable", "one seed does not show how much seeds vary", None
    about = [bound, p, len(one), one.shape[1]]
    return [claim, arm, target, task, made.value, made.low, made.high, *about, found, reason]


def _unknown(claim: str, place: tuple[str, str, str], bound: float, why: str) -> list[object]:
    """The row of a claim on an (arm, target, task) of which nothing was measured."""
    return [claim, *place, None, None, None, bound, None, 0, 0, NOT_RUN, why]


def _ported(tables: Cells, phase: str) -> Iterator[tuple[str, str, str, dict[int, np.ndarray]]]:
    """(task, target, arm, cell) of every arm, and of :data:`WITHOUT`, on every host that was ported to; the cell is
    empty where none ran.
    """
    for task, target in dict.fromkeys(key[:2] for key in tables if key[2] == "zero-shot"):
        yield from ((task, target, arm, tables.get((task, target, phase, arm), {})) for arm in JUDGED)


def _zero_shot(tables: Cells) -> Iterator[Compared]:
    name = "1 zero-shot loses less than 1 point against the source"
    for task, target, arm, cell in _ported(tables, "zero-shot"):
        yield Compared(name, arm, task, target, (cell, source_of(tables, task, arm)), -1.0, own_source(arm))


def _tuned(tables: Cells) -> Iterator[Compared]:
    name = "2 tuned, it matches SAT-LoRA retrained (margin 1 point)"
    for task, target, arm, cell in _ported(tables, "tuned"):
        pair = cell, tables.get((task, target, "retrained", RIVAL), {})
        yield Compared(name, arm, task, target, pair, -1.0, "SAT-LoRA")


def _narrow(tables: Cells) -> Iterator[Compared]:
    name = "3 tuned, 1.1 points over plain LoRA of the same budget"
    for task, target, arm, cell in _ported(tables, "tuned"):
        pair = cell, tables.get((task, target, "retrained", SAME_BUDGET), {})
        yield Compared(name, arm, task, target, pair, 1.1, "LoRA at 1 MB")


def _fact(name: str, row: Mapping[Any, Any], value: float, bound: float, holds: bool, reason: str) -> list[object]:
    place = [row["arm"], row["target"], row["task"]]
    held = "held" if holds else "refuted"
    return [name, *place, value, None, None, bound, None, row["seeds"], row["n"], held, reason]


def _memory(table: pd.DataFrame) -> Iterator[list[object]]:
    """Bytes of files at one precision (8 bits, 4 where both have 4), and FLOPs, of ours and of the rival's."""
    memory, flops = "2 with 97 % less memory than SAT-LoRA", "2 with SAT-LoRA's FLOPs or fewer"
    rivals = table[(table["arm"] == RIVAL) & (table["phase"] == "retrained")].to_dict("records")
    rival = {(row["task"], row["target"]): row for row in rivals}
    for row in table[(table["phase"] == "tuned") & table["arm"].isin(PORTED)].to_dict("records"):
        theirs = rival.get((row["task"], row["target"]))
        if theirs is None:
            for name, bound in ((memory, 97.0), (flops, 0.05)):
                yield _unknown(name, (row["arm"], row["target"], row["task"]), bound, "SAT-LoRA was not run")
            continue
        less = 100 * (1 - row["adapter_bytes"] / theirs["adapter_bytes"])
        reason = f"{row['adapter_bytes']:,.0f} bytes against {theirs['adapter_bytes']:,.0f}"
        yield _fact(memory, row, less, 97.0, less >= 97.0, reason)
        more = row["extra_flops_pct"] - theirs["extra_flops_pct"]
        reason = f"{row['extra_flops_pct']:.2f} % against {theirs['extra_flops_pct']:.2f} % of the host's FLOPs"
        yield _fact(flops, row, more, 0.05, more < 0.05, reason)


def _budgets(table: pd.DataFrame) -> Iterator[list[object]]:
    limits = {
        "adapter_bytes": ("4 at most 1 MB", float(LIMIT_BYTES), "{:,.0f} bytes"),
        "extra_flops_pct": ("4 at most 10 % more FLOPs", LIMIT_FLOPS_PCT, "{:.1f} %"),
        "top_k": ("4 at most two active atoms a token", 2.0, "{:.0f} may be"),
    }
    ours = table[table["arm"].isin([*PORTED, "uhl-canonical", "uhl-dimension"])]
    for column, (name, limit, text) in limits.items():
        for _, rows in ours.groupby("arm", sort=False):
            worst = max(rows.to_dict("records"), key=lambda row: row[column])
            value = float(worst[column])
            reason = f"the largest of {len(rows)} cells: {text.format(value)}"
            if column == "top_k":
                reason += f", at most {rows['active_atoms'].max():.2f} are on average"
            yield _fact(name, worst, value, limit, value <= limit, reason)


def verdicts(judged: pd.DataFrame) -> pd.DataFrame:
    """Counts of each verdict by claim and arm, of :func:`judge`."""
    counts = judged.groupby(["claim", "arm"], sort=False)["verdict"].value_counts().unstack(fill_value=0)
    return counts.reindex(
        columns=["held", "refuted", "not decidable", NOT_RUN, NOT_DEFINED], fill_value=0
    ).reset_index()


def _where(rows: pd.DataFrame, verdict: str) -> str:
    """The targets of a verdict in brackets, where there are others too."""
    if rows["verdict"].nunique() == 1:
        return ""
    return f" ({', '.join(dict.fromkeys(rows['target'][rows['verdict'] == verdict]))})"


def _left(rows: pd.DataFrame) -> str:
    """The verdicts that a correction leaves, in words; a claim about budgets needs none."""
    if rows["p holm"].isna().all():
        return ""
    left = rows[(rows["p holm"] < 0.05) & (rows["verdict"] != "not decidable")]["verdict"].value_counts()
    return ", ".join(f"{verdict} in {count}" for verdict, count in left.items()) or "none"


def _places(rows: Iterable[Mapping[Any, Any]]) -> str:
    """Tasks and the targets of each, in words."""
    targets: dict[str, list[str]] = {}
    for row in rows:
        targets.setdefault(row["task"], []).append(row["target"])
    return "; ".join(f"{task} on {', '.join(names)}" for task, names in targets.items())


UNITS = {"2 with": " %", "4 at most 1 MB": " bytes", "4 at most 10": " %", "4 at most two": " atoms"}


def of_profile(profile: str) -> pd.DataFrame:
    """:func:`judge` on a profile's runs."""
    tables = gather(profile)
    groups = {task: groups_of(profile, task) for task in {key[0] for key in tables}}
    return judge(summary(profile), tables, groups, undefined(profile))


def markdown(judged: pd.DataFrame, profile: str, page: Path, arms: Collection[str] = ()) -> str:
    """The verdicts on a profile's runs, from :func:`of_profile`, as Markdown for ``page`` of the repository: a row a
    claim and arm, of ``arms`` alone where they are given; the claims about budgets in one row each.

    The verdicts are counts over the tasks and targets where the arm ran, of the claims about budgets over arms, and
    beside them how many are left when all claims about scores are corrected for how many there are; the effects are
    their range. Where verdicts differ their targets stand beside them: the first claim is of a larger host,
    the third of a narrower one. Cells where an arm did not run are named, and below the full table arms that ran
    nowhere.
    """
    nowhere = judged.groupby("claim")["effect"].transform("count") == 0
    judged = judged.assign(arm=judged["arm"].mask(nowhere, "every arm"))
    anywhere = judged.groupby(["claim", "arm"])["effect"].transform("count") > 0
    absent = judged[~nowhere & ~anywhere & (judged["verdict"] == NOT_RUN)]
    judged = judged[nowhere | anywhere]
    if arms:  # and what is said of all of them
        judged = judged[judged["arm"].isin([*arms, "every arm"]) | judged["claim"].str.startswith("4")]
    file = (figures_of(profile) / "claims.csv").relative_to(page.parent).as_posix()
    said = f"The claims of the hypothesis, over tasks and targets (intervals: [{file}]({file})):"
    lines = [said, "", "| claim | arm | effect | verdict | after Holm's correction |", "|---|---|---|---|---|"]
    named = judged["arm"].mask(judged["claim"].str.startswith("4"), "each arm's worst")
    for (claim, arm), found in judged.groupby(["claim", named], sort=False):
        rows = found[~found["verdict"].isin([NOT_RUN, NOT_DEFINED])]
        told = rows["verdict"].value_counts()
        counts = ", ".join(f"{verdict} in {count}{_where(rows, str(verdict))}" for verdict, count in told.items())
        counts += f" of {len(rows)}" if len(rows) else NOT_RUN
        left = found[found["verdict"] == NOT_RUN].to_dict("records")
        if len(rows) and left:
            counts += f"; not run: {_places(left)}"
        arm = f"*{NAMES[str(arm)]}*" if arm in WITHOUT else arm
        unit = next((unit for start, unit in UNITS.items() if str(claim).startswith(start)), " points")
        known = rows["effect"].dropna()
        form = "{:,.0f}" if known.abs().max() > 1000 else "{:.1f}" if unit != " points" else "{:+.1f}"
        ends = " to ".join(dict.fromkeys(form.format(end) for end in (known.min(), known.max())))
        lines.append(f"| {claim} | {arm} | {ends + unit if len(known) else NOT_RUN} | {counts} | {_left(rows)} |")
    if len(absent) and not arms:
        lines += ["", f"Run nowhere, and not judged: {_absent(absent)}."]
    return "\n".join(lines)


def _absent(rows: pd.DataFrame) -> str:
    """Arms and the numbers of the claims that they are not judged in, in words."""
    claims: dict[str, list[str]] = {}
    for arm, group in rows.groupby("arm", sort=False):
        claims.setdefault(", ".join(group["claim"].str[0].unique()), []).append(str(arm))
    return "; ".join(f"{', '.join(arms)} (claim{'s' * (',' in numbers)} {numbers})" for numbers, arms in claims.items())
