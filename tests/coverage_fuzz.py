"""Coverage-guided fuzzing of the loader, for long runs; `test_fuzz.py` has the properties that every test run checks.

    pip install atheris==3.0.0
    python tests/coverage_fuzz.py -runs=100000

Half of the inputs are a file's raw bytes. The other half are edits of a sound file's header and tensors with the hash
made right again, so that the search gets past it. Whatever comes in, it loads to finite values or is one
:class:`UHLError`, within a second and 200 MB.
"""

from __future__ import annotations

import json
import resource
import sys
import tempfile
import time
from pathlib import Path

import atheris

with atheris.instrument_imports(include=["uhl.fileformat", "uhl.store", "uhl.quant", "uhl.config"]):
    from uhl import fileformat, store

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from uhl.errors import UHLError

FOLDER = Path(tempfile.mkdtemp(dir="/dev/shm" if Path("/dev/shm").is_dir() else None))
VALUES = [None, True, -1, 0, 1, 2, 3, 7, 2**31, 2**63, 10**40, 0.5, 1e308, "", "x", "../x", "\x00", [], {}, [[]], ["x"]]
KINDS = [torch.int8, torch.uint8, torch.float16, torch.float32, torch.int64]


SOUND = Path(__file__).parent / "data" / "version-1.safetensors"  # small, with every kind of tensor
ADAPTER, TENSORS, RAW = store.load(SOUND), load_file(SOUND), SOUND.read_bytes()
with safe_open(SOUND, "pt") as sound:
    META = json.loads(sound.metadata()[fileformat.KEY])
PACK = store.save_task(ADAPTER, "mood", FOLDER / "pack.safetensors").read_bytes()
COUNT = {"inputs": 0, "loaded": 0, "refused": 0}
SLOWEST = 0.0
BEFORE = 0


def edit_tree(data: atheris.FuzzedDataProvider, tree: object) -> object:
    """One node of a JSON tree replaced, removed or renamed."""
    node = tree
    for _ in range(4):
        keys = list(node) if isinstance(node, dict) else list(range(len(node))) if isinstance(node, list) else []
        if not keys:
            break
        key = keys[data.ConsumeIntInRange(0, len(keys) - 1)]
        inner = node[key]
        if isinstance(inner, (dict, list)) and inner and data.ConsumeBool():
            node = inner
            continue
        what = data.ConsumeIntInRange(0, 3)
        if what == 0:
            del node[key]
        elif what == 1:
            node[key] = VALUES[data.ConsumeIntInRange(0, len(VALUES) - 1)]
        elif what == 2:
            node[key] = data.ConsumeUnicodeNoSurrogates(12)
        elif isinstance(node, dict):
            node[data.ConsumeUnicodeNoSurrogates(8)] = inner
        break
    return tree


def edit_tensors(data: atheris.FuzzedDataProvider, tensors: dict[str, torch.Tensor]) -> None:
    """One tensor cut, cast, renamed, dropped or written into."""
    names = sorted(tensors)
    name = names[data.ConsumeIntInRange(0, len(names) - 1)]
    value, what = tensors[name], data.ConsumeIntInRange(0, 5)
    if what == 0:
        del tensors[name]
    elif what == 1:
        tensors[data.ConsumeUnicodeNoSurrogates(12) or "y"] = value.clone()
    elif what == 2:
        tensors[name] = value.to(KINDS[data.ConsumeIntInRange(0, len(KINDS) - 1)])
    elif what == 3 and value.ndim:
        tensors[name] = value[: data.ConsumeIntInRange(0, len(value))].clone()
    elif what == 4:
        tensors[name] = value.reshape(-1).clone()
    else:
        flat = value.clone().reshape(-1).contiguous().view(torch.uint8)
        for _ in range(data.ConsumeIntInRange(1, 8)):
            flat[data.ConsumeIntInRange(0, len(flat) - 1)] = data.ConsumeIntInRange(0, 255)
        tensors[name] = flat.view(value.dtype).reshape(value.shape)


def structured(data: atheris.FuzzedDataProvider, path: Path) -> None:
    """A file with an edited header and tensors, and a right hash."""
    meta, tensors = json.loads(json.dumps(META)), dict(TENSORS)
    for _ in range(data.ConsumeIntInRange(1, 3)):
        if data.ConsumeBool():
            meta = edit_tree(data, meta)
        elif tensors:
            edit_tensors(data, tensors)
    if isinstance(meta, dict) and data.ConsumeIntInRange(0, 7):
        meta["sha256"] = fileformat.digest(tensors)
    save_file(tensors, path, {fileformat.KEY: json.dumps(meta)})


def edited(data: atheris.FuzzedDataProvider, raw: bytes) -> bytes:
    """A sound file's bytes with a few of them overwritten, cut or added, most of them in the header."""
    out = bytearray(raw)
    for _ in range(data.ConsumeIntInRange(1, 6)):
        at = data.ConsumeIntInRange(0, min(len(out), 4000 if data.ConsumeBool() else 1 << 30))
        piece = data.ConsumeBytes(data.ConsumeIntInRange(0, 8))
        out[at : at + data.ConsumeIntInRange(0, 12)] = piece
    return bytes(out)


def one_input(raw: bytes) -> None:
    """Load one made file and hold the loader to its word."""
    global SLOWEST, BEFORE
    data, path = atheris.FuzzedDataProvider(raw), FOLDER / "a.safetensors"
    way = data.ConsumeIntInRange(0, 7)
    packed = way in {3, 4}
    try:
        if way < 3:
            structured(data, path)
        elif way == 7:
            path.write_bytes(data.ConsumeBytes(data.remaining_bytes()))
        else:
            path.write_bytes(edited(data, PACK if packed else RAW))
    except (ValueError, RuntimeError, TypeError):  # what safetensors itself does not write
        return
    COUNT["inputs"] += 1
    begun = time.perf_counter()
    try:
        if packed:
            store.add_task(ADAPTER, path)
            adapter = ADAPTER
        else:
            adapter = store.load(path)
        assert all(bool(torch.isfinite(p).all()) for p in adapter.parameters())
        COUNT["loaded"] += 1
    except UHLError:
        COUNT["refused"] += 1
    spent = time.perf_counter() - begun
    SLOWEST = max(SLOWEST, spent)
    assert spent < 1.0, spent
    if COUNT["inputs"] % 5000 == 0:
        memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024
        print(COUNT, f"slowest {1000 * SLOWEST:.0f} ms, peak {memory - BEFORE} MB up in 5,000 inputs", flush=True)
        assert memory - BEFORE < 200
        BEFORE = memory


if __name__ == "__main__":
    torch.set_num_threads(1)
    BEFORE = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024
    atheris.Setup(sys.argv, one_input)
    atheris.Fuzz()
