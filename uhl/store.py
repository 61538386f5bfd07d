"""Adapters and task packs to files and back; what a file holds is told in :mod:`uhl.fileformat`.

An adapter is written whole (:func:`save`, :func:`load`), or as a dictionary (:func:`save_dictionary`) and task packs
that plug into it (:func:`save_task`, :func:`add_task`), so that a library of tasks shares one dictionary.
"""

from __future__ import annotations

import hashlib
import json
import zlib
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from pydantic import ValidationError
from safetensors.torch import load_file, save_file
from torch import Tensor

from uhl.adapter import TASK_BITS, TaskPart, UHLAdapter, check_task_name
from uhl.anchors import Anchors, Codes
from uhl.config import MAX_FILE, Sizes
from uhl.errors import UHLError
from uhl.fileformat import (
    KEY,
    MAX_HEADER,
    MAX_LINE,
    MAX_TEXT,
    AnchorEntry,
    Content,
    Header,
    PackHeader,
    TaskEntry,
    bound_to,
    check_values,
    compare,
    digest,
    header_length,
    is_stored,
    layout,
    misfit,
    pack_layout,
    read,
    read_either,
    read_pack,
    specs,
)
from uhl.files import write_atomic
from uhl.quant import dequantise, pack4, quantise, to_half, unpack4


def _parameters(adapter: UHLAdapter) -> dict[str, tuple[str, int]]:
    """The adapter's parameters and their bits, by stored name."""
    short = {"router.weight": "router"}
    return {short.get(n, n.replace("tasks.", "task.", 1)): (n, bits) for n, bits in adapter.bits().items()}


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
    """The inverse of :func:`pack_values`, float32."""
    named = dict(adapter.named_parameters())
    return {
        parameter: _unpack(name, tensors, bits, tuple(named[parameter].shape))
        for name, (parameter, bits) in _parameters(adapter).items()
    }


def _unpack(name: str, tensors: Mapping[str, Tensor], bits: int, shape: tuple[int, ...]) -> Tensor:
    stored = tensors[name]
    if bits == 16:
        return stored.float()
    return dequantise(unpack4(stored, shape) if bits == 4 else stored, tensors[name + ".scale"])


def to_tensors(adapter: UHLAdapter) -> dict[str, Tensor]:
    """Every stored tensor by name, in the file's dtypes."""
    out = pack_values(adapter, dict(adapter.named_parameters())) | _anchor_tensors(adapter)
    return {name: value.contiguous() for name, value in sorted(out.items())}


def packed_text(texts: Sequence[str]) -> bytes:
    """Anchor texts as a file holds them."""
    return zlib.compress("\n".join(texts).encode(), 9)


def _anchor_tensors(adapter: UHLAdapter) -> dict[str, Tensor]:
    if adapter.anchors is None:
        return {}
    text = packed_text(adapter.anchors.texts)
    out = {"anchors.text": torch.from_numpy(np.frombuffer(text, dtype=np.uint8).copy())}
    if adapter.anchors.reads is not None:
        out["anchors.reads"], out["anchors.reads.scale"] = quantise(adapter.anchors.reads, 8)
        if adapter.anchors.bias is not None:
            out["anchors.bias"] = to_half(adapter.anchors.bias)
    for name, codes in code_tables(adapter.anchors).items():
        out |= {name: codes.values, f"{name}.scale": codes.scale, f"{name}.centre": codes.centre}
    return out


def code_tables(anchors: Anchors) -> dict[str, Codes]:
    """An anchor set's tables of codes by the names of their tensors."""
    found = {"anchors.head": anchors.head} | {f"anchors.stream.{i}": c for i, c in enumerate(anchors.stream)}
    return found if anchors.logits is None else found | {"anchors.logits": anchors.logits}


def _anchor_entry(anchors: Anchors) -> AnchorEntry:
    return AnchorEntry(
        count=len(anchors.texts),
        origin=anchors.origin,
        words=anchors.words,
        dims=len(anchors.stream[0].values),
        labels=0 if anchors.reads is None else len(anchors.reads),
        depths=list(anchors.depths),
        coded=anchors.coded,
        units=0 if anchors.logits is None else anchors.logits.values.shape[1],
        kind=anchors.kind,
        length=anchors.length,
        task=anchors.task,
        own=anchors.own,
        cuts=anchors.cuts,
    )


def to_metadata(adapter: UHLAdapter, tensors: dict[str, Tensor]) -> dict[str, str]:
    """The safetensors metadata: one JSON object under :data:`KEY`."""
    anchors = adapter.anchors
    try:
        header = Header(
            config=adapter.config.stored(),
            tasks=_entries(adapter),
            anchors=_anchor_entry(anchors) if anchors else None,
            info=adapter.info,
            extra=sorted(name for name in tensors if not is_stored(name)),
            sha256=digest(tensors),
        )
    except ValidationError as error:
        raise UHLError(f"the adapter cannot be written: {error.errors()[0]['msg']}") from error
    return {
        KEY: json.dumps(header.model_dump(), sort_keys=True)
    }  # one key: safetensors writes several in no fixed order


def save(adapter: UHLAdapter, path: str | Path) -> Path:
    """Write the adapter; an interruption leaves an older file of that name whole.

    Raises :class:`UHLError` for an adapter that could not be read again: values that are not finite, texts with line
    breaks or longer than :data:`MAX_LINE`, more bytes than :data:`MAX_FILE`.
    """
    if adapter.anchors:
        check_texts(adapter.anchors.texts)
    check_finite(dict(adapter.named_parameters()))
    return _write(adapter, to_tensors(adapter), path)


def check_texts(texts: Sequence[str]) -> None:
    """Raise :class:`UHLError` for anchor texts that a file cannot hold."""
    if any("\n" in text for text in texts):
        raise UHLError("anchor texts are stored one a line; replace line breaks in them by blanks")
    longest, whole = max(map(len, texts), default=0), sum(len(text.encode()) + 1 for text in texts)
    if longest > MAX_LINE or whole > MAX_TEXT:
        raise UHLError(
            f"anchor texts have up to {longest:,} characters and {whole:,} bytes together; a file holds {MAX_LINE:,} a "
            f"text and {MAX_TEXT:,} in all: cut the texts, or lower `more_anchors`"
        )


def check_finite(values: Mapping[str, Tensor]) -> None:
    """Raise :class:`UHLError` for a parameter with values that are not finite: it must not replace a good file."""
    for name, value in values.items():
        if value.device.type != "meta" and not torch.isfinite(value).all():
            raise UHLError(f"{name} holds values that are not finite; train again with lower learning rates")


def complete(adapter: UHLAdapter, path: str | Path, expected: str) -> bool:
    """Give a file of an adapter's tensors, as PEFT writes it, its header and its anchors; whether that was done.

    Tensors that are no adapter's (`modules_to_save`) stay in the file and are named in its header. A file whose stored
    tensors have another digest than ``expected`` is another adapter's, and is left alone.
    """
    tensors = load_file(path)
    if digest({name: value for name, value in tensors.items() if is_stored(name)}) != expected:
        return False
    _write(adapter, tensors | _anchor_tensors(adapter), path)
    return True


def check_tensors(adapter: UHLAdapter, tensors: Mapping[str, Tensor]) -> None:
    """Raise :class:`UHLError` unless the tensors, beside anchors, are those of an adapter of these sizes and tasks."""
    found = specs({name: value for name, value in tensors.items() if not name.startswith("anchors.")})
    where = Path("the state dict")
    compare(where, layout(adapter.config, _entries(adapter)), found)
    check_values(where, {name: tensors[name] for name in found})


def _entries(adapter: UHLAdapter) -> dict[str, TaskEntry]:
    parts = {name: adapter.task(name) for name in adapter.tasks}
    return {
        name: TaskEntry(
            labels=list(part.labels),
            kind=part.kind,  # type: ignore[arg-type]
            own_head=part.own_head,
            length=part.length,
        )
        for name, part in parts.items()
    }


def _write(adapter: UHLAdapter, tensors: dict[str, Tensor], path: str | Path) -> Path:
    size = sum(t.numel() * t.element_size() for name, t in tensors.items() if is_stored(name))
    if size > MAX_FILE - MAX_HEADER:
        raise UHLError(
            f"the adapter takes {size:,} bytes, files hold at most {MAX_FILE:,}; keep fewer anchors or tasks"
        )
    check_finite({name: t for name, t in tensors.items() if is_stored(name)})
    return _write_tensors(tensors, to_metadata(adapter, tensors), path)


def _write_tensors(tensors: dict[str, Tensor], meta: dict[str, str], path: str | Path) -> Path:
    return write_atomic(path, partial(_save, tensors, meta, path))


def _save(tensors: dict[str, Tensor], meta: dict[str, str], path: str | Path, temporary: Path) -> None:
    save_file(tensors, temporary, meta)
    if (length := header_length(temporary)) > MAX_HEADER:
        raise UHLError(
            f"the header of {path} would take {length:,} bytes, files hold at most {MAX_HEADER:,}; shorten the "
            "labels of its tasks"
        )


def _shared(adapter: UHLAdapter) -> dict[str, Tensor]:
    """Stored tensors of what all tasks share."""
    packed = pack_values(adapter, dict(adapter.named_parameters()))
    return {name: value for name, value in packed.items() if not name.startswith("task.")}


def base_of(adapter: UHLAdapter) -> str:
    """Name of the adapter's dictionary, 16 hexadecimal digits: of its sizes and of what all its tasks share."""
    sizes = json.dumps(adapter.config.stored(), sort_keys=True)
    return hashlib.sha256(f"{sizes}|{digest(_shared(adapter))}".encode()).hexdigest()[:16]


def save_dictionary(adapter: UHLAdapter, path: str | Path) -> Path:
    """Write what all tasks share, without tasks and anchors: at most 110 kB at the default sizes."""
    check_finite(dict(adapter.named_parameters()))
    alone = UHLAdapter(adapter.config)
    alone.info = adapter.info
    return _write(alone, _shared(adapter), path)


def save_task(adapter: UHLAdapter, name: str, path: str | Path) -> Path:
    """Write one task alone: at most 2 kB for two labels at the default sizes. Errors as for :func:`save`."""
    part = adapter.task(name)
    check_finite({f"tasks.{name}.{n}": p for n, p in part.named_parameters()})
    prefix = f"task.{name}."
    packed = pack_values(adapter, dict(adapter.named_parameters()))
    tensors = {n.removeprefix(prefix): value for n, value in packed.items() if n.startswith(prefix)}
    try:
        about: dict[str, Any] = _entries(adapter)[name].model_dump() | {"name": name, "base": base_of(adapter)}
        header = PackHeader(**about, sha256=digest(tensors))
    except ValidationError as error:
        raise UHLError(f"task {name!r} cannot be a task pack: {error.errors()[0]['msg']}") from error
    meta = {KEY: json.dumps(header.model_dump(), sort_keys=True, separators=(",", ":"))}
    return _write_tensors(tensors, meta, path)


def add_task(adapter: UHLAdapter, path: str | Path) -> str:
    """Plug a task pack into the adapter and return the task's name; a task of that name is replaced.

    Raises :class:`UHLError` for a pack of another dictionary, and for files as :func:`load` does.
    """
    found = read_pack(path)
    header, tensors = found.header, found.tensors
    if header.base != base_of(adapter):
        raise UHLError(
            f"{path} was made for dictionary {header.base}, this one is {base_of(adapter)}; use the dictionary file "
            f"that came with it"
        )
    compare(found.path, pack_layout(adapter.config.atoms, adapter.config.width, len(header.labels)), specs(tensors))
    part = TaskPart(adapter.config, header.labels, header.kind, header.own_head, header.length)
    part.load_state_dict({n: _unpack(n, tensors, TASK_BITS[n], tuple(p.shape)) for n, p in part.named_parameters()})
    check_task_name(header.name)
    adapter.tasks[header.name] = part
    return header.name


def load(path: str | Path) -> UHLAdapter:
    """Read an adapter. Raises :class:`UHLError` for a file that is missing, truncated, altered, of another version or
    not an adapter at all.
    """
    return build(read(path))


def build(found: Content[Header]) -> UHLAdapter:
    """The adapter of a file that was read."""
    try:
        return _build(found.header, found.tensors)
    except (KeyError, ValueError, TypeError, RuntimeError, zlib.error) as error:
        raise misfit(found.path, error) from error


def _build(header: Header, tensors: dict[str, Tensor]) -> UHLAdapter:
    adapter = UHLAdapter(Sizes(**header.config))
    for name, task in header.tasks.items():
        adapter.add_task(name, task.labels, task.kind, task.own_head, task.length)
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

    stream = [codes(f"anchors.stream.{i}") for i in range(len(entry.depths))]
    reads = dequantise(tensors["anchors.reads"], tensors["anchors.reads.scale"]) if entry.labels else None
    made = Anchors(
        texts,
        entry.origin,
        codes("anchors.head"),
        stream,
        entry.words,
        tuple(entry.depths),
        reads,
        tensors["anchors.bias"].float() if entry.task is not None and entry.labels else None,
        codes("anchors.logits") if entry.units else None,
        entry.kind,
        entry.length,
        entry.task,
        entry.own,
        entry.cuts,
    )
    units = sum(made.probe.units())
    if entry.units and units != entry.units:
        raise UHLError(f"the anchor texts have {units} units, {entry.units} promised")
    if not entry.units and len(made.probe.coded_units()) != units:
        raise UHLError("anchor texts that have neither codes nor logits")
    return made


def describe(path: str | Path) -> str:
    """A file's parts, bytes, tasks, anchors and provenance, for people. The file is checked first."""
    from uhl import budget

    found = read_either(path)
    path, header = found.path, found.header
    size = f"{path.name}: {path.stat().st_size:,} bytes, version {header.version}, sha256 {header.sha256[:12]} checked"
    if isinstance(header, PackHeader):
        return _plain(
            size,
            f"task       {header.name}: {header.kind}, labels {', '.join(header.labels) or 'none'}{bound_to(header)}",
            f"belongs to dictionary {header.base}; plug it in with `uhl join`",
        )
    adapter = build(found)  # type: ignore[arg-type]
    config = adapter.config
    lines = [
        size,
        f"adapter    {config.atoms} atoms of width {config.width}, at most {config.top_k} a token, "
        f"{config.projector} projector, {config.routed()}, on weights {' '.join(config.types)}",
        f"dictionary {base_of(adapter)}",
    ]
    lines += [f"{key:10s} {value}" for key, value in sorted(header.info.items())]
    lines += [
        f"task       {name}: {task.kind}, labels {', '.join(task.labels) or 'none'}{bound_to(task)}"
        for name, task in header.tasks.items()
    ]
    if header.anchors:
        a = header.anchors
        codes = f"{a.coded or a.count} with codes" + (f" and those of {a.words} words of each" if a.words else "")
        cut = f", {a.cuts} fragments of each of the first {a.own or a.count}" if a.cuts else ""
        lines.append(f"anchors    {a.count} texts, {codes}{cut} ({a.origin})")
    sizes = budget.file_bytes(path)
    lines += [f"bytes      {part:10s} {count:9,}" for part, count in sizes.items() if count]
    lines.append(
        f"with every number as a float16 it would have {budget.float16_bytes(adapter) + sizes['header']:,} bytes"
    )
    return _plain(*lines)


def _plain(*lines: str) -> str:
    """Lines for a terminal: what a stranger's file has of control characters is written out."""
    return "\n".join("".join(c if c.isprintable() else ascii(c)[1:-1] for c in line) for line in lines)
