"""Anchors: N unlabelled texts and the source's canonical codes for them, the shared reference between two models.

What is stored: the texts (zlib), codes of the *adapted* source that its head reads, (N, C), and codes of the bare
source's residual stream at a few relative depths, (depths, M, R); all 8-bit, centred and scaled per column. The head's
are sentence codes, means over a sentence's tokens. The stream's are word codes: for a few words of each text, chosen by
position alone, the mean over the word's pieces, found by character offsets, so that both sides may cut words
differently. Their R coordinates are the first of the C canonical ones.
"""

from __future__ import annotations

import re
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int8
from torch import Tensor, nn

from uhl.errors import UHLError
from uhl.frame import LAST
from uhl.models import Encoder
from uhl.quant import dequantise, quantise

DEPTHS = (0.0, 1 / 3, 2 / 3, 1.0)  # of the stream's codes; the embeddings' output is depth 0
FIRST_WORDS = 32  # of a text, among which words are chosen: later ones may be cut off


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
    """Texts with the codes of the adapted head's input, and of the bare stream at ``depths`` for ``words`` words a text
    (0: for the whole text). ``reads`` are the head's rows when the source's training ended: tuning on a target changes
    the head, and must not change how the file is ported.
    """

    texts: list[str]
    origin: str
    head: Codes
    stream: list[Codes]
    words: int = 0
    depths: tuple[float, ...] = (1 / 3, 2 / 3, 1.0)
    reads: Float[Tensor, "labels C"] | None = None


def word_spans(text: str, count: int) -> list[tuple[int, int]]:
    """Character spans of ``count`` words, evenly spread over the first :data:`FIRST_WORDS`; they repeat in short texts.

    A text without words counts as one.
    """
    words = [m.span() for m in re.finditer(r"\S+", text)][:FIRST_WORDS] or [(0, len(text))]
    return [words[(2 * i + 1) * len(words) // (2 * count)] for i in range(count)]


def pieces_of(
    offsets: Sequence[Sequence[int]], spans: Sequence[tuple[int, int]], live: Sequence[int]
) -> Float[Tensor, "words T"]:
    """Weights that average a word's pieces: those whose characters it shares; all tokens where it was cut off."""
    weights = torch.zeros(len(spans), len(offsets))
    for row, (start, end) in enumerate(spans):
        hit = [i for i, (a, b) in enumerate(offsets) if a < b and a < end and b > start and live[i]]
        hit = hit or [i for i, keep in enumerate(live) if keep]
        weights[row, hit] = 1 / len(hit)
    return weights


def batches(encoder: Encoder, texts: Sequence[str], size: int = 64, max_length: int = 64, **options: bool):  # type: ignore[no-untyped-def]
    """Yield (row indices, tokenised batch) over ``texts``, sorted by length so that little is padded."""
    order = sorted(range(len(texts)), key=lambda i: len(texts[i]))
    for start in range(0, len(order), size):
        rows = order[start : start + size]
        chosen = [texts[i] for i in rows]
        batch = encoder.tokenizer(
            chosen, padding=True, truncation=True, max_length=max_length, return_tensors="pt", **options
        )
        yield rows, batch.to(next(encoder.model.parameters()).device)


def sentence_mean(hidden: Float[Tensor, "B T D"], mask: Tensor) -> Float[Tensor, "B D"]:
    """Mean over the tokens that are not padding."""
    weights = mask.to(hidden.dtype)[:, :, None]
    return (hidden * weights).sum(1) / weights.sum(1).clamp_min(1)


def levels_of(output: Any) -> list[Float[Tensor, "B T D"]]:
    """A host's states by level, the embeddings' first; the last are those after a final norm, where there is one."""
    return [*output.hidden_states[:-1], output.last_hidden_state]


def final_means(encoder: Encoder, texts: Sequence[str]) -> Float[Tensor, "N D"]:
    """Sentence means of the last states, with whatever is attached to the host."""
    return level_means(encoder, texts, LAST)


def read_levels(model: nn.Module, levels: Sequence[int], **inputs: Any) -> Float[Tensor, "B T D_levels"]:
    """A host's states at ``levels`` (0: the embeddings', -1: the last), one behind the other."""
    if tuple(levels) == LAST:
        last: Tensor = model(**inputs).last_hidden_state
        return last
    states = levels_of(model(**inputs, output_hidden_states=True))
    return torch.cat([states[i] for i in levels], -1)


@torch.no_grad()
def level_means(encoder: Encoder, texts: Sequence[str], levels: Sequence[int]) -> Float[Tensor, "N D_levels"]:
    """Sentence means of :func:`read_levels`, with whatever is attached to the host."""
    out = torch.empty(len(texts), len(levels) * encoder.width)
    for rows, batch in batches(encoder, texts):
        hidden = read_levels(encoder.model.eval(), levels, **batch)
        out[rows] = sentence_mean(hidden, batch["attention_mask"]).cpu()
    return out


@dataclass(frozen=True)
class Observed:
    """What a bare host makes of the anchor texts at each of its levels (the embeddings' output first): sentence means,
    the chosen words' states, and the second moment of all token states of all levels.
    """

    means: Float[Tensor, "levels N D"]
    words: Float[Tensor, "levels M D"]
    moment: Float[Tensor, "D D"]
    seconds: float

    @property
    def final(self) -> Float[Tensor, "N D"]:
        """Sentence means of the last states."""
        return self.means[-1]

    def level(self, depth: float) -> int:
        """The level nearest to a relative depth."""
        return round(depth * (len(self.means) - 1))

    def stream(self, words: int) -> Float[Tensor, "levels M D"]:
        """What the stream's codes belong to: words, or whole texts where ``words`` is 0."""
        return self.words if words else self.means


@torch.no_grad()
def observe(encoder: Encoder, texts: Sequence[str], words: int = 0) -> Observed:
    """Run a bare host over the texts: one pass for a basis, for codes, and for all arms of a port.

    ``words`` a text are observed by themselves. Raises :class:`UHLError` where that needs character offsets and the
    tokenizer has none.
    """
    begun = time.time()
    if words and not encoder.tokenizer.is_fast:
        raise UHLError(
            f"{encoder.name}: its tokenizer gives no character offsets; load a fast one (AutoTokenizer's default)"
        )
    means = seen = torch.empty(0)
    moment, count = torch.zeros(encoder.width, encoder.width, dtype=torch.float64), 0
    for rows, batch in batches(encoder, texts, return_offsets_mapping=bool(words)):
        offsets, mask = batch.pop("offset_mapping", None), batch["attention_mask"]
        states = levels_of(encoder.model.eval()(**batch, output_hidden_states=True))
        if not len(means):
            means = torch.empty(len(states), len(texts), encoder.width)
            seen = torch.empty(len(states), len(texts), words, encoder.width)
        picks = [
            pieces_of(offsets[place].tolist(), word_spans(texts[row], words), mask[place].tolist())
            for place, row in enumerate(rows if words else ())
        ]
        for level, hidden in enumerate(states):
            means[level, rows] = sentence_mean(hidden, mask).cpu()
            tokens = hidden[mask.bool()]
            moment, count = moment + (tokens.T @ tokens).double().cpu(), count + len(tokens)
            if words:
                seen[level, rows] = (torch.stack(picks).to(hidden) @ hidden).cpu()
    return Observed(means, seen.flatten(1, 2), moment / max(count, 1), time.time() - begun)
