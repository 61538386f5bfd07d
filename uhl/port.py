"""Port an adapter to another host: obtain the host's frame, without labels.

| arm          | readers and writers of the target                                  | needs                    |
|--------------|--------------------------------------------------------------------|--------------------------|
| `dimension`  | the projector's network h_psi(d)                                   | a `dimension` adapter    |
| `lineage`    | the source's own basis, as it is                                   | equal widths, the source |
| `anchor`     | ridge regressions between the target's and the source's anchor codes | the file's anchors     |
| `zero-atoms` | control: `anchor` for the head, no atoms                           | the file's anchors       |
| `random-p`   | control: `anchor` for the head, atoms behind a random orthogonal P | the file's anchors       |
| `shuffled`   | control: `anchor` with the anchors' codes permuted                 | the file's anchors       |

The anchored port runs the target over the anchor texts once. The stream's reader M solves
min ||H M^T - Z||^2 + ||Lambda M||^2 between its words' states H and the source's codes Z at matched depths; the writer
N solves the reverse. The head's reader is the same regression from the sentence means of several levels to the
*adapted* source's codes, fitted with the atoms in place. How much of the atoms to use is the scale in :data:`SCALES` at
which the source's logits are reproduced best; 0 is allowed.

A target whose weights are the source's own, by their hash, gets the source's own frame.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Literal

import torch
from jaxtyping import Float
from peft import PeftModel
from pydantic import Field
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from uhl.adapter import UHLAdapter
from uhl.anchors import Anchors, Observed, level_means, observe
from uhl.config import ARMS, _Strict
from uhl.errors import UHLError, one_of
from uhl.frame import LAST, Basis, Frame, canonical_basis, dimension_frame
from uhl.host import Slot, find_slots
from uhl.models import Encoder
from uhl.peft_method import attach, tuner_of

SCALES = (0.0, 1.0, 2.0)  # of the atoms, times source layers over target layers: a shorter host has fewer edits
FREE = 0.1  # least share of the rows that a regression leaves as degrees of freedom
PENALTIES = tuple(10.0 ** (e / 2) for e in range(-8, 9))  # times the mean squared singular value


@dataclass
class Fit:
    """A ridge regression Y = X B + c, a penalty for each column of Y, and what it explains of Y's variance.

    ``explained`` is 1 - (sum over columns of GCV) / (sum of variances): an estimate for unseen rows; ``columns`` the
    same for each column.
    """

    matrix: Float[Tensor, "D C"]
    shift: Float[Tensor, " C"]
    penalty: Float[Tensor, " C"]
    explained: float
    columns: Float[Tensor, " C"]


def ridge(x: Float[Tensor, "n D"], y: Float[Tensor, "n C"], centre: bool = True) -> Fit:
    """Ridge regression in float64; generalised cross-validation chooses each column's penalty (Golub et al. 1979).

    GCV_c(l) = n ||y_c - y_c,l||^2 / (n - df_l)^2 with df_l the trace of the smoother. Columns differ in how well they
    can be predicted (leading directions well, the tail hardly), so one penalty for all would fit neither. ``centre``
    adds an intercept. Penalties that leave fewer than :data:`FREE` of the rows as degrees of freedom are not
    considered: near interpolation GCV is 0 / 0. Raises :class:`UHLError` for fewer than 16 rows.
    """
    if len(x) < 16:
        raise UHLError(f"{len(x)} anchors are too few for a regression; use at least 16")
    x, y = x.double(), y.double()
    x_mean, y_mean = (t.mean(0) if centre else torch.zeros_like(t[0]) for t in (x, y))
    left, values, right = _svd(x - x_mean)
    target = left.T @ (y - y_mean)  # (r, C)
    total = (y - y_mean).pow(2).sum(0)  # (C,)
    outside = total - target.pow(2).sum(0)
    power = values.pow(2)
    penalties = torch.tensor(PENALTIES, dtype=x.dtype) * power.sum() / min(x.shape)
    shrink = power / (power + penalties[:, None])  # (penalties, r)
    residual = outside + (1 - shrink).pow(2) @ target.pow(2)  # (penalties, C)
    free = len(x) - shrink.sum(1) - float(centre)
    gcv = len(x) * residual / free[:, None].clamp_min(1e-9) ** 2
    gcv[free < FREE * len(x)] = torch.inf
    gcv, best = gcv.min(0)  # (C,)
    inverse = values[:, None] / (power[:, None] + penalties[best])  # (r, C)
    matrix = right.T @ (inverse * target)
    explained = 1 - float(gcv.sum() / (total.sum() / len(x)).clamp_min(1e-12))
    columns = 1 - gcv / (total / len(x)).clamp_min(1e-12)
    return Fit(matrix.float(), (y_mean - x_mean @ matrix).float(), penalties[best].float(), explained, columns)


def _svd(x: Float[Tensor, "n D"]) -> tuple[Tensor, Tensor, Tensor]:
    """Singular vectors and values (n, r), (r,), (r, D), through the smaller Gram matrix; none of no size."""
    wide = x.shape[0] < x.shape[1]
    power, vectors = torch.linalg.eigh(x @ x.T if wide else x.T @ x)
    keep = power > 1e-13 * power.max()
    values, vectors = power[keep].sqrt(), vectors[:, keep]
    if wide:
        return vectors, values, (vectors.T @ x) / values[:, None]
    return (x @ vectors) / values, values, vectors.T


class Way(_Strict):
    """How an anchored port is made. What is not the default is there to compare; notebook 03 does."""

    maps: Literal["shared", "level"] = Field("shared", description="one pair of maps of the stream, or a pair a level")
    reads: Literal["upper", "last"] = Field("upper", description="levels that the head reads: upper half, or the last")
    scales: tuple[float, ...] | None = Field(None, description="of the atoms, tried on the anchors; None: SCALES")


@dataclass
class Port:
    """A ported adapter's frame and scale, and a report: weights, fits, scales tried, seconds."""

    arm: str
    frame: Frame
    scale: float
    report: dict[str, object] = field(default_factory=dict)


def why_not(adapter: UHLAdapter, target: Encoder, arm: str, source: Encoder | None = None) -> str | None:
    """Why a cell is not defined, or None when it is."""
    one_of(arm, ARMS, "arm")
    if (arm == "dimension") != (adapter.config.projector == "dimension"):
        return f"arm {arm} is not defined for an adapter trained under the {adapter.config.projector} projector"
    if arm == "lineage" and source is None:
        return "arm lineage needs the source model"
    if arm == "lineage" and source is not None and source.width != target.width:
        return f"arm lineage needs equal widths; the source has {source.width}, the target {target.width}"
    if arm not in {"dimension", "lineage"} and adapter.anchors is None:
        return f"arm {arm} needs anchors, and the adapter's file has none"
    return None


def port(
    adapter: UHLAdapter,
    target: Encoder,
    task: str,
    arm: str = "anchor",
    source: Encoder | None = None,
    seed: int = 0,
    seen: Observed | None = None,
    way: Way | None = None,
) -> Port:
    """The target's frame for ``adapter``. No labels are used. Raises :class:`UHLError` for an undefined cell.

    ``source`` is needed by `lineage` alone; ``seed`` draws the controls; ``seen`` spares observing the target again
    when several arms are ported with the same anchors (its seconds are counted all the same).
    """
    reason = why_not(adapter, target, arm, source)
    if reason:
        raise UHLError(reason)
    begun = time.time()
    slots = find_slots(target.model, adapter.config.types)
    if arm == "dimension":
        with torch.no_grad():
            done = Port(arm, dimension_frame(adapter.projector, slots, target.width), 1.0)
    elif arm == "lineage":
        assert source is not None
        done = Port(arm, source_basis(adapter, source).frame(target.model, slots), 1.0)
    else:
        assert adapter.anchors is not None
        again = seen
        seen = seen or observe(target, adapter.anchors.texts, adapter.anchors.words)
        own = target.revision != "unknown" and target.revision == adapter.info.get("revision")
        if own and arm in {"anchor", "zero-atoms"}:  # the source itself: its own basis, no regression
            frame = basis_of(seen, adapter.config.width).frame(target.model, slots)
            done = Port(arm, frame, float(arm == "anchor"))
        else:
            done = _anchored(adapter, target, task, arm, slots, seed, seen, way or Way())
        begun -= seen.seconds if again else 0.0
    done.report |= {"arm": arm, "weights": len(slots), "scale": done.scale, "seconds": round(time.time() - begun, 1)}
    return done


def port_model(
    model: PeftModel, tokenizer: PreTrainedTokenizerBase, name: str = "default", arm: str = "anchor"
) -> Port:
    """Port an adapter that a PEFT model carries to that model, and put the frame to work in it. No labels are used.

    The host is an encoder, or a decoder, with any head on it; its other adapters are left alone. Raises
    :class:`UHLError` for an arm that the adapter does not allow, or that needs its source model.
    """
    tuner = tuner_of(model)
    if name not in tuner.uhl_adapters:
        raise UHLError(f"the model has no adapter {name!r}; it has {', '.join(tuner.uhl_adapters) or 'none'}")
    adapter, host = tuner.uhl_adapters[name], tuner.model
    assert isinstance(adapter, UHLAdapter)
    inner = getattr(host, "base_model", host)  # transformers' name for a model without its head
    if getattr(getattr(host, "config", None), "is_encoder_decoder", False):
        raise UHLError("a model with encoder and decoder has no single stream of states to port to")
    prefix = next(path for path, module in host.named_modules() if module is inner)
    with tuner.bare():
        target = Encoder(str(getattr(host.config, "_name_or_path", "")), inner, tokenizer, "unknown")
        done = port(adapter, target, tuner.attached(name).task_name, arm)
    pairs = {f"{prefix}.{path}" if prefix else path: pair for path, pair in done.frame.slots.items()}
    tuner.set_frame(name, replace(done.frame, slots=pairs), done.scale, arm)
    return done


def source_basis(adapter: UHLAdapter, source: Encoder) -> Basis:
    """The basis that a `canonical` adapter was trained in: principal directions of its source over its anchors."""
    if adapter.anchors is None:
        raise UHLError("the adapter has no anchor texts to take the source's basis from")
    return basis_of(observe(source, adapter.anchors.texts), adapter.config.width)


def basis_of(seen: Observed, width: int) -> Basis:
    """Canonical basis of a bare encoder that was observed on unlabelled texts."""
    return canonical_basis(seen.moment, seen.final, width)


def _anchored(
    adapter: UHLAdapter,
    target: Encoder,
    task: str,
    arm: str,
    slots: Sequence[Slot],
    seed: int,
    seen: Observed,
    way: Way,
) -> Port:
    anchors = adapter.anchors
    assert anchors is not None
    generator = torch.Generator().manual_seed(seed)
    count = len(anchors.texts)
    order = torch.randperm(count, generator=generator) if arm == "shuffled" else torch.arange(count)
    wanted = anchors.head.table()[order]
    basis, fits = _stream_basis(anchors, seen, order, way)
    if arm == "random-p":
        basis = _random_basis(basis, generator)
    layers = adapter.info.get("layers")
    ratio = layers / target.layers if isinstance(layers, int) and layers > 0 else 1.0
    tried: dict[float, Fit] = {}
    with untuned(adapter, task):
        for scale in (0.0,) if arm == "zero-atoms" else tuple(ratio * s for s in way.scales or SCALES):
            states = torch.cat([seen.means[i] for i in basis.levels], -1)
            if scale > 0:
                with attach(target.model, adapter, task, basis.frame(target.model, slots), scale):
                    states = level_means(target, anchors.texts, basis.levels)
            tried[scale] = _head_fit(states, wanted, anchors.reads, target.width)
    scale = max(tried, key=lambda s: tried[s].explained)
    best = tried[scale]
    frame = replace(basis, head=best.matrix.T.contiguous(), shift=best.shift).frame(target.model, slots)
    report: dict[str, object] = {
        "anchors": count,
        "stream_fit": [round(f, 4) for f in fits],
        "head_fit": {round(s, 4): round(f.explained, 4) for s, f in tried.items()},
    }
    return Port(arm, frame, scale, report)


def _head_fit(
    states: Float[Tensor, "N D_levels"],
    codes: Float[Tensor, "N C"],
    reads: Float[Tensor, "labels C"] | None,
    width: int,
) -> Fit:
    """A ridge regression from several levels' states, each brought to the same size, to the adapted source's codes.

    Coordinates are turned so that the first are those that the head ``reads``: their penalties are then chosen for what
    the task needs, and ``explained`` is that of the source's logits (without a head: of all codes).
    """
    sizes = states.reshape(len(states), -1, width).double().pow(2).mean((0, 2)).sqrt().clamp_min(1e-12)
    sizes = sizes.repeat_interleave(width).float()
    if reads is None:
        fit = ridge(states / sizes, codes)
        return replace(fit, matrix=fit.matrix / sizes[:, None])
    _, strength, turn = torch.linalg.svd((reads - reads.mean(0)).double(), full_matrices=True)  # turn: read, then not
    turned = codes.double() @ turn.T
    fit = ridge(states / sizes, turned)
    share = turned.var(0)[: len(strength)] * strength.pow(2)
    explained = float((fit.columns[: len(strength)] * share).sum() / share.sum().clamp_min(1e-12))
    matrix, shift = (fit.matrix.double() @ turn).float() / sizes[:, None], (fit.shift.double() @ turn).float()
    return replace(fit, matrix=matrix, shift=shift, explained=explained)


@contextmanager
def untuned(adapter: UHLAdapter, task: str) -> Iterator[None]:
    """The task's bias at zero for a while: a tuned file is ported as it was before tuning, so its scores repeat."""
    bias = adapter.task(task).bias
    kept = bias.detach().clone()
    with torch.no_grad():
        bias.zero_()
        try:
            yield
        finally:
            bias.copy_(kept)


def _stream_basis(anchors: Anchors, seen: Observed, order: Tensor, way: Way) -> tuple[Basis, list[float]]:
    """Readers and writers of the target's stream, from its states to the source's codes and back, a pair a level; and
    how much of the codes' variance each reader explains.
    """
    states, per_text = seen.stream(anchors.words), max(anchors.words, 1)
    rows = (order[:, None] * per_text + torch.arange(per_text)).flatten()
    tables = [c.table()[rows] for c in anchors.stream]
    width, last = anchors.head.values.shape[0], len(states) - 1
    nearest = [min(range(len(tables)), key=lambda i: abs(anchors.depths[i] - n / last)) for n in range(last + 1)]
    if way.maps == "shared":
        pairs = [_map_pair(torch.cat(list(states)), torch.cat([tables[i] for i in nearest]), width)]
        rms: tuple[float, ...] = (float(states.double().pow(2).mean().sqrt()),)
    else:
        pairs = [_map_pair(s, tables[i], width) for s, i in zip(states, nearest, strict=True)]
        rms = tuple(float(s.double().pow(2).mean().sqrt()) for s in states)
    levels = LAST if way.reads == "last" else tuple(range((last + 1) // 2, last + 1))
    unset = torch.zeros(width, len(levels) * states.shape[-1])
    basis = Basis(tuple(p[0] for p in pairs), tuple(p[1] for p in pairs), unset, unset[:, 0], rms, levels)
    return basis, [p[2] for p in pairs]


def _map_pair(states: Float[Tensor, "n D"], codes: Float[Tensor, "n R"], width: int) -> tuple[Tensor, Tensor, float]:
    """Reader (C, D), writer (D, C), and the reader's explained variance; coordinates beyond the R stored are zero."""
    reader, writer = ridge(states, codes, centre=False), ridge(codes, states, centre=False)
    more = width - codes.shape[1]
    read, write = nn.functional.pad(reader.matrix.T, (0, 0, 0, more)), nn.functional.pad(writer.matrix.T, (0, more))
    return read.contiguous(), write.contiguous(), reader.explained


def _random_basis(like: Basis, generator: torch.Generator) -> Basis:
    """Random orthogonal directions, others at each level, with the same overall gains for reading and writing."""
    read, write = [], []
    for old_read, old_write in zip(like.read, like.write, strict=True):
        c, d = old_read.shape
        square = torch.linalg.qr(torch.randn(max(c, d), max(c, d), generator=generator))[0]
        directions = square[:c, :d]
        read.append(directions * (old_read.norm() / directions.norm()))
        write.append(directions.T * (old_write.norm() / directions.norm()))
    return replace(like, read=tuple(read), write=tuple(write))
