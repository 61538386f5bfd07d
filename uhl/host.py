"""Which weights a host model has: the type, relative depth and side of every `nn.Linear` that can carry atoms.

Types follow the module's name, so that any family with these names works: BERT, RoBERTa, ELECTRA, DeBERTa-v2,
DistilBERT, MPNet, and decoders with `q_proj ... down_proj`. A *reader* takes the residual stream as input (Q, K, V,
FFN-in), a *writer* adds to it (O, FFN-out).
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from uhl.config import WEIGHT_TYPES
from uhl.errors import UHLError

# Suffix of the path below the layer -> (type, is writer). Order matters: the first match wins.
_PATTERNS: tuple[tuple[str, str, bool], ...] = (
    (r"(query|query_proj|q_lin|q_proj|attn\.q)", "Q", False),
    (r"(key|key_proj|k_lin|k_proj|attn\.k)", "K", False),
    (r"(value|value_proj|v_lin|v_proj|attn\.v)", "V", False),
    (r"(attention\.output\.dense|out_lin|o_proj|attn\.o)", "O", True),
    (r"(intermediate\.dense|lin1|up_proj|gate_proj)", "FFN", False),
    (r"(output\.dense|lin2|down_proj)", "FFN", True),
)
_LAYER = re.compile(r"^(.*?(?:layers?|h|blocks?)\.(\d+))\.(.+)$")


@dataclass(frozen=True)
class Slot:
    """One weight of a host: where it is, what it is, and its shape (d_out, d_in)."""

    path: str
    layer_path: str
    layer: int
    depth: float
    type: str
    writer: bool
    d_in: int
    d_out: int


def find_slots(model: nn.Module, types: tuple[str, ...] = WEIGHT_TYPES) -> list[Slot]:
    """Weights of the wanted types, in layer order. ``depth`` is layer / (L - 1), 0 for a single layer.

    Raises :class:`UHLError` when the model has no weight of a known type.
    """
    found = []
    for path, module in model.named_modules():
        path = path.removesuffix(".base_layer")  # a weight that carries an adapter is still that weight
        match = _LAYER.match(path) if isinstance(module, nn.Linear) else None
        if match and isinstance(module, nn.Linear):
            kind = _classify(match[3])
            if kind and kind[0] in types:
                found.append((path, match[1], int(match[2]), *kind, module.in_features, module.out_features))
    if not found:
        raise UHLError(
            f"{type(model).__name__} has no nn.Linear of a known type ({', '.join(types)}) inside numbered layers; "
            f"expected an encoder such as BERT, RoBERTa, ELECTRA, DeBERTa-v2, DistilBERT or MPNet"
        )
    last = max(layer for _, _, layer, *_ in found)
    slots = [Slot(p, lp, n, n / last if last else 0.0, t, w, di, do) for p, lp, n, t, w, di, do in found]
    return sorted(slots, key=lambda s: s.layer)


def _classify(below_layer: str) -> tuple[str, bool] | None:
    for pattern, kind, writer in _PATTERNS:
        if re.search(rf"(^|\.){pattern}$", below_layer):
            return kind, writer
    return None


def linear_flops(slots: list[Slot]) -> int:
    """FLOPs per token of the host's own weights: 2 d_in d_out each."""
    return sum(2 * s.d_in * s.d_out for s in slots)


def weight(model: nn.Module, slot: Slot) -> torch.Tensor:
    """The host's weight (d_out, d_in), whether an adapter is attached or not."""
    module: Any = model.get_submodule(slot.path)
    found: torch.Tensor = getattr(module, "base_layer", module).weight
    return found.detach()
