"""Tasks by name: labelled text in fixed splits, of three kinds.

| kind       | example columns             | label                | metric                       |
|------------|-----------------------------|----------------------|------------------------------|
| `sentence` | `text`                      | one class            | accuracy                     |
| `pair`     | `text`, `text_pair`         | one class            | accuracy                     |
| `token`    | `tokens` (list of words)    | BIO tag for each word | entity F1 (seqeval)         |

A task is named by an offline name (:data:`OFFLINE`), by a hub id, or by local files. Dev chooses settings; test is
what tables report. ``unlabelled`` is text without labels, disjoint from dev and test, for anchors.
"""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pandas as pd
from datasets import Dataset, DatasetDict, load_dataset
from transformers import PreTrainedTokenizerBase

from uhl import sources
from uhl.errors import UHLError

Kind = Literal["sentence", "pair", "token"]
SPLIT_SEED = 20240101
IGNORE = -100
NEUTRAL = 0.3  # offline sentences whose mean rating is nearer to zero carry no label


@dataclass(frozen=True)
class Task:
    """A task with fixed splits. ``data`` has ``train``, ``dev``, ``test`` and, where there is any, ``unlabelled``."""

    name: str
    kind: Kind
    labels: tuple[str, ...]
    data: DatasetDict
    licence: str = "unknown"

    @property
    def metric(self) -> str:
        """``f1`` for token tasks, else ``accuracy``."""
        return "f1" if self.kind == "token" else "accuracy"

    def subset(self, split: str, size: int | None, seed: int) -> Task:
        """The same task with at most ``size`` examples of one split, drawn with ``seed``; other splits stay whole."""
        rows = self.data[split]
        if size is None or size >= len(rows):
            return self
        chosen = random.Random(seed).sample(range(len(rows)), size)
        return replace(self, data=DatasetDict({**self.data, split: rows.select(chosen)}))


@dataclass(frozen=True)
class TaskSpec:
    """How to read a task: where it lies, its kind, and which columns mean what.

    ``path`` is a hub id, a folder with ``train.*`` and optionally ``dev.*`` (or ``validation.*``) and ``test.*``, or
    one file. ``columns`` maps ours (text, text_pair, label, tokens, tags) to the file's. ``labels`` fixes the order
    of the classes; without it they are the sorted labels of the training split.
    """

    path: str
    kind: Kind
    columns: dict[str, str] = field(default_factory=dict)
    labels: tuple[str, ...] = ()
    config: str | None = None
    licence: str = "unknown"
    revision: str | None = None


_BIO = ("O", "B-PER", "I-PER", "B-ORG", "I-ORG", "B-LOC", "I-LOC", "B-MISC", "I-MISC")
HUB: dict[str, TaskSpec] = {
    "sst2": TaskSpec("stanfordnlp/sst2", "sentence", {"text": "sentence"}, ("0", "1")),
    "conll2003": TaskSpec(
        "eriktks/conll2003", "token", {"tags": "ner_tags"}, _BIO, revision="refs/convert/parquet"
    ),  # its main revision is a script, which `datasets` no longer runs
    "boolq": TaskSpec(
        "google/boolq", "pair", {"text": "question", "text_pair": "passage", "label": "answer"}, ("False", "True")
    ),
    "amazon_polarity": TaskSpec("fancyzhx/amazon_polarity", "sentence", {"text": "content"}, ("0", "1")),
}
REQUIRED: dict[str, tuple[str, ...]] = {
    "sentence": ("text", "label"),
    "pair": ("text", "text_pair", "label"),
    "token": ("tokens", "tags"),
}


def load_task(task: str | TaskSpec) -> Task:
    """Load a task by offline name, by a name or hub id in :data:`HUB`, by a local path, or from a :class:`TaskSpec`.

    Raises :class:`UHLError` for an unknown name, a missing column, an unknown label or an empty split.
    """
    if isinstance(task, str):
        if task in OFFLINE:
            return _offline_task(task)
        by_id = {spec.path: spec for spec in HUB.values()}
        if task in HUB or task in by_id:
            return load_task(HUB.get(task) or by_id[task])
        if Path(task).exists():
            return load_task(TaskSpec(task, "sentence"))
        raise UHLError(
            f"unknown task {task!r}; offline names: {', '.join(OFFLINE)}; hub names: {', '.join(HUB)}; or give a "
            f"TaskSpec or an existing file or folder"
        )
    tables = _read(task)
    return _assemble(task, tables)


# --- offline sentences -----------------------------------------------------------------------------------------------


OFFLINE = {"movies": "movieReviewSnippets", "amazon": "amazonReviewSnippets"}
GENERIC = {"editorials": "nytEditorialSnippets", "tweets": "tweets"}


def rated_sentences(name: str) -> pd.DataFrame:
    """Sentences with their mean human rating: columns ``text``, ``rating``, ``group`` (the review they come from)."""
    stem = {**OFFLINE, **GENERIC}[name]
    lines = (sources.vader_text() / f"{stem}_GroundTruth.txt").read_text(encoding="utf-8").splitlines()
    rows = [line.split("\t") for line in lines if line.strip()]
    table = pd.DataFrame(rows, columns=["id", "rating", "text"])
    table["group"] = table["id"] if name in {"movies", "tweets"} else table["id"].str.split("_").str[0]
    table["rating"] = table["rating"].astype(float)
    return table.drop_duplicates("text").reset_index(drop=True)


def _offline_task(name: str) -> Task:
    """Whole reviews go to one split (seeded); ratings near zero are dropped from the labelled splits."""
    table = rated_sentences(name)
    groups = sorted(table["group"].unique())
    random.Random(SPLIT_SEED).shuffle(groups)
    bounds = (np.array([0.62, 0.70, 0.90]) * len(groups)).round().astype(int)
    parts = dict(zip(("train", "dev", "test", "unlabelled"), np.split(np.array(groups), bounds), strict=True))
    labelled = table["rating"].abs() >= NEUTRAL
    data = {}
    for split in ("train", "dev", "test"):
        rows = table[table["group"].isin(parts[split]) & labelled]
        data[split] = Dataset.from_dict(
            {"text": rows["text"].tolist(), "label": (rows["rating"] > 0).astype(int).tolist()}
            | {"group": pd.factorize(rows["group"])[0].tolist()}  # the review: its sentences are not independent
        )
    held_out = table["group"].isin(parts["dev"]) | table["group"].isin(parts["test"])
    free = table[table["group"].isin(parts["unlabelled"]) | (~labelled & ~held_out)]
    data["unlabelled"] = Dataset.from_dict({"text": free["text"].tolist()})
    return Task(name, "sentence", ("negative", "positive"), DatasetDict(data), licence="MIT")


def generic_text() -> list[str]:
    """Public sentences of no task's domain (editorials and tweets), in a fixed order."""
    return [text for name in GENERIC for text in rated_sentences(name)["text"]]


# --- hub and local files ---------------------------------------------------------------------------------------------


ALIASES = {"train": "train", "dev": "dev", "validation": "dev", "valid": "dev", "test": "test"}
SUFFIXES = (".jsonl", ".json", ".csv", ".tsv", ".conll", ".txt")


def _read(spec: TaskSpec) -> dict[str, pd.DataFrame]:
    path = Path(spec.path).expanduser()
    if path.is_file():
        return {"train": _read_file(path, spec)}
    if path.is_dir():
        found: dict[str, pd.DataFrame] = {}
        for file in sorted(path.iterdir()):
            split = ALIASES.get(file.name.split(".")[0])
            if split and file.name.removesuffix(".gz").endswith(SUFFIXES):
                found[split] = _read_file(file, spec)
        if "train" not in found:
            raise UHLError(f"{path} holds no train file; expected train{'|'.join(SUFFIXES)}, gzip allowed")
        return found
    try:
        loaded = load_dataset(spec.path, spec.config, revision=spec.revision)
    except Exception as error:  # the hub's clients raise many kinds
        reason = (str(error).strip().splitlines() or [""])[0][:160]
        raise UHLError(
            f"task {spec.path!r} is neither a local path nor could it be loaded from the hub "
            f"({type(error).__name__}: {reason}); without a network use {', '.join(OFFLINE)} or a local folder"
        ) from error
    tables = {ALIASES[str(split)]: rows.to_pandas() for split, rows in loaded.items() if str(split) in ALIASES}
    return {split: rows for split, rows in tables.items() if not _hidden(rows, spec)}


def _hidden(rows: pd.DataFrame, spec: TaskSpec) -> bool:
    """Whether a split's labels are withheld, as GLUE's test labels are (all -1)."""
    column = spec.columns.get("label", "label")
    return column in rows and len(rows) > 0 and bool((rows[column] == -1).all())


def _read_file(path: Path, spec: TaskSpec) -> pd.DataFrame:
    name = path.name.removesuffix(".gz")
    try:
        if name.endswith((".jsonl", ".json")):
            return pd.read_json(path, lines=True, dtype=False)
        if name.endswith(".csv"):
            return pd.read_csv(path, keep_default_na=False)
        if name.endswith(".tsv"):
            return pd.read_csv(path, sep="\t", quoting=3, keep_default_na=False)
        return _read_conll(path, spec)
    except UHLError:
        raise
    except Exception as error:  # pandas raises many kinds
        raise UHLError(f"{path} could not be read ({error}); expected {name.rsplit('.', 1)[-1]} rows") from error


def _read_conll(path: Path, spec: TaskSpec) -> pd.DataFrame:
    """Columns separated by blanks, first the word, last the tag; a blank line ends a sentence (IOB1 becomes BIO)."""
    import gzip

    text = gzip.decompress(path.read_bytes()).decode() if path.suffix == ".gz" else path.read_text(encoding="utf-8")
    rows = []
    for block in text.replace("\r\n", "\n").split("\n\n"):
        cells = [line.split() for line in block.splitlines() if line.strip() and not line.startswith("-DOCSTART-")]
        if cells:
            rows.append({"tokens": [c[0] for c in cells], "tags": to_bio([c[-1] for c in cells])})
    columns = {spec.columns.get(key, key): [row[key] for row in rows] for key in ("tokens", "tags")}
    return pd.DataFrame(columns)


def to_bio(tags: Sequence[str]) -> list[str]:
    """IOB1 or BIO tags as BIO: an entity always begins with ``B-``."""
    out = []
    for i, tag in enumerate(tags):
        before = tags[i - 1][2:] if i and tags[i - 1] != "O" else None
        out.append("B-" + tag[2:] if tag.startswith("I-") and tag[2:] != before else tag)
    return out


def _assemble(spec: TaskSpec, tables: dict[str, pd.DataFrame]) -> Task:
    names = {key: spec.columns.get(key, key) for key in REQUIRED[spec.kind]}
    for split, table in tables.items():
        missing = [c for c in names.values() if c not in table.columns]
        if missing:
            raise UHLError(
                f"{spec.path}, split {split}: missing column {missing[0]!r}; it has "
                f"{', '.join(map(str, table.columns))}. "
                f"Name the columns in TaskSpec.columns"
            )
        if table.empty:
            raise UHLError(f"{spec.path}, split {split} is empty; expected at least one row")
    tables = {s: t[list(names.values())].set_axis(list(names), axis=1) for s, t in tables.items()}
    tables = _complete_splits(tables)
    labels, convert = _label_map(spec, tables)
    data = {split: Dataset.from_list(convert(split, table)) for split, table in tables.items()}
    return Task(Path(spec.path).name.split(".")[0], spec.kind, labels, DatasetDict(data), spec.licence)


def _complete_splits(tables: dict[str, pd.DataFrame]) -> dict[str, pd.DataFrame]:
    """Fill absent splits from train (seeded). With train and dev alone, the given dev is the reported test."""
    tables = dict(tables)
    if "test" not in tables and "dev" in tables:
        tables["test"] = tables.pop("dev")
    for split in ("test", "dev"):
        if split not in tables:
            rows = tables["train"].sample(frac=1.0, random_state=SPLIT_SEED)
            cut = min(1000, max(1, len(rows) // 10))
            tables[split], tables["train"] = rows[:cut], rows[cut:]
    return {split: tables[split].reset_index(drop=True) for split in ("train", "dev", "test")}


def _label_map(spec: TaskSpec, tables: dict[str, pd.DataFrame]) -> tuple[tuple[str, ...], Any]:
    column = "tags" if spec.kind == "token" else "label"

    def text(value: Any) -> str:
        if isinstance(value, (int, np.integer)) and not isinstance(value, bool) and spec.kind == "token":
            return spec.labels[int(value)] if int(value) < len(spec.labels) else str(value)
        return str(value)

    seen = tables["train"][column]
    known = {text(v) for row in seen for v in row} if spec.kind == "token" else {text(v) for v in seen}
    labels = spec.labels or tuple(sorted(known, key=lambda tag: (tag != "O", tag)))
    index = {label: i for i, label in enumerate(labels)}

    def number(value: Any, split: str) -> int:
        if text(value) not in index:
            raise UHLError(f"{spec.path}, split {split}: unknown label {value!r}; expected one of {', '.join(labels)}")
        return index[text(value)]

    def convert(split: str, table: pd.DataFrame) -> list[dict[str, Any]]:
        rows: list[dict[str, Any]] = table.to_dict("records")  # type: ignore[assignment]
        for row in rows:
            cell = row[column]
            row[column] = [number(v, split) for v in cell] if spec.kind == "token" else number(cell, split)
            if spec.kind == "token":
                row["tokens"] = list(row["tokens"])
        return rows

    return labels, convert


# --- tokenisation and metrics ----------------------------------------------------------------------------------------


def encode(task_kind: Kind, rows: Dataset, tokenizer: PreTrainedTokenizerBase, max_length: int = 128) -> Dataset:
    """Tokenise a split. Adds ``labels``: a class, or for token tasks a tag on each word's first piece, else -100."""

    def one(batch: Mapping[str, list[Any]]) -> dict[str, Any]:
        if task_kind == "token":
            out = tokenizer(batch["tokens"], is_split_into_words=True, truncation=True, max_length=max_length)
            if "tags" in batch:
                out["labels"] = [_first_piece_labels(out.word_ids(i), tags) for i, tags in enumerate(batch["tags"])]
            return dict(out)
        out = tokenizer(batch["text"], batch.get("text_pair"), truncation=True, max_length=max_length)
        if "label" in batch:
            out["labels"] = batch["label"]
        return dict(out)

    return rows.map(one, batched=True, remove_columns=rows.column_names, load_from_cache_file=False)


def kept_words(rows: Dataset, tokenizer: PreTrainedTokenizerBase, max_length: int) -> list[list[int]]:
    """For each example of a token task, the words that have a piece left after truncation, in order."""
    made = tokenizer(list(rows["tokens"]), is_split_into_words=True, truncation=True, max_length=max_length)
    return [sorted({w for w in made.word_ids(i) if w is not None}) for i in range(len(rows))]


def every_word(tags: Sequence[int], gold: Sequence[int], words: Sequence[int], task: Task) -> list[int]:
    """Tags of ``words`` as tags of all words of ``gold``: one that the model never saw counts as outside."""
    out = [outside(task)] * len(gold)
    for word, tag in zip(words, tags, strict=True):
        out[word] = tag
    return out


def outside(task: Task) -> int:
    """Number of the tag ``O``, or the first tag where a task has none."""
    return task.labels.index("O") if "O" in task.labels else 0


def _first_piece_labels(words: Sequence[int | None], tags: Sequence[int]) -> list[int]:
    previous, labels = None, []
    for word in words:
        labels.append(IGNORE if word is None or word == previous else tags[word])
        previous = word
    return labels


def score(task: Task, predictions: Sequence[Any] | np.ndarray, gold: Sequence[Any] | np.ndarray) -> float:
    """Test metric in percent: accuracy of classes, or entity F1 over word-level tags (lists, aligned, no padding)."""
    if task.kind == "token":
        from seqeval.metrics import f1_score

        names = [[task.labels[t] for t in row] for row in gold]
        guess = [[task.labels[t] for t in row] for row in predictions]
        return 100.0 * float(f1_score(names, guess, zero_division=0))
    from sklearn.metrics import accuracy_score

    return 100.0 * float(accuracy_score(list(gold), list(predictions)))


def majority(task: Task, split: str = "test") -> tuple[list[Any], float]:
    """Predictions and score of the most frequent training class (a token task: ``O`` everywhere, F1 0)."""
    rows = task.data[split]
    if task.kind == "token":
        nothing = [[outside(task)] * len(tags) for tags in rows["tags"]]
        return nothing, score(task, nothing, rows["tags"])
    label = int(np.bincount(task.data["train"]["label"]).argmax())
    guess = [label] * len(rows)
    return guess, score(task, guess, rows["label"])
