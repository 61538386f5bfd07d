"""Baselines on the same host, labels and head: rank-8 LoRA and full fine-tuning (PEFT, Trainer), and head only."""

from __future__ import annotations

import tempfile
import warnings
from collections.abc import Sequence
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path

import pandas as pd
import torch
from peft import (
    FourierFTConfig,
    LoraConfig,
    PeftConfig,
    UniLoraConfig,
    VBLoRAConfig,
    VeraConfig,
    get_peft_model,
)
from peft.utils import SAFETENSORS_WEIGHTS_NAME
from torch import nn

from uhl import budget
from uhl.adapter import TaskPart
from uhl.anchors import Probe, observe
from uhl.config import Sizes, TrainConfig
from uhl.errors import one_of
from uhl.frame import Frame
from uhl.head import fit_head
from uhl.host import find_slots
from uhl.models import Encoder
from uhl.porting import basis_of
from uhl.quant import quantise
from uhl.tasks import Task
from uhl.train import Classifier, TrainLog, train

METHODS = ("head", "lora-r8", "full")
RANK = 8


@dataclass
class Baseline:
    """A trained baseline: a classifier ready to predict, what it trained, and the bytes it adds to the bare host."""

    classifier: Classifier
    log: TrainLog
    bytes: int
    extra_flops_pct: float


@dataclass
class Start:
    """Where every baseline of a host begins: head coordinates of its own, a fitted head, and what they took."""

    frame: Frame
    part: TaskPart
    seconds: float


def own_frame(encoder: Encoder, probe: Probe, width: int = 256) -> Frame:
    """Head coordinates of a host from its own states on unlabelled texts: the same head capacity for every method."""
    return basis_of(observe(encoder, probe), width).frame(encoder.model, [])


def start(encoder: Encoder, task: Task, probe: Probe, max_length: int = 64) -> Start:
    """Fit the head on the bare host. Every method begins there, and `head` stays there."""
    part = TaskPart(Sizes(), task.labels, task.kind)
    for p in (part.embedding, part.bias):
        p.requires_grad_(False)
    device = next(encoder.model.parameters()).device
    frame = own_frame(encoder, probe).to(device)
    seconds = fit_head(Classifier(encoder.model, part.to(device), frame), encoder, task, max_length)
    return Start(frame, part, seconds)


def run_baseline(
    method: str, encoder: Encoder, task: Task, begin: Start, config: TrainConfig, folder: str | Path
) -> Baseline:
    """Train one of :data:`METHODS` on the task's training split. The encoder is changed in place, ``begin`` is not."""
    one_of(method, METHODS, "baseline")
    part, frame = deepcopy(begin.part), begin.frame
    torch.manual_seed(config.seed)
    model: nn.Module = encoder.model
    for p in model.parameters():
        p.requires_grad_(method == "full")
    if method == "head":
        log = TrainLog([], begin.seconds, 0, part.head.numel() + part.head_bias.numel())
        return Baseline(Classifier(model, part, frame), log, head_size(part, frame), 0.0)
    flops = 0.0
    if method == "lora-r8":
        slots = find_slots(model)
        targets = [s for s in slots if s.type in {"Q", "V"}]
        lora = LoraConfig(r=RANK, lora_alpha=2 * RANK, lora_dropout=0.0, target_modules=[s.path for s in targets])
        model = get_peft_model(model, lora)  # type: ignore[arg-type]
        flops = budget.lora_flops_pct(RANK, targets, slots)
    classifier = Classifier(model, part, frame, train_config=config)
    log = train(classifier, encoder, task, config, folder)
    round_trained(classifier)
    own = sum(p.numel() for n, p in classifier.named_parameters() if p.requires_grad and "part." not in n)
    return Baseline(classifier, log, 2 * own + head_size(part, frame), flops)


def head_size(part: TaskPart, frame: Frame) -> int:
    """Bytes of a head folded into its host's coordinates, as it would be stored (8-bit rows, float16 biases)."""
    tensors = (*quantise((part.head @ frame.head).detach(), 8), part.head_bias.detach().half())
    return sum(t.numel() * t.element_size() for t in tensors)


@torch.no_grad()
def round_trained(classifier: Classifier) -> None:
    """Round what was trained beside the head to float16, as its file would hold it: scores are those of the file."""
    for name, parameter in classifier.named_parameters():
        if parameter.requires_grad and not name.startswith("part."):
            parameter.copy_(parameter.half().float())


def peft_methods(targets: Sequence[str]) -> dict[str, PeftConfig]:
    """PEFT's small methods on the weights whose names end in ``targets``, with the sizes that their authors report.

    LoRA (Hu et al. 2021) at rank 8, VeRA (Kopiczko et al. 2023) at rank 256, VB-LoRA (Li et al. 2024) with 90 vectors
    of 256, FourierFT (Gao et al. 2024) with 1,000 coefficients, Uni-LoRA (Li et al. 2025) with a vector of 23,040.
    """
    names = list(targets)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Specified to not save vera_A and vera_B")  # as meant: a seed remakes them
        vera = VeraConfig(r=256, target_modules=names, save_projection=False)
    return {
        "LoRA r8": LoraConfig(r=RANK, target_modules=names),
        "VeRA r256": vera,
        "VB-LoRA": VBLoRAConfig(
            r=4, num_vectors=90, vector_length=256, topk=2, target_modules=names, save_only_topk_weights=True
        ),
        "FourierFT": FourierFTConfig(n_frequency=1000, target_modules=names),
        "Uni-LoRA": UniLoraConfig(r=4, theta_d_length=23_040, target_modules=names),
    }


def file_sizes(model: nn.Module, targets: Sequence[str]) -> pd.DataFrame:
    """Bytes of each of PEFT's methods on a host, of files that PEFT wrote: as it trains (float32), and as float16."""
    rows = []
    for name, config in peft_methods(targets).items():
        torch.manual_seed(0)
        adapted = get_peft_model(model, config)  # type: ignore[arg-type]
        own = [p for p in adapted.parameters() if p.requires_grad]
        trained = sum(p.numel() for p in own)
        sizes = []
        for dtype in (torch.float32, torch.float16):
            with tempfile.TemporaryDirectory() as folder:
                for p in own:
                    p.data = p.data.to(dtype)
                adapted.save_pretrained(folder)
                sizes.append((Path(folder) / SAFETENSORS_WEIGHTS_NAME).stat().st_size)
        rows.append({"method": name, "trained": trained, "bytes": sizes[0], "bytes, float16": sizes[1]})
        model = adapted.unload()  # type: ignore[operator]
    return pd.DataFrame(rows)
