"""The file: what is read back is what was trained; broken files are one clear error; bytes equal the formula."""

import json
import multiprocessing
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from world import fill, sentences

from uhl import budget, fileformat, store
from uhl.adapter import UHLAdapter
from uhl.anchors import Anchors, Codes
from uhl.config import Sizes
from uhl.errors import UHLError
from uhl.peft_method import attach
from uhl.runs import Settings


@pytest.fixture
def with_anchors(adapter):
    texts = sorted(set(sentences(30)))
    tables = [Codes.of(torch.randn(len(texts), adapter.config.width)) for _ in range(4)]
    adapter.anchors = Anchors(texts, "in-domain, MIT", tables[0], tables[1:])
    adapter.info = {"source": "tiny"}
    return adapter


@pytest.fixture
def path(with_anchors, tmp_path):
    return store.save(with_anchors, tmp_path / "a.safetensors")


def run(encoder, adapter):
    inputs = encoder.tokenizer(sentences(4), return_tensors="pt")
    with torch.no_grad(), attach(encoder.model, adapter, "mood") as attached:
        states = encoder.model(**inputs).last_hidden_state.mean(1)
        return adapter.task("mood").classify(attached.frame.codes(states))


def test_the_file_gives_back_the_same_logits_and_anchors(encoder, with_anchors, path):
    found = store.load(path)
    assert torch.equal(run(encoder, found), run(encoder, with_anchors))
    assert found.anchors.texts == with_anchors.anchors.texts
    assert torch.equal(found.anchors.head.table(), with_anchors.anchors.head.table())
    assert found.info == {"source": "tiny"}
    assert found.config == with_anchors.config


def test_saving_again_gives_the_same_bytes(path, tmp_path):
    again = store.save(store.load(path), tmp_path / "b.safetensors")
    assert again.read_bytes() == path.read_bytes()


def test_formula_equals_the_file(with_anchors, path):
    formula, measured = budget.adapter_parts(with_anchors), budget.file_bytes(path)
    assert formula == {k: v for k, v in measured.items() if k != "header"}
    assert sum(measured.values()) == path.stat().st_size


def test_bytes_at_float16_are_two_a_number(with_anchors, path):
    bare = UHLAdapter(Sizes())
    bare.add_task("t", ("a", "b"), "sentence")
    assert budget.float16_bytes(bare) == 2 * sum(p.numel() for p in bare.parameters())
    expected = 2 * sum(p.numel() for p in with_anchors.parameters())
    for name, value in load_file(path).items():  # what the file holds beside the parameters
        if name.startswith("anchors.") and not name.endswith((".scale", ".centre")):
            expected += value.numel() * (1 if name == "anchors.text" else 2)
    assert budget.float16_bytes(with_anchors) == expected


def test_full_size_adapter_keeps_the_budget(tmp_path):
    adapter = UHLAdapter(Sizes())
    adapter.add_task("t", ("a", "b"), "sentence")
    size = store.save(adapter, tmp_path / "a.safetensors").stat().st_size
    assert size <= 128_000
    parts = budget.part_bytes(Sizes(), [2], 512, 60_000)
    assert parts["dictionary"] == 66_048
    assert parts["projector"] <= 4096
    assert sum(parts.values()) < 1_000_000


@pytest.mark.parametrize("cut", [0, 4, 50, -1, -100])
def test_truncated(path, cut):
    path.write_bytes(path.read_bytes()[:cut])
    with pytest.raises(UHLError, match="not a whole safetensors file"):
        store.load(path)


def test_altered_bytes(path):
    raw = bytearray(path.read_bytes())
    raw[-5] ^= 1
    path.write_bytes(raw)
    with pytest.raises(UHLError, match="sha256 differs"):
        store.load(path)


def rewrite(path, change):
    with safe_open(path, "pt") as file:
        meta = json.loads(file.metadata()[fileformat.KEY])
    tensors = load_file(path)
    change(meta, tensors)
    save_file(tensors, path, {fileformat.KEY: json.dumps(meta)})


def test_another_version(path):
    rewrite(path, lambda meta, _: meta.update(version="9"))
    with pytest.raises(UHLError, match="file version '9', .* install a newer release"):
        store.load(path)


def test_another_safetensors_file(path):
    rewrite(path, lambda meta, _: meta.update(format="pt"))
    with pytest.raises(UHLError, match="not an adapter: .* give a file of uhl's"):
        store.load(path)


def test_not_safetensors(tmp_path):
    (tmp_path / "a.safetensors").write_bytes(b"PK\x03\x04 a zip, say, or a pickle")
    with pytest.raises(UHLError, match="not a whole safetensors file"):
        store.load(tmp_path / "a.safetensors")


def test_a_folder_is_no_file(tmp_path):
    with pytest.raises(UHLError, match="is a folder; give an adapter's file, such as its adapter_model.safetensors"):
        store.load(tmp_path)


def test_missing(tmp_path):
    with pytest.raises(UHLError, match="does not exist"):
        store.load(tmp_path / "none.safetensors")


def test_wrong_shape_and_missing_tensor(path):
    def shrink(meta, tensors):
        tensors["router"] = tensors["router"][:3].contiguous()
        meta["sha256"] = fileformat.digest(tensors)

    def drop(meta, tensors):
        del tensors["dictionary.u"]
        meta["sha256"] = fileformat.digest(tensors)

    whole = path.read_bytes()
    for change, message in ((shrink, "router has shape"), (drop, "dictionary.u")):
        path.write_bytes(whole)
        rewrite(path, change)
        with pytest.raises(UHLError, match=message):
            store.load(path)


def test_configuration_from_the_future(path):
    def extend(meta, _):
        meta["config"]["colour"] = 1

    rewrite(path, extend)
    with pytest.raises(UHLError, match="colour"):
        store.load(path)


def test_metadata_of_another_kind(path):
    whole = path.read_bytes()
    for part, values, message in (
        ("config", {"self": 1}, "self: Extra inputs are not permitted"),
        ("info", {"layers": [1]}, "layers is .* expected a number from 1 to 65536"),
        ("info", {"layers": 10**401}, "layers is 1000000.* expected a number from 1"),
        ("info", {"revision": []}, r"revision is \[\], expected a text without control characters"),
        ("info", {"tuned_on": "x\x1b[2J"}, r"tuned_on is 'x\\x1b\[2J', expected a text without control characters"),
        ("info", {"port_rules": "7"}, "port_rules is '7', expected a whole number"),
        ("info", {"scale": float("nan")}, "scale is nan, expected a finite number"),
    ):
        path.write_bytes(whole)
        rewrite(path, lambda meta, _, part=part, values=values: meta[part].update(values))
        with pytest.raises(UHLError, match=message):
            store.load(path)


def test_a_description_has_no_control_characters(path):
    rewrite(path, lambda meta, _: meta["tasks"]["mood"].update(labels=["\x1b[31mred", "a\nb"]))
    assert r"\x1b[31mred, a\nb" in store.describe(path)


def test_what_could_not_be_read_again_does_not_replace_a_file(path, with_anchors):
    before = path.read_bytes()
    kept = with_anchors.anchors
    with_anchors.anchors = replace(kept, head=Codes.of(torch.full(kept.head.table().shape, 1e6)))
    with pytest.raises(UHLError, match=r"anchors\.head.* values that are not finite"):
        store.save(with_anchors, path)
    with_anchors.anchors = kept
    with_anchors.add_task("many", [f"{i} {'x' * 220}" for i in range(6000)], "sentence")
    for write in (lambda: store.save(with_anchors, path), lambda: store.save_task(with_anchors, "many", path)):
        with pytest.raises(UHLError, match=r"header of .* would take 1,.* shorten the labels of its tasks"):
            write()
    del with_anchors.tasks["many"]
    with_anchors.info = {"layers": 0}
    with pytest.raises(UHLError, match="cannot be written: .*layers is 0, expected a number from 1"):
        store.save(with_anchors, path)
    assert path.read_bytes() == before


@pytest.mark.parametrize("name", ["train", "training", "items", "a.b", ""])
def test_names_that_a_task_cannot_have(name, config):
    with pytest.raises(UHLError, match="a task cannot be called"):
        UHLAdapter(config).add_task(name, ("a", "b"), "sentence")
    if name.isalpha():
        with pytest.raises(UHLError, match=f"a task cannot be called '{name}', .*; rename its file or folder"):
            Settings(task=f"/data/{name}.jsonl", kind="sentence")


def test_an_interrupted_write_leaves_the_old_file(path, adapter, monkeypatch):
    before = path.read_bytes()

    def fail(tensors, name, meta):
        name.write_bytes(b"half")
        raise OSError("disk full")

    monkeypatch.setattr(store, "save_file", fail)
    with pytest.raises(UHLError, match="disk full.*the older file is as it was"):
        store.save(adapter, path)
    assert path.read_bytes() == before
    assert [p.name for p in path.parent.glob("*a.safetensors*")] == ["a.safetensors"]


def in_a_process(work, *args):
    """Start a function of this file in a process of its own."""
    process = multiprocessing.get_context("forkserver").Process(target=work, args=args)
    process.start()
    return process


def save_with_little_room(path):
    import resource
    import signal

    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)  # then the write itself fails, as on a full disk
    resource.setrlimit(resource.RLIMIT_FSIZE, (2000, 2000))
    with pytest.raises(UHLError, match="could not be written.*the older file is as it was"):
        store.save(UHLAdapter(Sizes()), path)


def test_a_full_disk_leaves_the_old_file(path):
    before = path.read_bytes()
    writer = in_a_process(save_with_little_room, path)
    writer.join(timeout=120)
    assert writer.exitcode == 0
    assert path.read_bytes() == before
    assert [p.name for p in path.parent.iterdir()] == [path.name]


def save_many_times(path, seed):
    adapter = UHLAdapter(Sizes(atoms=64, width=64, seed=seed))
    for _ in range(80):
        store.save(adapter, path)
        time.sleep(0.01)


def test_two_processes_writing_one_file_leave_a_whole_one(tmp_path):
    path, seeds = tmp_path / "a.safetensors", set()
    store.save(UHLAdapter(Sizes(atoms=64, width=64)), path)
    writers = [in_a_process(save_many_times, path, seed) for seed in (1, 2)]
    while any(w.is_alive() for w in writers):
        seeds.add(store.load(path).config.seed)  # whole at any moment
        time.sleep(0.005)
    assert [w.exitcode for w in writers] == [0, 0]
    assert {1, 2} <= seeds
    assert [p.name for p in tmp_path.iterdir()] == [path.name]


def test_anchor_texts_that_no_file_holds(with_anchors, tmp_path, monkeypatch):
    with_anchors.anchors.texts[0] = "two\nlines"
    with pytest.raises(UHLError, match="one a line"):
        store.save(with_anchors, tmp_path / "a.safetensors")
    with_anchors.anchors.texts[0] = "x" * (fileformat.MAX_LINE + 1)
    with pytest.raises(UHLError, match="up to 65,537 characters .* a file holds 65,536 a text .* cut the texts"):
        store.save(with_anchors, tmp_path / "a.safetensors")
    with_anchors.anchors.texts[0] = "x" * fileformat.MAX_LINE
    store.load(store.save(with_anchors, tmp_path / "a.safetensors"))
    monkeypatch.setattr(store, "MAX_TEXT", 1000)
    with pytest.raises(UHLError, match="and 1,000 in all"):
        store.save(with_anchors, tmp_path / "b.safetensors")
    assert [path.name for path in tmp_path.iterdir()] == ["a.safetensors"]


def full_size():
    adapter = fill(UHLAdapter(Sizes()))
    for name, labels in (("mood", ("negative", "positive")), ("topic", ("a", "b", "c"))):
        adapter.add_task(name, labels, "sentence")
        with torch.no_grad():
            for p in adapter.task(name).parameters():
                p.add_(torch.randn(p.shape))
    return adapter


def test_a_dictionary_and_its_task_packs_are_small_and_make_the_whole(tmp_path):
    adapter = full_size()
    whole = store.save(adapter, tmp_path / "whole.safetensors")
    dictionary = store.save_dictionary(adapter, tmp_path / "dictionary.safetensors")
    packs = [store.save_task(adapter, n, tmp_path / f"{n}.task.safetensors") for n in ("mood", "topic")]
    assert dictionary.stat().st_size <= 110_000
    assert packs[0].stat().st_size <= 2_000
    again = store.load(dictionary)
    assert list(again.tasks) == []
    assert [store.add_task(again, pack) for pack in reversed(packs)] == ["topic", "mood"]
    assert store.save(again, tmp_path / "again.safetensors").read_bytes() == whole.read_bytes()


def test_a_pack_of_another_dictionary_is_refused_and_changes_nothing(tmp_path):
    adapter, other = full_size(), full_size()
    pack = store.save_task(adapter, "mood", tmp_path / "mood.task.safetensors")
    with torch.no_grad():
        other.router.weight.mul_(1.5)
    before = {n: p.clone() for n, p in other.named_parameters()}
    with pytest.raises(UHLError, match=r"was made for dictionary [0-9a-f]{16}, this one is"):
        store.add_task(other, pack)
    assert all(torch.equal(p, before[n]) for n, p in other.named_parameters())
    with pytest.raises(UHLError, match="a task pack; plug it into its dictionary"):
        store.load(pack)
    with pytest.raises(UHLError, match="an adapter; cut it into task packs"):
        store.add_task(adapter, store.save(adapter, tmp_path / "whole.safetensors"))


@pytest.mark.parametrize("name", ["../up", "a/b", "", "x" * 65])
def test_names_that_are_no_file_names_make_no_pack(name, config, tmp_path):
    adapter = UHLAdapter(config)
    with pytest.raises(UHLError, match="cannot be a task pack|cannot be called"):
        adapter.add_task(name, ("a", "b"), "sentence")
        store.save_task(adapter, name, tmp_path / "x")
    assert list(tmp_path.iterdir()) == []


def test_split_and_join_by_command(tmp_path, path, monkeypatch, capsys):
    from uhl import __main__ as command

    store.save(full_size(), tmp_path / "whole.safetensors")

    def run(*words):
        monkeypatch.setattr("sys.argv", ["uhl", *map(str, words)])
        command.main()
        told = capsys.readouterr()
        return told.out + told.err

    assert "anchors" not in run("split", tmp_path / "whole.safetensors", "--into", tmp_path / "parts")
    parts = tmp_path / "parts"
    assert sorted(p.name for p in parts.iterdir()) == [
        "dictionary.safetensors",
        "mood.task.safetensors",
        "topic.task.safetensors",
    ]
    packs = (parts / f"{n}.task.safetensors" for n in ("mood", "topic"))
    run("join", parts / "dictionary.safetensors", *packs, "--out", tmp_path / "again.safetensors")
    assert (tmp_path / "again.safetensors").read_bytes() == (tmp_path / "whole.safetensors").read_bytes()
    assert "uhl-task version 1" in run("verify", parts / "mood.task.safetensors")
    assert "labels negative, positive" in run("inspect", parts / "mood.task.safetensors")
    assert f"no anchored port; keep {path}" in run("split", path, "--into", tmp_path / "without")
    told = run("inspect", tmp_path / "whole.safetensors")
    assert "bytes      dictionary    66,048" in told
    assert "token router" in told
    whole = tmp_path / "whole.safetensors"
    expected = budget.float16_bytes(store.load(whole)) + budget.file_bytes(whole)["header"]
    assert f"float16 it would have {expected:,} bytes" in told


def test_a_file_of_version_1_goes_on_loading():
    """Written once, by the release that made the format; `python tests/test_store.py` would write another."""
    path = Path(__file__).parent / "data" / "version-1.safetensors"
    adapter = store.load(path)
    assert list(adapter.tasks) == ["mood", "tags"]
    assert adapter.anchors.texts[:2] == ["text 0", "text 1"]
    sums = {n: round(float(p.detach().double().abs().sum()), 4) for n, p in adapter.named_parameters()}
    assert sums == json.loads(path.with_suffix(".json").read_text())


def write_golden(folder):
    """The file of :func:`test_a_file_of_version_1_goes_on_loading`, and the sum of each parameter's absolute values."""
    adapter = UHLAdapter(Sizes(atoms=6, width=8, hidden=4))
    adapter.add_task("mood", ("bad", "good"), "sentence")
    adapter.add_task("tags", ("O", "B-X"), "token")
    fill(adapter)
    tables = [Codes.of(torch.randn(20, 8, generator=torch.Generator().manual_seed(i))) for i in range(3)]
    adapter.anchors = Anchors([f"text {i}" for i in range(20)], "generic, MIT", tables[0], tables[1:])
    adapter.info = {"source": "tiny", "shape": "3 x 24"}
    path = store.save(adapter, folder / "version-1.safetensors")
    sums = {n: round(float(p.detach().double().abs().sum()), 4) for n, p in store.load(path).named_parameters()}
    path.with_suffix(".json").write_text(json.dumps(sums, indent=1) + "\n")


if __name__ == "__main__":
    write_golden(Path(__file__).parent / "data")
