"""Which weights a host model has: the type, relative depth and side of every `nn.Linear` that can carry atoms.

Types follow the module's name, so that any family with these names works: BERT, RoBERTa, ELECTRA, DeBERTa-v2,
DistilBERT, MPNet, T5, BART, GPT-2 (a fused QKV weight counts as Q), and decoders with `q_proj ... down_proj`. A
*reader* takes the residual stream as input (Q, K, V, FFN-in), a *writer* adds to it (O, FFN-out).
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
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
        r"(query|query_proj|q_lin|q_proj|attn\.q|(?:Self|EncDec)Attention\.q|c_attn|query_key_value|qkv_proj|in_proj|Wqkv)",
        "Q",
        False,
    ),
    (r"(key|key_proj|k_lin|k_proj|attn\.k|(?:Self|EncDec)Attention\.k)", "K", False),
    (r"(value|value_proj|v_lin|v_proj|attn\.v|(?:Self|EncDec)Attention\.v)", "V", False),
    (
        r"(attention\.output\.dense|out_lin|o_proj|out_proj|attn\.o|(?:Self|EncDec)Attention\.o|attn\.(?:c_proj|Wo)|attention\.dense)",
        "O",
        True,
    ),
    (
        r"(intermediate\.dense|lin1|up_proj|gate_proj|gate_up_proj|fc_in|fc1|c_fc|wi|wi_0|wi_1|dense_h_to_4h|ffn|mlp\.Wi)",
        "FFN",
        False,
    ),
    (r"(output\.dense|lin2|down_proj|fc_out|fc2|mlp\.(?:c_proj|Wo)|wo|dense_4h_to_h|ffn_output)", "FFN", True),
)
_LAYER = re.compile(r"^(.*?(?:layers?|h|blocks?)\.(\d+))\.(.+)$")
_ELSEWHERE = re.compile(  # may read other states than its layer, or not all of them
    r"crossattention|encoder_attn|EncDecAttention|cross_attn|experts?\."
)


@dataclass(frozen=True)
class Slot:
    """One weight of a host: where it is, what it is, and its shape (d_out, d_in).

    ``layer`` counts all layers of all stacks; -1 is a weight outside of any layer. ``shared``: whether the weight uses
    its layer's route. Others (outside of layers, cross-attention, experts that see some of the tokens) are routed by
    what their atoms read; so are a ``twice`` weight's calls with another input than its layer's (DeBERTa's positions).
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
    twice: bool = False

    def sides(self, stream: bool) -> tuple[int, int]:
        """Widths of what the weight's update reads and writes: its own sides, or twice the residual stream's."""
        if not stream:
            return self.d_in, self.d_out
        return (self.d_out, self.d_out) if self.writer else (self.d_in, self.d_in)


def find_slots(
    model: nn.Module, types: tuple[str, ...] = WEIGHT_TYPES, paths: Collection[str] | None = None
) -> list[Slot]:
    """Weights of the wanted types, in layer order. ``depth`` is layer / (L - 1) in its stack, 0 for a single layer.

    ``paths`` names the weights instead: those of no known type count as FFN, those outside of layers have depth 0.
    Raises :class:`UHLError` when the model has no weight of a known type, and for one that runs its feed-forward blocks
    in chunks, where a token's route would be lost.
    """
    if getattr(getattr(model, "config", None), "chunk_size_feed_forward", 0):
        raise UHLError("the host's feed-forward blocks run in chunks; set its config.chunk_size_feed_forward to 0")
    found: list[tuple[str, str, int, str, bool, int, int]] = []
    last: dict[str, int] = {}  # layer of each stack, whether it carries atoms or not
    for path, module in model.named_modules():
        path = path.removesuffix(".base_layer")  # a weight that carries an adapter is still that weight
        if not isinstance(module, (nn.Linear, Conv1D)):
            continue
        match = _LAYER.match(path)
        if match:
            stack = match[1].rpartition(".")[0]
            last[stack] = max(last.get(stack, 0), int(match[2]))
        if paths is not None and path not in paths:
            continue
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
    inside = sorted((row for row in found if row[1]), key=_stack_order(last))
    order = {p: i for i, p in enumerate(dict.fromkeys(layer_path for _, layer_path, *_ in inside))}
    slots = []
    for path, layer_path, number, kind_, writer, d_in, d_out in found:
        end = last[layer_path.rpartition(".")[0]] if layer_path else 0
        depth = number / end if end > 0 and number > 0 else 0.0
        shared = bool(layer_path) and not _ELSEWHERE.search(path)
        twice = getattr(model.get_submodule(path.rpartition(".")[0]), "share_att_key", False)
        number = order.get(layer_path, -1)
        slots.append(Slot(path, layer_path, number, depth, kind_, writer, d_in, d_out, shared, twice))
    return sorted(slots, key=lambda s: s.layer)


def _stack_order(last: dict[str, int]) -> Callable[[tuple[Any, ...]], tuple[int, int]]:
    """Stacks in order of appearance, layers by number."""
    stacks = list(last)
    return lambda row: (stacks.index(row[1].rpartition(".")[0]), row[2])


def shape(module: nn.Linear | Conv1D) -> tuple[int, int]:
    """(d_out, d_in), also of a weight that is stored packed; transformers' Conv1D keeps its weight transposed."""
    if isinstance(module, Conv1D):
        return module.weight.shape[1], module.weight.shape[0]
    return module.out_features, module.in_features


def text_config(model: nn.Module) -> Any:
    """A host's configuration; of one for several modalities the text's, whose Transformer atoms work in. None of a
    module without any.
    """
    config: Any = getattr(model, "config", None)
    return config.get_text_config() if hasattr(config, "get_text_config") else config


def is_encoder_decoder(model: nn.Module) -> bool:
    """Whether a host has two stacks, the second of which reads the first: its tokens have two streams of states."""
    return bool(getattr(getattr(model, "config", None), "is_encoder_decoder", False))


def stream_width(model: nn.Module) -> int | None:
    """D of the residual stream by the model's configuration; None where it does not say."""
    config: Any = text_config(model)
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


def first_layers(slots: Sequence[Slot]) -> dict[int, int]:
    """The first layer of each layer's stack, by number, of the layers that have a route to share."""
    first: dict[str, int] = {}
    out = {}
    for slot in sorted((s for s in slots if s.shared), key=lambda s: s.layer):
        out[slot.layer] = first.setdefault(slot.layer_path.rpartition(".")[0], slot.layer)
    return out


def weight(model: nn.Module, slot: Slot) -> torch.Tensor:
    """The host's weight (d_out, d_in), with an adapter attached or without. :class:`UHLError` for a packed one."""
    module: Any = model.get_submodule(slot.path)
    module = getattr(module, "base_layer", module)
    found: torch.Tensor = module.weight.detach()
    if not found.dtype.is_floating_point or found.ndim != 2:
        raise UHLError(
            f"{slot.path} is stored as {found.dtype} {tuple(found.shape)}; merging needs weights in floating "
            f"point: load the host without quantisation, or keep the adapter unmerged"
        )
    return found.T if isinstance(module, Conv1D) else found


@contextmanager
def evaluating(model: nn.Module) -> Iterator[nn.Module]:
    """A model without dropout for a while; afterwards each of its modules is in the mode that it was in."""
    training = [module for module in model.modules() if module.training]
    try:
        yield model.eval()
    finally:
        for module in training:
            module.training = True
