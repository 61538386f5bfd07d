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

import bisect
import hashlib
import itertools
import json
import math
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import pandas as pd
import pyarrow as pa
from datasets import Dataset, DatasetDict, concatenate_datasets
from datasets.fingerprint import generate_random_fingerprint
from transformers import BatchEncoding, PreTrainedTokenizerBase

from uhl import sources
from uhl.config import METRICS, PAIR, Kind
from uhl.errors import UHLError
from uhl.readers import SPLIT_SEED, TaskSpec, folded_text, read
from uhl.runs import root

IGNORE = -100
V = TypeVar("V")
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
        return METRICS[self.kind]

    def subset(self, split: str, size: int | None, seed: int) -> Task:
        """The same task with at most ``size`` examples of one split, drawn with ``seed``; other splits stay whole."""
        rows = self.data[split]
        if size is None or size >= len(rows):
            return self
        chosen = random.Random(seed).sample(range(len(rows)), size)
        return replace(self, data=DatasetDict({**self.data, split: rows.select(chosen)}))

    def set_aside(self, count: int) -> Task:
        """The same task with ``count`` training texts less, which are ``unlabelled`` ones instead, the same for every
        seed: none that dev or test hold as well, and each in all its copies, so that nothing is trained on that text,
        capitals and blanks aside. (On parts of it there may be: SST-2's training split has phrases of its sentences.)

        Raises :class:`UHLError` where no more than ``count`` such texts are there.
        """
        if not count:
            return self
        rows, texts = self.data["train"], plain_text(self, "train")
        held = {folded_text(text) for split in ("dev", "test") for text in plain_text(self, split)}
        there = sorted(text for text in set(texts) if folded_text(text) not in held)
        if count >= len(there):
            raise UHLError(f"`unlabelled` is {count:,}, and {self.name} has {len(there):,} training texts; lower it")
        chosen = set(random.Random(SPLIT_SEED).sample(there, count))
        first = {text: row for row, text in reversed(list(enumerate(texts)))}
        columns = [column for column in ("text", "text_pair", "tokens") if column in rows.column_names]
        free = rows.select(sorted(first[text] for text in chosen)).select_columns(columns)
        parts = [self.data["unlabelled"], free] if "unlabelled" in self.data else [free]
        away = {folded_text(text) for text in chosen}
        kept = rows.select([row for row, text in enumerate(texts) if folded_text(text) not in away])
        return replace(self, data=DatasetDict({**self.data, "train": kept, "unlabelled": concatenate_datasets(parts)}))


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


def find_task(name: str) -> TaskSpec | None:
    """What a task's name stands for: a name or hub id in :data:`HUB`, or a local path; None for an offline name.

    Raises :class:`UHLError` for an unknown name.
    """
    by_id = {spec.path: spec for spec in HUB.values()}
    if name in OFFLINE:
        return None
    if name in HUB or name in by_id:
        return HUB.get(name) or by_id[name]
    if Path(name).exists():
        return TaskSpec(name, "sentence")
    raise UHLError(
        f"unknown task {name!r}; offline names: {', '.join(OFFLINE)}; hub names: {', '.join(HUB)}; or give an "
        f"existing file or folder, or a hub id with its `kind`, `columns` and `labels`"
    )


def load_task(task: str | TaskSpec) -> Task:
    """Load a task by offline name, by what :func:`find_task` knows, or from a :class:`TaskSpec`.

    Raises :class:`UHLError` for an unknown name, a missing column, an unknown label or an empty split.
    """
    if isinstance(task, str):
        spec = find_task(task)
        return load_task(spec) if spec else _offline_task(task)
    labels, data = read(task, tuple(OFFLINE))
    return Task(Path(task.path).name.split(".")[0], task.kind, labels, data, task.licence)


# --- offline sentences -----------------------------------------------------------------------------------------------


OFFLINE = {"movies": "movieReviewSnippets", "amazon": "amazonReviewSnippets"}
LICENCE = "MIT"  # of all these sentences
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
    return Task(name, "sentence", ("negative", "positive"), DatasetDict(data), licence=LICENCE)


def generic_text() -> list[str]:
    """Public sentences of no task's domain (editorials and tweets), in a fixed order."""
    return [text for name in GENERIC for text in rated_sentences(name)["text"]]


def digest(task: Task, texts: Sequence[str] = ()) -> str:
    """Hash of a task's labels, of its splits, and of further texts."""
    splits = {split: task.data[split].to_dict() for split in ("train", "dev", "test")}
    return hashlib.sha256(json.dumps([task.labels, splits, list(texts)], default=str).encode()).hexdigest()


def groups(task: Task, split: str) -> np.ndarray | None:
    """The group of each example of a split, such as the review that it is of; None where examples stand alone."""
    rows = task.data[split]
    return np.array(rows["group"], dtype=np.int32) if "group" in rows.column_names else None


def plain_text(task: Task, split: str) -> list[str]:
    """A split's texts without their labels: words joined by blanks, a pair's two parts by a tab; no other tabs."""
    rows = task.data[split]
    if "tokens" in rows.column_names:
        return [" ".join(words) for words in rows["tokens"]]
    first = [text.replace(PAIR, " ") for text in rows["text"]]
    if "text_pair" in rows.column_names:
        return [f"{a}{PAIR}{b.replace(PAIR, ' ')}" for a, b in zip(first, rows["text_pair"], strict=True)]
    return first


# --- tokenisation and metrics ----------------------------------------------------------------------------------------


def encode(task_kind: Kind, rows: Dataset, tokenizer: PreTrainedTokenizerBase, max_length: int = 128) -> Dataset:
    """Tokenise a split. Adds ``labels``: a class, or for token tasks a tag on each word's first piece, else -100; and
    ``teacher``, logits, where the split has them, for token tasks a row a piece, of NaN where it is no first one. What
    is beyond ``max_length`` tokens, or beyond what the tokenizer's model takes, is cut.

    The result is kept in :func:`tokens_dir` under a hash of rows, tokenizer and length, so that other seeds and stages
    read it. It is not kept where that folder cannot be written, or for a tokenizer that is not of `tokenizers`.
    """
    most = min(max_length, tokenizer.model_max_length)  # a host has no places for more

    def one(batch: Mapping[str, list[Any]]) -> dict[str, Any]:
        if task_kind == "token":
            out, words = _tokenise_words(batch["tokens"], tokenizer, most)
            if "tags" in batch:
                out["labels"] = [
                    _on_first_pieces(w, tags, IGNORE) for w, tags in zip(words, batch["tags"], strict=True)
                ]
            if "teacher" in batch:
                told = zip(words, batch["teacher"], strict=True)
                out["teacher"] = [_on_first_pieces(w, said, [math.nan] * len(said[0])) for w, said in told]
            return dict(out)
        out = tokenizer(batch["text"], batch.get("text_pair"), truncation=True, max_length=most)
        for given, made in (("label", "labels"), ("teacher", "teacher")):
            if given in batch:
                out[made] = batch[given]
        return dict(out)

    # a name of our own: the default is a hash of the function with all the globals it reaches
    name = _mark(task_kind, rows, tokenizer, most)
    shared: dict[str, Any] = {"batched": True, "remove_columns": rows.column_names}
    shared["new_fingerprint"] = name or generate_random_fingerprint()
    if name is not None:
        file = tokens_dir() / f"{name}.arrow"
        if (kept := _read_tokens(file, len(rows))) is not None:
            return kept
        try:
            file.parent.mkdir(parents=True, exist_ok=True)
            return rows.map(one, cache_file_name=str(file), load_from_cache_file=False, **shared)
        except OSError:  # no space, or no right to write
            pass
    return rows.map(one, load_from_cache_file=False, **shared)


FORM = 3  # of tokenised splits; another where :func:`encode` makes others of the same rows


def tokens_dir() -> Path:
    """Where tokenised splits are kept: beside the runs, with which they go."""
    return root() / ".tokens"


def _mark(task_kind: Kind, rows: Dataset, tokenizer: PreTrainedTokenizerBase, most: int) -> str | None:
    """Hash of all that tokens depend on; None where the tokenizer does not tell its state."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        return None
    state = json.loads(backend.to_str()) | {"truncation": None, "padding": None}  # of the last call
    own = tokenizer.truncation_side, tokenizer.model_input_names, getattr(tokenizer, "split_special_tokens", False)
    made_by = FORM, type(tokenizer).__name__, version("tokenizers"), version("transformers")
    known = [task_kind, most, state, own, made_by, rows.to_dict()]
    return hashlib.sha256(json.dumps(known, default=str).encode()).hexdigest()


def _read_tokens(file: Path, count: int) -> Dataset | None:
    """A tokenised split that was kept; None where there is none, or one that is cut off."""
    try:
        found = Dataset.from_file(str(file))
    except (OSError, ValueError, pa.ArrowException):
        return None
    return found if len(found) == count else None


def kept_words(rows: Dataset, tokenizer: PreTrainedTokenizerBase, max_length: int) -> list[list[int]]:
    """For each example of a token task, the words that have a piece left after truncation, in order."""
    most = min(max_length, tokenizer.model_max_length)
    found = _tokenise_words(list(rows["tokens"]), tokenizer, most)[1]
    return [sorted({w for w in words if w is not None}) for words in found]


def _tokenise_words(
    rows: Sequence[Sequence[str]], tokenizer: PreTrainedTokenizerBase, most: int
) -> tuple[BatchEncoding, list[list[int | None]]]:
    """Examples given as words, tokenised as the text that the words make, and the word of each piece.

    A byte-level BPE writes a word at the beginning of a text otherwise than behind a blank, so words one by one would
    not be what it was trained on, nor what :mod:`uhl.anchors` sees.
    """
    made = tokenizer([" ".join(words) for words in rows], truncation=True, max_length=most)
    found: list[list[int | None]] = []
    for i, words in enumerate(rows):
        ends = list(itertools.accumulate(len(word) + 1 for word in words))  # of each word, with the blank behind it
        places: list[int | None] = []
        for part, (start, end) in zip(made[i].sequence_ids, made[i].offsets, strict=True):
            word = bisect.bisect_right(ends, start)
            word += word < len(words) and start == ends[word] - 1  # a piece that begins with the blank before its word
            outside = part is None or start == end or word >= len(words)
            blank = not outside and end < ends[word] - len(words[word])  # nothing of the word
            places.append(None if outside or blank else word)
        found.append(places)
    return made, found


def every_word(tags: Sequence[int], gold: Sequence[int], words: Sequence[int], task: Task) -> list[int]:
    """Tags of ``words`` as tags of all words of ``gold``: one that the model never saw counts as outside."""
    out = [outside(task)] * len(gold)
    for word, tag in zip(words, tags, strict=True):
        out[word] = tag
    return out


def outside(task: Task) -> int:
    """Number of the tag ``O``, or the first tag where a task has none."""
    return task.labels.index("O") if "O" in task.labels else 0


def _on_first_pieces(words: Sequence[int | None], values: Sequence[V], nothing: V) -> list[V]:
    """Each word's value on its first piece, ``nothing`` on others."""
    before = [None, *words]
    return [nothing if w is None or w == b else values[w] for w, b in zip(words, before, strict=False)]


def gold_labels(task: Task, split: str) -> list[Any]:
    """Gold labels of a split, in its order: a class an example, or a list of tags."""
    if task.kind == "token":
        return [list(tags) for tags in task.data[split]["tags"]]
    return list(task.data[split]["label"])


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
    truth = gold_labels(task, split)
    guess: list[Any]
    if task.kind == "token":
        guess = [[outside(task)] * len(tags) for tags in truth]
    else:
        guess = [int(np.bincount(task.data["train"]["label"]).argmax())] * len(truth)
    return guess, score(task, guess, truth)
