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

Tensors of the host that PEFT trained beside the adapter (`modules_to_save`) may follow under their own names; the
header lists them. A static router stores no `router`, a task without labels no head.

The header's metadata is one JSON object (:class:`Header`) with the format, its version, the configuration, the tasks,
free information and the sha256 of all tensor bytes in order of name. :func:`layout` gives the tensors that a header
promises; a file must hold exactly these.

Files may come from strangers: sizes are bounded before anything is read, shapes are checked before anything is built,
and every fault is one :class:`UHLError`.
"""

from __future__ import annotations

import hashlib
import json
import math
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from uhl.adapter import UHLAdapter
from uhl.anchors import Anchors, Codes
from uhl.config import MAX_FILE, Sizes
from uhl.errors import UHLError
from uhl.files import write_atomic
from uhl.mixer import BASIS, INPUTS
from uhl.projector import FEATURES, HIDDEN
from uhl.quant import QMAX, SMALLEST_SCALE, dequantise, pack4, quantise, to_half, unpack4

FORMAT, VERSION, KEY = "uhl-adapter", "1", "uhl"
MAX_HEADER = 1 << 20  # bytes
MAX_TEXT, MAX_LINE = 8 << 20, 64 << 10  # bytes of all anchor texts unpacked, characters of one
BYTES = {"I8": 1, "U8": 1, "F16": 2}
_KIND = {torch.int8: "I8", torch.uint8: "U8", torch.float16: "F16"}
Spec = tuple[str, tuple[int, ...]]  # a tensor's safetensors dtype and shape


class TaskEntry(BaseModel):
    """What the header says of a task."""

    model_config = ConfigDict(extra="forbid", strict=True)
    labels: list[str]
    kind: Literal["sentence", "pair", "token"]


class AnchorEntry(BaseModel):
    """What the header says of the anchors."""

    model_config = ConfigDict(extra="forbid", strict=True)
    count: int = Field(ge=1, le=1 << 20)
    origin: str


class Header(BaseModel):
    """The header's metadata. ``info`` is free: the source and where a task was tuned.

    ``extra`` names tensors of the host that were trained beside the adapter (PEFT's `modules_to_save`).
    """

    model_config = ConfigDict(extra="forbid", strict=True)
    format: Literal["uhl-adapter"] = "uhl-adapter"
    version: Literal["1"] = "1"
    config: dict[str, Any]
    tasks: dict[str, TaskEntry]
    anchors: AnchorEntry | None
    info: dict[str, Any]
    extra: list[str] = []
    sha256: str


def layout(config: Sizes, tasks: Mapping[str, TaskEntry], anchors: int, depths: int, text: int) -> dict[str, Spec]:
    """Every tensor of a file by name. ``anchors``: how many, 0 for none; ``text``: bytes of their packed texts."""
    a, c, h = config.atoms, config.width, config.hidden
    rows: dict[str, tuple[int, int, int]] = {  # rows, columns, bits
        "dictionary.u": (a, c, 8),
        "dictionary.v": (a, c, 8),
        "projector.first": (HIDDEN, FEATURES + 1, 8),
        "projector.second": (c, HIDDEN + 2, 8),
        "mixer.first": (h, INPUTS + 1, 4),
        "mixer.second": (a, h + 1, 4),
    }
    if config.router == "token":
        rows["router"] = (a, c, 8)
    out: dict[str, Spec] = {}
    for name, task in tasks.items():
        rows[f"task.{name}.bias"] = (BASIS, a, 4)
        out |= {f"task.{name}.embedding": ("I8", (a,)), f"task.{name}.embedding.scale": ("F16", ())}
        if task.labels:  # without them the host's own head is used
            rows[f"task.{name}.head"] = (len(task.labels), c, 8)
            out[f"task.{name}.head_bias"] = ("F16", (len(task.labels),))
    for name, (count, columns, bits) in rows.items():
        out[name] = ("I8", (count, columns)) if bits == 8 else ("U8", (-(-count * columns // 2),))
        out[f"{name}.scale"] = ("F16", (count,))
    if anchors:
        out["anchors.text"] = ("U8", (text,))
        for name in ("anchors.head", *(f"anchors.stream.{i}" for i in range(depths))):
            out |= {name: ("I8", (c, anchors)), f"{name}.scale": ("F16", (c,)), f"{name}.centre": ("F16", (c,))}
    return out


def _parameters(adapter: UHLAdapter) -> dict[str, tuple[str, int]]:
    """The adapter's parameters and their bits, by stored name."""
    short = {"router.weight": "router"}
    return {short.get(n, n.replace("tasks.", "task.", 1)): (n, bits) for n, bits in adapter.bits().items()}


def is_stored(name: str) -> bool:
    """Whether a name is one of a file's tensors."""
    return name.startswith(("dictionary.", "projector.", "mixer.", "router", "task.", "anchors."))


def pack_values(adapter: UHLAdapter, values: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Stored tensors of parameter values, by the adapter's parameter names."""
    out: dict[str, Tensor] = {}
    for name, (parameter, bits) in _parameters(adapter).items():
        value = values[parameter].detach().cpu().float()
        if bits == 16:
            out[name] = to_half(value)
            continue
        integers, out[name + ".scale"] = quantise(value, bits)
        out[name] = pack4(integers) if bits == 4 else integers
    return {name: value.contiguous() for name, value in sorted(out.items())}


def unpack_values(adapter: UHLAdapter, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The inverse of :func:`pack_values`, float32. Raises :class:`UHLError` for values outside of their bits."""
    shapes = {name: tuple(p.shape) for name, p in adapter.named_parameters()}
    out: dict[str, Tensor] = {}
    for name, (parameter, bits) in _parameters(adapter).items():
        stored = tensors[name]
        if bits == 16:
            out[parameter] = stored.float()
            continue
        integers = unpack4(stored, shapes[parameter]) if bits == 4 else stored
        if bits == 4 and (integers < -QMAX[4]).any():
            raise UHLError(f"tensor {name} holds {-QMAX[4] - 1}, which is outside of 4-bit rows")
        out[parameter] = dequantise(integers, tensors[name + ".scale"])
    return out


def to_tensors(adapter: UHLAdapter) -> dict[str, Tensor]:
    """Every stored tensor by name, in the file's dtypes."""
    out = pack_values(adapter, dict(adapter.named_parameters())) | _anchor_tensors(adapter)
    return {name: value.contiguous() for name, value in sorted(out.items())}


def _anchor_tensors(adapter: UHLAdapter) -> dict[str, Tensor]:
    if adapter.anchors is None:
        return {}
    text = zlib.compress("\n".join(adapter.anchors.texts).encode(), 9)
    out = {"anchors.text": torch.from_numpy(np.frombuffer(text, dtype=np.uint8).copy())}
    for name, codes in _code_tables(adapter.anchors).items():
        out |= {name: codes.values, f"{name}.scale": codes.scale, f"{name}.centre": codes.centre}
    return out


def _code_tables(anchors: Anchors) -> dict[str, Codes]:
    return {"anchors.head": anchors.head} | {f"anchors.stream.{i}": c for i, c in enumerate(anchors.stream)}


def digest(tensors: dict[str, Tensor]) -> str:
    """sha256 over names, dtypes, shapes and bytes, in order of name."""
    total = hashlib.sha256()
    for name, value in sorted(tensors.items()):
        _hash(total, name, value)
    return total.hexdigest()


def _hash(total: Any, name: str, value: Tensor) -> None:
    total.update(f"{name}|{value.dtype}|{tuple(value.shape)}|".encode())
    total.update(value.contiguous().flatten().view(torch.uint8).numpy())


def to_metadata(adapter: UHLAdapter, tensors: dict[str, Tensor]) -> dict[str, str]:
    """The safetensors metadata: one JSON object under :data:`KEY`."""
    anchors = adapter.anchors
    header = Header(
        config=adapter.config.model_dump(mode="json"),
        tasks=_entries(adapter),
        anchors=AnchorEntry(count=len(anchors.texts), origin=anchors.origin) if anchors else None,
        info=adapter.info,
        extra=sorted(name for name in tensors if not is_stored(name)),
        sha256=digest(tensors),
    )
    return {
        KEY: json.dumps(header.model_dump(), sort_keys=True)
    }  # one key: safetensors writes several in no fixed order


def save(adapter: UHLAdapter, path: str | Path) -> Path:
    """Write the adapter; an interruption leaves an older file of that name whole.

    Raises :class:`UHLError` for an adapter that could not be read again: values that are not finite, texts with line
    breaks, more bytes than :data:`MAX_FILE`.
    """
    if adapter.anchors and any("\n" in t for t in adapter.anchors.texts):
        raise UHLError("anchor texts are stored one a line; replace line breaks in them by blanks")
    check_finite(dict(adapter.named_parameters()))
    return _write(adapter, to_tensors(adapter), path)


def check_finite(values: Mapping[str, Tensor]) -> None:
    """Raise :class:`UHLError` for a parameter with values that are not finite: it must not replace a good file."""
    for name, value in values.items():
        if value.device.type != "meta" and not torch.isfinite(value).all():
            raise UHLError(f"{name} holds values that are not finite; train again with lower learning rates")


def complete(adapter: UHLAdapter, path: str | Path, expected: str) -> None:
    """Give a file of an adapter's tensors, as PEFT writes it, its header and its anchors.

    Tensors that are no adapter's (`modules_to_save`) stay in the file and are named in its header. A file whose stored
    tensors have another digest than ``expected`` is another adapter's, and is left alone.
    """
    tensors = load_file(path)
    if digest({name: value for name, value in tensors.items() if is_stored(name)}) == expected:
        _write(adapter, tensors | _anchor_tensors(adapter), path)


def check_tensors(adapter: UHLAdapter, tensors: Mapping[str, Tensor]) -> None:
    """Raise :class:`UHLError` unless the tensors, beside anchors, are those of an adapter of these sizes and tasks."""
    found = {n: (_KIND.get(t.dtype, str(t.dtype)), tuple(t.shape)) for n, t in tensors.items() if n[:8] != "anchors."}
    where = Path("the state dict")
    _compare(where, layout(adapter.config, _entries(adapter), 0, 0, 0), found)
    _check_values(where, {name: tensors[name] for name in found})


def _entries(adapter: UHLAdapter) -> dict[str, TaskEntry]:
    parts = {name: adapter.task(name) for name in adapter.tasks}
    return {name: TaskEntry(labels=list(part.labels), kind=part.kind) for name, part in parts.items()}  # type: ignore[arg-type]


def _write(adapter: UHLAdapter, tensors: dict[str, Tensor], path: str | Path) -> Path:
    size = sum(t.numel() * t.element_size() for name, t in tensors.items() if is_stored(name))
    if size > MAX_FILE - MAX_HEADER:
        raise UHLError(
            f"the adapter takes {size:,} bytes, files hold at most {MAX_FILE:,}; keep fewer anchors or tasks"
        )
    return write_atomic(path, lambda tmp: save_file(tensors, tmp, to_metadata(adapter, tensors)))


def load(path: str | Path) -> UHLAdapter:
    """Read an adapter. Raises :class:`UHLError` for a file that is missing, truncated, altered, of another version or
    not an adapter at all.
    """
    path = Path(path)
    header, tensors = read(path)
    try:
        return _build(header, tensors)
    except (KeyError, ValueError, TypeError, RuntimeError, zlib.error) as error:
        raise _misfit(path, error) from error


def read(path: str | Path) -> tuple[Header, dict[str, Tensor]]:
    """A file's header and the adapter's tensors: sizes, layout, hash and ranges are checked. Errors as :func:`load`.

    Tensors of the host (``extra``) are hashed one after another and not kept.
    """
    path = Path(path)
    if not path.is_file():
        raise UHLError(
            f"adapter file {path} does not exist; train one with notebooks/02_pretrain.ipynb "
            f"(a cell restored from an archive has none: delete its folder and run it again)"
        )
    try:
        _check_sizes(path)
        with safe_open(path, "pt") as file:
            meta = json.loads((file.metadata() or {}).get(KEY, "{}"))
            slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118 (not a mapping)
            found: dict[str, Spec] = {n: (x.get_dtype(), tuple(x.get_shape())) for n, x in slices.items()}
            header = _header(path, meta)
            _check_layout(path, header, found)
            own = sum(math.prod(shape) * BYTES[kind] for n, (kind, shape) in found.items() if n not in header.extra)
            if own > MAX_FILE:
                raise UHLError(f"{path} holds {own:,} bytes of an adapter; files hold at most {MAX_FILE:,}")
            total = hashlib.sha256()
            tensors = {}
            for name in sorted(found):  # one at a time: the host's are only hashed
                value = file.get_tensor(name)
                _hash(total, name, value)
                if name not in header.extra:
                    tensors[name] = value
    except UHLError:
        raise
    except (SafetensorError, OSError, ValueError, RecursionError) as error:
        raise UHLError(f"{path} is not a whole safetensors file ({error}); copy or download it again") from error
    if header.sha256 != total.hexdigest():
        raise UHLError(f"{path} was altered or damaged after it was written (sha256 differs); copy it again")
    _check_values(path, tensors)
    return header, tensors


def extra_shapes(path: str | Path) -> dict[str, tuple[int, ...]]:
    """Shapes of a checked file's tensors that are the host's, by name."""
    header, _ = read(path)
    with safe_open(path, "pt") as file:
        return {name: tuple(file.get_slice(name).get_shape()) for name in header.extra}


def _misfit(path: Path, why: object) -> UHLError:
    return UHLError(f"{path} does not have the layout of version {VERSION} ({why}); write it again")


def _check_sizes(path: Path) -> None:
    """Bound what is read: the file, and the header whose length its first eight bytes give.

    Only a file whose header names tensors of the host (``extra``) may be larger.
    """
    size = path.stat().st_size
    with open(path, "rb") as handle:
        length = int.from_bytes(handle.read(8), "little")
        head = handle.read(length) if size > MAX_FILE and length <= MAX_HEADER else b""
    if size > MAX_FILE and b'\\"extra\\": [\\"' not in head:
        raise UHLError(f"{path} has {size:,} bytes; an adapter has at most {MAX_FILE:,}. Is it a model's file?")
    if size > 8 and MAX_HEADER < length <= size:
        raise UHLError(f"{path} has a header of {length:,} bytes; an adapter's has at most {MAX_HEADER:,}")


def _header(path: Path, meta: Any) -> Header:
    if not isinstance(meta, dict) or meta.get("format") != FORMAT:
        raise UHLError(f"{path} is a safetensors file but not an adapter; expected format {FORMAT!r} in its header")
    if meta.get("version") != VERSION:
        raise UHLError(
            f"{path} has file version {meta.get('version')!r}, this package reads version {VERSION!r}; "
            f"install the release of uhl that wrote it"
        )
    try:
        return Header(**meta)
    except ValidationError as error:
        first = error.errors()[0]
        raise _misfit(path, f"header, {'.'.join(map(str, first['loc']))}: {first['msg']}") from error


def _check_layout(path: Path, header: Header, found: dict[str, Spec]) -> None:
    """The file holds the tensors that its header promises, and no other."""
    depths = sum(name.startswith("anchors.stream.") and name.count(".") == 2 for name in found)
    text = found.get("anchors.text", ("U8", (0,)))[1]
    count = header.anchors.count if header.anchors else 0
    try:
        config = Sizes(**header.config)
    except UHLError as error:
        raise _misfit(path, error) from error
    wanted = layout(config, header.tasks, count, depths, text[0] if len(text) == 1 else 0)
    if any(is_stored(name) for name in header.extra):
        raise _misfit(path, "header, extra: names a tensor of the adapter")
    _compare(path, wanted, {name: spec for name, spec in found.items() if name not in header.extra})


def _compare(path: Path, wanted: Mapping[str, Spec], found: Mapping[str, Spec]) -> None:
    for name in sorted({*wanted, *found}):
        if name not in found:
            raise _misfit(path, f"tensor {name} is missing")
        if name not in wanted:
            raise _misfit(path, f"tensor {name} is not one that the header promises")
        if found[name] != wanted[name]:
            (kind, shape), (right_kind, right) = found[name], wanted[name]
            raise _misfit(path, f"tensor {name} has shape {shape}, {kind}, expected {right}, {right_kind}")


def _check_values(path: Path, tensors: dict[str, Tensor]) -> None:
    """Scales are finite and positive, other float16 values finite, integers within their bits."""
    for name, value in tensors.items():
        if value.dtype == torch.float16 and not torch.isfinite(value).all():
            raise _misfit(path, f"tensor {name} holds values that are not finite")
        if name.endswith(".scale") and (value < SMALLEST_SCALE).any():
            raise _misfit(path, f"tensor {name} holds a scale below {SMALLEST_SCALE:g}")
        if value.dtype == torch.int8 and (value < -QMAX[8]).any():
            raise _misfit(path, f"tensor {name} holds {-QMAX[8] - 1}, which is outside of 8-bit rows")


def _build(header: Header, tensors: dict[str, Tensor]) -> UHLAdapter:
    adapter = UHLAdapter(Sizes(**header.config))
    for name, task in header.tasks.items():
        adapter.add_task(name, task.labels, task.kind)
    values = unpack_values(adapter, tensors)
    with torch.no_grad():
        for name, parameter in adapter.named_parameters():
            parameter.copy_(values[name])
    adapter.info = header.info
    if header.anchors:
        adapter.anchors = _read_anchors(header.anchors, tensors)
    return adapter


def _read_anchors(entry: AnchorEntry, tensors: dict[str, Tensor]) -> Anchors:
    inflate = zlib.decompressobj()
    raw = inflate.decompress(tensors["anchors.text"].numpy().tobytes(), MAX_TEXT)
    if inflate.unconsumed_tail or not inflate.eof:
        raise UHLError(f"the anchor texts are cut off or larger than {MAX_TEXT:,} bytes")
    texts = raw.decode().split("\n")
    if len(texts) != entry.count or max(map(len, texts)) > MAX_LINE:
        raise UHLError(f"{len(texts)} anchor texts, {entry.count} promised, each of at most {MAX_LINE:,} characters")

    def codes(name: str) -> Codes:
        return Codes(*(tensors[name + end] for end in ("", ".scale", ".centre")))

    depths = sum(n.startswith("anchors.stream.") and n.count(".") == 2 for n in tensors)
    return Anchors(texts, entry.origin, codes("anchors.head"), [codes(f"anchors.stream.{i}") for i in range(depths)])


def describe(path: str | Path) -> str:
    """A file's parts, bytes, tasks, anchors and provenance, for people. The file is checked first."""
    from uhl import budget

    header, _ = read(path)
    config, path = Sizes(**header.config), Path(path)
    lines = [
        f"{path.name}: {path.stat().st_size:,} bytes, version {header.version}, sha256 {header.sha256[:12]} checked"
    ]
    lines.append(
        f"adapter    {config.atoms} atoms of width {config.width}, at most {config.top_k} a token, "
        f"{config.projector} projector, on weights {' '.join(config.types)}"
    )
    lines += [f"{key:10s} {value}" for key, value in sorted(header.info.items())]
    lines += [f"task       {name}: {task.kind}, labels {', '.join(task.labels)}" for name, task in header.tasks.items()]
    if header.anchors:
        lines.append(f"anchors    {header.anchors.count} texts ({header.anchors.origin})")
    sizes = budget.file_bytes(path)
    lines += [f"bytes      {part:10s} {size:9,}" for part, size in sizes.items() if size]
    return "\n".join(lines)
