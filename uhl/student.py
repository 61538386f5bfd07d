"""`minilm-4x312`: a narrow student of `minilm-l6`, made here on unlabelled text and shipped at 8 bits.

It has TinyBERT-4L's shape (4 layers, width 312, 12 heads of 26, feed-forward 1200). Two steps, both without labels:

1. *Compression*: width by the principal directions ``Q`` (384, 312) of the teacher's residual stream, heads and
   feed-forward neurons by norm, layers 0, 2, 3, 5 of 6.
2. *Distillation*: hidden states and sentence means towards the teacher's through one linear map per depth, as in
   TinyBERT (Jiao et al. 2020, arXiv:1909.10351), on sentences outside every dev and test split.

The shipped file was made by ``python -m uhl.student --bf16`` (39 minutes on one core); models load that file.
"""

from __future__ import annotations

import argparse
import json
import random
import time
from pathlib import Path

import torch
from jaxtyping import Float
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import BertConfig, BertModel

from uhl.errors import UHLError
from uhl.files import sha256, write_atomic
from uhl.tasks import OFFLINE, generic_text, load_task

SHAPE = {"hidden_size": 312, "num_hidden_layers": 4, "num_attention_heads": 12, "intermediate_size": 1200}
TEACHER_LAYERS = (0, 2, 3, 5)  # layer that each student layer starts from
TEACHER_STATES = (0, 1, 3, 4, 6)  # teacher's hidden state (of 0..6) that each student state is matched with


def corpus() -> list[str]:
    """Unlabelled sentences outside every dev and test split of the offline tasks, in a fixed order."""
    own = [t for name in OFFLINE for split in ("train", "unlabelled") for t in load_task(name).data[split]["text"]]
    return own + generic_text()


def _kept(matrix: Tensor, count: int) -> Tensor:
    """Indices (sorted) of the ``count`` rows of largest norm."""
    return matrix.norm(dim=1).topk(count).indices.sort().values


@torch.no_grad()
def compress(teacher: BertModel, basis: Tensor) -> BertModel:
    """Step 1. ``basis`` (384, 312) has orthonormal columns that span the teacher's main residual directions."""
    config = BertConfig(**{**teacher.config.to_dict(), **SHAPE})
    student = BertModel(config, add_pooling_layer=False)
    source, target = teacher.state_dict(), student.state_dict()
    new: dict[str, Tensor] = {}
    for name, value in target.items():
        if not name.startswith("encoder.layer."):
            full = source[name]
            new[name] = full if full.shape == value.shape else _narrow(name, full, basis)
            continue
        layer, rest = name.removeprefix("encoder.layer.").split(".", 1)
        prefix = f"encoder.layer.{TEACHER_LAYERS[int(layer)]}."
        heads, neurons = _kept_inner(source, prefix)
        full = source[prefix + rest]
        if rest.startswith("attention.self"):
            full = full[heads]
            new[name] = full @ basis if full.ndim == 2 else full
        elif rest == "attention.output.dense.weight":
            new[name] = basis.T @ full[:, heads]
        elif rest.startswith("intermediate"):
            new[name] = full[neurons] @ basis if full.ndim == 2 else full[neurons]
        elif rest == "output.dense.weight":
            new[name] = basis.T @ full[:, neurons]
        else:
            new[name] = _narrow(name, full, basis)
    student.load_state_dict(new)
    return student


def _narrow(name: str, full: Tensor, basis: Tensor) -> Tensor:
    """Embeddings, biases and norms of the residual stream in the narrow basis (a norm's gain by its mean)."""
    if name.endswith("LayerNorm.weight"):
        return full.mean().expand(basis.shape[1]).clone()
    return full @ basis


def _kept_inner(source: dict[str, Tensor], prefix: str) -> tuple[Tensor, Tensor]:
    """Attention rows (26 of 32 a head) and feed-forward neurons (1200 of 1536) with the largest weights."""
    out = source[prefix + "attention.output.dense.weight"]
    query = source[prefix + "attention.self.query.weight"]
    size, keep = query.shape[0] // 12, SHAPE["hidden_size"] // 12
    rows = out.T.norm(dim=1, keepdim=True) * query.norm(dim=1, keepdim=True)
    heads = torch.cat([h * size + _kept(rows[h * size : (h + 1) * size], keep) for h in range(12)])
    up, down = source[prefix + "intermediate.dense.weight"], source[prefix + "output.dense.weight"]
    neurons = _kept(up.norm(dim=1, keepdim=True) * down.T.norm(dim=1, keepdim=True), SHAPE["intermediate_size"])
    return heads, neurons


def principal_directions(states: Tensor, count: int) -> Tensor:
    """Leading eigenvectors (D, count) of the second moment of states (N, D)."""
    _, vectors = torch.linalg.eigh(states.T @ states)
    return vectors.flip(1)[:, :count].contiguous()


def distil(steps: int, batch: int, rate: float, seed: int, bf16: bool) -> BertModel:
    """Both steps; returns the student. Prints a line of progress every 100 steps."""
    from uhl.models import load_encoder

    torch.manual_seed(seed)
    encoder = load_encoder("minilm-l6")
    teacher, tokenizer, texts = encoder.model, encoder.tokenizer, corpus()
    order = random.Random(seed)

    def tokens(rows: list[str]) -> dict[str, Tensor]:
        return dict(tokenizer(rows, padding=True, truncation=True, max_length=64, return_tensors="pt"))

    with torch.no_grad():
        first = tokens(order.sample(texts, 512))
        hidden = teacher(**first, output_hidden_states=True).hidden_states
        mask = first["attention_mask"].bool()
        basis = principal_directions(torch.cat([h[mask] for h in hidden]), SHAPE["hidden_size"])
    student = compress(teacher, basis).train()  # type: ignore[arg-type]
    maps = nn.ParameterList([nn.Parameter(basis.T.clone()) for _ in TEACHER_STATES])
    optimiser = torch.optim.AdamW([*student.parameters(), *maps.parameters()], lr=rate, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, rate, total_steps=steps, pct_start=0.05)
    begun, seen = time.time(), 0.0
    for step in range(1, steps + 1):
        rows = tokens(order.sample(texts, batch))
        with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            with torch.no_grad():
                wanted = teacher(**rows, output_hidden_states=True).hidden_states
            given = student(**rows, output_hidden_states=True).hidden_states
        loss = _match(given, wanted, maps, rows["attention_mask"].float())
        optimiser.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(student.parameters(), 1.0)
        optimiser.step()
        schedule.step()
        seen += loss.item()
        if step % 100 == 0:
            print(f"step {step}/{steps} loss {seen / 100:.4f} {time.time() - begun:.0f} s", flush=True)
            seen = 0.0
    return student.eval()


def _match(given: tuple[Tensor, ...], wanted: tuple[Tensor, ...], maps: nn.ParameterList, mask: Tensor) -> Tensor:
    """Relative squared error of every matched state, and (weight 2) of the last sentence means."""
    total = torch.zeros(())
    for state, depth, lift in zip(given, TEACHER_STATES, maps, strict=True):
        goal = wanted[depth].float()
        error = ((state.float() @ lift - goal) ** 2).sum(-1)
        total = total + (error * mask).sum() / ((goal**2).sum(-1) * mask).sum()
    weights = (mask / mask.sum(1, keepdim=True))[:, :, None]
    guess, goal = (given[-1].float() @ maps[-1] * weights).sum(1), (wanted[-1].float() * weights).sum(1)
    return total + 2 * ((guess - goal) ** 2).sum() / (goal**2).sum()


def write_student(model: BertModel, path: Path, info: dict[str, object]) -> None:
    """Write the student: matrices as int8 with one float16 scale a row, vectors as float16."""
    tensors: dict[str, Tensor] = {}
    for name, value in model.state_dict().items():
        if value.ndim == 2:
            scale = value.abs().amax(1, keepdim=True).clamp_min(1e-8).div(127).half()
            tensors[name] = (value / scale.float()).round().clamp(-127, 127).to(torch.int8)
            tensors[name + ".scale"] = scale.squeeze(1)
        elif value.is_floating_point():
            tensors[name] = value.half()
    config = json.dumps(model.config.to_diff_dict(), sort_keys=True)
    meta = {"config": config, "info": json.dumps(info, sort_keys=True)}
    write_atomic(path, lambda tmp: save_file({k: v.contiguous() for k, v in tensors.items()}, tmp, meta))


def read_student(path: Path) -> tuple[BertConfig, dict[str, Tensor]]:
    """Configuration and float32 state dict of the shipped student."""
    if not path.is_file():
        raise UHLError(f"{path} is missing; restore it from the repository or make it with python -m uhl.student")
    with safe_open(path, "pt") as file:
        config = BertConfig(**json.loads(file.metadata()["config"]))
        stored = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a mapping)
    state = {}
    for name, value in stored.items():
        if not name.endswith(".scale"):
            scale = stored.get(name + ".scale")
            state[name] = value.float() if scale is None else value.float() * scale.float()[:, None]
    return config, state


def quality(near: Float[Tensor, "n d"], far: Float[Tensor, "n D"]) -> dict[str, float]:
    """How near a student's sentence means come to its teacher's on n texts that neither was fitted to.

    ``explained``: share of the teacher's variance that a ridge regression from the student explains, fitted on every
    other text and scored on the rest. ``similarity``: Spearman correlation, over all pairs of texts, of the cosine
    similarity in the student with that in the teacher (both centred).
    """
    from scipy.stats import spearmanr

    from uhl.ridge import ridge

    fit = ridge(near[::2], far[::2])
    error = (near[1::2] @ fit.matrix + fit.shift - far[1::2]).pow(2).sum()
    explained = 1 - float(error / (far[1::2] - far[::2].mean(0)).pow(2).sum())
    pairs = torch.triu_indices(len(near), len(near), 1)
    cosines = []
    for means in (near, far):
        unit = nn.functional.normalize(means - means.mean(0), dim=1)
        cosines.append((unit @ unit.T)[pairs[0], pairs[1]].numpy())
    return {"explained": explained, "similarity": float(spearmanr(*cosines).statistic)}


def check() -> None:
    """Print :func:`quality` of the shipped student, and of the other small model for scale."""
    from uhl import runs
    from uhl.anchors import final_means
    from uhl.models import load_encoder

    runs.quiet()
    texts = [text for name in OFFLINE for text in load_task(name).data["dev"]["text"]]
    far = final_means(load_encoder("minilm-l6"), texts)
    for name in ("minilm-4x312", "minilm-l3"):
        found = quality(final_means(load_encoder(name), texts), far)
        print(
            f"{name}: on {len(texts):,} dev sentences explains {found['explained']:.1%} of the variance of the "
            f"teacher's sentence means; pairwise similarities correlate at {found['similarity']:.3f}"
        )


def main() -> None:
    """Command line: make the student and write it to its place in the package, or check the one that is there."""
    from uhl.models import STUDENT_FILE

    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=3500)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--rate", type=float, default=6e-4)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--bf16", action="store_true", help="mixed precision, where the processor is quick at it")
    parser.add_argument("--out", type=Path, default=STUDENT_FILE)
    parser.add_argument("--check", action="store_true", help="print how near the shipped student is to its teacher")
    options = parser.parse_args()
    if options.check:
        return check()
    model = distil(options.steps, options.batch, options.rate, options.seed, options.bf16)
    info = {k: v for k, v in vars(options).items() if k != "out"} | {"teacher": "minilm-l6"}
    write_student(model, options.out, info)
    print(f"wrote {options.out.name}, {options.out.stat().st_size:,} bytes; pin its hash in uhl/models.py:")
    print(f'STUDENT_SHA256 = "{sha256(options.out)}"')


if __name__ == "__main__":
    main()
