"""Compressed copies of an encoder: structured pruning of BERT, without data and without training afterwards.

| what is cut   | what stays                                                                                         |
|---------------|----------------------------------------------------------------------------------------------------|
| ``layers``    | evenly spread ones, the first and the last among them (a single one: the last)                     |
| ``heads``     | of each layer those with the largest ||W_O|| ||W_V||                                               |
| ``neurons``   | of each feed-forward block those with the largest ||w_out|| ||w_in||                               |
| ``width``     | coordinates of the residual stream with the largest gain^2 + bias^2, summed over the layer norms   |

A copy is named after its model: ``minilm-l6@layers=4``, ``minilm-l6@heads=6,neurons=768``. It lives in memory:
BERT's configuration derives the size of a head from the width and the number of heads, so what `save_pretrained` wrote
of a copy with fewer heads or another width could not be loaded. What an adapter makes of such copies is notebook 10's
question.
"""

from __future__ import annotations

import re
from dataclasses import asdict, dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from uhl.errors import UHLError
from uhl.host import find_slots, linear_flops

PARTS = ("layers", "heads", "neurons", "width")
_NAME = re.compile(r"^(.+?)@((?:[a-z]+=[0-9]+)(?:,[a-z]+=[0-9]+)*)$")
_ALMOST = re.compile(rf"@\s*({'|'.join(PARTS)})\b")


@dataclass(frozen=True)
class Cut:
    """How many of each part stay; None: all."""

    layers: int | None = None
    heads: int | None = None
    neurons: int | None = None
    width: int | None = None

    @classmethod
    def of(cls, text: str) -> Cut:
        """From ``layers=4,heads=6``. Raises :class:`UHLError` for anything else."""
        _, cut = parse(f"model@{text}")
        if cut is None:
            raise UHLError(f"{text!r} is no cut; write it as layers=4, or heads=6,neurons=768")
        return cut

    @property
    def part(self) -> str:
        """The part that is cut; `several`, or empty where nothing is."""
        return "several" if len(self.parts()) > 1 else "".join(self.parts())

    def parts(self) -> dict[str, int]:
        """What is cut, in the order of :data:`PARTS`."""
        return {part: count for part, count in asdict(self).items() if count is not None}

    def __str__(self) -> str:
        return ",".join(f"{part}={count}" for part, count in self.parts().items())


def parse(name: str) -> tuple[str, Cut | None]:
    """A model's name without what is cut from it, and the cut; None where nothing is. Raises :class:`UHLError`."""
    match = _NAME.match(name)
    if not match or _ALMOST.search(match[1]):
        if _ALMOST.search(name):
            raise UHLError(f"model {name!r}: write a cut as in minilm-l6@layers=4,heads=6, without blanks, once")
        return name, None
    pairs = [pair.split("=") for pair in match[2].split(",")]
    names = [part for part, _ in pairs]
    if unknown := [part for part in names if part not in PARTS] or [p for p in names if names.count(p) > 1]:
        raise UHLError(f"model {name!r}: {unknown[0]!r} cannot be cut, or twice; parts are {', '.join(PARTS)}")
    return match[1], Cut(**{part: int(count) for part, count in pairs})


def check(config: Any, cut: Cut) -> None:
    """Raise :class:`UHLError` for another architecture than BERT, and for a cut that keeps nothing or more than all."""
    if config.model_type != "bert":
        raise UHLError(f"only BERT encoders can be pruned here; this is {config.model_type!r}")
    whole = {"layers": config.num_hidden_layers, "heads": config.num_attention_heads}
    whole |= {"neurons": config.intermediate_size, "width": config.hidden_size}
    for part, kept in cut.parts().items():
        if not 1 <= kept <= whole[part]:
            raise UHLError(f"{part}={kept}: the model has {whole[part]}; keep between 1 and all of them")


@torch.no_grad()
def prune(model: nn.Module, cut: Cut) -> nn.Module:
    """Cut a BERT model in place and return it, when :func:`check` has nothing against it."""
    check(model.config, cut)
    if cut.layers is not None:
        _cut_layers(model, cut.layers)
    for layer in _layers(model):
        if cut.heads is not None:
            _cut_heads(layer, cut.heads)
        if cut.neurons is not None:
            _cut_neurons(layer, cut.neurons)
    if cut.width is not None:
        _cut_width(model, cut.width)
    config: Any = model.config
    config.num_attention_heads = cut.heads or config.num_attention_heads
    config.intermediate_size = cut.neurons or config.intermediate_size
    return model


def kept_share(model: nn.Module, whole: nn.Module) -> float:
    """Weights of a copy's linear layers, as a share of those of the whole model."""
    return linear_flops(find_slots(model)) / linear_flops(find_slots(whole))


def _layers(model: Any) -> nn.ModuleList:
    found: nn.ModuleList = model.encoder.layer
    return found


def _cut_layers(model: Any, count: int) -> None:
    layers = _layers(model)
    last = len(layers) - 1
    kept = [round(i * last / (count - 1)) for i in range(count)] if count > 1 else [last]
    model.encoder.layer = nn.ModuleList(layers[i] for i in kept)
    model.config.num_hidden_layers = count


def _largest(scores: Float[Tensor, " n"], count: int) -> Tensor:
    """Places of the largest scores, in order."""
    return scores.topk(count).indices.sort().values


def _keep(linear: nn.Linear, rows: Tensor | None = None, columns: Tensor | None = None) -> None:
    """Cut a weight to some outputs and inputs."""
    if rows is not None:
        linear.weight = nn.Parameter(linear.weight[rows], linear.weight.requires_grad)
        linear.out_features = len(rows)
        if linear.bias is not None:
            linear.bias = nn.Parameter(linear.bias[rows], linear.bias.requires_grad)
    if columns is not None:
        linear.weight = nn.Parameter(linear.weight[:, columns], linear.weight.requires_grad)
        linear.in_features = len(columns)


def _cut_heads(layer: Any, count: int) -> None:
    attention, out = layer.attention.self, layer.attention.output.dense
    heads, size = attention.num_attention_heads, attention.attention_head_size
    values = attention.value.weight.unflatten(0, (heads, size)).flatten(1).norm(dim=1)
    outs = out.weight.unflatten(1, (heads, size)).transpose(0, 1).flatten(1).norm(dim=1)
    rows = (_largest(values * outs, count)[:, None] * size + torch.arange(size, device=values.device)).flatten()
    for linear in (attention.query, attention.key, attention.value):
        _keep(linear, rows=rows)
    _keep(out, columns=rows)
    attention.num_attention_heads, attention.all_head_size = count, count * size


def _cut_neurons(layer: Any, count: int) -> None:
    into, out = layer.intermediate.dense, layer.output.dense
    rows = _largest(into.weight.norm(dim=1) * out.weight.norm(dim=0), count)
    _keep(into, rows=rows)
    _keep(out, columns=rows)


def _cut_width(model: Any, count: int) -> None:
    norms = [m for m in model.modules() if isinstance(m, nn.LayerNorm)]
    kept = _largest(torch.stack([m.weight.square() + m.bias.square() for m in norms]).sum(0), count)
    for norm in norms:
        norm.weight, norm.bias = (nn.Parameter(p[kept], p.requires_grad) for p in (norm.weight, norm.bias))
        norm.normalized_shape = (count,)
    for table in (m for m in model.embeddings.modules() if isinstance(m, nn.Embedding)):
        table.weight = nn.Parameter(table.weight[:, kept], table.weight.requires_grad)
        table.embedding_dim = count
    for slot in find_slots(model):
        linear = model.get_submodule(slot.path)
        _keep(linear, rows=kept if slot.writer else None, columns=None if slot.writer else kept)
    if model.pooler is not None:
        _keep(model.pooler.dense, rows=kept, columns=kept)
    model.config.hidden_size = count
