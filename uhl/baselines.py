"""Baselines on the same host, labels and head: rank-8 LoRA and full fine-tuning (PEFT, Trainer), and head only."""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from peft import LoraConfig, get_peft_model
from sklearn.linear_model import LogisticRegression
from torch import nn

from uhl.adapter import TaskPart
from uhl.anchors import final_means
from uhl.config import TrainConfig, UHLConfig
from uhl.errors import UHLError, one_of
from uhl.frame import Frame
from uhl.host import find_slots
from uhl.models import Encoder
from uhl.port import basis_of
from uhl.quant import quantise
from uhl.tasks import Task
from uhl.train import Classifier, TrainLog, train

METHODS = ("head", "lora-r8", "full")
RANK = 8
HEAD_STRENGTHS = (0.001, 0.003, 0.01, 0.03, 0.1)  # inverse penalties tried on dev


@dataclass
class Baseline:
    """A trained baseline: a classifier ready to predict, what it trained, and the bytes it adds to the bare host."""

    classifier: Classifier
    log: TrainLog
    bytes: int
    extra_flops_pct: float


def own_frame(encoder: Encoder, texts: Sequence[str], width: int = 256) -> Frame:
    """Head coordinates of a host from its own states on unlabelled texts: the same head capacity for every method."""
    return basis_of(encoder, texts, width).frame(encoder.model, [])


def fit_head(codes: torch.Tensor, labels: Sequence[int], dev_codes: torch.Tensor, dev: Sequence[int], part: TaskPart) -> None:
    """Logistic regression on fixed codes into ``part``; dev chooses among :data:`HEAD_STRENGTHS`."""
    best: tuple[float, LogisticRegression] | None = None
    for strength in HEAD_STRENGTHS:
        model = LogisticRegression(C=strength, max_iter=2000).fit(codes.numpy(), labels)
        accuracy = float(model.score(dev_codes.numpy(), dev))
        if best is None or accuracy > best[0]:
            best = (accuracy, model)
    assert best is not None
    weight, bias = best[1].coef_, best[1].intercept_
    if len(part.labels) == 2:  # one row of scores becomes two of opposite sign
        weight, bias = np.concatenate([-weight, weight]) / 2, np.concatenate([-bias, bias]) / 2
    with torch.no_grad():
        part.head.copy_(torch.from_numpy(weight))
        part.head_bias.copy_(torch.from_numpy(bias))


def run_baseline(
    method: str, encoder: Encoder, task: Task, texts: Sequence[str], config: TrainConfig, folder: str | Path
) -> Baseline:
    """Train one of :data:`METHODS` on the task's training split. The encoder is changed in place."""
    one_of(method, METHODS, "baseline")
    part = TaskPart(UHLConfig(), task.labels, task.kind)
    for p in (part.embedding, part.bias):
        p.requires_grad_(False)
    frame = own_frame(encoder, texts)
    torch.manual_seed(config.seed)
    head_bytes = head_size(part)
    if method == "head":
        return _head_only(encoder, task, part, frame, head_bytes)
    model: nn.Module = encoder.model
    flops = 0.0
    if method == "lora-r8":
        for p in model.parameters():
            p.requires_grad_(False)
        slots = find_slots(model)
        targets = [s for s in slots if s.type in {"Q", "V"}]
        lora = LoraConfig(r=RANK, lora_alpha=2 * RANK, lora_dropout=0.0, target_modules=[s.path for s in targets])
        model = get_peft_model(model, lora)  # type: ignore[arg-type]
        flops = 100.0 * sum(2 * RANK * (s.d_in + s.d_out) for s in targets) / sum(2 * s.d_in * s.d_out for s in slots)
    classifier = Classifier(model, part, frame, train_config=config)
    log = train(classifier, encoder, task, config, folder)
    own = sum(p.numel() for n, p in classifier.named_parameters() if p.requires_grad and "part." not in n)
    return Baseline(classifier, log, 2 * own + head_bytes, flops)


def _head_only(encoder: Encoder, task: Task, part: TaskPart, frame: Frame, size: int) -> Baseline:
    if task.kind != "sentence":
        raise UHLError(f"baseline head is made for sentence tasks; {task.name} is a {task.kind} task")
    for p in encoder.model.parameters():
        p.requires_grad_(False)
    codes = {s: frame.codes(final_means(encoder, list(task.data[s]["text"]))) for s in ("train", "dev")}
    fit_head(codes["train"], task.data["train"]["label"], codes["dev"], task.data["dev"]["label"], part)
    log = TrainLog([], 0.0, 0, part.head.numel() + part.head_bias.numel())
    return Baseline(Classifier(encoder.model, part, frame), log, size, 0.0)


def head_size(part: TaskPart) -> int:
    """Bytes of a head as an adapter's file stores it (8-bit rows with scales, float16 biases)."""
    tensors = (*quantise(part.head.detach(), 8), part.head_bias.detach().half())
    return sum(t.numel() * t.element_size() for t in tensors)


def as_file(state: dict[str, torch.Tensor]) -> int:
    """Bytes of a float16 safetensors file of ``state``."""
    from safetensors.torch import save

    return len(io.BytesIO(save({k: v.half().contiguous() for k, v in state.items()})).getvalue())
