"""Readers for every format, fixed splits, tokenised labels, and an error for each kind of bad input."""

import copy
import gzip
import json
import shutil
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
from datasets import Dataset, DatasetDict
from tokenizers import Tokenizer, pre_tokenizers
from tokenizers.models import Unigram
from transformers import PreTrainedTokenizerFast

from uhl import readers, sources, stages, tasks
from uhl.anchors import pieces_of
from uhl.errors import UHLError
from uhl.runs import Settings
from uhl.tasks import IGNORE, TaskSpec, encode, load_task, plain_text

ROWS = [{"sentence": f"film {i}", "label": i % 2} for i in range(40)]


def write_jsonl(path, rows):
    text = "\n".join(json.dumps(r) for r in rows)
    path.write_bytes(gzip.compress(text.encode())) if path.suffix == ".gz" else path.write_text(text)
    return path


@pytest.mark.parametrize(
    "name", ["train.jsonl", "train.jsonl.gz", "train.csv", "train.csv.gz", "train.tsv", "train.tsv.gz"]
)
def test_plain_files(tmp_path, name):
    path = tmp_path / name
    if "jsonl" in name:
        write_jsonl(path, ROWS)
    else:
        pd.DataFrame(ROWS).to_csv(path, index=False, sep="\t" if "tsv" in name else ",")
    task = load_task(TaskSpec(str(tmp_path), "sentence", {"text": "sentence"}))
    assert task.labels == ("0", "1")
    assert {s: len(d) for s, d in task.data.items()} == {"train": 33, "dev": 3, "test": 4}
    texts = [set(task.data[s]["text"]) for s in ("train", "dev", "test")]
    assert len(set.union(*texts)) == 40  # no sentence stands in two splits


def test_splits_are_fixed_and_a_given_dev_becomes_the_test(tmp_path):
    write_jsonl(tmp_path / "train.jsonl", ROWS)
    write_jsonl(tmp_path / "validation.jsonl", [{"sentence": "held out", "label": 1}])
    spec = TaskSpec(str(tmp_path), "sentence", {"text": "sentence"})
    one, two = load_task(spec), load_task(spec)
    assert one.data["test"]["text"] == ["held out"]
    assert one.data["dev"]["text"] == two.data["dev"]["text"]


def test_rows_of_one_text_stand_in_one_split(tmp_path):
    rows = [{"text": f"{'Film' if n % 2 else ' film'} {i}", "label": i % 2} for i in range(60) for n in range(4)]
    write_jsonl(tmp_path / "train.jsonl", rows)
    task = load_task(TaskSpec(str(tmp_path), "sentence"))
    texts = {split: {text.strip().lower() for text in rows["text"]} for split, rows in task.data.items()}
    assert sum(map(len, texts.values())) == 60
    assert {split: len(rows) for split, rows in task.data.items()} == {"train": 196, "dev": 20, "test": 24}


def test_questions_on_one_passage_stand_in_one_split_where_there_are_several(tmp_path):
    rows = [{"text": f"question {i}", "text_pair": f"passage {i // 3}", "label": i % 2} for i in range(90)]
    large = [row | {"text_pair": "rare" if i == 0 else f"aspect {i % 3}"} for i, row in enumerate(rows)]
    for given, apart in ((rows, True), ([row | {"text_pair": "the passage"} for row in rows], False), (large, False)):
        write_jsonl(tmp_path / "train.jsonl", given)
        task = load_task(TaskSpec(str(tmp_path), "pair"))
        sides = [set(part["text_pair"]) for part in task.data.values()]
        assert (sum(map(len, sides)) == len(set.union(*sides))) == apart
        assert len({text for part in task.data.values() for text in part["text"]}) == 90
        assert {split: len(part) for split, part in task.data.items()}["test"] == 9


def test_pairs_that_share_a_part_are_a_group(tmp_path):
    """Questions on one passage, hypotheses on one premise; neither a part that many have nor one that none shares."""
    rows = [{"text": f"question {i}", "text_pair": f"Passage  {i // 3}", "label": i % 2} for i in range(90)]
    rows[1]["text_pair"] = "passage 0"
    turned = [row | {"text": row["text_pair"], "text_pair": row["text"]} for row in rows]
    aspects = [row | {"text_pair": f"aspect {i % 9}"} for i, row in enumerate(rows)]
    alone = [row | {"text_pair": f"passage {i}"} for i, row in enumerate(rows)]
    both = [row | {"text": f"aspect {i % 9}"} for i, row in enumerate(rows)]
    for given, grouped in ((rows, True), (turned, True), (aspects, False), (alone, False), (both, True)):
        for split in ("train", "dev", "test"):
            (tmp_path / f"{split}.jsonl").write_text("\n".join(map(json.dumps, given)))
        task = load_task(TaskSpec(str(tmp_path), "pair", labels=("0", "1")))
        assert "group" not in task.data["train"].column_names
        for split in ("dev", "test"):
            found = tasks.groups(task, split)
            assert (None if found is None else found.tolist()) == ([i // 3 for i in range(90)] if grouped else None)


def test_boolq_layout(tmp_path, tokenizer):
    rows = [{"question": f"is it {i}", "passage": "the film was fine", "answer": bool(i % 2)} for i in range(20)]
    write_jsonl(tmp_path / "train.jsonl", rows)
    columns = {"text": "question", "text_pair": "passage", "label": "answer"}
    task = load_task(TaskSpec(str(tmp_path), "pair", columns, ("False", "True")))
    first = encode(task.kind, task.data["train"], tokenizer)[0]
    assert tokenizer.decode(first["input_ids"]).count("[SEP]") == 2
    assert first["labels"] == task.data["train"][0]["label"]


CONLL = "".join(
    f"-DOCSTART- -X- O O\n\ngood NN I-PER\njoy NN I-PER\nfilm{i} NN O\n\nbad NN I-LOC\nplot{i} NN B-LOC\n"
    for i in range(6)
)


@pytest.mark.parametrize("name", ["train.conll", "train.conll.gz"])
def test_conll_columns_become_bio_on_first_pieces(tmp_path, tokenizer, name):
    if name.endswith("gz"):
        (tmp_path / name).write_bytes(gzip.compress(CONLL.encode()))
    else:
        (tmp_path / name).write_text(CONLL)
    task = load_task(TaskSpec(str(tmp_path), "token", labels=("O", "B-PER", "I-PER", "B-LOC", "I-LOC")))
    rows = [r for split in task.data.values() for r in split]
    assert len(rows) == 12
    by_first = {r["tokens"][0]: r["tags"] for r in rows}
    assert by_first == {"good": [1, 2, 0], "bad": [3, 3]}
    from datasets import Dataset

    split = Dataset.from_dict({"tokens": [["goodjoy", "film"]], "tags": [[1, 0]]})
    made = encode("token", split, tokenizer)[0]
    pieces = tokenizer.convert_ids_to_tokens(made["input_ids"])
    assert pieces == ["[CLS]", "good", "##joy", "film", "[SEP]"]
    assert made["labels"] == [IGNORE, 1, IGNORE, 0, IGNORE]


def test_words_are_tokenised_as_the_text_that_they_make(tokenizer, bpe):
    from datasets import Dataset

    words, tags = ["good", "film,", "badly", "was", "the"], [1, 2, 3, 4, 5]
    rows = Dataset.from_dict({"tokens": [words, words[2:]], "tags": [tags, tags[2:]]})
    for made_by in (tokenizer, bpe):
        for row, made in zip(rows, encode("token", rows, made_by), strict=True):
            text = " ".join(row["tokens"])
            assert made["input_ids"] == made_by(text)["input_ids"]
            assert [label for label in made["labels"] if label != IGNORE] == row["tags"]
            offsets = made_by(text)[0].offsets
            begins = [offsets[i][0] for i, label in enumerate(made["labels"]) if label != IGNORE]
            assert begins == [text.index(word) for word in row["tokens"]]
        assert tasks.kept_words(rows, made_by, 128) == [[0, 1, 2, 3, 4], [0, 1, 2]]
        (cut,) = tasks.kept_words(rows.select([0]), made_by, 4)
        assert 0 < len(cut) < 5
    alone, behind = (bpe(text, add_special_tokens=False)["input_ids"] for text in ("good", "a good"))
    assert alone != behind[1:]


def test_a_blank_before_a_word_is_no_piece_of_it():
    """A unigram tokenizer may write the blank by itself; tasks and ports read the same piece of such a word."""
    vocabulary = [("<unk>", -9.0), ("[PAD]", -9.0), ("\u2581", -1.0), ("\u2581good", -1.0), ("film", -1.0), ("s", -1.0)]
    backend = Tokenizer(Unigram(vocabulary, unk_id=0))
    backend.pre_tokenizer = pre_tokenizers.Metaspace()
    made_by = PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<unk>", pad_token="[PAD]")
    rows = Dataset.from_dict({"tokens": [["good", "films", "good"]], "tags": [[1, 2, 3]]})
    made = encode("token", rows, made_by)[0]
    assert made_by.convert_ids_to_tokens(made["input_ids"]) == ["\u2581good", "\u2581", "film", "s", "\u2581good"]
    assert made["labels"] == [1, IGNORE, 2, IGNORE, 3]
    text = made_by("good films good")[0]
    pieces = [(part, *span) for part, span in zip(text.sequence_ids, text.offsets, strict=True)]
    weights = pieces_of(pieces, [(0, 0, 4), (0, 5, 10), (0, 11, 15)], first=True)
    assert weights.argmax(1).tolist() == [i for i, label in enumerate(made["labels"]) if label != IGNORE]


def test_tokens_of_a_shorter_limit_are_others(task, tokenizer):
    rows = task.data["train"]
    for most in (6, 4):
        tokenizer_of_host = copy.deepcopy(tokenizer)
        tokenizer_of_host.model_max_length = most
        assert max(map(len, encode(task.kind, rows, tokenizer_of_host, 16)["input_ids"])) <= most


def test_tags_of_another_form_and_rows_without_words_are_errors(tmp_path):
    spec = TaskSpec(str(tmp_path), "token")
    for rows, message in (
        ([{"tokens": ["the", "dog", str(i)], "tags": [0, 3, 0]} for i in range(40)], "tag '0' is not O, B-<type> or"),
        ([{"tokens": ["dogs", str(i)], "tags": ["NNS", "CD"]} for i in range(40)], "tag 'CD' is not O, B-<type> or"),
        (
            [{"tokens": [" "] * (i % 2), "tags": ["O"] * (i % 2)} for i in range(40)],
            "row 1, .*expected a list of words",
        ),
    ):
        write_jsonl(tmp_path / "train.jsonl", rows)
        with pytest.raises(UHLError, match=message):
            load_task(spec)
    write_jsonl(tmp_path / "train.jsonl", [{"tokens": ["a", str(i)], "tags": [1, 0]} for i in range(40)])
    assert load_task(replace(spec, labels=("O", "B-A"))).labels == ("O", "B-A")


@pytest.mark.parametrize("labels", [("01", "02"), ("true", "false"), ("1.0", "2")])
def test_labels_of_tables_are_what_is_written_there(tmp_path, labels):
    lines = [f"film {i},{' ' * (i % 3)}{labels[i % 2]}" for i in range(40)]
    (tmp_path / "train.csv").write_text("\n".join(["text,label", *lines]))
    for given in (labels, ()):
        assert set(load_task(TaskSpec(str(tmp_path), "sentence", labels=given)).labels) == set(labels)


def test_a_byte_order_mark_is_no_part_of_the_first_word(tmp_path):
    (tmp_path / "train.conll").write_bytes(b"\xef\xbb\xbf" + CONLL.removeprefix("-DOCSTART- -X- O O\n\n").encode())
    task = load_task(TaskSpec(str(tmp_path), "token"))
    assert {row["tokens"][0] for rows in task.data.values() for row in rows} == {"good", "bad"}


def test_tokens_are_kept_for_other_seeds_and_stages(task, tokenizer, monkeypatch):
    rows = task.data["train"]
    first = encode(task.kind, rows, tokenizer, 16).to_dict()
    (kept,) = tasks.tokens_dir().iterdir()
    whole = kept.read_bytes()
    few = tasks.tokens_dir() / "few.arrow"
    rows.select(range(4)).map(lambda row: row, cache_file_name=str(few))
    for damaged in (whole[: len(whole) // 2], whole[:-100], b"", b"nonsense" * 40, few.read_bytes()):
        kept.write_bytes(damaged)
        assert encode(task.kind, rows, tokenizer, 16).to_dict() == first
        assert kept.read_bytes() == whole

    def again(*_, **__):
        raise AssertionError("tokenised again")

    monkeypatch.setattr(type(tokenizer), "__call__", again)
    assert encode(task.kind, rows, tokenizer, 16).to_dict() == first
    other = copy.deepcopy(tokenizer)
    other.truncation_side = "left"
    larger = copy.deepcopy(tokenizer)
    larger.add_tokens(["unheard"])
    for kind, split, own, length in [
        (task.kind, task.data["dev"], tokenizer, 16),
        (task.kind, rows, tokenizer, 8),
        (task.kind, rows, other, 16),
        (task.kind, rows, larger, 16),
        ("pair", rows, tokenizer, 16),
    ]:
        with pytest.raises(AssertionError, match="tokenised again"):
            encode(kind, split, own, length)
    monkeypatch.setattr(tasks, "FORM", 0)
    with pytest.raises(AssertionError, match="tokenised again"):
        encode(task.kind, rows, tokenizer, 16)


def test_tokens_that_cannot_be_kept_are_made(task, tokenizer, monkeypatch):
    rows = task.data["train"]
    tasks.tokens_dir().parent.mkdir(parents=True)
    tasks.tokens_dir().write_text("a file where the folder should be")
    first = encode(task.kind, rows, tokenizer)
    assert len(first) == len(rows)
    tasks.tokens_dir().unlink()
    whole = type(rows).map

    def full(self, *given, cache_file_name=None, **more):
        if cache_file_name is not None:
            raise OSError(28, "No space left on device")
        return whole(self, *given, **more)

    monkeypatch.setattr(type(rows), "map", full)
    assert encode(task.kind, rows, tokenizer).to_dict() == first.to_dict()


@pytest.mark.parametrize("blank", [" ", "\t", " \t\r", "\r"])
def test_a_separator_of_blanks_ends_a_sentence(tmp_path, blank):
    (tmp_path / "train.conll").write_bytes(CONLL.replace("\n\n", f"\n{blank}\n").encode())
    task = load_task(TaskSpec(str(tmp_path), "token"))
    assert sorted(len(row["tokens"]) for split in task.data.values() for row in split) == [2] * 6 + [3] * 6


LIST = "expected a list of {} \\(jsonl or CoNLL\\); mend it"


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"tokens": ["a", "b"], "tags": [0, -1]}, "split train: unknown label -1; expected one of O, B-X"),
        ({"tokens": ["a", "b"], "tags": [0, 2]}, "split train: unknown label 2; expected one of O, B-X"),
        ({"tokens": "ab", "tags": [0, 1]}, f"row 31, column 'tokens' holds 'ab', {LIST.format('words')}"),
        ({"tokens": ["a"], "tags": "O"}, f"row 31, column 'tags' holds 'O', {LIST.format('tags')}"),
        ({"tokens": ["a", None], "tags": [0, 1]}, f"row 31, column 'tokens' holds .*None., {LIST.format('words')}"),
        ({"tokens": ["a", "b"], "tags": ["O", None]}, f"row 31, column 'tags' holds .*None., {LIST.format('tags')}"),
        ({"tokens": ["a"], "tags": [0, 1]}, "split train, row 31 has 2 tags for 1 tokens; give each one tag"),
        ({"tokens": ["a", "b"], "tags": [0]}, "split train, row 31 has 1 tags for 2 tokens; give each one tag"),
    ],
)
def test_a_bad_row_of_a_token_task(tmp_path, row, message):
    good = [{"tokens": ["a", "b"], "tags": [0, 1]}] * 30
    for split, rows in (("train", [*good, row]), ("dev", good), ("test", good)):
        write_jsonl(tmp_path / f"{split}.jsonl", rows)
    with pytest.raises(UHLError, match=message):
        load_task(TaskSpec(str(tmp_path), "token", labels=("O", "B-X")))


def test_scores(task):
    assert tasks.score(task, [1, 0, 1, 1], [1, 1, 1, 0]) == 50.0
    token = tasks.Task("ner", "token", ("O", "B-X", "I-X"), task.data)
    gold, guess = [[1, 2, 0, 1]], [[1, 2, 0, 0]]
    assert tasks.score(token, guess, gold) == pytest.approx(200 / 3)
    assert tasks.score(token, [[1, 0, 0, 0]], gold) == 0.0  # half an entity is no entity


def test_majority_never_looks_at_the_scored_split(task):
    labels, value = tasks.majority(task)
    commonest = int(np.bincount(task.data["train"]["label"]).argmax())
    assert set(labels) == {commonest}
    assert value == pytest.approx(100 * np.mean(np.array(task.data["test"]["label"]) == commonest))


def test_subset_is_seeded_and_leaves_dev_and_test(task):
    a, b, c = (task.subset("train", 8, seed).data["train"]["text"] for seed in (0, 0, 1))
    assert a == b
    assert a != c
    assert len(task.subset("train", 8, 0).data["test"]) == 16


def test_what_is_set_aside_is_trained_on_nowhere_and_scored_nowhere(task):
    texts = [f"text {i}" for i in range(20)]
    rows = {"text": [*texts, *texts[:10]], "label": [0] * 30, "group": list(range(30))}
    scored = {split: Dataset.from_dict({"text": texts[15:18], "label": [0, 1, 0]}) for split in ("dev", "test")}
    whole = replace(task, data=DatasetDict({"train": Dataset.from_dict(rows), **scored}))
    parted = whole.set_aside(8)
    free, left = parted.data["unlabelled"], parted.data["train"]["text"]
    assert free.column_names == ["text"]
    assert len(set(free["text"])) == len(free) == 8
    assert not set(free["text"]) & {*left, *texts[15:18]}
    assert len(left) == 30 - sum(rows["text"].count(text) for text in free["text"])
    assert list(whole.set_aside(8).data["unlabelled"]["text"]) == list(free["text"])
    more = parted.set_aside(2).data["unlabelled"]["text"]
    assert list(more[:8]) == list(free["text"])
    assert len(more) == 10
    assert whole.set_aside(0) is whole
    with pytest.raises(UHLError, match="`unlabelled` is 17, and .* has 17 training texts; lower it"):
        whole.set_aside(17)


def test_a_text_of_test_is_not_set_aside_for_its_capitals_or_blanks(task):
    rows = Dataset.from_dict({"text": ["A  Good film", "a dull plot"], "label": [1, 0], "group": [0, 1]})
    scored = {split: Dataset.from_dict({"text": ["a good film"], "label": [1]}) for split in ("dev", "test")}
    whole = replace(task, data=DatasetDict({"train": rows, **scored}))
    with pytest.raises(UHLError, match="`unlabelled` is 1, and .* has 1 training texts"):
        whole.set_aside(1)


def test_what_is_set_aside_leaves_no_copy_in_other_letters(task):
    texts = [f"text {i}" for i in range(8)]
    rows = Dataset.from_dict({"text": [*texts, *map(str.upper, texts)], "label": [0] * 16, "group": list(range(16))})
    whole = replace(task, data=DatasetDict({**task.data, "train": rows})).set_aside(4)
    away = {text.lower() for text in whole.data["unlabelled"]["text"]}
    assert not away & {text.lower() for text in whole.data["train"]["text"]}


def test_the_only_tab_divides_a_pair(task):
    rows = {"text": ["a\tquestion"], "text_pair": ["a\tpassage"], "label": [0]}
    pairs = replace(task, kind="pair", data=DatasetDict({"train": Dataset.from_dict(rows)}))
    assert plain_text(pairs, "train") == ["a question\ta passage"]


def test_words_and_pairs_can_be_set_aside(task):
    tokens = {"tokens": [["good", str(i)] for i in range(6)], "tags": [[0, 0]] * 6}
    pairs = {"text": ["why"] * 6, "text_pair": [str(i) for i in range(6)], "label": [0] * 6}
    for rows, kept in ((tokens, ["tokens"]), (pairs, ["text", "text_pair"])):
        none = {split: Dataset.from_dict({k: v[:0] for k, v in rows.items()}) for split in ("dev", "test")}
        parted = replace(task, data=DatasetDict({"train": Dataset.from_dict(rows), **none})).set_aside(2)
        assert parted.data["unlabelled"].column_names == kept
        assert len(parted.data["train"]) == 4


@pytest.mark.parametrize("kind", ["sentence", "pair", "token"])
def test_a_folder_may_hold_unlabelled_texts(tmp_path, kind, caplog):
    def row(i, label=True):
        text = {"tokens": ["film", str(i)]} if kind == "token" else {"text": f"film {i}"}
        other = {"text_pair": f"why {i}"} if kind == "pair" else {}
        target = {"tags": ["O", "B-N"]} if kind == "token" else {"label": i % 2}
        return text | other | (target if label else {})

    write_jsonl(tmp_path / "train.jsonl", [row(i) for i in range(40)])
    write_jsonl(tmp_path / "unlabelled.jsonl", [row(i, label=False) for i in (3, 40, 41, 41)])
    with caplog.at_level("WARNING", "uhl"):
        task = load_task(TaskSpec(str(tmp_path), kind))
    assert tasks.plain_text(task, "unlabelled") == tasks.plain_text(
        replace(task, data=DatasetDict({"x": Dataset.from_list([row(40), row(41)])})), "x"
    )
    assert "2 unlabelled texts stand in another split or twice" in caplog.text
    assert task.set_aside(5).data["unlabelled"].num_rows == 7
    settings = Settings(task=str(tmp_path), kind=kind, anchor_text="in-domain")
    assert len(stages.anchor_pool(settings, task)) == 2
    if kind == "sentence":
        (tmp_path / "unlabelled.jsonl").unlink()
        (tmp_path / "unlabelled.txt").write_text("a text a line\n\n film 3\n")
        assert load_task(TaskSpec(str(tmp_path), kind)).data["unlabelled"]["text"] == ["a text a line"]
        (tmp_path / "unlabelled.txt").unlink()
    write_jsonl(tmp_path / "unlabelled.jsonl", [row(3, label=False)])
    with pytest.raises(UHLError, match="split unlabelled has no text that is not in another split"):
        load_task(TaskSpec(str(tmp_path), kind))


def test_missing_column(tmp_path):
    write_jsonl(tmp_path / "train.jsonl", ROWS)
    with pytest.raises(UHLError, match=r"missing column 'text'; it has sentence, label.*columns: {text: <name>}"):
        load_task(TaskSpec(str(tmp_path), "sentence"))


def test_a_column_that_the_kind_does_not_have(tmp_path):
    write_jsonl(tmp_path / "train.jsonl", ROWS)
    with pytest.raises(UHLError, match="a sentence task has no column 'tags'; it has text, label"):
        load_task(TaskSpec(str(tmp_path), "sentence", {"tags": "label"}))


def test_settings_describe_an_own_task(tmp_path):
    write_jsonl(tmp_path / "my.rows.jsonl", ROWS)
    own = {"task": str(tmp_path / "my.rows.jsonl"), "kind": "sentence", "columns": {"text": "sentence"}}
    settings = Settings(**own, labels=("1", "0"))
    task = load_task(settings.task_spec())
    assert (task.name, settings.task_name, task.labels) == ("my", "my", ("1", "0"))
    with pytest.raises(UHLError, match="`columns`, `labels` and `config` describe a task .*set `kind` too"):
        Settings(task="movies", labels=("a", "b")).task_spec()


def test_a_task_below_a_folder_that_the_environment_names(tmp_path, monkeypatch):
    (tmp_path / "reviews").mkdir()
    rows = [{"text": f"text {i}", "label": i % 2} for i in range(40)]
    (tmp_path / "reviews" / "train.jsonl").write_text("\n".join(map(json.dumps, rows)))
    settings = Settings(task="${UHL_DATA}/reviews", kind="sentence")
    assert settings.task_name == "reviews"
    monkeypatch.setenv("UHL_DATA", str(tmp_path))
    assert len(load_task(settings.task_spec()).data["train"]) > 20
    monkeypatch.delenv("UHL_DATA")
    with pytest.raises(UHLError, match="set UHL_DATA in the environment"):
        settings.task_spec()


def test_a_kind_that_there_is_not_and_a_label_that_stands_twice(tmp_path):
    write_jsonl(tmp_path / "train.jsonl", [{"text": f"film {i}", "label": "xy"[i % 2]} for i in range(40)])
    strange = TaskSpec(str(tmp_path), "sentence")
    object.__setattr__(strange, "kind", "words")  # tests check types, a user's session does not
    with pytest.raises(UHLError, match="unknown kind of task 'words'; choose one of: sentence, pair, token"):
        load_task(strange)
    with pytest.raises(UHLError, match="label 'x' stands twice in `labels`; name each once"):
        load_task(TaskSpec(str(tmp_path), "sentence", labels=("x", "y", "x")))
    with pytest.raises(UHLError, match="'x' stands there twice; name each once"):
        Settings(labels=("x", "x"))
    with pytest.raises(UHLError, match="'anchor' stands there twice"):
        Settings(arms=("anchor", "anchor"))


def test_test_texts_that_are_trained_on_are_counted(tmp_path, caplog):
    rows = [{"text": f"film {i}", "label": "xy"[i % 2]} for i in range(40)]
    for name, part in (("train", rows[:30]), ("dev", rows[30:35]), ("test", rows[28:40])):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in part))
    with caplog.at_level("WARNING", "uhl"):
        load_task(TaskSpec(str(tmp_path), "sentence"))
    (said,) = (record.getMessage() for record in caplog.records)
    assert said.endswith("2 of 12 texts of test stand in train too")


@pytest.mark.parametrize("count", [3, 60])
def test_a_label_that_only_the_cut_dev_has_is_known(tmp_path, count):
    rows = [{"text": f"film {i}", "label": f"x{i}"} for i in range(count)]  # each row has its own
    write_jsonl(tmp_path / "train.jsonl", rows)
    task = load_task(TaskSpec(str(tmp_path), "sentence"))
    assert set(task.labels) == {row["label"] for row in rows}
    for split in task.data.values():
        for row in split:
            assert task.labels[row["label"]] == row["text"].replace("film ", "x")


def test_unknown_label(tmp_path):
    write_jsonl(tmp_path / "train.jsonl", ROWS)
    write_jsonl(tmp_path / "test.jsonl", [{"sentence": "x", "label": 7}])
    with pytest.raises(
        UHLError, match="split test: unknown label 7; expected one of 0, 1: mend the row, or name all labels"
    ):
        load_task(TaskSpec(str(tmp_path), "sentence", {"text": "sentence"}))


def test_empty_split(tmp_path):
    write_jsonl(tmp_path / "train.jsonl", ROWS)
    (tmp_path / "test.csv").write_text("sentence,label\n")
    with pytest.raises(UHLError, match="split test is empty; expected at least one row: fill it, or remove its file"):
        load_task(TaskSpec(str(tmp_path), "sentence", {"text": "sentence"}))


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        ({"text": None, "label": 1}, "'text' holds .*, expected text; mend it"),
        ({"label": 1}, "'text' holds nan, expected text; mend it"),
        ({"text": 5, "label": 1}, "'text' holds 5, expected text; mend it"),
        ({"text": "x", "label": None}, "'label' holds nan, expected a label; mend it"),
        ({"text": "x", "label": " "}, "'label' holds ' ', expected a label; mend it"),
        ({"text": "x", "label": ["a", "b"]}, "'label' holds .'a', 'b'., expected a label; mend it"),
    ],
)
def test_a_cell_that_cannot_be_used(tmp_path, bad, message):
    rows = [{"text": f"film {i}", "label": i % 2} for i in range(20)]
    file = write_jsonl(tmp_path / "reviews.jsonl", [*rows[:7], bad, *rows[7:]])
    with pytest.raises(UHLError, match=f"reviews.jsonl, split train, row 8, column {message}"):
        load_task(TaskSpec(str(file), "sentence"))


def test_a_blank_label_and_texts_of_digits_in_a_table(tmp_path):
    rows = "".join(f"{i},{'ab'[i % 2]}\n" for i in range(20))
    (tmp_path / "train.csv").write_text("text,label\n" + rows)
    assert set(load_task(TaskSpec(str(tmp_path), "sentence")).data["train"]["text"]) < set(map(str, range(20)))
    for row in ("20,\n", "20\n", "20, \n"):
        (tmp_path / "train.csv").write_text("text,label\n" + rows + row)
        with pytest.raises(UHLError, match="split train, row 21, column 'label' holds '"):
            load_task(TaskSpec(str(tmp_path), "sentence"))


def test_splits_that_use_up_train(tmp_path):
    spec = TaskSpec(str(tmp_path), "sentence", {"text": "sentence"}, ("0", "1"))
    for count in (1, 2):
        write_jsonl(tmp_path / "train.jsonl", ROWS[:count])
        with pytest.raises(
            UHLError, match=f"split train has too few different rows, of {count}, .*give more, or files for both"
        ):
            load_task(spec)
    write_jsonl(tmp_path / "train.jsonl", ROWS[:3])
    assert [len(rows) for rows in load_task(spec).data.values()] == [1, 1, 1]
    write_jsonl(tmp_path / "train.jsonl", ROWS[:1])
    write_jsonl(tmp_path / "test.jsonl", ROWS)
    with pytest.raises(UHLError, match="split train has too few different rows, of 1,"):
        load_task(spec)


@pytest.mark.parametrize("split", ["train", "test"])
def test_an_empty_jsonl(tmp_path, split):
    write_jsonl(tmp_path / "train.jsonl", ROWS)
    (tmp_path / f"{split}.jsonl").write_text("")
    with pytest.raises(UHLError, match=f"split {split} is empty; expected at least one row"):
        load_task(TaskSpec(str(tmp_path), "sentence", {"text": "sentence"}))


def test_withheld_labels_make_dev_the_reported_split(tmp_path, caplog):
    """As GLUE's tsv and SuperGLUE's jsonl are given out."""
    for name, count in {"train": 30, "dev": 7}.items():
        rows = "".join(f"film {i}\t{i % 2}\n" for i in range(count))
        (tmp_path / f"{name}.tsv").write_text("sentence\tlabel\n" + rows)
    (tmp_path / "test.tsv").write_text("index\tsentence\n0\tfilm 99\n")
    caplog.set_level("WARNING", "uhl")
    task = load_task(TaskSpec(str(tmp_path), "sentence", {"text": "sentence"}))
    assert {split: len(rows) for split, rows in task.data.items()} == {"train": 27, "dev": 3, "test": 7}
    assert "the labels of test are withheld" in caplog.text
    (tmp_path / "test.tsv").write_text("sentence\tLabel\nfilm 99\t1\n")
    with pytest.raises(UHLError, match="split test: missing column 'label'; it has sentence, Label"):
        load_task(TaskSpec(str(tmp_path), "sentence", {"text": "sentence"}))
    pairs = tmp_path / "boolq"
    pairs.mkdir()
    for name, count, extra in (("train", 30, {"label": True}), ("val", 7, {"label": False}), ("test", 5, {})):
        write_jsonl(
            pairs / f"{name}.jsonl", [{"question": "q", "passage": str(i), "idx": i} | extra for i in range(count)]
        )
    spec = TaskSpec(str(pairs), "pair", {"text": "question", "text_pair": "passage"}, ("False", "True"))
    assert [len(load_task(spec).data[split]) for split in ("train", "dev", "test")] == [27, 3, 7]


def test_folder_without_train(tmp_path):
    with pytest.raises(UHLError, match=r"holds no train file but nothing; name one train\.jsonl"):
        load_task(TaskSpec(str(tmp_path), "sentence"))
    (tmp_path / "derived_train.jsonl").write_text("{}")
    with pytest.raises(UHLError, match=r"holds no train file but derived_train\.jsonl; name one"):
        load_task(TaskSpec(str(tmp_path), "sentence"))
    twice = tmp_path / "twice"
    twice.mkdir()
    for name in ("train.csv", "dev.jsonl", "validation.jsonl.gz"):
        (twice / name).touch()
    with pytest.raises(UHLError, match=r"two files of its dev split, dev\.jsonl and validation\.jsonl\.gz; keep one"):
        load_task(TaskSpec(str(twice), "sentence"))


def test_broken_file(tmp_path):
    (tmp_path / "train.jsonl.gz").write_bytes(b"not gzip")
    with pytest.raises(UHLError, match="could not be read"):
        load_task(TaskSpec(str(tmp_path), "sentence"))


@pytest.mark.parametrize("rows", [["a,1,9", "b,0,8"], ["a,1", "b,0,8"], ["a,1,9", "b,0"]])
@pytest.mark.parametrize(("suffix", "mark"), [("csv", ","), ("tsv", "\t")])
def test_a_row_with_a_cell_too_many_shifts_no_column(tmp_path, rows, suffix, mark):
    text = "\n".join(["text,label", *rows, *["c,0"] * 20]).replace(",", mark)
    path = tmp_path / f"train.{suffix}"
    path.write_text(text + "\n")
    with pytest.raises(UHLError, match=r"train.*(more cells than its first line|Expected 2 fields in line 3, saw 3)"):
        load_task(TaskSpec(str(tmp_path), "sentence"))


def test_a_word_without_a_tag(tmp_path):
    (tmp_path / "train.conll").write_text("EU B-ORG\nrejects\n\nPeter B-PER\n")
    with pytest.raises(UHLError, match="line 2: 'rejects' has no tag; expected a word and its tag"):
        load_task(TaskSpec(str(tmp_path), "token"))


def test_unknown_name_lists_the_choices():
    with pytest.raises(UHLError, match="offline names: movies, amazon; hub names: sst2, conll2003"):
        load_task("moovies")


def test_hub_without_a_network(monkeypatch):
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", True)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")

    def refuse(*_args, **_kwargs):
        raise ConnectionError("offline")

    monkeypatch.setattr(readers, "load_dataset", refuse)
    with pytest.raises(UHLError, match="nor could it be loaded from the hub .*use movies, amazon, a local folder"):
        load_task("sst2")


def test_a_hub_data_set_with_withheld_labels_and_one_without_a_train_split(monkeypatch, caplog):
    from datasets import Dataset, DatasetDict

    rows = Dataset.from_list(ROWS)
    withheld = rows.map(lambda row: {"label": -1})
    found = DatasetDict({"train": rows, "validation": rows.select(range(8)), "test": withheld})
    monkeypatch.setattr(readers, "load_dataset", lambda *a, **k: found)
    with caplog.at_level("WARNING", logger="uhl"):
        task = load_task("sst2")
    assert (len(task.data["test"]), len(task.data["dev"])) == (8, 4)
    assert "labels of test are withheld" in caplog.text
    del found["train"]
    with pytest.raises(UHLError, match="no split train; it has validation, test"):
        load_task("sst2")


def test_a_hub_data_set_of_several_is_named_in_a_parameter_file(monkeypatch):
    from datasets import Dataset, DatasetDict

    asked = []
    found = DatasetDict({"train": Dataset.from_list(ROWS)})
    monkeypatch.setattr(readers, "load_dataset", lambda *given, **_: asked.append(given) or found)
    settings = Settings(task="nyu-mll/glue", kind="sentence", columns={"text": "sentence"}, config="sst2")
    assert settings.task_name == "glue"
    load_task(settings.task_spec())
    assert asked == [("nyu-mll/glue", "sst2")]
    with pytest.raises(UHLError, match="set `kind` too"):
        Settings(task="nyu-mll/glue", config="sst2").task_spec()


@pytest.mark.parametrize("name", ["movies", "amazon"])
def test_offline_tasks_keep_reviews_apart(name):
    task = load_task(name)
    table = tasks.rated_sentences(name).set_index("text")["group"]
    groups = {s: {table[t] for t in d["text"]} for s, d in task.data.items()}
    for a, b in (("train", "dev"), ("train", "test"), ("dev", "test"), ("unlabelled", "test"), ("unlabelled", "dev")):
        assert not groups[a] & groups[b], (a, b)
    assert 0.4 < np.mean(task.data["train"]["label"]) < 0.62
    assert len(task.data["unlabelled"]) > 512


def test_a_damaged_text_in_the_cache(tmp_path, monkeypatch):
    texts = shutil.copytree(sources.vader_text(), tmp_path / "text" / "vader")
    monkeypatch.setenv("UHL_CACHE", str(tmp_path))
    file = texts / "movieReviewSnippets_GroundTruth.txt"
    whole = file.read_bytes()
    assert len(load_task("movies").data["train"]) > 5000
    file.write_bytes(whole[: whole.rfind(b"\n", 0, len(whole) // 2)])
    with pytest.raises(UHLError, match="movieReview.*is corrupt: .*delete its folder and run again"):
        load_task("movies")
    file.unlink()
    with pytest.raises(UHLError, match="movieReview.*is missing; delete its folder and run again"):
        load_task("movies")


def test_a_subset_is_a_fair_sample_of_ordered_data():
    """The film file has its positive half first; a prefix of the test split would hold one class only."""
    task = load_task("movies")
    prefix = np.mean(task.data["test"]["label"][:500])
    drawn = np.mean(task.subset("test", 500, tasks.SPLIT_SEED).data["test"]["label"])
    assert abs(drawn - np.mean(task.data["test"]["label"])) < 0.06
    assert abs(prefix - np.mean(task.data["test"]["label"])) > 0.2
