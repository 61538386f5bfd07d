"""Baselines on the same host, labels and head: head only, BitFit, PEFT's small methods, SAT-LoRA, full fine-tuning."""

from __future__ import annotations

import math
import tempfile
import warnings
from collections.abc import Sequence
from copy import deepcopy
from dataclasses import dataclass, replace
from pathlib import Path

import pandas as pd
import safetensors.torch
import torch
from peft import (
    FourierFTConfig,
    LoraConfig,
    PeftConfig,
    PeftModel,
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
from uhl.config import METHODS, Sizes, TrainConfig
from uhl.errors import one_of
from uhl.fits import basis_of
from uhl.frame import LAST, Frame
from uhl.head import fit_head
from uhl.host import Slot, find_slots
from uhl.models import Encoder
from uhl.peft_method import attach
from uhl.quant import quantise
from uhl.sat import SATAdapter
from uhl.tasks import Task
from uhl.train import Classifier, TrainLog, Watch, train

SPARSE = ("sat-lora", "hf-sat-lora")
RATES: dict[str, str] = {
    m: m.removesuffix("-r8").replace("-", "_") + "_rate" for m in METHODS if m != "head"
}  # settings of the rates
RANK = 8
HEAD_AND_HEADER = 24_000  # bytes that a rank may not use: the head, and a tensor's line in the file's header each
VERA_RANK, SMALL_RANK, VALUES = 256, 4, 23_040  # of VeRA; of VB-LoRA and Uni-LoRA, and the values that both train
RANKS = {"LoRA r8": RANK, "VeRA r256": VERA_RANK, "VB-LoRA": SMALL_RANK, "Uni-LoRA": SMALL_RANK}


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


def own_frame(encoder: Encoder, probe: Probe, width: int = 256, levels: tuple[int, ...] = LAST) -> Frame:
    """Head coordinates of a host from its own states on unlabelled texts, at ``levels``: the same head capacity for
    every method.

    No weight has a pair in it: sparse adapters' atoms are of the weights' own sides.
    """
    return replace(basis_of(observe(encoder, probe), width, levels).frame([]), stream=False)


def start(encoder: Encoder, task: Task, probe: Probe, max_length: int = 64, levels: tuple[int, ...] = LAST) -> Start:
    """Fit the head on the bare host, whose ``levels`` it reads. Every method begins there, and `head` stays there."""
    part = TaskPart(Sizes(), task.labels, task.kind)
    for p in (part.embedding, part.bias):
        p.requires_grad_(False)
    device = next(encoder.model.parameters()).device
    frame = own_frame(encoder, probe, levels=levels).to(device)
    fit = fit_head(Classifier(encoder.model, part.to(device), frame), encoder, task, max_length)
    return Start(frame, part, fit.seconds)


def run_baseline(
    method: str,
    encoder: Encoder,
    task: Task,
    begin: Start,
    config: TrainConfig,
    folder: str | Path,
    watch: Watch | None = None,
    sizes: Sizes | None = None,
    about: str = "",
) -> Baseline:
    """Train one of :data:`uhl.config.METHODS` on the task's training split.

    The encoder is changed in place, ``begin`` is not. ``sizes`` are a sparse method's; None: the hypothesis's.
    ``about`` is :func:`uhl.train.train`'s: what the start was fitted to.
    """
    one_of(method, METHODS, "baseline")
    part, frame = deepcopy(begin.part), begin.frame
    torch.manual_seed(config.seed)
    model: nn.Module = encoder.model
    for name, p in model.named_parameters():
        p.requires_grad_(method == "full" or (method == "bitfit" and name.endswith("bias")))
    if method == "head":
        log = TrainLog([], begin.seconds, 0, part.head.numel() + part.head_bias.numel())
        return Baseline(Classifier(model, part, frame), log, head_size(part, frame), 0.0)
    slots, flops, attached = find_slots(model), 0.0, None
    if method in SPARSE:
        sizes = sizes or Sizes(seed=config.seed)
        adapter = SATAdapter(sizes, slots, encoder.width, functional=method == "hf-sat-lora")
        adapter.tasks["main"] = part
        part.embedding.requires_grad_(True)
        attached = attach(model, adapter, "main", frame)
        flops = budget.extra_flops_pct(adapter.config, slots, slots, encoder.width)
    elif method not in {"bitfit", "full"}:
        lora, targets, rank = peft_method(method, slots)
        model = get_peft_model(model, lora)  # type: ignore[arg-type]
        flops = budget.lora_flops_pct(rank, targets, slots)
    classifier = Classifier(model, part, frame, attached, config)
    log = train(classifier, encoder, task, config, folder, about, watch)
    if attached is None:
        round_trained(classifier)
    return Baseline(classifier, log, added_bytes(classifier) + head_size(part, frame), flops)


def peft_method(method: str, slots: Sequence[Slot]) -> tuple[PeftConfig, list[Slot], int]:
    """PEFT's configuration of a method for a host's weights, the weights that it changes, and its rank.

    All change Q and V, as their authors do, but `lora-1mb`: LoRA on every weight, at the largest rank that stays within
    the adapter's budgets, its file of float16 in :data:`uhl.budget.LIMIT_BYTES` and its FLOPs in ``LIMIT_FLOPS_PCT``.
    """
    if method == "lora-1mb":
        left = budget.LIMIT_BYTES - HEAD_AND_HEADER
        rank = left // (2 * sum(s.d_in + s.d_out for s in slots))
        rank = max(1, min(rank, int(budget.LIMIT_FLOPS_PCT / budget.lora_flops_pct(1, slots, slots))))
        paths = [s.path for s in slots]
        return LoraConfig(r=rank, lora_alpha=2 * rank, lora_dropout=0.0, target_modules=paths), list(slots), rank
    targets = [s for s in slots if s.type in {"Q", "V"}]
    name = {"lora-r8": "LoRA r8", "vera": "VeRA r256", "vb-lora": "VB-LoRA", "uni-lora": "Uni-LoRA"}[method]
    return peft_methods([s.path for s in targets], widths(targets))[name], targets, RANKS[name]


def head_size(part: TaskPart, frame: Frame) -> int:
    """Bytes of a head folded into its host's coordinates, as it would be stored (8-bit rows, float16 biases)."""
    tensors = (*quantise((part.head @ frame.head).detach(), 8), part.head_bias.detach().half())
    return sum(t.numel() * t.element_size() for t in tensors)


def added_bytes(classifier: Classifier) -> int:
    """Bytes of a file with what was trained beside the head: PEFT's own or bare tensors, in float16 or as quantised."""
    if isinstance(classifier.adapter, SATAdapter):
        (task,) = classifier.adapter.tasks
        return len(safetensors.torch.save(classifier.adapter.stored(task)))
    if isinstance(classifier.model, PeftModel):
        return saved_bytes(classifier.model, torch.float16)
    own = {n: p.detach().half() for n, p in classifier.model.named_parameters() if p.requires_grad}
    return len(safetensors.torch.save(own))


def saved_bytes(model: PeftModel, dtype: torch.dtype) -> int:
    """Bytes of PEFT's file of a model's adapter, with what trains in ``dtype``; the model is left as it was. For int8
    PEFT's file is written again, each tensor's rows along its longest axis as :func:`uhl.quant.quantise` gives them.
    """
    own = [(p, p.data) for p in model.parameters() if p.requires_grad]
    try:
        with tempfile.TemporaryDirectory() as folder:
            for p, data in own:
                p.data = data.to(dtype if dtype.is_floating_point else torch.float32)
            model.save_pretrained(folder)
            written = (Path(folder) / SAFETENSORS_WEIGHTS_NAME).read_bytes()
            return len(written if dtype.is_floating_point else _at_eight_bits(written))
    finally:
        for p, data in own:
            p.data = data


def _at_eight_bits(file: bytes) -> bytes:
    """A file of tensors with 8 bits in place of each real number, and a float16 scale a row."""
    tensors = {}
    for name, x in safetensors.torch.load(file).items():
        if not x.is_floating_point():
            tensors[name] = x
            continue
        x = torch.atleast_1d(x)
        rows = x.movedim(max(range(x.ndim), key=lambda axis: x.shape[axis]), -1).contiguous()
        tensors[name], tensors[f"{name}.scale"] = quantise(rows, 8)
    return safetensors.torch.save(tensors)


@torch.no_grad()
def round_trained(classifier: Classifier) -> None:
    """Round what was trained beside the head to float16, as its file would hold it: scores are those of the file."""
    for name, parameter in classifier.named_parameters():
        if parameter.requires_grad and not name.startswith("part."):
            parameter.copy_(parameter.half().float())


def widths(slots: Sequence[Slot]) -> list[int]:
    """What the weights read and write: d_in and d_out of each."""
    return [size for s in slots for size in (s.d_in, s.d_out)]


def vector_length(sizes: Sequence[int]) -> int:
    """Length of VB-LoRA's vectors on weights of these sizes, each of which it must divide: the longest up to 256."""
    divisor = math.gcd(*sizes)
    return max(n for n in range(1, min(divisor, 256) + 1) if divisor % n == 0)


def peft_methods(targets: Sequence[str], sizes: Sequence[int]) -> dict[str, PeftConfig]:
    """PEFT's small methods on the weights whose names end in ``targets``, with the sizes that their authors report.
    ``sizes``: all widths that these weights read or write.

    LoRA (Hu et al. 2021) at rank 8, VeRA (Kopiczko et al. 2023) at rank 256, VB-LoRA (Li et al. 2024) with 23,040
    values in vectors of :func:`vector_length`, FourierFT (Gao et al. 2024) with 1,000 coefficients, Uni-LoRA (Li et al.
    2025) with a vector of 23,040.
    """
    names, length = list(targets), vector_length(sizes)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Specified to not save vera_A and vera_B")  # as meant: a seed remakes them
        vera = VeraConfig(r=VERA_RANK, target_modules=names, save_projection=False)
    return {
        "LoRA r8": LoraConfig(r=RANK, lora_alpha=2 * RANK, lora_dropout=0.0, target_modules=names),
        "VeRA r256": vera,
        "VB-LoRA": VBLoRAConfig(
            r=SMALL_RANK,
            num_vectors=VALUES // length,
            vector_length=length,
            topk=2,
            target_modules=names,
            save_only_topk_weights=True,
        ),
        "FourierFT": FourierFTConfig(n_frequency=1000, target_modules=names),
        "Uni-LoRA": UniLoraConfig(r=SMALL_RANK, theta_d_length=VALUES, target_modules=names),
    }


def file_sizes(model: nn.Module, targets: Sequence[str]) -> pd.DataFrame:
    """Bytes of each of PEFT's methods on a host, of files that PEFT wrote: as it trains (float32), as float16, and the
    same at 8 bits (:func:`saved_bytes`).
    """
    rows, slots = [], [s for s in find_slots(model) if s.path.endswith(tuple(targets))]
    for name, config in peft_methods(targets, widths(slots)).items():
        torch.manual_seed(0)
        adapted = get_peft_model(model, config)  # type: ignore[arg-type]
        trained = sum(p.numel() for p in adapted.parameters() if p.requires_grad)
        whole, half, eight = (saved_bytes(adapted, d) for d in (torch.float32, torch.float16, torch.int8))  # type: ignore[arg-type]
        sizes = {"bytes": whole, "bytes, float16": half, "bytes, 8 bits": eight}
        rows.append({"method": name, "trained": trained} | sizes)
        model = adapted.unload()  # type: ignore[operator]
    return pd.DataFrame(rows)
