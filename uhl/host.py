"""Which weights a host model has: the type, relative depth and side of every `nn.Linear` that can carry atoms.

Types follow the module's name, so that any family with these names works: BERT, RoBERTa, ELECTRA, DeBERTa-v2,
DistilBERT, MPNet, T5, BART, GPT-2 (a fused QKV weight counts as Q), and decoders with `q_proj ... down_proj`. A
*reader* takes the residual stream as input (Q, K, V, FFN-in), a *writer* adds to it (O, FFN-out).
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from uhl.config import WEIGHT_TYPES
from uhl.errors import UHLError

# Suffix of the path below the layer -> (type, is writer). Order matters: the first match wins.
_PATTERNS: tuple[tuple[str, str, bool], ...] = (
    (
        r"(query|query_proj|q_lin|q_proj|attn\.q|(?:Self|EncDec)Attention\.q|c_attn|query_key_value|qkv_proj|in_proj)",
        "Q",
        False,
    ),
    (r"(key|key_proj|k_lin|k_proj|attn\.k|(?:Self|EncDec)Attention\.k)", "K", False),
    (r"(value|value_proj|v_lin|v_proj|attn\.v|(?:Self|EncDec)Attention\.v)", "V", False),
    (
        r"(attention\.output\.dense|out_lin|o_proj|out_proj|attn\.o|(?:Self|EncDec)Attention\.o|attn\.c_proj|attention\.dense)",
        "O",
        True,
    ),
    (
        r"(intermediate\.dense|lin1|up_proj|gate_proj|gate_up_proj|fc_in|fc1|c_fc|wi|wi_0|wi_1|dense_h_to_4h)",
        "FFN",
        False,
    ),
    (r"(output\.dense|lin2|down_proj|fc_out|fc2|mlp\.c_proj|wo|dense_4h_to_h)", "FFN", True),
)
_LAYER = re.compile(r"^(.*?(?:layers?|h|blocks?)\.(\d+))\.(.+)$")
_ELSEWHERE = re.compile(
    r"crossattention|encoder_attn|EncDecAttention|cross_attn"
)  # may read other states than its layer


@dataclass(frozen=True)
class Slot:
    """One weight of a host: where it is, what it is, and its shape (d_out, d_in).

    ``layer`` counts all layers of all stacks; -1 is a weight outside of any layer. ``shared``: whether the weight uses
    its layer's route. Others (outside of layers, cross-attention) are routed by their own input.
    """

    path: str
    layer_path: str
    layer: int
    depth: float
    type: str
    writer: bool
    d_in: int
    d_out: int
    shared: bool = True


def find_slots(
    model: nn.Module, types: tuple[str, ...] = WEIGHT_TYPES, paths: Collection[str] | None = None
) -> list[Slot]:
    """Weights of the wanted types, in layer order. ``depth`` is layer / (L - 1) in its stack, 0 for a single layer.

    ``paths`` names the weights instead: those of no known type count as FFN, those outside of layers have depth 0.
    Raises :class:`UHLError` when the model has no weight of a known type.
    """
    found: list[tuple[str, str, int, str, bool, int, int]] = []
    for path, module in model.named_modules():
        path = path.removesuffix(".base_layer")  # a weight that carries an adapter is still that weight
        if not isinstance(module, (nn.Linear, Conv1D)) or (paths is not None and path not in paths):
            continue
        match = _LAYER.match(path)
        kind = _classify(match[3]) if match else None
        if paths is not None:
            kind = kind or ("FFN", False)
        if kind and kind[0] in types:
            d_out, d_in = shape(module)
            found.append((path, match[1] if match else "", int(match[2]) if match else -1, *kind, d_in, d_out))
    if not found and paths is None:
        raise UHLError(
            f"{type(model).__name__} has no nn.Linear of a known type ({', '.join(types)}) inside numbered layers; "
            f"expected a Transformer such as BERT, RoBERTa, ELECTRA, DeBERTa-v2, DistilBERT, MPNet, Llama or T5"
        )
    last: dict[str, int] = {}  # of each stack
    for _, layer_path, number, *_ in found:
        stack = layer_path.rpartition(".")[0]
        last[stack] = max(last.get(stack, 0), number)
    order = {p: i for i, p in enumerate(dict.fromkeys(lp for _, lp, *_ in sorted(found, key=_stack_order(last)) if lp))}
    slots = []
    for path, layer_path, number, kind_, writer, d_in, d_out in found:
        end = last[layer_path.rpartition(".")[0]]
        depth = number / end if end > 0 and number > 0 else 0.0
        shared = bool(layer_path) and not _ELSEWHERE.search(path)
        slots.append(Slot(path, layer_path, order.get(layer_path, -1), depth, kind_, writer, d_in, d_out, shared))
    return sorted(slots, key=lambda s: s.layer)


def _stack_order(last: dict[str, int]) -> Callable[[tuple[Any, ...]], tuple[int, int]]:
    """Stacks in order of appearance, layers by number."""
    stacks = list(last)
    return lambda row: (stacks.index(row[1].rpartition(".")[0]), row[2])


def shape(module: nn.Linear | Conv1D) -> tuple[int, int]:
    """(d_out, d_in); transformers' Conv1D keeps its weight transposed."""
    rows, columns = module.weight.shape
    return (columns, rows) if isinstance(module, Conv1D) else (rows, columns)


def stream_width(model: nn.Module) -> int | None:
    """D of the residual stream by the model's configuration; None where it does not say."""
    config: Any = getattr(model, "config", None)
    for name in ("hidden_size", "d_model", "n_embd", "dim"):
        size = getattr(config, name, None)
        if isinstance(size, int):
            return size
    return None


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
    module = getattr(module, "base_layer", module)
    found: torch.Tensor = module.weight.detach()
    return found.T if isinstance(module, Conv1D) else found
