"""The file: what is read back is what was trained; broken files are one clear error; bytes equal the formula."""

import json

import pytest
import torch
from conftest import sentences
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from uhl import budget, store
from uhl.adapter import UHLAdapter
from uhl.anchors import Anchors, Codes
from uhl.config import Sizes
from uhl.errors import UHLError
from uhl.peft_method import attach


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
        meta = json.loads(file.metadata()[store.KEY])
    tensors = load_file(path)
    change(meta, tensors)
    save_file(tensors, path, {store.KEY: json.dumps(meta)})


def test_another_version(path):
    rewrite(path, lambda meta, _: meta.update(version="9"))
    with pytest.raises(UHLError, match="file version '9'"):
        store.load(path)


def test_another_safetensors_file(path):
    rewrite(path, lambda meta, _: meta.update(format="pt"))
    with pytest.raises(UHLError, match="not an adapter"):
        store.load(path)


def test_not_safetensors(tmp_path):
    (tmp_path / "a.safetensors").write_bytes(b"PK\x03\x04 a zip, say, or a pickle")
    with pytest.raises(UHLError, match="not a whole safetensors file"):
        store.load(tmp_path / "a.safetensors")


def test_missing(tmp_path):
    with pytest.raises(UHLError, match="does not exist"):
        store.load(tmp_path / "none.safetensors")


def test_wrong_shape_and_missing_tensor(path):
    def shrink(meta, tensors):
        tensors["router"] = tensors["router"][:3].contiguous()
        meta["sha256"] = store.digest(tensors)

    def drop(meta, tensors):
        del tensors["dictionary.u"]
        meta["sha256"] = store.digest(tensors)

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


def test_an_interrupted_write_leaves_the_old_file(path, adapter, monkeypatch):
    before = path.read_bytes()

    def fail(tensors, name, meta):
        name.write_bytes(b"half")
        raise OSError("disk full")

    monkeypatch.setattr(store, "save_file", fail)
    with pytest.raises(OSError, match="disk full"):
        store.save(adapter, path)
    assert path.read_bytes() == before
    assert [p.name for p in path.parent.glob("*a.safetensors*")] == ["a.safetensors"]


def test_line_breaks_in_anchor_texts(with_anchors, tmp_path):
    with_anchors.anchors.texts[0] = "two\nlines"
    with pytest.raises(UHLError, match="one a line"):
        store.save(with_anchors, tmp_path / "a.safetensors")
