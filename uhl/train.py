"""Training and prediction: one classifier module for every method, and the Trainer with the budget loss.

    loss = cross-entropy + lambda_F E[k] + lambda_Q ||d_theta||^2

The host stays frozen. Every method, ours and the baselines, reads a host's states through a frame's head coordinates
into the same linear head, so head capacity is equal everywhere: the last states, and where a head was ported by anchors
some levels below, which baselines on targets read as well.
"""

from __future__ import annotations

import hashlib
import json
import math
import shutil
import time
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.modules.module import _IncompatibleKeys
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import (
    DataCollatorForTokenClassification,
    DataCollatorWithPadding,
    PrinterCallback,
    Trainer,
    TrainerCallback,
    TrainerState,
    TrainingArguments,
)
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_pt_utils import LengthGroupedSampler
from transformers.trainer_utils import get_last_checkpoint

from uhl.adapter import TaskPart
from uhl.anchors import read_levels, sentence_mean
from uhl.config import TrainConfig
from uhl.errors import DivergenceError, UHLError
from uhl.files import write_text
from uhl.frame import Frame
from uhl.layer import Attached
from uhl.models import Encoder
from uhl.progress import batch
from uhl.tasks import IGNORE, Task, encode, every_word, gold_labels, kept_words, score


class Classifier(nn.Module):
    """Host, frame and head. With ``attached`` the frame is the adapter's, and the loss holds its budget terms."""

    def __init__(
        self,
        model: nn.Module,
        part: TaskPart,
        frame: Frame | None = None,
        attached: Attached | None = None,
        train_config: TrainConfig | None = None,
    ) -> None:
        super().__init__()
        self.model, self.part = model, part
        self.adapter = attached.adapter if attached else None
        self._attached, self._frame = attached, frame
        self._config = train_config or TrainConfig()
        device = next(model.parameters()).device
        self.part.to(device)
        if self._frame is not None:
            self._frame = self._frame.to(device)

    @property
    def frame(self) -> Frame:
        """The frame in use: the attached adapter's as last folded, else the given one."""
        frame = self._attached.current if self._attached else self._frame
        assert frame is not None
        return frame

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor,
        labels: Tensor | None = None,
        teacher: Tensor | None = None,
        **extra: Tensor,
    ) -> dict[str, Tensor]:
        """Logits (B, labels) or (B, T, labels), and the loss where labels are given. ``teacher``: logits in that form,
        NaN where there are none.
        """
        logits = self.part.classify(self.codes(input_ids, attention_mask, **extra))
        out = {"logits": logits}
        if labels is not None:
            out["loss"] = self.loss(logits, labels, teacher)
        return out

    def codes(self, input_ids: Tensor, attention_mask: Tensor, **extra: Tensor) -> Float[Tensor, "*b C"]:
        """What the head reads: canonical codes of each sentence (B, C), or of each token (B, T, C)."""
        levels = self._attached.levels if self._attached else self.frame.levels
        hidden = read_levels(self.model, levels, input_ids=input_ids, attention_mask=attention_mask, **extra)
        return self.frame.codes(hidden if self.part.kind == "token" else sentence_mean(hidden, attention_mask))

    def loss(
        self, logits: Float[Tensor, "*b labels"], labels: Tensor, teacher: Float[Tensor, "*b labels"] | None = None
    ) -> Float[Tensor, ""]:
        """Cross-entropy, with a teacher's as :mod:`uhl.teacher` has it, plus the budget terms where an adapter is
        attached.
        """
        flat, gold = logits.flatten(0, -2), labels.flatten()
        if teacher is None:
            total = nn.functional.cross_entropy(flat, gold, ignore_index=IGNORE)
        else:
            total = self._with_teacher(flat, gold, teacher.flatten(0, -2).to(flat))
        if self._attached is not None and self.training:
            total = total + self._config.lambda_f * self._attached.active()
            total = total + self._config.lambda_q * self.part.bias.pow(2).sum()
        return total

    def _with_teacher(
        self, logits: Float[Tensor, "n labels"], labels: Tensor, teacher: Float[Tensor, "n labels"]
    ) -> Float[Tensor, ""]:
        """The mean over all rows with a label or a teacher's logits."""
        known, told = labels != IGNORE, ~teacher.isnan().any(-1)
        by_label = nn.functional.cross_entropy(logits, labels, ignore_index=IGNORE, reduction="none")
        by_teacher = nn.functional.cross_entropy(logits, teacher.nan_to_num().softmax(-1), reduction="none")
        weight = torch.where(known, self._config.teacher_weight, 1.0) * told
        each = (1 - weight) * by_label + weight * by_teacher
        return each.sum() / (known | told).sum().clamp_min(1)

    def state_dict(self, *args: Any, **kwargs: Any) -> dict[str, Any]:  # type: ignore[override]
        """Trained parameters only, as they are trained: not yet rounded, and without the frozen host."""
        return {name: p.detach() for name, p in self.named_parameters() if p.requires_grad}

    def load_state_dict(self, state: Mapping[str, Any], strict: bool = True, assign: bool = False) -> Any:
        """Load what :meth:`state_dict` gave; anything else is an error."""
        wanted = {name for name, p in self.named_parameters() if p.requires_grad}
        if set(state) != wanted:
            raise UHLError(
                "the checkpoint holds other parameters than this run trains; delete its folder and run again"
            )
        super().load_state_dict(state, strict=False, assign=assign)
        return _IncompatibleKeys([], [])  # the frozen host is not missing, it was never written


def parameter_groups(model: Classifier, config: TrainConfig) -> list[dict[str, Any]]:
    """Learning rates by part: mixer and task bias, head, and everything else."""
    groups: dict[float, list[nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            last = name.rsplit(".", 1)[-1]
            if last in {"head", "head_bias"}:
                rate = config.head_rate
            elif ".mixer." in f".{name}" or (last == "bias" and parameter is model.part.bias):
                rate = config.mixer_rate
            else:
                rate = config.rate
            groups.setdefault(rate, []).append(parameter)
    return [{"params": params, "lr": rate} for rate, params in groups.items()]


class EpochSampler(LengthGroupedSampler):
    """Batches of similar length in an order that seed and epoch alone decide, so that a resumed epoch is the same."""

    def __init__(self, batch: int, rows: Dataset, seed: int) -> None:
        super().__init__(batch, lengths=[len(ids) for ids in rows["input_ids"]])
        self._seed = seed
        self.set_epoch(0)

    def set_epoch(self, epoch: int) -> None:
        """Called by the Trainer before each epoch."""
        self.generator = torch.Generator().manual_seed(1000 * self._seed + epoch)


class BudgetTrainer(Trainer):
    """transformers' Trainer with a learning rate for each part, and a stop on a loss that is not finite."""

    def __init__(self, *args: Any, train_config: TrainConfig, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._train_config = train_config

    def _get_train_sampler(self, train_dataset: Any = None) -> EpochSampler:
        rows = self.train_dataset if train_dataset is None else train_dataset
        return EpochSampler(self.args.per_device_train_batch_size, rows, self.args.seed)

    def create_optimizer(self, *args: Any, **kwargs: Any) -> torch.optim.Optimizer:
        """AdamW over :func:`parameter_groups`."""
        if self.optimizer is None:
            groups = parameter_groups(self.model, self._train_config)  # type: ignore[arg-type]
            self.optimizer = torch.optim.AdamW(groups, weight_decay=0.0)
        return self.optimizer

    def compute_loss(self, model: nn.Module, inputs: Mapping[str, Any], *args: Any, **kwargs: Any) -> Any:
        """The classifier's own loss; :class:`DivergenceError` when it is NaN or infinite."""
        with torch.autocast(self.args.device.type, torch.bfloat16, enabled=self._train_config.bf16):
            out = model(**inputs)
        if not torch.isfinite(out["loss"]):
            raise DivergenceError(
                f"the loss is {out['loss'].item()} at step {self.state.global_step}; lower the learning rates "
                f"(the last checkpoint is kept in {self.args.output_dir})"
            )
        return (out["loss"], out) if kwargs.get("return_outputs") else out["loss"]


class _Live(TorchDispatchMode):
    """Bytes of the tensors that operations have made and that are still there, and the most at a time."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        known = {x.untyped_storage().data_ptr() for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)}
        for x in tree_leaves(out):
            if isinstance(x, Tensor) and (storage := x.untyped_storage()).data_ptr() not in known:  # else a view
                self.now += storage.nbytes()
                self.peak = max(self.peak, self.now)
                weakref.finalize(storage, self._gone, storage.nbytes()).atexit = False
        return out

    def _gone(self, size: int) -> None:
        self.now -= size


class StepMemory(TrainerCallback):
    """The most bytes that the first step held at a time: activations, gradients and AdamW's moments.

    The first batch is the one of the longest texts. The host's weights and the parameters themselves do not count.
    """

    def __init__(self) -> None:
        self.peak: int | None = None
        self._live: _Live | None = None

    def on_step_begin(self, args: object, state: TrainerState, *_: object, **__: object) -> None:
        """Watch the first step of all."""
        if state.global_step == 0:
            self._live = _Live()
            self._live.__enter__()

    def on_step_end(self, *_: object, **__: object) -> None:
        """It has ended."""
        self.stop()

    def stop(self) -> None:
        """Watch no more; needed where the step did not end."""
        if self._live is not None:
            self._live.__exit__(None, None, None)
            self.peak, self._live = self._live.peak, None


class _Clock(TrainerCallback):
    """Wall seconds of a run, those before its last interruption among them: kept in each checkpoint."""

    FILE = "seconds.txt"

    def __init__(self, checkpoint: str | None) -> None:
        kept = Path(checkpoint or "") / self.FILE
        self.before = float(kept.read_text(encoding="utf-8")) if checkpoint and kept.is_file() else 0.0
        self.begun = time.time()

    @property
    def seconds(self) -> float:
        """So far."""
        return self.before + time.time() - self.begun

    def on_train_begin(self, *_: object, **__: object) -> None:
        """What comes before the first step does not count."""
        self.begun = time.time()

    def on_save(self, args: TrainingArguments, state: TrainerState, *_: object, **__: object) -> None:
        """Beside the checkpoint's own files."""
        write_text(Path(str(args.output_dir)) / f"checkpoint-{state.global_step}" / self.FILE, f"{self.seconds}")


Watch = Callable[[int, float], None]  # quarters of the steps, dev score


class _DevScores(TrainerCallback):
    """Tells ``watch`` a score after a quarter, half and three quarters of the steps."""

    def __init__(self, watch: Watch, score: Callable[[], float]) -> None:
        self.watch, self.score = watch, score

    def on_step_end(self, args: object, state: TrainerState, *_: object, **__: object) -> None:
        """Score where it is time to."""
        parts = [part for part in (1, 2, 3) if state.max_steps * part // 4 == state.global_step]
        if parts:  # several, where steps are few
            self.watch(parts[-1], self.score())


@dataclass
class TrainLog:
    """What a run leaves: loss by step, wall seconds, optimiser steps, the count of trained parameters, and the peak of
    memory of a step in MB, see :class:`StepMemory` (None where nothing trained, or training was resumed).
    """

    losses: list[tuple[int, float]]
    seconds: float
    steps: int
    trained: int
    peak_mb: float | None = None

    def costs(self) -> dict[str, float | int | None]:
        """Columns of a result row."""
        return {
            "trainable_params": self.trained,
            "seconds": self.seconds,
            "steps": self.steps,
            "peak_mb": self.peak_mb,
        }


RUN_FILE = "run.txt"


def fingerprint(classifier: Classifier, encoder: Encoder, task: Task, config: TrainConfig, about: str) -> str:
    """Hash of what a run is: settings, data, host, ``about``, and the frozen parts beside the host.

    A checkpoint belongs to one of these. Trained parameters count by name and shape: their start may differ in the
    last bits between machines.
    """
    own = {n: p for n, p in classifier.named_parameters() if p.requires_grad or not n.startswith("model.")}
    trained = sorted((n, tuple(p.shape)) for n, p in own.items() if p.requires_grad)
    rows = task.data["train"]
    named = [
        config.model_dump(),
        task.name,
        task.labels,
        rows.to_dict(),
        encoder.name,
        encoder.revision,
        about,
        trained,
    ]
    total = hashlib.sha256(json.dumps(named, sort_keys=True, default=str).encode())
    for name, parameter in sorted(own.items()):
        if not parameter.requires_grad:
            total.update(name.encode() + parameter.detach().cpu().numpy().tobytes())
    return total.hexdigest()


def _is_whole(checkpoint: Path) -> bool:
    """Whether a checkpoint has the file that the Trainer writes last, before it removes an older one."""
    try:
        json.loads((checkpoint / TRAINER_STATE_NAME).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return True


def _own_checkpoint(folder: Path, mark: str) -> str | None:
    """The last checkpoint in ``folder`` where it belongs to this run; those of another run, and one that was being
    written when its run was stopped, are removed.
    """
    file = folder / RUN_FILE
    other = not file.is_file() or file.read_text(encoding="utf-8") != mark
    for left in folder.glob("checkpoint-*"):
        if other or not _is_whole(left):
            shutil.rmtree(left)
    if other:
        write_text(file, mark)
    return get_last_checkpoint(str(folder))


def train(
    classifier: Classifier,
    encoder: Encoder,
    task: Task,
    config: TrainConfig,
    folder: str | Path,
    about: str = "",
    watch: Watch | None = None,
    callbacks: Sequence[TrainerCallback] = (),
) -> TrainLog:
    """Train what ``requires_grad`` on the task's training split; resumes from a checkpoint in ``folder``.

    A checkpoint of another run (other settings, data, host or ``about``) is discarded. Checkpoints are removed when the
    run ends. ``watch(quarters, score)`` is told the dev score after one, two and three quarters of the steps; what
    ``callbacks`` do is to be named in ``about``. Raises :class:`DivergenceError` when the loss is not finite.
    """
    rows = encode(task.kind, task.data["train"], encoder.tokenizer, config.max_length)
    steps = config.steps_for(len(rows))
    arguments = TrainingArguments(
        output_dir=str(folder),
        max_steps=steps,
        per_device_train_batch_size=config.batch,
        lr_scheduler_type="linear",
        warmup_steps=int(config.warmup * steps),
        max_grad_norm=1.0,
        logging_steps=max(1, steps // 20),
        logging_nan_inf_filter=False,
        save_steps=max(1, math.ceil(steps / 4)),
        save_total_limit=1,
        seed=config.seed,
        data_seed=config.seed,
        use_cpu=not torch.cuda.is_available(),
        disable_tqdm=batch(),
        report_to=[],
        label_names=["labels"],
        remove_unused_columns=False,
    )
    trainer = BudgetTrainer(
        classifier, arguments, train_dataset=rows, data_collator=collator(encoder, task), train_config=config
    )
    memory = StepMemory()
    for callback in (memory, *callbacks):
        trainer.add_callback(callback)
    if watch is not None:
        sizes = {"max_length": config.max_length}
        trainer.add_callback(_DevScores(watch, lambda: predict(classifier, encoder, task, "dev", **sizes).score))
    trainer.remove_callback(PrinterCallback)  # without a progress bar it would print every log line
    checkpoint = _own_checkpoint(Path(folder), fingerprint(classifier, encoder, task, config, about))
    clock = _Clock(checkpoint)
    trainer.add_callback(clock)
    try:
        trainer.train(resume_from_checkpoint=checkpoint)
    finally:
        memory.stop()
    seconds = clock.seconds
    for left in Path(folder).glob("checkpoint-*"):
        shutil.rmtree(left)
    losses = [(int(e["step"]), float(e["loss"])) for e in trainer.state.log_history if "loss" in e]
    trained = sum(p.numel() for p in classifier.parameters() if p.requires_grad)
    classifier.eval()
    peak = None if memory.peak is None else memory.peak / 1e6
    return TrainLog(losses, seconds, trainer.state.global_step, trained, peak)


def collator(encoder: Encoder, task: Task) -> Any:
    """Padding for the task's kind, of a teacher's logits too."""
    pad = (DataCollatorForTokenClassification if task.kind == "token" else DataCollatorWithPadding)(encoder.tokenizer)

    def collate(rows: Sequence[Mapping[str, Any]]) -> Any:
        made = pad([{name: value for name, value in row.items() if name != "teacher"} for row in rows])
        if "teacher" in rows[0]:
            told = [torch.tensor(row["teacher"], dtype=torch.float32) for row in rows]
            made["teacher"] = nn.utils.rnn.pad_sequence(told, batch_first=True, padding_value=math.nan)
        return made

    return collate


def eval_batches(rows: Dataset, size: int) -> Iterator[list[int]]:
    """Row indices in batches of similar length."""
    order = sorted(range(len(rows)), key=lambda i: len(rows[i]["input_ids"]))
    for start in range(0, len(order), size):
        yield order[start : start + size]


@dataclass
class Prediction:
    """Predictions of a split in its order, their gold labels, logits, the score and the mean atoms a token used."""

    labels: list[Any]
    gold: list[Any]
    logits: list[np.ndarray]
    score: float
    active: float


@torch.no_grad()
def predict(
    classifier: Classifier, encoder: Encoder, task: Task, split: str, batch: int = 64, max_length: int = 64
) -> Prediction:
    """Predict a whole split in evaluation mode. ``active`` is 0 without an adapter."""
    rows = encode(task.kind, task.data[split], encoder.tokenizer, max_length)
    collate, device = collator(encoder, task), next(classifier.parameters()).device
    labels: list[Any] = [None] * len(rows)
    logits: list[Any] = [None] * len(rows)
    atoms = tokens = 0.0
    classifier.eval()
    for chosen in eval_batches(rows, batch):
        inputs = collate([rows[i] for i in chosen]).to(device)
        truth = inputs.pop("labels").cpu().numpy()
        out = classifier(**inputs)["logits"].cpu().numpy()
        if classifier._attached is not None:
            count = float(inputs["attention_mask"].sum())
            atoms, tokens = atoms + float(classifier._attached.active()) * count, tokens + count
        for place, row, answer in zip(chosen, out, truth, strict=True):
            keep = answer != IGNORE if task.kind == "token" else ...
            logits[place] = row[keep]
            labels[place] = row[keep].argmax(-1).tolist()
    gold = gold_labels(task, split)
    if task.kind == "token":
        kept = kept_words(task.data[split], encoder.tokenizer, max_length)
        labels = [every_word(*found, task) for found in zip(labels, gold, kept, strict=True)]
    return Prediction(labels, gold, logits, score(task, labels, gold), atoms / tokens if tokens else 0.0)  # type: ignore[arg-type]
