"""The regressions of an anchored port, from a host's states on the anchors and the file's codes; no host is run.

    stream: M = argmin ||H M^T - Z||^2 + ||Lambda M||^2, and N the reverse (:func:`stream_basis`)
    head:   the same from what a head reads, at several levels, to the adapted source's codes (:func:`head_fit`)

`H`: states (n, D) of the anchors' words, `Z`: the source's codes (n, R) at matched depths. Penalties are those of
:mod:`uhl.ridge`, chosen on rows that are left out.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
import torch
from jaxtyping import Float, Int64
from pydantic import Field
from scipy.optimize import minimize, minimize_scalar
from scipy.special import logsumexp
from torch import Tensor, nn

from uhl.anchors import Anchors, Observed
from uhl.config import _Strict
from uhl.frame import LAST, Basis, canonical_basis
from uhl.refresh import CONFIDENCE
from uhl.ridge import Rows, ridge, ridge_of_groups

# weight of a text of another pool, or a fragment, in the head's regression: on dev 0.3 and 1 differ little
OTHERS = 0.3
READ = 3  # levels that a head reads at most: on dev, all seven of the upper half of `mpnet-base` explain no more


class Way(_Strict):
    """How an anchored port is made. What is not the default is there to compare; notebook 07 does."""

    maps: Literal["shared", "level"] = Field("shared", description="one pair of maps of the stream, or a pair a level")
    reads: Literal["upper", "last"] = Field(
        "upper", description="levels that the head reads: of the upper half, or the last"
    )
    layers: Literal["all", "upper", "last"] = Field("all", description="layers of the host where atoms act")
    depths: Literal["relative", "cka"] = Field(
        "relative", description="the source's depth that a level is mapped to: the nearest, or the most alike"
    )
    rank: int | None = Field(None, ge=1, description="directions that atoms read and write; None: all")
    directions: Literal["principal", "canonical"] = Field(
        "principal", description="of the predicted codes by variance, or by their correlation with the target's states"
    )
    penalties: Literal["coordinates", "atoms"] = Field(
        "coordinates", description="what the reader's penalties are for: coordinates, or the atoms' principal readers"
    )
    writer: Literal["states", "inverse"] = Field(
        "states", description="fitted to the states, or an inverse of the reader: what is written reads as it was"
    )
    imitation: Literal["closest", "one-se"] | None = Field(
        None,
        description="of the source's logits by the head: as close as left-out texts allow, or within a standard error; "
        "None: the latter where the host is larger than the source, else the former",
    )
    targets: Literal["probabilities", "logits"] = Field(
        "probabilities", description="of the source, that the head is fitted to"
    )
    shares: Literal["source", "fitted"] = Field(
        "source", description="of each label among the decisions: brought to the source's, or as the fit has them"
    )
    scales: tuple[float, ...] | None = Field(
        None, description="of the atoms, tried on the anchors; None: SCALES for the two depths, or what `anchor` chose"
    )
    known: bool = Field(
        True, description="whether a host that is the source itself is known as it, and has its own basis"
    )
    refresh_steps: int = Field(200, ge=1, description="of the arms that refresh")
    confidence: float = Field(CONFIDENCE, ge=0, le=1, description="weight of the target's own decisions in these")


def basis_of(seen: Observed, width: int, levels: tuple[int, ...] = LAST, rest: Observed | None = None) -> Basis:
    """Canonical basis of a bare encoder that was observed on unlabelled texts, in one part or two; its head reads
    ``levels``.
    """
    parts = [seen] if rest is None else [seen, rest]
    count = sum(part.count for part in parts)
    moment = torch.stack([part.moment * (part.count / count) for part in parts]).sum(0)
    return replace(canonical_basis(moment, torch.cat([part.at(levels) for part in parts]), width), levels=levels)


@dataclass(frozen=True)
class Wanted:
    """What the regressions are to give: the head's codes at ``rows`` of the units, the logits at all of them (None:
    every unit has a code), to which the source's head adds ``bias``. ``order`` is that of the coded texts, which the
    control `shuffled` permutes.
    """

    codes: Float[Tensor, "n C"]
    rows: Tensor
    order: Tensor
    reads: Float[Tensor, "labels C"] | None
    bias: Float[Tensor, " labels"] | None
    logits: Float[Tensor, "U labels"] | None
    units: Rows  # weights of all units, and their texts
    coded: Rows | None  # the same of ``rows``; None where each is of another text

    @classmethod
    def of(cls, anchors: Anchors, shuffle: torch.Generator | None) -> Wanted:
        """The anchors' own, or shuffled."""
        order = torch.arange(anchors.coded) if shuffle is None else torch.randperm(anchors.coded, generator=shuffle)
        per_text = anchors.words if anchors.kind == "token" else 1
        codes = anchors.head.table()[_expand(order, per_text)]
        logits = None if anchors.logits is None else anchors.logits.table()
        if logits is not None and shuffle is not None:
            logits = logits[torch.randperm(len(logits), generator=shuffle)]
        probe = anchors.probe
        units, rows = Rows(probe.weights(OTHERS), probe.groups()), torch.tensor(probe.coded_units())
        coded = Rows(torch.ones(len(rows)), units.groups[rows]) if per_text > 1 else None
        return cls(codes, rows, order, anchors.reads, anchors.bias, logits, units, coded)

    def first(self, units: int) -> Wanted:
        """The first units alone."""
        assert self.logits is not None
        kept = Rows(self.units.weights[:units], self.units.groups[:units])
        return replace(self, logits=self.logits[:units], units=kept)


def _expand(order: Tensor, per_text: int) -> Tensor:
    """Rows of texts in an order, where a text has several."""
    return (order[:, None] * per_text + torch.arange(per_text)).flatten()


@dataclass(frozen=True)
class HeadFit:
    """The head's reader. ``explained``: of the variance of what it is fitted to, the source's logits or probabilities
    (without a head: of all codes); ``logits``: centred, each unit's predicted from all other texts, before the head's
    bias.
    """

    matrix: Float[Tensor, "D_levels C"]
    shift: Float[Tensor, " C"]
    explained: float
    logits: Float[Tensor, "n labels"] | None


def head_fit(
    states: Float[Tensor, "U D_levels"], wanted: Wanted, width: int, way: Way | None = None, loose: bool = False
) -> HeadFit:
    """A ridge regression from several levels' states, each brought to the same size, to the adapted source's codes.

    Coordinates are turned so that the first are those that the head reads: their penalties are then chosen for what the
    task needs, and they are fitted on all units whose logits are known; ``loose``: to within a standard error. What
    they are fitted to, and whether labels get the source's shares, ``way`` says.
    """
    way = way or Way()
    sizes = states.reshape(len(states), -1, width).double().pow(2).mean((0, 2)).sqrt().clamp_min(1e-12)
    sizes = sizes.repeat_interleave(width).float()
    x = states / sizes
    if wanted.reads is None:
        fit = ridge(x[wanted.rows], wanted.codes, rows=wanted.coded)
        return HeadFit(fit.matrix / sizes[:, None], fit.shift, fit.explained, None)
    left, strength, turn = torch.linalg.svd((wanted.reads - wanted.reads.mean(0)).double(), full_matrices=True)
    read = int((strength > 1e-6 * strength[0].clamp_min(1e-12)).sum())  # turn: the directions that are read come first
    seen = left[:, :read] / strength[:read]  # from logits to these coordinates
    targets = wanted.codes.double() @ turn.T
    fit = first = ridge(x[wanted.rows], targets, rows=wanted.coded)
    targets = targets[:, :read]
    judges = torch.ones(len(x), dtype=torch.bool) if wanted.logits is None else wanted.units.weights == 1
    matrix, shift = fit.matrix.double(), fit.shift.double()
    told = (wanted.codes.double() @ wanted.reads.double().T) if wanted.logits is None else wanted.logits.double()
    bias = torch.zeros(told.shape[1]).double() if wanted.bias is None else wanted.bias.double()
    soft = (told + bias).softmax(1) if way.targets == "probabilities" and wanted.bias is not None else None
    if soft is not None or wanted.logits is not None:
        known = told if soft is None else soft
        targets = (known - known.mean(1, keepdim=True)) @ seen
        first = ridge(x, targets, rows=wanted.units, one_se=loose)
        matrix[:, :read], shift[:read] = first.matrix.double(), first.shift.double()
    share = targets[judges].var(0) * strength[:read].pow(2)
    explained = float((first.columns[:read] * share).sum() / share.sum().clamp_min(1e-12))
    logits = first.left_out[:, :read] * strength[:read] @ left[:, :read].T
    more = torch.zeros_like(bias)
    if soft is not None:
        size = _sharpness(logits[judges], soft[judges])
        matrix[:, :read] *= size
        shift[:read] *= size
        logits, more = size * logits, bias.mean() - bias  # the head adds its bias
    if way.shares == "source":
        decided = (told + bias)[judges].argmax(1)
        more = more + share_offsets((logits + more + bias)[judges], decided)
    shift[:read] += more @ seen
    return HeadFit((matrix @ turn).float() / sizes[:, None], (shift @ turn).float(), explained, logits + more)


def _sharpness(predicted: Float[Tensor, "n labels"], wanted: Float[Tensor, "n labels"]) -> float:
    """The factor that makes logits of predicted probabilities: that of the least log loss against ``wanted`` ones."""

    def loss(power: float) -> float:
        made = np.exp(power) * predicted.numpy()
        return float((logsumexp(made, axis=1) - (wanted.numpy() * made).sum(1)).mean())

    return float(np.exp(minimize_scalar(loss, bounds=(-3.0, 6.0), method="bounded").x))


def share_offsets(logits: Float[Tensor, "n labels"], wanted: Int64[Tensor, " n"]) -> Float[Tensor, " labels"]:
    """What to add to logits, centred, so that the labels they decide on are as frequent as those ``wanted``.

    A regression predicts less than the whole of what it is fitted to, and so decides too often on what is usual. The
    offsets are the prices of the optimal assignment of rows to labels in these numbers: they minimise sum_i max_k
    (logit_ik + offset_k) - sum_k count_k offset_k, here with a maximum that is smoothed, less and less.
    """
    rows = logits.double().numpy()
    counts = torch.bincount(wanted, minlength=rows.shape[1]).numpy() + 0.5  # a label that never occurs has a price, too
    counts *= len(rows) / counts.sum()
    spread = float((rows - rows.mean(1, keepdims=True)).std()) or 1.0
    offsets = np.zeros(rows.shape[1])
    for smooth in (0.3 * spread, 0.1 * spread, 0.03 * spread, 0.01 * spread):

        def loss(given: np.ndarray, smooth: float = smooth) -> tuple[float, np.ndarray]:
            told = (rows + given) / smooth
            total = logsumexp(told, axis=1, keepdims=True)
            return float(smooth * total.sum() - counts @ given), np.exp(told - total).sum(0) - counts

        offsets = minimize(loss, offsets, jac=True, method="L-BFGS-B").x
    return torch.from_numpy(offsets - offsets.mean())


def stream_basis(
    anchors: Anchors, seen: Observed, order: Tensor, way: Way, reads: Float[Tensor, "A C"]
) -> tuple[Basis, list[float]]:
    """Readers and writers of the target's stream, from its states to the source's codes and back; and how much of the
    codes they explain at each level. ``reads`` are the atoms' readers in canonical coordinates.
    """
    rows = _expand(order, max(anchors.words, 1))
    states = seen.stream(anchors.words)[:, : len(rows)]
    tables = torch.stack([c.table()[rows] for c in anchors.stream])
    width, last = anchors.head.values.shape[0], len(states) - 1
    if way.depths == "cka":
        nearest = [int(torch.tensor([cka(h, z) for z in tables]).argmax()) for h in states]
    else:
        nearest = [min(range(len(tables)), key=lambda i: abs(anchors.depths[i] - n / last)) for n in range(last + 1)]
    codes = tables[nearest]
    texts = torch.arange(len(rows)) // max(anchors.words, 1)
    fitted = [(states, codes)] if way.maps == "shared" else zip(states[:, None], codes[:, None], strict=True)
    pairs = [_map_pair(h, z, texts, width, way, reads) for h, z in fitted]
    rms = tuple(float(h.double().pow(2).mean().sqrt()) for h in ([states] if way.maps == "shared" else states))
    levels = LAST if way.reads == "last" else upper_levels(last)
    unset = torch.zeros(width, len(levels) * states.shape[-1])
    basis = Basis(tuple(p[0] for p in pairs), tuple(p[1] for p in pairs), unset, unset[:, 0], rms, levels)
    return basis, [fit for p in pairs for fit in p[2]]


def cka(x: Float[Tensor, "n D"], y: Float[Tensor, "n C"]) -> float:
    """Linear centred kernel alignment of two tables with the same rows, 0 to 1 (Kornblith et al. 2019)."""
    x, y = ((t - t.mean(0)).double() for t in (x, y))
    apart = (x.T @ x).norm() * (y.T @ y).norm()
    return float((y.T @ x).pow(2).sum() / apart.clamp_min(1e-30))


def upper_levels(last: int) -> tuple[int, ...]:
    """Levels that a head reads: at most :data:`READ`, evenly spread from the middle of a host to its ``last``."""
    middle = (last + 1) // 2
    count = min(READ, last + 1 - middle)
    return tuple(last - round(i * (last - middle) / max(count - 1, 1)) for i in reversed(range(count)))


def _map_pair(
    states: Float[Tensor, "levels n D"],
    codes: Float[Tensor, "levels n R"],
    texts: Int64[Tensor, " n"],
    width: int,
    way: Way,
    reads: Float[Tensor, "A C"],
) -> tuple[Tensor, Tensor, list[float]]:
    """Reader (C, D), writer (D, C), and what the reader explains of each level's codes, of ``texts`` (each row's) that
    its fit has not seen at any level; coordinates beyond the R stored are zero. With a rank both keep to some
    directions of the codes that the reader predicts (reduced-rank regression: Izenman 1975).
    """
    there, back, size = states.flatten(0, 1), codes.flatten(0, 1), codes.shape[-1]
    groups = texts.repeat(len(states))
    turn = torch.eye(size, dtype=torch.float64)
    if way.penalties == "atoms":  # the readers' principal directions, a penalty each
        turn = torch.linalg.svd(reads[:, :size].double(), full_matrices=True)[2]
    reader = ridge_of_groups(there, back.double() @ turn.T, groups)
    miss = (codes.double() - (reader.left_out @ turn).view_as(codes)).pow(2).sum((1, 2))
    fits = 1 - miss / codes.double().pow(2).sum((1, 2)).clamp_min(1e-12)
    told = reader.matrix.double() @ turn
    if way.writer == "states":
        said = ridge_of_groups(back, there, groups, each=False, held=False).matrix.double()
    else:
        said = _inverse(there.double(), told, back.double())
    if way.rank is not None:
        keep = _directions(there.double() @ told, back.double(), way)
        told, said = told @ keep, keep @ said
    more = width - size
    read, write = nn.functional.pad(told.T, (0, 0, 0, more)), nn.functional.pad(said.T, (0, more))
    return read.float().contiguous(), write.float().contiguous(), fits.tolist()


def _inverse(
    states: Float[Tensor, "n D"], told: Float[Tensor, "D R"], codes: Float[Tensor, "n R"]
) -> Float[Tensor, "R D"]:
    """The changes of a state that read, by T, as given changes of the codes and are the smallest by the states' own
    spread: (T^T S T + d)^-1 T^T S with S their second moment. d, a hundredth of each code's mean square, damps codes
    that are hardly predicted.
    """
    moment = states.T @ states / len(states)
    damping = 1e-2 * codes.pow(2).mean(0)
    damping = torch.diag(damping.clamp_min(1e-9 * float(damping.max())))  # a narrow source has empty coordinates
    return torch.linalg.solve(told.T @ moment @ told + damping, told.T @ moment)


def _directions(predicted: Float[Tensor, "n R"], codes: Float[Tensor, "n R"], way: Way) -> Float[Tensor, "R R"]:
    """The projection onto ``way.rank`` directions of the predicted codes: principal ones, or canonical variates, which
    are principal where codes are whitened.
    """
    assert way.rank is not None
    spread = torch.eye(codes.shape[1], dtype=codes.dtype)
    white = spread
    if way.directions == "canonical":
        values, vectors = torch.linalg.eigh(codes.T @ codes / len(codes))
        values = values.clamp_min(1e-6 * float(values.max()))
        spread, white = ((vectors * values**power) @ vectors.T for power in (0.5, -0.5))
    kept = torch.linalg.eigh(white @ (predicted.T @ predicted) @ white).eigenvectors[:, -way.rank :]
    return white @ kept @ kept.T @ spread


def random_basis(like: Basis, generator: torch.Generator) -> Basis:
    """Random orthogonal directions, others at each level, with the same overall gains for reading and writing."""
    read, write = [], []
    for old_read, old_write in zip(like.read, like.write, strict=True):
        c, d = old_read.shape
        square = torch.linalg.qr(torch.randn(max(c, d), max(c, d), generator=generator))[0]
        directions = square[:c, :d]
        read.append(directions * (old_read.norm() / directions.norm()))
        write.append(directions.T * (old_write.norm() / directions.norm()))
    return replace(like, read=tuple(read), write=tuple(write))
