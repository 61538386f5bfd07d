"""Anchors: N unlabelled texts and what the source makes of them, the shared reference between two models.

What is stored: the texts (zlib); for the first of them, codes of the *adapted* source that its head reads, (n, C), and
codes of the bare source's residual stream at a few relative depths, (depths, M, R); for all of them, the logits that
the source's head gives. All are 8-bit, centred and scaled per column. A code takes 256 bytes and a logit one, so many
more texts can be afforded for the few directions that a task reads than for the whole space. Fragments cost nothing but
that: each text of the anchors' own pool that is long enough is also cut into a few, which have logits like any text.

The head reads a sentence (the mean over its tokens), or in a token task a word (its first piece). The stream's are word
codes: for a few words of each text, chosen by position alone, the mean over the word's pieces. Words are found by
character offsets, so that both sides may cut them differently. Their R coordinates are the first of the C canonical
ones.
"""

from __future__ import annotations

import re
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import pairwise
from typing import Any

import torch
from jaxtyping import Float, Int8, Int64
from torch import Tensor, nn
from transformers import BatchEncoding

from uhl.config import PAIR, Kind
from uhl.errors import UHLError
from uhl.frame import LAST
from uhl.host import evaluating, text_config
from uhl.models import Encoder
from uhl.progress import bar
from uhl.quant import dequantise, quantise

DEPTHS = (0.0, 1 / 3, 2 / 3, 1.0)  # of the stream's codes; the embeddings' output is depth 0
FIRST_WORDS = 32  # of a text, among which words are chosen: later ones may be cut off
FRAGMENT = 3  # words that a fragment has at least
TOKENS = 512  # of a batch on a CPU, padding among them; for more the states of all levels outgrow the host

Span = tuple[int, int, int]  # a word: part of a pair (0 or 1), first character, end


@dataclass
class Codes:
    """A table of codes, (N, C), stored by column: int8 values, float16 scales (C,) and float16 centres (C,)."""

    values: Int8[Tensor, "C N"]
    scale: Float[Tensor, " C"]
    centre: Float[Tensor, " C"]

    @classmethod
    def of(cls, codes: Float[Tensor, "N C"], bits: int = 8) -> Codes:
        """Quantise a table. Files hold 8 bits; fewer are there to compare."""
        centre = codes.mean(0).half()
        values, scale = quantise((codes - centre.float()).T, bits)
        return cls(values.contiguous(), scale, centre)

    def table(self) -> Float[Tensor, "N C"]:
        """The table back in float32."""
        return dequantise(self.values, self.scale).T + self.centre.float()


@dataclass(frozen=True)
class Probe:
    """What a host is observed on. A *unit* is what a head reads: a text, or in a token task each word of one.

    ``words`` words of each of the first ``coded`` texts (None: of all) are observed by themselves; texts are cut at
    ``length`` tokens, and no more than ``most`` words of one are looked at (None: all); a pair's two parts are one text
    with a tab between. The first ``own`` texts (None: all) are of the anchors' own pool; each of these is cut into
    ``cuts`` fragments beside (0: none), which are observed after all ``texts``.
    """

    texts: Sequence[str]
    kind: Kind = "sentence"
    words: int = 0
    coded: int | None = None
    length: int = 64
    most: int | None = FIRST_WORDS
    own: int | None = None
    cuts: int = 0

    @cached_property
    def fragments(self) -> list[tuple[int, str]]:
        """The fragments of the first ``own`` texts, text by text, each with the row of its text."""
        return [(i, part) for i, text in enumerate(self.texts[: self.own]) for part in fragments(text, self.cuts)]

    @property
    def origins(self) -> list[int]:
        """For everything that is observed, the text that it is, or is a fragment of."""
        return [*range(len(self.texts)), *(i for i, _ in self.fragments)]

    @cached_property
    def observed(self) -> list[str]:
        """The texts, then the fragments."""
        return [*self.texts, *(part for _, part in self.fragments)]

    def first(self) -> Probe:
        """The coded texts alone."""
        return replace(self, texts=self.texts[: self.coded], coded=None, own=None, cuts=0)

    def weights(self, others: float) -> Float[Tensor, " U"]:
        """1 for a unit of the own pool's texts, ``others`` for one of other texts, or of a fragment."""
        own = len(self.texts) if self.own is None else self.own
        units = torch.tensor(self.units())
        return torch.tensor([1.0 if i < own else others for i in range(len(units))]).repeat_interleave(units)

    def groups(self) -> Int64[Tensor, " U"]:
        """The text of each unit, which its fragments share."""
        return torch.tensor(self.origins).repeat_interleave(torch.tensor(self.units()))

    def rows(self, fewer: Probe) -> list[int]:
        """The units of a probe of the first of these texts, among the units of this one."""
        if not self.cuts:
            return list(range(sum(fewer.units())))
        kept = [row for row, (i, _) in enumerate(self.fragments, len(self.texts)) if i < len(fewer.texts)]
        return [*range(len(fewer.texts)), *(kept if fewer.cuts else [])]

    def spans(self, text: str) -> list[Span]:
        """The first ``most`` words of a text; a text without words counts as one."""
        parts = text.split(PAIR, 1) if self.kind == "pair" else [text]
        found = [(part, *m.span()) for part, words in enumerate(parts) for m in re.finditer(r"\S+", words)]
        return found[: self.most] or [(0, 0, len(text))]

    def picks(self, text: str) -> list[int]:
        """Which of these words have codes of the stream: evenly spread; they repeat in short texts."""
        count = len(self.spans(text))
        return [(2 * i + 1) * count // (2 * self.words) for i in range(self.words)]

    def units(self) -> list[int]:
        """How many units each text and fragment has."""
        return [len(self.spans(text)) if self.kind == "token" else 1 for text in self.observed]

    def covered(self) -> bool:
        """Whether every unit has a code of the head, in order."""
        return self.coded_units() == list(range(sum(self.units())))

    def coded_units(self) -> list[int]:
        """The units that have codes of the head: each coded text, or in a token task the words picked from it."""
        texts = self.first().texts
        if self.kind != "token":
            return list(range(len(texts)))
        starts = [0]
        for count in self.units():
            starts.append(starts[-1] + count)
        return [starts[i] + pick for i, text in enumerate(texts) for pick in self.picks(text)]


@dataclass
class Anchors:
    """Texts; codes of what the head of the adapted source reads, a row a coded unit (:meth:`Probe.coded_units`); codes
    of the bare stream at ``depths`` for ``words`` words of each coded text (0: for the whole text).

    ``reads`` and ``bias`` are the head of ``task`` when the source's training ended: tuning on a target changes the
    head, and must not change how the file is ported. ``logits`` are what ``reads`` makes of every unit, before the
    bias, or what a teacher says of it (:mod:`uhl.teacher`); None where every unit has a code and there is no teacher.
    ``kind``, ``length``, ``own`` and ``cuts`` are those of the :class:`Probe`.
    """

    texts: list[str]
    origin: str
    head: Codes
    stream: list[Codes]
    words: int = 0
    depths: tuple[float, ...] = (1 / 3, 2 / 3, 1.0)
    reads: Float[Tensor, "labels C"] | None = None
    bias: Float[Tensor, " labels"] | None = None
    logits: Codes | None = None
    kind: Kind = "sentence"
    length: int = 64
    task: str | None = None
    own: int | None = None
    cuts: int = 0

    def judges(self, task: str) -> bool:
        """Whether they say what the source's head for this task decides."""
        return self.reads is not None and self.bias is not None and task == self.task

    def decided(self) -> Float[Tensor, "U labels"]:
        """The logits of the source's head, or teacher's, for every unit; :class:`UHLError` where they do not say."""
        if self.reads is None or self.bias is None:
            raise UHLError("these anchors do not hold the source's decisions; pre-train the adapter again")
        return (self.head.table() @ self.reads.T if self.logits is None else self.logits.table()) + self.bias

    @property
    def coded(self) -> int:
        """How many of the texts have codes; they come first."""
        return self.stream[0].values.shape[1] // max(self.words, 1)

    @property
    def probe(self) -> Probe:
        """What to observe another host on."""
        return Probe(self.texts, self.kind, self.words, self.coded, self.length, own=self.own, cuts=self.cuts)

    def cut(
        self,
        coded: int | None = None,
        texts: int | None = None,
        dims: int | None = None,
        bits: int = 8,
        cuts: bool = True,
    ) -> Anchors:
        """Fewer of them: ``texts`` in all, the first ``coded`` with codes, ``dims`` coordinates of the stream's, all
        rounded to ``bits``, with or without their fragments. What loses its codes keeps its logits.
        """
        whole = self.probe
        probe = replace(whole, texts=self.texts[:texts], coded=min(coded or self.coded, texts or len(self.texts)))
        probe = replace(probe, cuts=self.cuts if cuts else 0)
        rows, words = len(probe.coded_units()), (probe.coded or 0) * max(self.words, 1)
        head, logits = self.head.table(), None
        if self.reads is not None and not probe.covered():
            known = head @ self.reads.T if self.logits is None else self.logits.table()
            logits = Codes.of(known[whole.rows(probe)], bits)
        stream = [Codes.of(c.table()[:words, :dims], bits) for c in self.stream]
        kept = {"texts": list(probe.texts), "head": Codes.of(head[:rows], bits), "stream": stream, "logits": logits}
        own = None if self.own is None else min(self.own, len(probe.texts))
        return replace(self, **kept, own=own, cuts=probe.cuts)  # type: ignore[arg-type]


def fragments(text: str, count: int) -> list[str]:
    """``count`` texts that lie one after another in a text, of equal counts of words; none where they would have fewer
    than :data:`FRAGMENT`. Of a pair the second part is cut, behind the first.
    """
    before, tab, cut = text.rpartition(PAIR)
    words = cut.split()
    if count < 1 or len(words) < FRAGMENT * count:
        return []
    ends = [round(i * len(words) / count) for i in range(count + 1)]
    return [before + tab + " ".join(words[a:b]) for a, b in pairwise(ends)]


Piece = tuple[int | None, int, int]  # a token: part of the pair (None: special, or padding), first character, end


def pieces_of(pieces: Sequence[Piece], spans: Sequence[Span], first: bool = False) -> Float[Tensor, "words T"]:
    """Weights that average the pieces of each word, those whose characters it shares, or take the ``first`` of them.

    A word that was cut off gets the mean of all pieces.
    """
    weights = torch.zeros(len(spans), len(pieces))
    real = [i for i, (part, _, _) in enumerate(pieces) if part is not None] or list(range(len(pieces)))
    for row, (part, start, end) in enumerate(spans):
        hit = [i for i, (own, a, b) in enumerate(pieces) if own == part and a < b and a < end and b > start]
        hit = (hit[:1] if first else hit) or real
        weights[row, hit] = 1 / len(hit)
    return weights


def batches(
    encoder: Encoder, probe: Probe, size: int = 64, progress: bool = False, start: int = 0
) -> Iterator[tuple[list[int], BatchEncoding]]:
    """Yield (row indices, tokenised batch) over what is observed, from row ``start`` on, sorted by count of tokens
    so that little is padded: at most ``size`` in a batch, and on CPUs fewer of long ones: passes there are no slower
    for it, and take less memory.

    ``progress`` shows a bar on a terminal; elsewhere (notebooks, logs) there is none. Raises :class:`UHLError` for a
    tokenizer without padding, or one that knows more tokens than the host, and for texts without a token.
    """
    if encoder.tokenizer.pad_token is None:
        raise UHLError(
            f"the tokenizer of {encoder.name or 'the host'} has no padding token; give it one, for instance "
            "`tokenizer.pad_token = tokenizer.eos_token`"
        )
    length, texts = _longest(encoder, probe), probe.observed
    vocabulary = int(getattr(text_config(encoder.model), "vocab_size", 1 << 62))
    device = next(encoder.model.parameters()).device
    most = TOKENS if device.type == "cpu" else size * length
    groups: list[list[int]] = []
    counts = [min(count, length) for count in _counts(encoder, probe, start)]
    for count, row in sorted(zip(counts, range(start, len(texts)), strict=True)):
        if not groups or len(groups[-1]) == size or count * (len(groups[-1]) + 1) > most:
            groups.append([])
        groups[-1].append(row)
    for rows in bar(groups, encoder.name, "batch") if progress else groups:
        cut: dict[str, Any] = {"truncation": True, "max_length": length, "return_tensors": "pt"}
        # on the right, too, where a decoder's tokenizer pads on the left: positions are counted from the left
        parts = _parts(probe, [texts[i] for i in rows])
        batch = encoder.tokenizer(*parts, padding=True, padding_side="right", **cut)
        if not batch["input_ids"].shape[1]:
            raise UHLError(f"{len(rows)} texts have no token at all; leave out blank ones")
        if (largest := int(batch["input_ids"].max())) >= vocabulary:
            raise UHLError(
                f"{encoder.name}: its tokenizer gives token {largest}, the model has {vocabulary:,} embeddings; "
                "load the tokenizer that belongs to it"
            )
        yield rows, batch.to(device)


def _longest(encoder: Encoder, probe: Probe) -> int:
    """Tokens beyond which a host's texts are cut."""
    most = int(getattr(text_config(encoder.model), "max_position_embeddings", 1 << 16)) - 2  # some number them from 2
    return min(probe.length, encoder.tokenizer.model_max_length, most)


def _parts(probe: Probe, texts: Sequence[str]) -> tuple[list[str], ...]:
    """Texts as a tokenizer takes them: pairs in two lists."""
    if probe.kind != "pair":
        return (list(texts),)
    first, second = zip(*(text.partition(PAIR)[::2] for text in texts), strict=True)
    return list(first), list(second)


def _counts(encoder: Encoder, probe: Probe, start: int = 0) -> list[int]:
    """How many tokens a host's tokenizer makes of each text and fragment from row ``start`` on, however long."""
    texts = probe.observed[start:]
    made = encoder.tokenizer(*_parts(probe, texts), truncation=False, verbose=False)["input_ids"] if texts else []
    return [len(tokens) for tokens in made]


def too_long(encoder: Encoder, probe: Probe) -> list[bool]:
    """Which texts of a probe the host does not read to their end."""
    most = _longest(encoder, probe)
    return [count > most for count in _counts(encoder, replace(probe, cuts=0))]


def _pieces(batch: BatchEncoding, place: int) -> list[Piece]:
    """Tokens of one text of a batch, by part and characters."""
    made = batch[place]
    return [(part, *span) for part, span in zip(made.sequence_ids, made.offsets, strict=True)]


def sentence_mean(hidden: Float[Tensor, "B T D"], mask: Tensor) -> Float[Tensor, "B D"]:
    """Mean over the tokens that are not padding."""
    wide = torch.promote_types(hidden.dtype, torch.float32)  # a sum of halves could overflow
    weights = mask.to(wide)[:, :, None]
    mean = (hidden.to(wide) * weights).sum(1) / weights.sum(1).clamp_min(1)
    return mean.to(hidden.dtype)


def levels_of(output: Any) -> list[Float[Tensor, "B T D"]]:
    """A host's states by level, the embeddings' first; the last are those after a final norm, where there is one."""
    return [*output.hidden_states[:-1], output.last_hidden_state]


def read_levels(model: nn.Module, levels: Sequence[int], **inputs: Any) -> Float[Tensor, "B T D_levels"]:
    """A host's states at ``levels`` (0: the embeddings', -1: the last), one behind the other."""
    if tuple(levels) == LAST:
        last: Tensor = model(**inputs).last_hidden_state
        return last
    states = levels_of(model(**inputs, output_hidden_states=True))
    return torch.cat([states[i] for i in levels], -1)


def final_means(encoder: Encoder, texts: Sequence[str]) -> Float[Tensor, "N D"]:
    """Sentence means of the last states, with whatever is attached to the host."""
    return unit_states(encoder, Probe(texts), LAST)


def units_of(
    encoder: Encoder, probe: Probe, levels: Sequence[int], progress: bool = False, start: int = 0
) -> list[Float[Tensor, "u D_levels"]]:
    """States of the units of each text and fragment from row ``start`` on, at ``levels``, see :func:`read_levels`, with
    whatever is attached to the host.
    """
    found: dict[int, Tensor] = {}
    with evaluating(encoder.model) as model:
        for rows, batch in batches(encoder, probe, progress=progress, start=start):
            hidden = read_levels(model, levels, **batch)
            found |= zip(rows, _units(probe, rows, batch, hidden), strict=True)
    return [found[row] for row in sorted(found)]


@torch.no_grad()
def unit_states(encoder: Encoder, probe: Probe, levels: Sequence[int], start: int = 0) -> Float[Tensor, "U D_levels"]:
    """The same in one table, without gradients and on the CPU; :class:`UHLError` where a state is not finite."""
    found = units_of(encoder, probe, levels, progress=True, start=start)
    return finite(encoder, torch.cat(found).cpu() if found else torch.empty(0, len(levels) * encoder.width))


def finite(encoder: Encoder, made: Tensor) -> Tensor:
    """What a host makes of texts, as it is; :class:`UHLError` where some of it is not finite."""
    if not made.isfinite().all():
        raise UHLError(
            f"{encoder.name}: what it makes of some text is not finite; its weights are damaged, or overflow in the "
            "precision that it was loaded in"
        )
    return made


def _units(probe: Probe, rows: Sequence[int], batch: BatchEncoding, hidden: Float[Tensor, "B T D"]) -> list[Tensor]:
    """States of the units of each text of a batch, (units, D) each."""
    if probe.kind != "token":
        return list(sentence_mean(hidden, batch["attention_mask"])[:, None].float().unbind())
    weights = (pieces_of(_pieces(batch, i), probe.spans(probe.observed[r]), first=True) for i, r in enumerate(rows))
    return [w.to(hidden.device) @ states.float() for w, states in zip(weights, hidden, strict=True)]


@dataclass(frozen=True)
class Observed:
    """What a bare host makes of a probe at each of its levels (the embeddings' output first): states of the units and
    of the picked words, and the second moment of the token states of all levels, ``count`` in all.
    """

    units: Float[Tensor, "levels U D"]
    words: Float[Tensor, "levels M D"]
    moment: Float[Tensor, "D D"]
    count: int
    seconds: float

    def at(self, levels: Sequence[int]) -> Float[Tensor, "U D_levels"]:
        """States of the units at ``levels``, one behind the other, as :func:`read_levels` has them."""
        return torch.cat([self.units[i] for i in levels], -1)

    def level(self, depth: float) -> int:
        """The level nearest to a relative depth."""
        return round(depth * (len(self.units) - 1))

    def cut(self, whole: Probe, probe: Probe) -> Observed:
        """What was seen of the first texts: ``probe`` has fewer than the ``whole``. The moment stays that of all."""
        words = (len(probe.texts) if probe.coded is None else probe.coded) * probe.words
        return replace(self, units=self.units[:, whole.rows(probe)], words=self.words[:, :words])

    def parts(self, units: int) -> tuple[Observed, Observed]:
        """The first units with all words, and the other units. All that the moment counts counts for the former."""
        rest = replace(self, units=self.units[:, units:], words=self.words[:, :0], count=0, seconds=0.0)
        return replace(self, units=self.units[:, :units]), rest

    def stream(self, words: int) -> Float[Tensor, "levels M D"]:
        """What the stream's codes belong to: words, or whole texts where ``words`` is 0."""
        return self.words if words else self.units


@torch.no_grad()
def observe(encoder: Encoder, probe: Probe, start: int = 0) -> Observed:
    """Run a bare host over the texts and fragments, for a basis, for codes, and for ports. With a ``start`` only over
    what comes from that row on, behind the coded texts: no words are picked then.

    Raises :class:`UHLError` where words are wanted and the tokenizer gives no character offsets, where a state is not
    finite, and as :func:`batches`.
    """
    begun = time.time()
    coded = len(probe.texts) if probe.coded is None else probe.coded
    if (probe.words or probe.kind == "token") and not encoder.tokenizer.is_fast:
        raise UHLError(
            f"{encoder.name}: its tokenizer gives no character offsets; load a fast one (AutoTokenizer's default)"
        )
    coded = 0 if start else coded
    starts = torch.tensor([0, *probe.units()[start:]]).cumsum(0).tolist()
    units = torch.empty(encoder.layers + 1, 0, encoder.width)
    words = units[:, :, None]
    moment, count = torch.zeros(encoder.width, encoder.width, dtype=torch.float64), 0
    with evaluating(encoder.model) as model:
        for rows, batch in batches(encoder, probe, progress=True, start=start):
            states = levels_of(model(**batch, output_hidden_states=True))
            if not units.numel():
                units = torch.empty(len(states), starts[-1], encoder.width)
                words = torch.empty(len(states), coded, probe.words, encoder.width)
            picked = [(i, r) for i, r in enumerate(rows) if probe.words and r < coded]
            weights = [_picked(probe, batch, i, r).to(states[0].device) for i, r in picked]
            for level, hidden in enumerate(states):
                for row, made in zip(rows, _units(probe, rows, batch, hidden), strict=True):
                    units[level, starts[row - start] : starts[row - start + 1]] = made.cpu()
                for (place, row), weight in zip(picked, weights, strict=True):
                    words[level, row] = (weight @ hidden[place].float()).cpu()
                tokens = hidden[batch["attention_mask"].bool()].float()
                moment, count = moment + (tokens.T @ tokens).double().cpu(), count + len(tokens)
    if wrong := [level for level, rows in enumerate(units) if not rows.isfinite().all()]:
        raise UHLError(
            f"{encoder.name}: states at level {wrong[0]} of {len(units) - 1} are not finite; its weights are damaged, "
            "or overflow in the precision that it was loaded in"
        )
    return Observed(units, words.flatten(1, 2), moment / max(count, 1), count, time.time() - begun)


def _picked(probe: Probe, batch: BatchEncoding, place: int, row: int) -> Float[Tensor, "words T"]:
    text = probe.texts[row]
    spans = probe.spans(text)
    return pieces_of(_pieces(batch, place), [spans[i] for i in probe.picks(text)])
