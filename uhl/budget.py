"""Bytes and FLOPs by formula, in conventions that the tests hold against the file's size and torch's counter.

Bytes: tensors as the file stores them, plus the safetensors header. FLOPs: a multiply and an add count as two; only
matrix products count (as in torch's counter), per token of one forward pass. The host's are those of its linear
layers, 2 d_in d_out each; attention's own products are left out, which makes our overhead look larger, not smaller.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path

import pandas as pd

from uhl import fileformat, host, store
from uhl.adapter import UHLAdapter
from uhl.anchors import DEPTHS, Anchors
from uhl.config import WEIGHT_TYPES, Sizes
from uhl.host import Slot, first_layers
from uhl.mixer import BASIS
from uhl.projector import FEATURES, HIDDEN

LIMIT_BYTES = 1_000_000
LIMIT_FLOPS_PCT = 10.0
SCALE = 2  # bytes of a float16


def part_bytes(
    config: Sizes,
    labels: Sequence[int] = (),
    anchors: int = 0,
    text: int = 0,
    depths: int = len(DEPTHS),
    words: int = 1,
    dims: int | None = None,
    reads: int = 0,
    heads: int = 1,
    units: int = 0,
) -> dict[str, int]:
    """Bytes of each part by formula. ``labels``: label count of each task; ``anchors``: texts that have codes;
    ``text``: bytes of all texts, packed; ``depths``, ``words`` a text and ``dims`` (None: C) of the stream's codes;
    ``heads`` a text of the head's codes; ``reads``: rows of the head that are kept with them; ``units`` that have
    logits.
    """
    a, c, h = config.atoms, config.width, config.hidden
    mixer_first, mixer_second = h * (len(WEIGHT_TYPES) + 2), a * (h + 1)
    parts = {
        "dictionary": 2 * (a * c + SCALE * a),
        "projector": HIDDEN * (FEATURES + 1) + c * (HIDDEN + 2) + SCALE * (HIDDEN + c),
        "mixer": -(-mixer_first // 2) + -(-mixer_second // 2) + SCALE * (h + a),
        "router": a * c + SCALE * a if config.router == "token" else 0,
    }
    parts["tasks"] = sum(-(-BASIS * a // 2) + SCALE * BASIS + a + SCALE + n * c + SCALE * n + SCALE * n for n in labels)
    r = dims or c
    codes = anchors * heads * c + 2 * SCALE * c + depths * (anchors * words * r + 2 * SCALE * r)
    logits = reads * (units + 2 * SCALE) if units else 0
    parts["anchors"] = codes + text + reads * (c + 2 * SCALE) + logits if anchors else 0
    return parts


def file_bytes(path: str | Path) -> dict[str, int]:
    """Bytes of each part as they lie in an adapter's file; they add up to the file's size."""
    raw = Path(path).read_bytes()
    length = int.from_bytes(raw[:8], "little")
    entries = json.loads(raw[8 : 8 + length])
    parts = dict.fromkeys(("dictionary", "projector", "mixer", "router", "tasks", "anchors", "host"), 0)
    for name, entry in entries.items():
        if name != "__metadata__":
            start, end = entry["data_offsets"]
            part = (
                {"task": "tasks"}.get(name.split(".")[0], name.split(".")[0]) if fileformat.is_stored(name) else "host"
            )
            parts[part] += end - start
    if not parts["host"]:  # nothing but an adapter
        del parts["host"]
    return parts | {"header": 8 + length}


def adapter_parts(adapter: UHLAdapter) -> dict[str, int]:
    """:func:`part_bytes` of a live adapter."""
    labels = [len(adapter.task(n).labels) for n in adapter.tasks]
    if adapter.anchors is None:
        return part_bytes(adapter.config, labels)
    text, anchors = store.to_tensors(adapter)["anchors.text"].numel(), adapter.anchors
    depths, words, dims = len(anchors.stream), max(anchors.words, 1), len(anchors.stream[0].values)
    reads = 0 if anchors.reads is None else len(anchors.reads)
    units = 0 if anchors.logits is None else anchors.logits.values.shape[1]
    heads = words if anchors.kind == "token" else 1
    return part_bytes(adapter.config, labels, anchors.coded, text, depths, words, dims, reads, heads, units)


def float16_bytes(adapter: UHLAdapter) -> int:
    """Bytes of an adapter's tensors if each number were a float16, to compare with files of other methods at one
    precision: anchors' texts as they are packed, and no scales. The header comes on top.
    """
    numbers, texts, anchors = sum(p.numel() for p in adapter.parameters()), b"", adapter.anchors
    if anchors is not None:
        numbers += sum(t.values.numel() for t in store.code_tables(anchors).values())
        numbers += sum(t.numel() for t in (anchors.reads, anchors.bias) if t is not None)
        texts = store.packed_text(anchors.texts)
    return 2 * numbers + len(texts)


def anchor_bytes(anchors: Anchors, bits: int = 8) -> int:
    """Bytes of anchors in a file, their codes at ``bits`` (a file's are at 8)."""
    tables = store.code_tables(anchors).values()
    codes = sum(-(-bits * t.values.numel() // 8) + 2 * SCALE * len(t.values) for t in tables)
    reads = 0 if anchors.reads is None else anchors.reads.numel() + 2 * SCALE * len(anchors.reads)
    return codes + reads + len(store.packed_text(anchors.texts))


def labelled_bytes(texts: Sequence[str], labels: int) -> int:
    """Bytes of texts with a label each, of ``labels`` kinds, as a file of ours would hold them."""
    return len(store.packed_text(texts)) + math.ceil(len(texts) * math.log2(max(labels, 2)) / 8)


def routing_flops(config: Sizes, slots: Sequence[Slot], width: int, stream: bool = False) -> int:
    """FLOPs per token of the routes: 2 A D a layer, or 2 A d_in a weight, or 2 A D a stack, as ``config.routing`` says.

    Weights that share no route (outside of layers, cross-attention) add 2 A d_in each. ``stream``: in a frame of the
    residual stream, where d_in is D everywhere. Static routes cost nothing.
    """
    if config.router == "static":
        return 0
    own = sum(s.sides(stream)[0] for s in slots if config.routing == "weight" or not s.shared)
    layers = {"layer": set(first_layers(slots)), "weight": set(), "model": set(first_layers(slots).values())}
    return 2 * config.atoms * (own + width * len(layers[config.routing]))


def update_flops(config: Sizes, slots: Sequence[Slot], stream: bool = False) -> int:
    """FLOPs per token of the updates on the reference path: 2 K (d_in + d_out) a weight, in a ``stream`` 4 K D."""
    k = min(config.top_k, config.atoms)
    return sum(2 * k * sum(s.sides(stream)) for s in slots)


def extra_flops_pct(
    config: Sizes, slots: Sequence[Slot], all_slots: Sequence[Slot], width: int, stream: bool = False
) -> float:
    """The adapter's FLOPs in percent of the host's linear layers, of which ``all_slots`` is the list."""
    extra = routing_flops(config, slots, width, stream) + update_flops(config, slots, stream)
    return 100.0 * extra / host.linear_flops(list(all_slots))


def lora_flops(rank: int, slots: Sequence[Slot]) -> int:
    """FLOPs per token of a low-rank adapter, 2 r (d_in + d_out) a weight."""
    return sum(2 * rank * (s.d_in + s.d_out) for s in slots)


def lora_flops_pct(rank: int, slots: Sequence[Slot], all_slots: Sequence[Slot]) -> float:
    """:func:`lora_flops` in percent of the host's linear layers."""
    return 100.0 * lora_flops(rank, slots) / host.linear_flops(list(all_slots))


def table(config: Sizes, hosts: dict[str, tuple[list[Slot], int]]) -> pd.DataFrame:
    """MFLOP per token for several hosts, each given as (all its weights, width), in both kinds of :mod:`uhl.frame`."""
    rows = []
    for name, (slots, width) in hosts.items():
        used = [s for s in slots if s.type in config.types]
        for frame in ("dimension", "residual"):
            stream = frame == "residual"
            rows.append(
                {
                    "host": name,
                    "frame": frame,
                    "host MFLOP/token": host.linear_flops(slots) / 1e6,
                    "routing": routing_flops(config, used, width, stream) / 1e6,
                    "updates": update_flops(config, used, stream) / 1e6,
                    "extra %": extra_flops_pct(config, used, slots, width, stream),
                }
            )
    return pd.DataFrame(rows)
