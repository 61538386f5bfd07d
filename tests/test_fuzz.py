"""Files from strangers: whatever is done to a file, it loads to a valid adapter or raises the package's one error."""

import json
import os
import struct
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from uhl import fileformat, store
from uhl.config import MAX_FILE
from uhl.errors import UHLError

EXAMPLES = int(os.environ.get("UHL_FUZZ", "150"))  # of each property; a long run sets it higher
fuzz = settings(
    max_examples=EXAMPLES, deadline=None, derandomize=EXAMPLES == 150, suppress_health_check=list(HealthCheck)
)


@pytest.fixture(scope="module")
def sound():
    """Bytes of a small, sound file with every kind of tensor in it."""
    return (Path(__file__).parent / "data" / "version-1.safetensors").read_bytes()


def outcome(path):
    """Load within a second; a file that loads is valid through and through."""
    begun, refused = time.perf_counter(), None
    try:
        adapter = store.load(path)
    except UHLError as error:
        refused = error
    assert time.perf_counter() - begun < 1.0
    if refused:
        assert str(path) in str(refused)
        return None
    assert all(torch.isfinite(p).all() for p in adapter.parameters())
    again = store.save(adapter, path.with_suffix(".again"))
    assert store.load(again).config == adapter.config
    for name in adapter.tasks:
        assert adapter.task(name).kind in {"sentence", "pair", "token"}
    return adapter


@pytest.fixture
def path(tmp_path_factory):
    return tmp_path_factory.mktemp("file") / "a.safetensors"


EDITS = st.lists(
    st.tuples(
        st.sampled_from(["flip", "set", "insert", "delete", "copy", "swap"]),
        st.floats(0, 1, exclude_max=True),
        st.floats(0, 1, exclude_max=True),
        st.integers(0, 255),
    ),
    min_size=1,
    max_size=8,
)


def edited(raw, edits):
    """Bytes after edits at relative places; half of the draws are squeezed into the header, where structure lies."""
    raw = bytearray(raw)
    for kind, at, other, value in edits:
        if not raw:
            break
        span = len(raw) if value % 2 else min(len(raw), 1500)
        i, j = int(at * span), int(other * len(raw))
        if kind == "flip":
            raw[i] ^= 1 << (value % 8)
        elif kind == "set":
            raw[i] = value
        elif kind == "insert":
            raw[i:i] = bytes([value]) * (1 + value % 5)
        elif kind == "delete":
            del raw[i : i + 1 + value % 64]
        elif kind == "copy":
            raw[i : i + value] = raw[j : j + value]
        else:
            raw[i], raw[j] = raw[j], raw[i]
    return bytes(raw)


@fuzz
@given(edits=EDITS)
def test_edited_bytes(sound, path, edits):
    path.write_bytes(edited(sound, edits))
    outcome(path)


@pytest.fixture(scope="module")
def sound_pack(sound, tmp_path_factory):
    """An adapter and the bytes of a task pack that fits it."""
    folder = tmp_path_factory.mktemp("pack")
    (folder / "a.safetensors").write_bytes(sound)
    adapter = store.load(folder / "a.safetensors")
    return adapter, store.save_task(adapter, "mood", folder / "p.safetensors").read_bytes()


@fuzz
@given(edits=EDITS)
def test_edited_packs(sound_pack, path, edits):
    adapter, raw = sound_pack
    path.write_bytes(edited(raw, edits))
    before = fileformat.digest(store.to_tensors(adapter))
    try:
        store.add_task(adapter, path)
    except UHLError:
        assert fileformat.digest(store.to_tensors(adapter)) == before
    assert all(torch.isfinite(p).all() for p in adapter.parameters())


@fuzz
@given(raw=st.binary(max_size=300), length=st.integers(0, 2**64 - 1))
def test_any_bytes(path, raw, length):
    for data in (raw, struct.pack("<Q", length) + raw, struct.pack("<Q", len(raw)) + raw):
        path.write_bytes(data)
        with pytest.raises(UHLError):
            store.load(path)


SCALARS = st.one_of(
    st.none(), st.booleans(), st.integers(-(2**70), 2**70), st.floats(), st.text(max_size=8), st.just(10**30)
)
JSON = st.recursive(
    SCALARS,
    lambda x: st.one_of(st.lists(x, max_size=3), st.dictionaries(st.text(max_size=6), x, max_size=3)),
    max_leaves=6,
)


def places(value, at=()):
    """Paths of all nodes of a JSON value."""
    yield at
    for key, inner in value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ():
        yield from places(inner, (*at, key))


@fuzz
@given(data=st.data(), new=JSON, remove=st.booleans())
def test_any_header(sound, path, data, new, remove):
    """One node of the header's JSON replaced or removed, the file otherwise in order."""
    path.write_bytes(sound)
    with safe_open(path, "pt") as file:
        meta = json.loads(file.metadata()[fileformat.KEY])
    at = data.draw(st.sampled_from([p for p in places(meta) if p]))
    inner = meta
    for key in at[:-1]:
        inner = inner[key]
    if remove:
        del inner[at[-1]]
    else:
        inner[at[-1]] = new
    save_file(load_file(path), path, {fileformat.KEY: json.dumps(meta)})
    outcome(path)


@fuzz
@given(data=st.data(), shape=st.lists(st.integers(0, 9), max_size=3), fill=st.integers(0, 255))
def test_any_tensor(sound, path, data, shape, fill):
    """One tensor replaced by another of any shape, dtype and bytes, with the hash made right."""
    path.write_bytes(sound)
    with safe_open(path, "pt") as file:
        meta = json.loads(file.metadata()[fileformat.KEY])
    tensors = load_file(path)
    name = data.draw(st.sampled_from(sorted(tensors)))
    old = tensors[name]
    dtype = data.draw(st.sampled_from([old.dtype, torch.int8, torch.uint8, torch.float16, torch.float32]))
    shape = tuple(old.shape) if data.draw(st.booleans()) else tuple(shape)
    raw = np.full(int(np.prod(shape)) * torch.empty(0, dtype=dtype).element_size(), fill, np.uint8)
    made = torch.from_numpy(raw).view(dtype).reshape(shape) if raw.size else torch.empty(shape, dtype=dtype)
    tensors[name] = made.clone()
    meta["sha256"] = fileformat.digest(tensors)
    save_file(tensors, path, {fileformat.KEY: json.dumps(meta)})
    outcome(path)


def test_deep_json_huge_sizes_and_a_bomb_of_text(sound, path):
    import zlib

    path.write_bytes(sound)
    with safe_open(path, "pt") as file:
        meta = json.loads(file.metadata()[fileformat.KEY])
    tensors = load_file(path)

    def refused(header, changed, message):
        save_file(changed, path, {fileformat.KEY: header if isinstance(header, str) else json.dumps(header)})
        with pytest.raises(UHLError, match=message):
            store.load(path)

    refused("[" * 100_000, tensors, "not a whole safetensors file")
    huge = {**meta, "config": {**meta["config"], "atoms": 10**12, "width": 10**12}}
    refused(huge, tensors, "a file holds at most")
    bomb = torch.from_numpy(np.frombuffer(zlib.compress(b"a" * (fileformat.MAX_TEXT * 4), 9), np.uint8).copy())
    changed = {**tensors, "anchors.text": bomb}
    refused({**meta, "sha256": fileformat.digest(changed)}, changed, "cut off or larger")
    refused("{" + '"x":1,' * 200_000 + '"y":1}', tensors, "header of")
    refused({**meta, "extra": ["absent"]}, tensors, "extra: names 'absent', which the file does not hold")
    with open(path, "wb") as handle:
        handle.truncate(MAX_FILE + 1)  # a sparse file
    with pytest.raises(UHLError, match="at most"):
        store.load(path)
