"""The adapter's file, in one place: what is in it, how it is packed, how its bytes add up, how it is checked.

One safetensors file with a JSON header. Never pickle, never code. ``A`` atoms, ``C`` canonical width, ``N`` anchors,
``R`` coordinates of the stream's codes:

| tensor                                   | dtype, shape                               | bytes at A = 128, C = 256 |
|------------------------------------------|--------------------------------------------|---------------------------|
| `dictionary.u`, `dictionary.v`           | int8 (A, C), a scale a row                 | 2 (A C + 2 A) = 66,048    |
| `router` (not where it is static)        | int8 (A, C), a scale a row                 | A C + 2 A = 33,024        |
| `projector.first`, `projector.second`    | int8 (8, 4), (C, 10), a scale a row        | 3,120                     |
| `mixer.first`, `mixer.second`            | 4-bit (14, 7), (A, 15), a scale a row      | 1,293                     |
| `task.<name>.bias`                       | 4-bit (8, A), a scale a row                | 4 A + 16 = 528            |
| `task.<name>.embedding`                  | int8 (A), one scale                        | A + 2 = 130               |
| `task.<name>.head` (where it has labels) | int8 (labels, C), a scale a row            | 258 a label               |
| `task.<name>.head_bias`                  | float16 (labels)                           | 2 a label                 |
| `anchors.text`                           | uint8, zlib of the texts joined by newline | as they pack              |
| `anchors.reads`, `anchors.bias`          | int8 (labels, C), a scale a row; float16   | 260 a label               |
| `anchors.logits`, for U units            | int8 (labels, U), a scale and a centre a row | labels (U + 4)          |
| `anchors.head`, for n coded units        | int8 (C, n), a scale and a centre a row    | C n + 4 C                 |
| `anchors.stream.<i>`, for W words of M coded texts | int8 (R, M W), a scale and a centre a row | R M W + 4 R each |

A scale is a float16 tensor `<name>.scale`, at least 2^-14; a value is integer times scale (plus `<name>.centre` for
anchors). 8-bit integers are in [-127, 127]. 4-bit ones are in [-7, 7], rows one after another, two a byte, the first in
the low half, an odd count padded with zero. Tensors of the host that PEFT trained beside the adapter
(`modules_to_save`) may follow under their own names; the header lists them as ``extra``.

The header's metadata is one JSON object under ``uhl`` (:class:`Header`): format, version, sizes, tasks, anchors, free
information, and the sha256 over name, dtype, shape and bytes of every tensor in order of name. The same state gives the
same bytes. :func:`layout` gives the tensors that a header promises; a file holds exactly these. `uhl.budget.part_bytes`
is the table above as a formula, and with the safetensors header it adds up to the file's size.

A *dictionary file* is such a file without tasks and anchors. A *task pack* (:class:`PackHeader`) is one task alone,
its tensors without the prefix `task.<name>.`; ``base`` says which dictionary it belongs to.

Version 1 is the only one so far, and its files go on loading (the tests keep one). Anchors have gained parts that a
file may lack (words, the head that the codes were made for, logits, fragments), and tasks the host that a head is of
and a length; a release that does not know them refuses a file that has them. A change of what is there raises the
version.

Files may come from strangers: sizes are bounded before anything is read, shapes are checked before anything is built,
and every fault is one :class:`UHLError`.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Generic, Literal, TypeVar

import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator
from safetensors import SafetensorError, safe_open
from torch import Tensor

from uhl.config import MAX_FILE, Kind, Sizes
from uhl.errors import UHLError
from uhl.mixer import BASIS, INPUTS
from uhl.projector import FEATURES, HIDDEN
from uhl.quant import QMAX, SMALLEST_SCALE, unpack4

FORMAT, PACK, VERSION, KEY = "uhl-adapter", "uhl-task", "1", "uhl"
MAX_HEADER = 1 << 20  # bytes
MAX_TEXTS, MAX_UNITS = 1 << 14, 1 << 16  # anchor texts; these, their fragments and words with logits
MAX_TEXT, MAX_LINE = 8 << 20, 64 << 10  # bytes of all anchor texts unpacked, characters of one
BYTES = {"I8": 1, "U8": 1, "F16": 2}
KIND = {torch.int8: "I8", torch.uint8: "U8", torch.float16: "F16"}
H = TypeVar("H", bound="Header | PackHeader")
Share = Annotated[float, Field(ge=0, le=1)]
Spec = tuple[str, tuple[int, ...]]  # a tensor's safetensors dtype and shape


def _unset(value: object) -> bool:
    return value is None


# a model's name or folder; of strangers' files it is printed
PRINTED = r"^[^\x00-\x1f\x7f-\x9f\u2028\u2029]*$"
HostName = Annotated[str, Field(max_length=4096, pattern=PRINTED)]
NAMED = ("source", "shape", "revision", "tuned_on", "arm", "teacher", "source_task")  # texts of a header's ``info``
MAX_LAYERS = 1 << 16


class TaskEntry(BaseModel):
    """What the header says of a task."""

    model_config = ConfigDict(extra="forbid", strict=True)
    labels: list[str]
    kind: Kind
    own_head: HostName | None = Field(None, exclude_if=_unset)  # the host that the head is of; "": none yet
    length: int | None = Field(None, ge=8, le=1 << 16, exclude_if=_unset)  # tokens a text is cut at; None: the anchors'


class AnchorEntry(BaseModel):
    """What the header says of the anchors."""

    model_config = ConfigDict(extra="forbid", strict=True)
    count: int = Field(ge=1, le=MAX_TEXTS)
    origin: str
    words: int = Field(0, ge=0, le=64)  # a text, that the stream's codes belong to; 0: to whole texts
    dims: int | None = Field(None, ge=1)  # of the stream's codes; None: all C
    labels: int = Field(0, ge=0, le=1 << 16)  # rows of the head that the codes were made for; 0: not stored
    depths: list[Share] = Field([], max_length=64)  # of the stream's codes; none, as in older files: evenly, up to 1
    coded: int | None = Field(None, ge=1)  # texts that have codes, the first ones; None: all
    own: int | None = Field(None, ge=1)  # texts of the anchors' own pool, the first ones; None: all
    cuts: int = Field(0, ge=0, le=16)  # fragments that each of these is cut into beside, all of which have logits
    units: int = Field(0, ge=0, le=MAX_UNITS)  # that have logits: texts and fragments, or a token task's words; 0: none
    task: str | None = None  # whose head the labels are; None, as in older files: its bias is not stored
    kind: Kind = "sentence"
    length: int = Field(64, ge=8, le=1 << 16)  # tokens that a text is cut at

    @model_validator(mode="after")
    def _coded(self) -> AnchorEntry:
        if (self.coded or 0) > self.count:
            raise ValueError(f"{self.coded} texts with codes, of {self.count}")
        if self.kind == "token" and not self.words:
            raise ValueError("anchors of a token task without words")
        if self.own is not None and not (self.coded or self.count) <= self.own <= self.count:
            raise ValueError(f"{self.own} texts of the pool, of {self.count}; those with codes are of it")
        if self.kind == "token" and self.cuts:
            raise ValueError("fragments of a token task, whose words have logits")
        if self.units and not self.labels:
            raise ValueError("logits without a head")
        return self


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

    @field_validator("info")
    @classmethod
    def _used(cls, info: dict[str, Any]) -> dict[str, Any]:
        """Of what is free, these are read by ports, and shown."""
        layers, scale = info.get("layers"), info.get("scale", 0.0)
        if layers is not None and (type(layers) is not int or not 1 <= layers <= MAX_LAYERS):
            raise ValueError(f"layers is {layers!r:.40}, expected a number from 1 to {MAX_LAYERS}")
        if type(scale) not in {int, float} or not math.isfinite(scale):
            raise ValueError(f"scale is {scale!r:.40}, expected a finite number")
        if type(info.get("port_rules", 0)) is not int:
            raise ValueError(f"port_rules is {info['port_rules']!r:.40}, expected a whole number")
        for name in NAMED:
            if not isinstance(info.get(name, ""), str) or not re.fullmatch(PRINTED, info.get(name, "")):
                raise ValueError(f"{name} is {info[name]!r:.40}, expected a text without control characters")
        return info


class PackHeader(TaskEntry):
    """A task pack's metadata. ``base`` names the dictionary that the task was trained with."""

    format: Literal["uhl-task"] = "uhl-task"
    version: Literal["1"] = "1"
    name: str = Field(pattern=r"^[\w.-]{1,64}$")
    base: str
    sha256: str


def bound_to(task: TaskEntry) -> str:
    """Words on a head that decides on one host alone; none where a source has trained it."""
    if task.own_head is None:
        return ""
    return f"; its head is of {task.own_head} alone" if task.own_head else "; its head is not trained yet"


def layout(
    config: Sizes, tasks: Mapping[str, TaskEntry], anchors: AnchorEntry | None = None, text: int = 0
) -> dict[str, Spec]:
    """Every tensor of a file by name. ``text``: bytes of the packed anchor texts."""
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
    out = _rows(rows)
    for name, task in tasks.items():
        out |= {f"task.{name}.{part}": spec for part, spec in pack_layout(a, c, len(task.labels)).items()}
    if anchors:
        out["anchors.text"] = ("U8", (text,))
        if anchors.labels:
            out |= _rows({"anchors.reads": (anchors.labels, c, 8)})
            if anchors.task is not None:
                out["anchors.bias"] = ("F16", (anchors.labels,))
        coded, picked = anchors.coded or anchors.count, max(anchors.words, 1)
        tables = {f"anchors.stream.{i}": (anchors.dims or c, coded * picked) for i in range(len(anchors.depths))}
        tables["anchors.head"] = c, coded * (picked if anchors.kind == "token" else 1)
        if anchors.units:
            tables["anchors.logits"] = anchors.labels, anchors.units
        for name, (rows_, columns) in tables.items():
            out |= {
                name: ("I8", (rows_, columns)),
                f"{name}.scale": ("F16", (rows_,)),
                f"{name}.centre": ("F16", (rows_,)),
            }
    return out


def pack_layout(atoms: int, width: int, labels: int) -> dict[str, Spec]:
    """Every tensor of one task; without labels it has no head, and the host's own is used."""
    out: dict[str, Spec] = {"embedding": ("I8", (atoms,)), "embedding.scale": ("F16", ())}
    out |= _rows({"bias": (BASIS, atoms, 4)})
    if labels:
        out |= _rows({"head": (labels, width, 8)}) | {"head_bias": ("F16", (labels,))}
    return out


def _rows(rows: Mapping[str, tuple[int, int, int]]) -> dict[str, Spec]:
    """Integer matrices, given as (rows, columns, bits), and their scales."""
    out: dict[str, Spec] = {}
    for name, (count, columns, bits) in rows.items():
        out[name] = ("I8", (count, columns)) if bits == 8 else ("U8", (-(-count * columns // 2),))
        out[f"{name}.scale"] = ("F16", (count,))
    return out


def is_stored(name: str) -> bool:
    """Whether a name is one of a file's tensors."""
    return name.startswith(("dictionary.", "projector.", "mixer.", "router", "task.", "anchors."))


def digest(tensors: Mapping[str, Tensor]) -> str:
    """sha256 over names, dtypes, shapes and bytes, in order of name."""
    total = hashlib.sha256()
    for name, value in sorted(tensors.items()):
        _hash(total, name, value)
    return total.hexdigest()


def _hash(total: Any, name: str, value: Tensor) -> None:
    total.update(f"{name}|{value.dtype}|{tuple(value.shape)}|".encode())
    total.update(value.contiguous().flatten().view(torch.uint8).numpy())


@dataclass(frozen=True)
class Content(Generic[H]):
    """What a checked file holds. ``extra``: shapes of the host's tensors in it, which are not kept."""

    path: Path
    header: H
    tensors: dict[str, Tensor]
    extra: dict[str, tuple[int, ...]]


def read(path: str | Path) -> Content[Header]:
    """Read an adapter's file: sizes, layout, hash and ranges are checked.

    Tensors of the host (``extra``) are hashed one after another and not kept. Raises :class:`UHLError` for a file that
    is missing, cut off, altered, of another version or no adapter at all.
    """
    return _read(Path(path), _adapter_header)


def read_pack(path: str | Path) -> Content[PackHeader]:
    """Read a task pack, checked. Errors as for :func:`read`."""
    return _read(Path(path), _pack_header)


def read_either(path: str | Path) -> Content[Header] | Content[PackHeader]:
    """Read an adapter's file or a task pack, checked. Errors as for :func:`read`."""

    def either(path: Path, meta: Any, found: dict[str, Spec]) -> Header | PackHeader:
        packed = isinstance(meta, dict) and meta.get("format") == PACK
        return (_pack_header if packed else _adapter_header)(path, meta, found)

    return _read(Path(path), either)  # type: ignore[return-value]  # one of the two


def _read(path: Path, check: Callable[[Path, Any, dict[str, Spec]], H]) -> Content[H]:
    """Read a file whose header and layout ``check`` accepts; again where another process replaced it meanwhile."""
    for _ in range(20):
        before = _identity(path)
        try:
            return _read_once(path, check)
        except UHLError:
            if _identity(path) == before:
                raise
    return _read_once(path, check)


def _identity(path: Path) -> tuple[int, ...]:
    try:
        found = path.stat()
    except OSError:
        return ()
    return found.st_ino, found.st_mtime_ns, found.st_size


def _read_once(path: Path, check: Callable[[Path, Any, dict[str, Spec]], H]) -> Content[H]:
    if path.is_dir():
        raise UHLError(f"{path} is a folder; give an adapter's file, such as its adapter_model.safetensors")
    if not path.is_file():
        raise UHLError(
            f"adapter file {path} does not exist; trained ones lie in adapters/, or train one with "
            "notebooks/02_pretrain.ipynb (a cell restored from an archive may have none: delete its folder and run it "
            "again)"
        )
    try:
        _check_sizes(path)
        with safe_open(path, "pt") as file:
            meta = json.loads((file.metadata() or {}).get(KEY, "{}"))
            slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118 (not a mapping)
            found: dict[str, Spec] = {n: (x.get_dtype(), tuple(x.get_shape())) for n, x in slices.items()}
            header = check(path, meta, found)
            extra = header.extra if isinstance(header, Header) else []
            own = sum(math.prod(shape) * BYTES[kind] for n, (kind, shape) in found.items() if n not in extra)
            if own > MAX_FILE:
                raise UHLError(f"{path} holds {own:,} bytes of an adapter; files hold at most {MAX_FILE:,}")
            total = hashlib.sha256()
            tensors = {}
            for name in sorted(found):  # one at a time: the host's are only hashed
                value = file.get_tensor(name)
                _hash(total, name, value)
                if name not in extra:
                    tensors[name] = value
    except UHLError:
        raise
    except (SafetensorError, OSError, ValueError, RecursionError) as error:
        raise UHLError(f"{path} is not a whole safetensors file ({error}); copy or download it again") from error
    if header.sha256 != total.hexdigest():
        raise UHLError(f"{path} was altered or damaged after it was written (sha256 differs); copy it again")
    check_values(path, tensors)
    return Content(path, header, tensors, {name: found[name][1] for name in extra})


def misfit(path: Path, why: object) -> UHLError:
    """The error for a file whose content is not what its format says."""
    return UHLError(f"{path} does not have the layout of version {VERSION} ({why}); write it again")


def header_length(path: Path) -> int:
    """Bytes of a safetensors file's header."""
    with open(path, "rb") as handle:
        return int.from_bytes(handle.read(8), "little")


def _check_sizes(path: Path) -> None:
    """Bound what is read: the file, and the header whose length its first eight bytes give.

    Only a file whose header names tensors of the host (``extra``) may be larger.
    """
    size, length, head = path.stat().st_size, header_length(path), b""
    if size > MAX_FILE and length <= MAX_HEADER:
        with open(path, "rb") as handle:
            head = handle.read(8 + length)
    if size > MAX_FILE and b'\\"extra\\": [\\"' not in head:
        raise UHLError(f"{path} has {size:,} bytes; an adapter has at most {MAX_FILE:,}. Is it a model's file?")
    if size > 8 and MAX_HEADER < length <= size:
        raise UHLError(f"{path} has a header of {length:,} bytes; an adapter's has at most {MAX_HEADER:,}")


def _parsed(path: Path, meta: Any, kind: type[Header] | type[PackHeader]) -> Header | PackHeader:
    """A header of the wanted kind, whatever lies in ``meta``."""
    wanted, found = kind.model_fields["format"].default, meta.get("format") if isinstance(meta, dict) else None
    if found != wanted:
        known = {
            PACK: "a task pack; plug it into its dictionary with `uhl join`",
            FORMAT: "an adapter; cut it into task packs with `uhl split`",
        }
        what = known.get(str(found), f"not an adapter: expected format {wanted!r} in its header; give a file of uhl's")
        raise UHLError(f"{path} is a safetensors file but {what}")
    version = meta.get("version")
    if version != VERSION:
        newer = isinstance(version, str) and version.isdecimal() and int(version[:9]) > int(VERSION)
        remedy = "install a newer release of uhl" if newer else "write it again"
        raise UHLError(f"{path} has file version {version!r}, this package reads version {VERSION!r}; {remedy}")
    try:
        return kind(**meta)
    except ValidationError as error:
        first = error.errors()[0]
        raise misfit(path, f"header, {'.'.join(map(str, first['loc']))}: {first['msg']}") from error


def _adapter_header(path: Path, meta: Any, found: dict[str, Spec]) -> Header:
    """The header of a file that holds the tensors that it promises, and no other."""
    header = _parsed(path, meta, Header)
    assert isinstance(header, Header)
    if header.anchors and not header.anchors.depths:
        count = sum(name.startswith("anchors.stream.") and name.count(".") == 2 for name in found)
        if not count:
            raise misfit(path, "anchors without codes of the source's stream")
        header.anchors.depths = [(i + 1) / count for i in range(count)]
    text = found.get("anchors.text", ("U8", (0,)))[1]
    try:
        config = Sizes(**header.config)
    except UHLError as error:
        raise misfit(path, error) from error
    wanted = layout(config, header.tasks, header.anchors, text[0] if len(text) == 1 else 0)
    if any(is_stored(name) for name in header.extra):
        raise misfit(path, "header, extra: names a tensor of the adapter")
    if missing := sorted(set(header.extra) - set(found)):
        raise misfit(path, f"header, extra: names {missing[0]!r}, which the file does not hold")
    compare(path, wanted, {name: spec for name, spec in found.items() if name not in header.extra})
    return header


def _pack_header(path: Path, meta: Any, found: dict[str, Spec]) -> PackHeader:
    header = _parsed(path, meta, PackHeader)
    assert isinstance(header, PackHeader)
    (_, atoms), (_, head) = found.get("embedding", ("", (0,))), found.get("head", ("", (0, 0)))
    compare(path, pack_layout(math.prod(atoms), head[-1] if head else 0, len(header.labels)), found)
    return header


def specs(tensors: Mapping[str, Tensor]) -> dict[str, Spec]:
    """Dtype and shape of live tensors, in safetensors' words."""
    return {name: (KIND.get(t.dtype, str(t.dtype)), tuple(t.shape)) for name, t in tensors.items()}


def compare(path: Path, wanted: Mapping[str, Spec], found: Mapping[str, Spec]) -> None:
    """Raise :class:`UHLError` for the first tensor that is missing, unknown, or of another shape or dtype."""
    for name in sorted({*wanted, *found}):
        if name not in found:
            raise misfit(path, f"tensor {name} is missing")
        if name not in wanted:
            raise misfit(path, f"tensor {name} is not one that the header promises")
        if found[name] != wanted[name]:
            (kind, shape), (right_kind, right) = found[name], wanted[name]
            raise misfit(path, f"tensor {name} has shape {shape}, {kind}, expected {right}, {right_kind}")


def check_values(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Scales are finite and positive, other float16 values finite, integers within their bits."""
    for name, value in tensors.items():
        if value.dtype == torch.float16 and not torch.isfinite(value).all():
            raise misfit(path, f"tensor {name} holds values that are not finite")
        if name.endswith(".scale") and (value < SMALLEST_SCALE).any():
            raise misfit(path, f"tensor {name} holds a scale below {SMALLEST_SCALE:g}")
        if value.dtype == torch.int8 and (value < -QMAX[8]).any():
            raise misfit(path, f"tensor {name} holds {-QMAX[8] - 1}, which is outside of 8-bit rows")
        if (
            value.dtype == torch.uint8
            and name != "anchors.text"
            and (unpack4(value, (2 * len(value),)) < -QMAX[4]).any()
        ):
            raise misfit(path, f"tensor {name} holds {-QMAX[4] - 1}, which is outside of 4-bit rows")
