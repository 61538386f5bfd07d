"""Anchors: N unlabelled texts and the source's canonical codes for them, the shared reference between two models.

What is stored: the texts (zlib), codes of the *adapted* source that its head reads, (N, C), and codes of the bare
source's residual stream at a few relative depths, (depths, N, C); all 8-bit, centred and scaled per column.
Sentence codes are means over a sentence's tokens.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int8
from torch import Tensor

from uhl.models import Encoder
from uhl.quant import dequantise, quantise

DEPTHS = (1 / 3, 2 / 3, 1.0)  # of the stream's codes


@dataclass
class Codes:
    """A table of codes, (N, C), stored by column: int8 values, float16 scales (C,) and float16 centres (C,)."""

    values: Int8[Tensor, "C N"]
    scale: Float[Tensor, " C"]
    centre: Float[Tensor, " C"]

    @classmethod
    def of(cls, codes: Float[Tensor, "N C"]) -> Codes:
        """Quantise a table."""
        centre = codes.mean(0).half()
        values, scale = quantise((codes - centre.float()).T, 8)
        return cls(values.contiguous(), scale, centre)

    def table(self) -> Float[Tensor, "N C"]:
        """The table back in float32."""
        return dequantise(self.values, self.scale).T + self.centre.float()


@dataclass
class Anchors:
    """Texts with the codes of the adapted head's input and of the bare stream at :data:`DEPTHS`."""

    texts: list[str]
    origin: str
    head: Codes
    stream: list[Codes]


def batches(encoder: Encoder, texts: Sequence[str], size: int = 64, max_length: int = 64):  # type: ignore[no-untyped-def]
    """Yield (row indices, tokenised batch) over ``texts``, sorted by length so that little is padded."""
    order = sorted(range(len(texts)), key=lambda i: len(texts[i]))
    for start in range(0, len(order), size):
        rows = order[start : start + size]
        chosen = [texts[i] for i in rows]
        batch = encoder.tokenizer(chosen, padding=True, truncation=True, max_length=max_length, return_tensors="pt")
        yield rows, batch.to(next(encoder.model.parameters()).device)


def sentence_mean(hidden: Float[Tensor, "B T D"], mask: Tensor) -> Float[Tensor, "B D"]:
    """Mean over the tokens that are not padding."""
    weights = mask.to(hidden.dtype)[:, :, None]
    return (hidden * weights).sum(1) / weights.sum(1).clamp_min(1)


@torch.no_grad()
def final_means(encoder: Encoder, texts: Sequence[str]) -> Float[Tensor, "N D"]:
    """Sentence means of the last states, with whatever is attached to the host."""
    out = torch.empty(len(texts), encoder.width)
    for rows, batch in batches(encoder, texts):
        hidden = encoder.model.eval()(**batch).last_hidden_state
        out[rows] = sentence_mean(hidden, batch["attention_mask"]).cpu()
    return out


@torch.no_grad()
def stream_states(
    encoder: Encoder, texts: Sequence[str], depths: Sequence[float] = DEPTHS
) -> tuple[Float[Tensor, "depths N D"], Float[Tensor, "n D"]]:
    """Sentence means at relative depths (nearest hidden state), and token states of every depth (a sample)."""
    means = torch.empty(len(depths), len(texts), encoder.width)
    tokens = []
    levels = [round(d * encoder.layers) for d in depths]
    for rows, batch in batches(encoder, texts):
        states = encoder.model.eval()(**batch, output_hidden_states=True).hidden_states
        for i, level in enumerate(levels):
            means[i, rows] = sentence_mean(states[level], batch["attention_mask"]).cpu()
        keep = batch["attention_mask"].bool()
        tokens.append(torch.cat([s[keep].cpu() for s in states]))
    return means, torch.cat(tokens)


@dataclass(frozen=True)
class Observed:
    """What a bare host makes of the anchor texts: sentence means of the stream at :data:`DEPTHS`, (depths, N, D), and
    its token states at all depths, (n, D).
    """

    stream: Float[Tensor, "depths N D"]
    tokens: Float[Tensor, "n D"]
    seconds: float

    @property
    def final(self) -> Float[Tensor, "N D"]:
        """Sentence means of the last states: the deepest of :data:`DEPTHS`."""
        return self.stream[-1]

    @property
    def rms(self) -> float:
        """Root mean square of the token states."""
        return float(self.tokens.double().pow(2).mean().sqrt())


def observe(encoder: Encoder, texts: Sequence[str]) -> Observed:
    """Run a bare host over the texts: one pass for a basis, for codes, and for all arms of a port."""
    begun = time.time()
    stream, tokens = stream_states(encoder, texts)
    return Observed(stream, tokens, time.time() - begun)
