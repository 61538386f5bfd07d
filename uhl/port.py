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
min ||H M^T - Z||^2 + ||Lambda M||^2 between its sentence means H and the source's codes Z at matched depths; the
writer N solves the reverse. The head's reader is the same regression from the last states to the *adapted* source's
codes, fitted with the atoms in place. How much of the atoms to use is the scale in :data:`SCALES` whose last states
reproduce the adapted codes best, by generalised cross-validation; 0 is allowed.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace

import torch
from jaxtyping import Float
from peft import PeftModel
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from uhl.adapter import UHLAdapter
from uhl.anchors import Anchors, Observed, final_means, observe
from uhl.config import ARMS
from uhl.errors import UHLError, one_of
from uhl.frame import Basis, Frame, canonical_basis, dimension_frame
from uhl.host import Slot, find_slots
from uhl.models import Encoder
from uhl.peft_method import attach, tuner_of

SCALES = (0.0, 0.25, 0.5, 1.0)
PENALTIES = tuple(10.0 ** (e / 2) for e in range(-8, 9))  # times the mean squared singular value


@dataclass
class Fit:
    """A ridge regression Y = X B + c, a penalty for each column of Y, and what it explains of Y's variance.

    ``explained`` is 1 - (sum over columns of GCV) / (sum of variances): an estimate for unseen rows.
    """

    matrix: Float[Tensor, "D C"]
    shift: Float[Tensor, " C"]
    penalty: Float[Tensor, " C"]
    explained: float


def ridge(x: Float[Tensor, "n D"], y: Float[Tensor, "n C"], centre: bool = True) -> Fit:
    """Ridge regression in float64; generalised cross-validation chooses each column's penalty (Golub et al. 1979).

    GCV_c(l) = n ||y_c - y_c,l||^2 / (n - df_l)^2 with df_l the trace of the smoother. Columns differ in how well they
    can be predicted (leading directions well, the tail hardly), so one penalty for all would fit neither. ``centre``
    adds an intercept. Raises :class:`UHLError` for fewer than 16 rows.
    """
    if len(x) < 16:
        raise UHLError(f"{len(x)} anchors are too few for a regression; use at least 16")
    x, y = x.double(), y.double()
    x_mean, y_mean = (t.mean(0) if centre else torch.zeros_like(t[0]) for t in (x, y))
    left, values, right = torch.linalg.svd(x - x_mean, full_matrices=False)
    target = left.T @ (y - y_mean)  # (r, C)
    total = (y - y_mean).pow(2).sum(0)  # (C,)
    outside = total - target.pow(2).sum(0)
    power = values.pow(2)
    penalties = torch.tensor(PENALTIES, dtype=x.dtype) * power.mean()
    shrink = power / (power + penalties[:, None])  # (penalties, r)
    residual = outside + (1 - shrink).pow(2) @ target.pow(2)  # (penalties, C)
    free = (1 - shrink).sum(1) + (len(x) - len(values)) - float(centre)  # small, not zero, where D exceeds n
    gcv, best = (len(x) * residual / free[:, None] ** 2).min(0)  # (C,)
    inverse = values[:, None] / (power[:, None] + penalties[best])  # (r, C)
    matrix = right.T @ (inverse * target)
    explained = 1 - float(gcv.sum() / (total.sum() / len(x)).clamp_min(1e-12))
    return Fit(matrix.float(), (y_mean - x_mean @ matrix).float(), penalties[best].float(), explained)


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
        seen = seen or observe(target, adapter.anchors.texts)
        done = _anchored(adapter, target, task, arm, slots, seed, seen)
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
    return canonical_basis(seen.tokens, seen.final, width)


def _anchored(
    adapter: UHLAdapter, target: Encoder, task: str, arm: str, slots: Sequence[Slot], seed: int, seen: Observed
) -> Port:
    anchors = adapter.anchors
    assert anchors is not None
    generator = torch.Generator().manual_seed(seed)
    order: Tensor | slice = (
        torch.randperm(len(anchors.texts), generator=generator) if arm == "shuffled" else slice(None)
    )
    wanted = anchors.head.table()[order]
    basis, stream_fit = _stream_basis(anchors, seen, order)
    if arm == "random-p":
        basis = _random_basis(basis, generator)
    scales = (0.0,) if arm == "zero-atoms" else SCALES
    tried: dict[float, Fit] = {}
    with untuned(adapter, task):
        for scale in scales:
            states = seen.final
            if scale > 0:
                with attach(target.model, adapter, task, basis.frame(target.model, slots), scale):
                    states = final_means(target, anchors.texts)
            tried[scale] = ridge(states, wanted)
    scale = max(tried, key=lambda s: tried[s].explained)
    best = tried[scale]
    frame = replace(basis, head=best.matrix.T.contiguous(), shift=best.shift).frame(target.model, slots)
    report: dict[str, object] = {
        "anchors": len(anchors.texts),
        "stream_fit": round(stream_fit, 4),
        "head_fit": {s: round(f.explained, 4) for s, f in tried.items()},
    }
    return Port(arm, frame, scale, report)


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


def _stream_basis(anchors: Anchors, seen: Observed, order: Tensor | slice) -> tuple[Basis, float]:
    """Reader and writer of the target's stream, from its sentence means to the source's codes and back."""
    codes = torch.cat([c.table()[order] for c in anchors.stream])
    states = seen.stream.flatten(0, 1)
    reader, writer = ridge(states, codes, centre=False), ridge(codes, states, centre=False)
    unset = torch.zeros(codes.shape[1], states.shape[1])
    read, write = reader.matrix.T.contiguous(), writer.matrix.T.contiguous()
    return Basis(read, write, unset, unset[:, 0], seen.rms), reader.explained


def _random_basis(like: Basis, generator: torch.Generator) -> Basis:
    """Random orthogonal directions with the same overall gain for reading and writing as ``like``."""
    c, d = like.read.shape
    square = torch.linalg.qr(torch.randn(max(c, d), max(c, d), generator=generator))[0]
    directions = square[:c, :d]
    read = directions * (like.read.norm() / directions.norm())
    write = directions.T * (like.write.norm() / directions.norm())
    return replace(like, read=read, write=write)
