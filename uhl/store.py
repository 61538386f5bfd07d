"""The adapter's file: one safetensors file with a JSON header. Never pickle, never code.

| tensor                                  | dtype, shape                              |
|-----------------------------------------|-------------------------------------------|
| `dictionary.u`, `.v`, `router`          | int8 (A, C) and `.scale` float16 (A)      |
| `projector.first`, `.second`            | int8 rows and `.scale` float16            |
| `mixer.first`, `.second`                | uint8, two 4-bit values a byte, `.scale`  |
| `task.<name>.bias`                      | uint8, 4-bit (8, A), `.scale` float16 (8) |
| `task.<name>.embedding`, `.head`        | int8 (A), (labels, C) and `.scale`        |
| `task.<name>.head_bias`                 | float16 (labels)                          |
| `anchors.text`                          | uint8, zlib of the texts joined by newline |
| `anchors.head`, `anchors.stream.<i>`    | int8 (C, N), `.scale`, `.centre` float16 (C) |

The header's metadata is one JSON object with the format, its version, the configuration, the tasks, free information
and the sha256 of all tensor bytes in order of name.
"""

from __future__ import annotations

import hashlib
import json
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from uhl.adapter import TaskPart, UHLAdapter
from uhl.anchors import Anchors, Codes
from uhl.config import UHLConfig
from uhl.errors import UHLError
from uhl.files import write_atomic
from uhl.quant import dequantise, pack4, quantise, unpack4

FORMAT, VERSION, KEY = "uhl-adapter", "1", "uhl"
MAX_TEXT = 8 << 20  # bytes of anchor text after decompression


def _shared(adapter: UHLAdapter) -> dict[str, tuple[nn.Parameter, int]]:
    """Shared matrices by stored name, with their bits."""
    return {
        "dictionary.u": (adapter.dictionary.u, 8),
        "dictionary.v": (adapter.dictionary.v, 8),
        "projector.first": (adapter.projector.first, 8),
        "projector.second": (adapter.projector.second, 8),
        "mixer.first": (adapter.mixer.first, 4),
        "mixer.second": (adapter.mixer.second, 4),
        "router": (adapter.router.weight, 8),
    }


def _of_task(part: TaskPart) -> dict[str, tuple[nn.Parameter, int]]:
    return {"bias": (part.bias, 4), "embedding": (part.embedding, 8), "head": (part.head, 8)}


def _parameters(adapter: UHLAdapter) -> dict[str, tuple[nn.Parameter, int]]:
    own = {f"task.{n}.{k}": v for n in adapter.tasks for k, v in _of_task(adapter.task(n)).items()}
    return _shared(adapter) | own


def to_tensors(adapter: UHLAdapter) -> dict[str, Tensor]:
    """Every stored tensor by name, in the file's dtypes."""
    out: dict[str, Tensor] = {}
    for name, (parameter, bits) in _parameters(adapter).items():
        integers, scale = quantise(parameter.detach().cpu(), bits)
        out[name] = pack4(integers) if bits == 4 else integers
        out[name + ".scale"] = scale
    for name in adapter.tasks:
        out[f"task.{name}.head_bias"] = adapter.task(name).head_bias.detach().cpu().half()
    if adapter.anchors:
        text = zlib.compress("\n".join(adapter.anchors.texts).encode(), 9)
        out["anchors.text"] = torch.from_numpy(np.frombuffer(text, dtype=np.uint8).copy())
        for name, codes in _code_tables(adapter.anchors).items():
            out |= {name: codes.values, f"{name}.scale": codes.scale, f"{name}.centre": codes.centre}
    return {name: value.contiguous() for name, value in sorted(out.items())}


def _code_tables(anchors: Anchors) -> dict[str, Codes]:
    return {"anchors.head": anchors.head} | {f"anchors.stream.{i}": c for i, c in enumerate(anchors.stream)}


def digest(tensors: dict[str, Tensor]) -> str:
    """sha256 over names, dtypes, shapes and bytes, in order of name."""
    total = hashlib.sha256()
    for name, value in sorted(tensors.items()):
        total.update(f"{name}|{value.dtype}|{tuple(value.shape)}|".encode())
        total.update(value.contiguous().numpy().tobytes())
    return total.hexdigest()


def to_metadata(adapter: UHLAdapter, tensors: dict[str, Tensor]) -> dict[str, str]:
    """The header's metadata: one JSON object under :data:`KEY`."""
    tasks = {n: {"labels": adapter.task(n).labels, "kind": adapter.task(n).kind} for n in adapter.tasks}
    anchors = {"count": len(adapter.anchors.texts), "origin": adapter.anchors.origin} if adapter.anchors else None
    entry = {
        "format": FORMAT,
        "version": VERSION,
        "config": adapter.config.model_dump(mode="json"),
        "tasks": tasks,
        "anchors": anchors,
        "info": adapter.info,
        "sha256": digest(tensors),
    }
    return {KEY: json.dumps(entry, sort_keys=True)}  # one key: safetensors writes several in no fixed order


def save(adapter: UHLAdapter, path: str | Path) -> Path:
    """Write the adapter; an interruption leaves an older file of that name whole."""
    if adapter.anchors and any("\n" in t for t in adapter.anchors.texts):
        raise UHLError("anchor texts are stored one a line; replace line breaks in them by blanks")
    tensors = to_tensors(adapter)
    return write_atomic(path, lambda tmp: save_file(tensors, tmp, to_metadata(adapter, tensors)))


def load(path: str | Path) -> UHLAdapter:
    """Read an adapter. Raises :class:`UHLError` for a file that is missing, truncated, altered, of another version or
    not an adapter at all.
    """
    path = Path(path)
    if not path.is_file():
        raise UHLError(
            f"adapter file {path} does not exist; train one with notebooks/02_pretrain.ipynb "
            f"(a cell restored from an archive has none: delete its folder and run it again)"
        )
    try:
        with safe_open(path, "pt") as file:
            meta = json.loads((file.metadata() or {}).get(KEY, "{}"))
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a mapping)
    except (SafetensorError, OSError, ValueError) as error:
        raise UHLError(f"{path} is not a whole safetensors file ({error}); copy or download it again") from error
    if meta.get("format") != FORMAT:
        raise UHLError(f"{path} is a safetensors file but not an adapter; expected format {FORMAT!r} in its header")
    if meta.get("version") != VERSION:
        raise UHLError(
            f"{path} has file version {meta.get('version')!r}, this package reads version {VERSION!r}; "
            f"install the release of uhl that wrote it"
        )
    if meta.get("sha256") != digest(tensors):
        raise UHLError(f"{path} was altered or damaged after it was written (sha256 differs); copy it again")
    try:
        return _build(meta, tensors)
    except (KeyError, ValueError, TypeError, RuntimeError, zlib.error) as error:
        raise UHLError(f"{path} does not have the layout of version {VERSION} ({error}); write it again") from error


def _build(meta: dict[str, Any], tensors: dict[str, Tensor]) -> UHLAdapter:
    adapter = UHLAdapter(UHLConfig(**meta["config"]))
    for name, task in meta["tasks"].items():
        adapter.add_task(name, task["labels"], task["kind"])
    with torch.no_grad():
        for name, (parameter, bits) in _parameters(adapter).items():
            stored = tensors[name]
            integers = unpack4(stored, tuple(parameter.shape)) if bits == 4 else stored
            if integers.shape != parameter.shape:
                raise UHLError(f"tensor {name} has shape {tuple(integers.shape)}, expected {tuple(parameter.shape)}")
            parameter.copy_(dequantise(integers, tensors[name + ".scale"]))
        for name in adapter.tasks:
            adapter.task(name).head_bias.copy_(tensors[f"task.{name}.head_bias"].float())
    adapter.info = meta["info"]
    if "anchors.text" in tensors:
        adapter.anchors = _read_anchors(meta["anchors"], tensors)
    return adapter


def _read_anchors(entry: dict[str, Any], tensors: dict[str, Tensor]) -> Anchors:
    inflate = zlib.decompressobj()
    raw = inflate.decompress(tensors["anchors.text"].numpy().tobytes(), MAX_TEXT)
    if inflate.unconsumed_tail:
        raise UHLError(f"the anchor texts are larger than {MAX_TEXT} bytes")
    texts = raw.decode().split("\n")

    def codes(name: str) -> Codes:
        values, scale, centre = (tensors[name + end] for end in ("", ".scale", ".centre"))
        if values.shape != (len(scale), len(texts)):
            raise UHLError(f"tensor {name} has shape {tuple(values.shape)}, expected {(len(scale), len(texts))}")
        return Codes(values, scale, centre)

    names = sorted(n for n in tensors if n.startswith("anchors.stream.") and n.count(".") == 2)
    return Anchors(texts, entry["origin"], codes("anchors.head"), [codes(n) for n in names])
