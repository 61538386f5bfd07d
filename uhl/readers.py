"""Readers of labelled text: hub data sets and local files (jsonl, csv, tsv, CoNLL columns; gzip too) as three splits.

A folder holds ``train.*`` and optionally ``dev.*`` (or ``val.*``, ``validation.*``) and ``test.*``. Absent splits are
cut from train with a fixed seed; where train and dev alone are given, or test has no labels, the given dev is the
reported test. ``unlabelled.*`` holds texts without labels, which anchors may be chosen from.
"""

from __future__ import annotations

import csv
import gzip
import logging
import re
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from datasets import Dataset, DatasetDict, load_dataset

from uhl.config import Kind
from uhl.errors import UHLError, one_of

SPLIT_SEED = 20240101
LOG = logging.getLogger("uhl")


@dataclass(frozen=True)
class TaskSpec:
    """How to read a task: where it lies, its kind, and which columns mean what.

    ``path`` is a hub id, a folder with ``train.*`` and optionally ``dev.*`` (or ``validation.*``), ``test.*`` and
    ``unlabelled.*``, or one file. ``columns`` maps ours (text, text_pair, label, tokens, tags) to the file's.
    ``labels`` fixes the order of the classes; without it they are the sorted labels of the given training rows.
    """

    path: str
    kind: Kind
    columns: dict[str, str] = field(default_factory=dict)
    labels: tuple[str, ...] = ()
    config: str | None = None
    licence: str = "unknown"
    revision: str | None = None


REQUIRED: dict[str, tuple[str, ...]] = {
    "sentence": ("text", "label"),
    "pair": ("text", "text_pair", "label"),
    "token": ("tokens", "tags"),
}
ALIASES = {
    **{"train": "train", "dev": "dev", "val": "dev", "valid": "dev", "validation": "dev", "test": "test"},
    **dict.fromkeys(("unlabelled", "unlabeled", "unsupervised"), "unlabelled"),
}
WANTED = {
    "text": "text",
    "text_pair": "text",
    "label": "a label",
    "tokens": "a list of words (jsonl or CoNLL)",
    "tags": "a list of tags (jsonl or CoNLL)",
}
TEXTS = ("text", "tokens", "text_pair")  # columns of text; questions on one passage have the last in common
SUFFIXES = (".jsonl", ".json", ".csv", ".tsv", ".conll", ".txt")


def read(spec: TaskSpec, instead: Sequence[str] = ()) -> tuple[tuple[str, ...], DatasetDict]:
    """Labels in order, and train, dev and test with our column names and labels as numbers; ``unlabelled``, where it is
    given, less the texts that those hold. Dev and test of pairs have a column ``group`` where several share a part.

    ``instead`` are names that the error offers when a hub cannot be reached. Raises :class:`UHLError` for files that
    cannot be read, a missing column, an unusable cell, an unknown label and an empty split.
    """
    found = _tables(spec, instead)
    free = found.pop("unlabelled", None)
    for split in [name for name in found if name != "train" and _hidden(found[name], found["train"], spec)]:
        LOG.warning("%s: the labels of %s are withheld; other splits, or a part of train, stand in", spec.path, split)
        del found[split]
    tables = _checked(spec, found)
    labels, convert = _label_map(spec, found["train"])
    scored = {split: _grouped(table) if split in {"dev", "test"} else table for split, table in tables.items()}
    data = {split: Dataset.from_dict(convert(split, table)) for split, table in scored.items()}
    if free is not None:
        data["unlabelled"] = Dataset.from_dict(_free(spec, free, tables).to_dict("list"))
    return labels, DatasetDict(data)


def _free(spec: TaskSpec, table: pd.DataFrame, labelled: dict[str, pd.DataFrame]) -> pd.DataFrame:
    """Texts without labels, each once, that no labelled split holds."""
    rows = _columns(spec, "unlabelled", table, [key for key in REQUIRED[spec.kind] if key in TEXTS])
    known = pd.concat([_keys(part) for part in labelled.values()])
    kept = rows[~_keys(rows).isin(known) & ~_keys(rows).duplicated()].reset_index(drop=True)
    if len(kept) < len(rows):
        left = len(rows) - len(kept)
        LOG.warning("%s: %d unlabelled texts stand in another split or twice, and are left out", spec.path, left)
    if kept.empty:
        raise UHLError(f"{spec.path}, split unlabelled has no text that is not in another split; remove its file")
    return kept


def _keys(rows: pd.DataFrame) -> pd.Series:
    """What tells texts apart, capitals and blanks aside: both parts of a pair."""
    parts = [rows[key].map(folded_text) for key in TEXTS if key in rows]
    return sum(("\t" + part for part in parts[1:]), parts[0])


def folded_text(cell: Any) -> str:
    """A text, or words, without regard to capitals and blanks."""
    text = cell if isinstance(cell, str) else " ".join(cell)
    return " ".join(text.lower().split())


def _tables(spec: TaskSpec, instead: Sequence[str]) -> dict[str, pd.DataFrame]:
    path = Path(spec.path).expanduser()
    if path.is_file():
        return {"train": _read_file(path, spec)}
    if path.is_dir():
        files: dict[str, Path] = {}
        for file in sorted(path.iterdir()):
            split = ALIASES.get(file.name.split(".")[0])
            if split and file.name.removesuffix(".gz").endswith(SUFFIXES):
                if split in files:
                    both = f"{files[split].name} and {file.name}"
                    raise UHLError(f"{path} has two files of its {split} split, {both}; keep one")
                files[split] = file
        found = {split: _read_file(file, spec, split) for split, file in files.items()}
        if "train" not in found:
            names = ", ".join(sorted(file.name for file in path.iterdir())[:6]) or "nothing"
            raise UHLError(f"{path} holds no train file but {names}; name one train{'|'.join(SUFFIXES)}, .gz too")
        return found
    try:
        loaded = load_dataset(spec.path, spec.config, revision=spec.revision)
    except Exception as error:  # the hub's clients raise many kinds
        reason = (str(error).strip().splitlines() or [""])[0][:160]
        raise UHLError(
            f"task {spec.path!r} is neither a local path nor could it be loaded from the hub "
            f"({type(error).__name__}: {reason}); without a network use {', '.join([*instead, 'a local folder'])}"
        ) from error
    tables = {ALIASES[str(split)]: rows.to_pandas() for split, rows in loaded.items() if str(split) in ALIASES}
    if "train" not in tables:
        raise UHLError(f"task {spec.path!r} has no split train; it has {', '.join(map(str, loaded))}")
    if (free := tables.pop("unlabelled", None)) is not None:  # nobody asked for it: taken as far as it can be read
        texts = {key: spec.columns.get(key, key) for key in REQUIRED[spec.kind] if key in TEXTS}
        if set(texts.values()) <= set(free.columns):
            good = [all(_usable(key, row[column]) for key, column in texts.items()) for _, row in free.iterrows()]
            tables |= {"unlabelled": free[good]} if any(good) else {}
    return tables


def _hidden(rows: pd.DataFrame, train: pd.DataFrame, spec: TaskSpec) -> bool:
    """Whether a split's labels are withheld, as GLUE's test labels are: all -1, or a column that only train has.

    A column in its place that train does not have is a mistake, not a withheld label.
    """
    key = "tags" if spec.kind == "token" else "label"
    column = spec.columns.get(key, key)
    if rows.empty:
        return False
    if column not in rows:
        return column in train and set(rows.columns) <= {*train.columns, "index", "id", "idx"}
    return bool(rows[column].astype(str).isin(["-1", "-1.0"]).all())


def _read_file(path: Path, spec: TaskSpec, split: str = "train") -> pd.DataFrame:
    name = path.name.removesuffix(".gz")
    try:
        if split == "unlabelled" and spec.kind == "sentence" and name.endswith(".txt"):  # a text a line
            lines = [line.strip() for line in _text(path).split("\n")]
            return pd.DataFrame({spec.columns.get("text", "text"): [line for line in lines if line]})
        if name.endswith((".jsonl", ".json")):
            return pd.read_json(path, lines=True, dtype=False)
        texts = {spec.columns.get(key, key): str for key in ("text", "text_pair", "label")}  # also digits
        if name.endswith((".csv", ".tsv")):
            form: dict[str, Any] = {"sep": "\t", "quoting": csv.QUOTE_NONE} if name.endswith(".tsv") else {}
            with warnings.catch_warnings():  # of a row with more cells than there are columns
                warnings.simplefilter("error", pd.errors.ParserWarning)
                return pd.read_csv(path, dtype=texts, index_col=False, keep_default_na=False, **form)
        return _read_conll(path, spec)
    except UHLError:
        raise
    except pd.errors.ParserWarning as error:
        raise UHLError(
            f"{path} has a row with more cells than its first line has names; take the separator out of texts (csv: or "
            "quote them) and from the ends of rows, name the first column, or give jsonl"
        ) from error
    except Exception as error:  # pandas raises many kinds
        raise UHLError(f"{path} could not be read ({error}); expected {name.rsplit('.', 1)[-1]} rows") from error


def _text(path: Path) -> str:
    """A file's text, unpacked, without a byte order mark."""
    return (gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()).decode("utf-8-sig")


def _read_conll(path: Path, spec: TaskSpec) -> pd.DataFrame:
    """Columns separated by blanks, first the word, last the tag; a blank line ends a sentence (IOB1 becomes BIO)."""
    rows: list[dict[str, list[str]]] = []
    words: list[str] = []
    tags: list[str] = []
    for number, line in enumerate([*_text(path).split("\n"), ""], start=1):
        cells = re.findall(r"[^ \t\r]+", line)
        if cells and not cells[0].startswith("-DOCSTART-"):
            if len(cells) == 1:
                raise UHLError(f"{path}, line {number}: {cells[0]!r} has no tag; expected a word and its tag")
            words.append(cells[0])
            tags.append(cells[-1])
        elif not cells and words:
            rows.append({"tokens": words, "tags": to_bio(tags)})
            words, tags = [], []
    columns = {spec.columns.get(key, key): [row[key] for row in rows] for key in ("tokens", "tags")}
    return pd.DataFrame(columns)


def to_bio(tags: Sequence[str]) -> list[str]:
    """IOB1 or BIO tags as BIO: an entity always begins with ``B-``."""
    out = []
    for i, tag in enumerate(tags):
        before = tags[i - 1][2:] if i and tags[i - 1] != "O" else None
        out.append("B-" + tag[2:] if tag.startswith("I-") and tag[2:] != before else tag)
    return out


def _checked(spec: TaskSpec, tables: dict[str, pd.DataFrame]) -> dict[str, pd.DataFrame]:
    """The columns that the kind needs, under our names, of three splits that are not empty."""
    one_of(spec.kind, REQUIRED, "kind of task")
    if twice := [label for label in spec.labels if spec.labels.count(label) > 1]:
        raise UHLError(f"{spec.path}: label {twice[0]!r} stands twice in `labels`; name each once")
    known = REQUIRED[spec.kind]
    if strange := set(spec.columns) - set(known):
        raise UHLError(f"{spec.path}: a {spec.kind} task has no column {min(strange)!r}; it has {', '.join(known)}")
    _count_shared(spec, tables)
    whole = _complete_splits({split: _columns(spec, split, table, known) for split, table in tables.items()})
    if whole["train"].empty:
        raise UHLError(
            f"{spec.path}, split train has too few different rows, of {len(tables['train'])}, to cut the absent splits "
            "from; give more, or files for both dev and test"
        )
    return whole


def _count_shared(spec: TaskSpec, tables: dict[str, pd.DataFrame]) -> None:
    """Log how many texts of a given dev or test split stand in train too, to the letter."""
    names = [spec.columns.get(key, key) for key in TEXTS]
    texts = {split: table[[name for name in names if name in table]].astype(str) for split, table in tables.items()}
    trained = set(texts["train"].itertuples(index=False, name=None))
    for split in ("dev", "test"):
        both = sum(row in trained for row in texts[split].itertuples(index=False, name=None)) if split in texts else 0
        if both:
            LOG.warning("%s: %d of %d texts of %s stand in train too", spec.path, both, len(texts[split]), split)


def _columns(spec: TaskSpec, split: str, table: pd.DataFrame, keys: Sequence[str]) -> pd.DataFrame:
    """Columns of a split under our names. Raises :class:`UHLError` where it is empty, lacks one, or a cell is wrong."""
    names = {key: spec.columns.get(key, key) for key in keys}
    if table.empty:
        raise UHLError(
            f"{spec.path}, split {split} is empty; expected at least one row: fill it, or remove its file"
            + (", and the split is cut from train" if split != "unlabelled" else "")
        )
    missing = [key for key, column in names.items() if column not in table.columns]
    if missing:
        raise UHLError(
            f"{spec.path}, split {split}: missing column {names[missing[0]]!r}; it has "
            f"{', '.join(map(str, table.columns))}. Say which one holds it, columns: {{{missing[0]}: <name>}}"
        )
    _check_cells(f"{spec.path}, split {split}", table, names)
    return table[list(names.values())].set_axis(list(names), axis=1)


def _check_cells(where: str, table: pd.DataFrame, names: dict[str, str]) -> None:
    """Raise at the first cell that does not hold what its column is for, and where tokens and tags differ in number."""
    for key, column in names.items():
        for row, cell in enumerate(table[column], start=1):
            if not _usable(key, cell):
                raise UHLError(
                    f"{where}, row {row}, column {column!r} holds {cell!r:.60}, expected {WANTED[key]}; "
                    f"mend it or leave the row out"
                )
    if "tags" in names:
        for row, (tokens, tags) in enumerate(zip(*(table[names[k]] for k in ("tokens", "tags")), strict=True), start=1):
            if len(tokens) != len(tags):
                raise UHLError(f"{where}, row {row} has {len(tags)} tags for {len(tokens)} tokens; give each one tag")


def _usable(key: str, cell: Any) -> bool:
    """Whether a cell holds text, a label that is not blank, or a list of such."""
    if key in {"tokens", "tags"}:
        inner = "text" if key == "tokens" else "label"
        if not isinstance(cell, (list, np.ndarray)) or not all(_usable(inner, each) for each in cell):
            return False
        return key == "tags" or any(word.strip() for word in cell)
    if key == "label":
        return pd.api.types.is_scalar(cell) and not pd.isna(cell) and str(cell).strip() != ""
    return isinstance(cell, str)


def _complete_splits(tables: dict[str, pd.DataFrame]) -> dict[str, pd.DataFrame]:
    """Fill absent splits from train (seeded). With train and dev alone, the given dev is the reported test.

    Rows of the same text (capitals and blanks aside), or pairs with the same second part, such as questions on one
    passage, go to one side.
    """
    tables = dict(tables)
    if "test" not in tables and "dev" in tables:
        tables["test"] = tables.pop("dev")
    for split in ("test", "dev"):
        if split not in tables:
            rows = tables["train"].sample(frac=1.0, random_state=SPLIT_SEED)
            held = _whole_groups(rows, min(1000, max(1, len(rows) // 10)))
            tables[split], tables["train"] = rows[held], rows[~held]
    return {split: tables[split].reset_index(drop=True) for split in ("train", "dev", "test")}


def _whole_groups(rows: pd.DataFrame, most: int) -> np.ndarray:
    """Marks of the first ``most`` rows or fewer, or of one group where none is so small: rows that belong together are
    all marked, or none. Pairs are taken by both parts where by the second groups are too large to fill half of
    ``most``, or to stand in any split, as with questions on a single passage.
    """
    last = next(key for key in reversed(TEXTS) if key in rows)
    for column in (rows[last].map(folded_text), _keys(rows)):
        groups, names = pd.factorize(column)
        left, chosen = most, []
        sizes = np.bincount(groups, minlength=len(names))
        for group, size in enumerate(sizes):
            if size <= left:
                chosen.append(group)
                left -= size
        if left <= most / 2 and sizes.max() <= most:
            break
    return np.isin(groups, chosen or [0])


def _grouped(rows: pd.DataFrame) -> pd.DataFrame:
    """Pairs with the ``group`` of each, such as all questions on one passage, which are not independent: those with the
    same first or second part, whichever makes fewer groups. As they are where none repeats, or where it is no text of
    its own: one that more than a tenth of all pairs have, such as an aspect to be judged.
    """
    parts = [pd.factorize(rows[key].map(folded_text))[0] for key in ("text", "text_pair") if "text_pair" in rows]
    groups = [part for part in parts if 1 < part.max() + 1 < len(rows) and np.bincount(part).max() <= len(rows) / 10]
    return rows.assign(group=min(groups, key=max)) if groups else rows


def _label_map(spec: TaskSpec, train: pd.DataFrame) -> tuple[tuple[str, ...], Any]:
    """Labels in order, and what turns a split into numbers; where none are named, they are those of train as it was
    given: one that few rows have may stand in no other split than the dev that is cut from it.
    """
    column = "tags" if spec.kind == "token" else "label"

    def text(value: Any) -> str:
        if isinstance(value, (int, np.integer)) and not isinstance(value, bool) and spec.kind == "token":
            return spec.labels[int(value)] if 0 <= int(value) < len(spec.labels) else str(value)
        return str(value).strip()

    seen = train[spec.columns.get(column, column)]
    known = {text(v) for row in seen for v in row} if spec.kind == "token" else {text(v) for v in seen}
    labels = spec.labels or tuple(sorted(known, key=lambda tag: (tag != "O", tag)))
    if spec.kind == "token" and (strange := [tag for tag in labels if not re.fullmatch("O|[BIES]-.+", tag)]):
        raise UHLError(
            f"{spec.path}: tag {strange[0]!r} is not O, B-<type> or I-<type>, and token tasks are scored by entities: "
            "write the tags so, or name them in `labels` where they are numbers"
        )
    index = {label: i for i, label in enumerate(labels)}

    def number(value: Any, split: str) -> int:
        if text(value) not in index:
            raise UHLError(
                f"{spec.path}, split {split}: unknown label {value!r}; expected one of {', '.join(labels)}: "
                "mend the row, or name all labels in `labels`"
            )
        return index[text(value)]

    def convert(split: str, table: pd.DataFrame) -> dict[str, list[Any]]:
        columns: dict[str, list[Any]] = {str(name): table[name].tolist() for name in table}
        if spec.kind == "token":
            columns["tokens"] = [list(words) for words in columns["tokens"]]
            columns[column] = [[number(tag, split) for tag in tags] for tags in columns[column]]
        else:
            columns[column] = [number(value, split) for value in columns[column]]
        return columns

    return labels, convert
