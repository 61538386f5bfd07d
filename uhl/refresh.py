"""Refresh: label-free steps on a task's bias, on a target, towards what the source says of the anchors.

The source's decisions p on the anchors are the teacher, the target q with its ported head, which stays, the student:

    loss = (1 - a) CE(p, q) + a CE(decision of q, q) + lambda_Q ||B||^2

The second term, off by default, lets a student keep to its own decisions where the teacher errs, after the
log-confidence loss of weak-to-strong generalisation (Burns et al. 2023, arXiv:2312.09390). Theirs takes decisions by a
threshold that halves each batch; here a decision is the likeliest label, as tasks may have many and unequal ones. Part
of the texts is held out; of the biases met on the way, zero among them, the one that is nearest to the teacher on these
is kept. (The head was fitted on all texts, without a bias: that favours zero.)
"""

from __future__ import annotations

import math
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from jaxtyping import Float
from torch import Tensor, nn

from uhl.adapter import TaskPart, UHLAdapter
from uhl.anchors import Probe, units_of
from uhl.errors import UHLError
from uhl.frame import Frame
from uhl.host import evaluating
from uhl.models import Encoder
from uhl.peft_method import attach
from uhl.progress import bar

BATCH, RATE = 32, 1e-2
CONFIDENCE = 0.0  # a, reached after a fifth of the steps
LAMBDA_Q = 1e-5
HELD_OUT = 0.2  # share of the texts
LOOKS = 8  # at the held-out texts, at most, beside the one at zero


def refresh(
    adapter: UHLAdapter,
    target: Encoder,
    task: str,
    frame: Frame,
    scale: float,
    seed: int = 0,
    steps: int = 200,
    confidence: float = CONFIDENCE,
) -> dict[str, object]:
    """Set the task's bias in ``adapter`` by label-free steps on the target; returns a report.

    ``frame`` and ``scale`` are an anchored port's; the bias starts from zero. The report has the held-out loss by step
    and the step that was kept. Raises :class:`UHLError` for a file whose anchors do not hold the source's decisions for
    the task; after any error the bias is what it was.
    """
    anchors, part = adapter.anchors, adapter.task(task)
    if anchors is None or not anchors.judges(task):
        raise UHLError(f"the anchors do not hold the source's decisions for task {task!r}; pre-train the adapter again")
    probe = replace(anchors.probe, cuts=0)
    taught = anchors.decided()[anchors.probe.rows(probe)].softmax(-1).split(probe.units())
    texts = list(range(len(anchors.texts)))
    random.Random(seed).shuffle(texts)
    held = max(1, round(HELD_OUT * len(texts)))
    trains = {p: p.requires_grad for p in (*adapter.parameters(), *target.model.parameters())}
    before, curve, met = part.bias.detach().clone(), {}, {}
    try:
        for parameter in trains:
            parameter.requires_grad_(parameter is part.bias)
        with attach(target.model, adapter, task, frame, scale), evaluating(target.model):
            student = _Student(target, part, frame.to(part.bias.device), probe, taught)
            with torch.no_grad():
                part.bias.zero_()
            optimiser = torch.optim.AdamW([part.bias], lr=RATE, weight_decay=0.0)
            every = max(5, math.ceil(steps / LOOKS))
            rows = [*_batches(texts[held:], steps, seed), []]
            for step, chosen in enumerate(bar(rows, "refresh", "step")):
                if step % every == 0 or step == steps:
                    curve[step], met[step] = student.held_out(texts[:held]), part.bias.detach().clone()
                if step == steps:
                    break
                found, wanted = student(chosen)
                share = confidence * min(1.0, 5 * step / steps)
                loss = (1 - share) * nn.functional.cross_entropy(found, wanted)
                loss = loss + share * nn.functional.cross_entropy(found, found.detach().argmax(-1))
                optimiser.zero_grad()
                (loss + LAMBDA_Q * part.bias.pow(2).sum()).backward()
                optimiser.step()
        kept = min(curve, key=lambda step: curve[step])
        before = met[kept]
    finally:
        with torch.no_grad():
            part.bias.copy_(before)
        for parameter, train in trains.items():
            parameter.requires_grad_(train)
    return {"held_out": {s: round(v, 4) for s, v in curve.items()}, "kept_step": kept}


@dataclass(frozen=True)
class _Student:
    """A target's logits on chosen texts of a probe, beside the teacher's decisions."""

    target: Encoder
    part: TaskPart
    frame: Frame
    probe: Probe
    taught: Sequence[Float[Tensor, "u labels"]]

    def __call__(self, rows: Sequence[int]) -> tuple[Float[Tensor, "U labels"], Float[Tensor, "U labels"]]:
        """Logits of the texts' units, and the teacher's probabilities."""
        probe = replace(self.probe, texts=[self.probe.texts[i] for i in rows], coded=None)
        states = units_of(self.target, probe, self.frame.levels)
        logits = self.part.classify(self.frame.codes(torch.cat(states)))
        return logits, torch.cat([self.taught[i] for i in rows]).to(logits)

    @torch.no_grad()
    def held_out(self, rows: Sequence[int]) -> float:
        """Cross-entropy to the teacher, in nats a unit."""
        logits, wanted = self(rows)
        return float(nn.functional.cross_entropy(logits, wanted))


def _batches(rows: Sequence[int], steps: int, seed: int) -> Iterator[list[int]]:
    """``steps`` batches: passes over the rows, each in another order."""
    order = random.Random(seed + 1)
    left: list[int] = []
    for _ in range(steps):
        if len(left) < BATCH:
            left += order.sample(list(rows), len(rows))
        yield left[:BATCH]
        left = left[BATCH:]
