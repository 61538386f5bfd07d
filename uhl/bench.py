"""What an adapter costs a host in time and memory, measured.

Memory is measured in a process of its own, times in pairs: the rivals take turns in one process.
"""

from __future__ import annotations

import ctypes
import gc
import logging
import multiprocessing
import os
import random
import resource
import statistics
import tempfile
import time
import warnings
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from copy import deepcopy
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pandas as pd
import torch
from peft import LoraConfig, PeftConfig, PeftModel, get_peft_model
from pydantic import Field
from torch import nn
from torch._dynamo.exc import Unsupported
from torch.profiler import ProfilerActivity, profile
from torch.utils.flop_counter import FlopCounterMode
from transformers import (
    AutoModel,
    AutoTokenizer,
    BertConfig,
    BertModel,
    DistilBertConfig,
    LlamaConfig,
    LlamaModel,
    MPNetConfig,
    PretrainedConfig,
)

from uhl import baselines, models, ops, runs, tasks
from uhl.adapter import UHLAdapter
from uhl.anchors import DEPTHS, Anchors, Codes, Probe
from uhl.config import Sizes, UHLConfig, _Strict
from uhl.errors import UHLError
from uhl.fits import Way
from uhl.frame import Basis, Frame, dimension_frame
from uhl.host import Slot, find_slots
from uhl.peft_method import LOG, attach
from uhl.porting import port
from uhl.router import Route

SHAPES = {
    "tiny": (2, 256, 512, 4),
    "tinybert-4l": (4, 312, 1200, 12),
    "bert-base": (12, 768, 3072, 12),
    "bert-large": (24, 1024, 4096, 16),
}  # layers, width, inner, heads
DECODERS = {"llama-tiny": (2, 256, 512, 4), "llama-7b": (32, 4096, 11008, 32)}  # likewise
RIVALS = ("LoRA r8", "VeRA r256", "VB-LoRA")  # PEFT's
SIX = ["query", "key", "value", "output.dense", "intermediate.dense"]  # names of a BERT layer's six weights
SEVEN = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]  # of a Llama layer


class Settings(_Strict):
    """Parameters of notebook 08."""

    shape: Literal["tiny", "tinybert-4l", "bert-base", "bert-large"] = Field("tiny", description="the host")
    batch: int = Field(2, ge=1, description="sequences")
    length: int = Field(64, ge=1, description="tokens of a sequence")
    repeats: int = Field(5, ge=2, description="rounds")
    full: bool = Field(False, description="the whole sweep, compiled hosts too; figures are kept")
    threads: int = Field(1, ge=1)


def bert(shape: str) -> nn.Module:
    """A BERT of that shape with random weights, in evaluation mode."""
    torch.manual_seed(0)
    return BertModel(_bert_config(*SHAPES[shape]), add_pooling_layer=False).eval()


def _bert_config(layers: int, width: int, inner: int, heads: int) -> BertConfig:
    return BertConfig(num_hidden_layers=layers, hidden_size=width, intermediate_size=inner, num_attention_heads=heads)


def architectures() -> dict[str, PretrainedConfig]:
    """The hosts that the workbook and the hypothesis speak of, by name."""
    own = {"minilm-l6": (6, 384, 1536, 12), "minilm-l3": (3, 384, 1536, 12), "minilm-4x312": (4, 312, 1200, 12)}
    berts = {name: _bert_config(*shape) for name, shape in (own | SHAPES).items()}
    return {**berts, "distilbert-base": DistilBertConfig(), "mpnet-base": MPNetConfig()}


def flops(config: PretrainedConfig, tokens: int = 10) -> dict[str, int]:
    """FLOPs of a forward pass of so many tokens by torch's counter: ``bare``, and what each method adds to them.

    ``UHL`` and ``UHL dimension`` are on the reference path, in a frame of the residual stream and in a ``dimension``
    frame; :data:`RIVALS` are PEFT's, on the same weights. The host's weights are never filled.
    """
    with torch.device("meta"):
        made = AutoModel.from_config(config).eval()
    model, sizes = made.to_empty(device="cpu"), Sizes()
    adapter, ids = UHLAdapter(sizes), torch.zeros(1, tokens, dtype=torch.long)
    adapter.add_task("main", [], "sentence")
    for buffer in model.buffers():
        buffer.zero_()

    def count() -> int:
        with torch.no_grad(), FlopCounterMode(display=False) as counter:
            model(input_ids=ids)
        return counter.get_total_flops()

    slots = find_slots(model)
    counted = {"bare": count()}
    for name, frame in (("UHL", stream_frame(slots, slots[0].d_in, sizes.width)), ("UHL dimension", None)):
        with torch.no_grad(), attach(model, adapter, "main", frame, path="reference"):  # folds before the count
            counted[name] = count() - counted["bare"]
    configs = baselines.peft_methods([s.path for s in slots], baselines.widths(slots))
    for name in RIVALS:
        adapted: Any = get_peft_model(model, configs[name])
        counted[name] = count() - counted["bare"]
        model = adapted.unload()
    return counted


def decoder(shape: str) -> nn.Module:
    """A Llama of that shape with random weights, in evaluation mode."""
    layers, width, inner, heads = DECODERS[shape]
    torch.manual_seed(0)
    config = LlamaConfig(
        num_hidden_layers=layers,
        hidden_size=width,
        intermediate_size=inner,
        num_attention_heads=heads,
        num_key_value_heads=heads,
        use_cache=False,
    )
    return LlamaModel(config).eval()


def _host(shape: str, device: str, dtype: torch.dtype) -> nn.Module:
    """A frozen host with random weights, made where and as it is wanted: the large ones fit nowhere else."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with torch.device(device):
            return (decoder if shape in DECODERS else bert)(shape).requires_grad_(False)
    finally:
        torch.set_default_dtype(before)


def _configs() -> dict[str, PeftConfig]:
    return {"UHL": UHLConfig(seed=0, init_weights=False), "LoRA r8": LoraConfig(r=8, target_modules=SIX)}


def _peak() -> int:
    """Most bytes that this process had resident. (Linux's getrusage would count its parent's too.)"""
    status = Path("/proc/self/status")
    if status.exists():
        return 1024 * int(next(r for r in status.read_text().splitlines() if r.startswith("VmHWM")).split()[1])
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def _base() -> int:
    """Bytes that this process has resident, from which :func:`_peak` rises anew; what is free is given back first.

    Where the system cannot forget a peak (Linux can), the peak so far.
    """
    gc.collect()
    if hasattr(libc := ctypes.CDLL(None), "malloc_trim"):
        libc.malloc_trim(0)
    with suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")
    return _peak()


def _load(method: str, shape: str, repeats: int) -> dict[str, object]:
    """Seconds to load a file into a host, seconds of the fold at first use, and how far the peak of memory rises."""
    host, config = bert(shape), _configs()[method]
    ids = torch.ones(1, 4, dtype=torch.long)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        adapted = get_peft_model(host, config)  # type: ignore[arg-type]
        adapted.save_pretrained(str(folder))
        host = adapted.unload()  # type: ignore[operator]
        size = (folder / "adapter_model.safetensors").stat().st_size
        loads: list[float] = []
        firsts: list[float] = []
        later: list[float] = []
        with torch.no_grad():
            host(ids)
            before = _base()
            for _ in range(repeats):
                begun = time.perf_counter()
                loaded = PeftModel.from_pretrained(host, folder)  # type: ignore[arg-type]
                loads.append(time.perf_counter() - begun)
                for times in (firsts, later):
                    begun = time.perf_counter()
                    loaded(input_ids=ids)
                    times.append(time.perf_counter() - begun)
                host = loaded.unload()  # type: ignore[operator]
    fold = statistics.median(a - b for a, b in zip(firsts, later, strict=True))
    out: dict[str, object] = {"method": method, "host": shape, "bytes": size}
    times_ = {"load s": statistics.median(loads), "slowest load s": max(loads), "first use s": fold}
    return out | {k: round(v, 3) for k, v in times_.items()} | {"peak MB": round((_peak() - before) / 1e6, 1)}


def loading(shape: str = "bert-large", repeats: int = 5) -> pd.DataFrame:
    """Load time and memory of our file and of rank-8 LoRA's on the same weights of a host."""
    return pd.DataFrame([_alone(_load, method, shape, repeats) for method in _configs()])


def _fold_cost(shape: str, frame: str) -> dict[str, object]:
    """Seconds of one fold without gradients, its tensors' bytes, and how far the peak of memory rises."""
    dimension, width = frame == "dimension", SHAPES[shape][1]
    adapter = UHLAdapter(Sizes(projector="dimension" if dimension else "canonical"))
    adapter.add_task("main", [], "sentence")
    with torch.device("meta"):  # no frame looks at the weights
        slots = find_slots(bert(shape))
    with torch.no_grad():
        adapter.fold(dimension_frame(adapter.projector, slots[:1], 64), slots[:1], "main")  # what first use costs
        before, begun = _base(), time.perf_counter()
        if dimension:
            made = dimension_frame(adapter.projector, slots, width)
        else:
            made = stream_frame(slots, width, adapter.config.width)
        folded = adapter.fold(made, slots, "main")
    seconds, peak = time.perf_counter() - begun, _peak() - before
    held = {t.data_ptr(): t.numel() * t.element_size() for t in folded.tensors()}
    sizes = {"peak MB": round(peak / 1e6, 1), "folded MB": round(sum(held.values()) / 1e6, 1)}
    return {"host": shape, "frame": frame, "seconds": round(seconds, 3), **sizes}


def folding(shape: str = "bert-large", frames: Sequence[str] = ("dimension", "residual")) -> pd.DataFrame:
    """Time and memory of folding an adapter into a host, by kind of frame; each in a process of its own."""
    return pd.DataFrame([_alone(_fold_cost, shape, frame) for frame in frames])


def _port_cost(shape: str, count: int, cuts: int, threads: int) -> dict[str, object]:
    """Seconds of an anchored port on ``count`` texts and their fragments, and how far the peak of memory rises.

    The texts are real, the codes random. The scales are those that need a pass over the coded texts each (0 needs none,
    but a regression), so that no luck spares one: with fragments there is a pass over these with the atoms at work.
    """
    torch.set_num_threads(threads)
    logging.getLogger("uhl.porting").setLevel(logging.ERROR)  # a port to random weights is a poor one
    texts = random.Random(0).sample(sorted(set(tasks.generic_text())), count)
    probe = Probe(texts, words=1, coded=count, own=count, cuts=cuts)
    tokenizer = AutoTokenizer.from_pretrained(models.resolve("minilm-l6")[0])
    target = models.Encoder(shape, bert(shape), tokenizer, "unknown")
    adapter = UHLAdapter(Sizes(projector="canonical"))
    part, width = adapter.add_task("main", ("negative", "positive"), "sentence"), adapter.config.width
    torch.manual_seed(0)
    nn.init.normal_(adapter.dictionary.u)
    head, *stream = (Codes.of(torch.randn(count, width)) for _ in (None, *DEPTHS))
    made = Anchors(texts, "bench", head, stream, 1, DEPTHS, torch.randn(part.head.shape), torch.zeros(2), task="main")
    logits = Codes.of(torch.randn(sum(probe.units()), 2)) if cuts else None
    adapter.anchors = replace(made, logits=logits, own=count, cuts=cuts)
    adapter.info = {"layers": target.layers // 2}  # as of a source that is not the host
    with torch.no_grad():
        target.model(torch.ones(1, 4, dtype=torch.long))
    before, begun = _base(), time.perf_counter()
    port(adapter, target, "main", way=Way(scales=(1.0, 2.0)))
    seconds, peak = time.perf_counter() - begun, _peak() - before
    size = sum(p.numel() * p.element_size() for p in target.model.parameters())
    sizes = {"anchors": count, "with fragments": len(probe.observed), "threads": threads}
    memory = {"peak MB": round(peak / 1e6, 1), "host MB": round(size / 1e6, 1)}
    return {"host": shape, **sizes, "seconds": round(seconds, 2), **memory}


def porting(shape: str = "bert-base", count: int = 512, threads: int = 2) -> pd.DataFrame:
    """Time and memory of an anchored port to a host of a shape, without and with the fragments of its texts; each in a
    process of its own. ``peak MB`` is what it takes beside the host.
    """
    return pd.DataFrame([_alone(_port_cost, shape, count, cuts, threads) for cuts in (0, 3)])


def _alone(work: Callable[..., Any], *args: Any) -> Any:
    """Run in a process of its own, so that one measurement's memory is not another's.

    It is a fork of a process that has imported this module and done nothing else.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__])
    with context.Pool(1) as pool:
        return pool.apply(work, args)


# --- time -------------------------------------------------------------------------------------------------------------

Step = Callable[[], object]


def paired(steps: dict[str, Step], repeats: int, limit: float = float("inf"), warm: int = 2) -> pd.DataFrame:
    """Time the steps in turn, round after round, so that what disturbs the machine disturbs all of them.

    Columns: ``seconds`` (median), ``low`` and ``high`` (quartiles), ``ratio`` (to the first step: median of the rounds'
    ratios), ``ratio low`` and ``ratio high`` (their quartiles), ``rounds``: fewer than ``repeats``, but at least three,
    where another would go beyond ``limit`` seconds.
    """
    times: dict[str, list[float]] = {name: [] for name in steps}
    for number in range(warm + repeats):
        spent = sum(map(sum, times.values()))
        if number >= warm + 3 and spent * (number - warm + 1) / (number - warm) > limit:
            break
        for name, step in steps.items():
            begun = time.perf_counter()
            step()
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            if number >= warm:
                times[name].append(time.perf_counter() - begun)
    first = next(iter(times.values()))
    rows = []
    for name, mine in times.items():
        low, middle, high = statistics.quantiles(mine, n=4)
        ratios = statistics.quantiles([a / b for a, b in zip(mine, first, strict=True)], n=4)
        rows.append(
            {"step": name, "seconds": middle, "low": low, "high": high, "rounds": len(mine)}
            | dict(zip(("ratio low", "ratio", "ratio high"), ratios, strict=True))
        )
    return pd.DataFrame(rows)


@contextmanager
def _silent() -> Iterator[None]:
    """Without what C++ writes to standard error; Python's own `sys.stderr` may be elsewhere (in notebooks)."""
    kept, nowhere = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 2)
    try:
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
        os.close(nowhere)


def held(step: Step) -> int:
    """Most bytes that torch's allocator holds on the CPU during a step, beside those that it held before.

    Compiled code's are counted, too; what a library takes for itself is not. Blocks from before that the step gives
    back count as held.
    """
    with _silent(), profile(activities=[ProfilerActivity.CPU], profile_memory=True) as run:  # it writes of each start
        step()
    now = most = 0
    for event in run.profiler.kineto_results.events():  # type: ignore[union-attr]
        if event.name() == "[memory]":
            now += event.nbytes()
            most = max(most, now)
    return most


def _costs(steps: dict[str, Step], repeats: int, limit: float = float("inf")) -> pd.DataFrame:
    """:func:`paired` times, and ``step MB``: :func:`held`."""
    times = paired(steps, repeats, limit)
    return times.assign(**{"step MB": [held(steps[name]) / 1e6 for name in times["step"]]})


def _weight_steps(
    tokens: int, d_in: int, d_out: int, atoms: int, top_k: int, train: bool, compiled: bool = False
) -> dict[str, Step]:
    """One frozen `nn.Linear`, by itself, with each path's update, with rank-8 LoRA's written plainly, and as PEFT's
    VeRA and VB-LoRA change it. The route and its tables are there before, as they are for five of a layer's six
    weights; what compiles makes its own tables in each backward pass. ``compiled``: LoRA, VeRA, VB-LoRA and gather
    compiled, too, where :func:`_compiled` can.

    A size is compiled for itself when it is first run, so in the rounds that are not counted.
    """
    g = torch.Generator().manual_seed(0)

    def draw(*shape: int, learned: bool = True) -> torch.Tensor:
        return torch.randn(*shape, generator=g).requires_grad_(train and learned)

    x, linear = draw(tokens, d_in), nn.Linear(d_in, d_out).requires_grad_(False)
    v, u, strength = draw(atoms, d_in), draw(atoms, d_out), draw(atoms)
    chosen = Route(draw(tokens, atoms, learned=False).topk(top_k).indices, torch.ones(tokens, top_k))
    down, up, ones = draw(8, d_in), draw(d_out, 8), torch.ones(tokens, d_out)

    def step(forward: Callable[[], torch.Tensor]) -> Step:
        def run() -> None:
            with torch.set_grad_enabled(train):
                y = forward()
            if train:
                y.backward(ones)

        return run

    def path(name: str) -> Callable[[], torch.Tensor]:
        return lambda: ops.get(name)(linear(x), x, v, u, strength, chosen)

    rivals = {"LoRA r8": lambda: linear(x) + (x @ down.T) @ up.T} | {
        name: partial(_on_one_weight(linear, name).train(train), x) for name in ("VeRA r256", "VB-LoRA")
    }
    paths = {name: path(name) for name in ("dense", "gather", "reference")}
    made = {name: step(forward) for name, forward in ({"bare": lambda: linear(x)} | rivals | paths).items()}
    if compiled:
        whole = _compiled(rivals | {"gather": paths["gather"]}, step)
        made |= {f"{name}, compiled": step(forward) for name, forward in whole.items()}
    return made


def _compiled(ways: dict[str, Any], step: Callable[[Any], Step]) -> dict[str, Any]:
    """Each way compiled as one graph; ``step`` makes a step of one. Those that do not compile so are left out: the
    compiler would go on to run in pieces whatever code they share with the others.
    """
    torch._dynamo.reset()
    whole = []
    for name, way in ways.items():
        try:
            step(torch.compile(way, fullgraph=True, backend="eager"))()
        except Unsupported as error:
            LOG.warning("%s does not compile as one graph, and is left out: %s", name, str(error).splitlines()[0])
        else:
            whole.append(name)
    torch._dynamo.reset()
    return {name: torch.compile(ways[name], fullgraph=True, dynamic=False) for name in whole}


def _on_one_weight(linear: nn.Linear, method: str) -> nn.Module:
    """A weight as one of PEFT's methods changes it; ``linear`` itself stays as it is."""
    config = baselines.peft_methods(["weight"], [linear.in_features, linear.out_features])[method]
    return get_peft_model(nn.Sequential(OrderedDict(weight=deepcopy(linear))), config)  # type: ignore[arg-type]


def weights(
    grid: Iterable[dict[str, int]],
    file: str | Path | None = None,
    repeats: int = 20,
    train: bool = False,
    compiled: bool = False,
    limit: float = 30.0,
) -> pd.DataFrame:
    """:func:`paired` times of one weight, and the memory of a step (``step MB``, :func:`held`), for each of ``grid``'s
    sizes (tokens, d_in, d_out, atoms, top_k).

    A size takes about ``limit`` seconds at most, beside its compilation where ways are measured ``compiled`` too.
    ``file``: see :func:`uhl.runs.resumed`.
    """

    def measure(repeats: int, limit: float, **size: Any) -> pd.DataFrame:
        return _costs(_weight_steps(**size), repeats, limit)

    how = {"train": train, "compiled": compiled, "repeats": repeats, "limit": limit}
    return runs.resumed(measure, [size | how for size in grid], file)


def stream_frame(slots: Sequence[Slot], width: int, canonical: int) -> Frame:
    """A residual frame of one map for all levels, as ports give them, with orthonormal rows."""
    read = torch.linalg.qr(torch.randn(max(width, canonical), canonical, generator=torch.Generator().manual_seed(0)))[0]
    read = read[:width].T.contiguous()
    return Basis((read,), (read.T.contiguous(),), read, read[:, 0], (1.0,)).frame(slots)


def _methods(
    shape: str, names: Sequence[str], device: str = "cpu", dtype: torch.dtype = torch.float32
) -> dict[str, nn.Module]:
    """The host of that shape with each method on the same weights, all of a layer; "bare" is the frozen host.

    "UHL" works in a residual frame, as a trained or ported adapter does, "UHL dimension" in the hypothesis's. By
    "UHL fused" it takes Triton's kernels, also compiled. Behind ", half" a method's own weights have the host's dtype.
    """
    config = UHLConfig(seed=0, init_weights=False)
    _, width, inner, _ = (SHAPES | DECODERS)[shape]
    configs = baselines.peft_methods(SEVEN if shape in DECODERS else SIX, [width, inner])
    configs |= dict.fromkeys(("UHL", "UHL fused", "UHL dimension"), config)
    made: dict[str, Any] = {}
    for name in names:
        host = _host(shape, device, dtype)
        method = name.removesuffix(", half")
        wide = method == name
        made[name] = host if name == "bare" else get_peft_model(host, configs[method], autocast_adapter_dtype=wide)  # type: ignore[arg-type]
        if name in {"UHL", "UHL fused"}:
            tuner = made[name].base_model
            attached = tuner.attached()
            attached.path = "fused" if name == "UHL fused" else None
            attached.set_frame(stream_frame(attached.slots, width, config.width))
            tuner.uhl_adapters["default"].projector.requires_grad_(False)  # a residual frame has no use for it
    return made


def host_step(model: nn.Module, batch: int, length: int, train: bool) -> Step:
    """A forward pass of random tokens, or a training step: forward, backward, AdamW."""
    where = next(model.parameters()).device
    ids = torch.randint(5, 1000, (batch, length), generator=torch.Generator().manual_seed(0)).to(where)
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    learned = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(learned, lr=1e-6) if train and learned else None
    if not train:
        model.eval()  # PEFT leaves its own layers in training mode

    def step() -> None:
        with torch.set_grad_enabled(optimizer is not None):
            loss = model(**inputs).last_hidden_state.float().pow(2).mean()
        if optimizer is not None:
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()

    return step


def hosts(
    shape: str = "bert-base",
    batch: int = 8,
    length: int = 128,
    train: bool = False,
    compiled: bool = False,
    methods: Sequence[str] = ("bare", "LoRA r8", "UHL"),
    repeats: int = 15,
    file: str | Path | None = None,
) -> pd.DataFrame:
    """:func:`paired` times of a whole host with each method, and the memory of a step (``step MB``, :func:`held`);
    "bare" is only ever a forward pass.

    ``compiled``: those that :func:`_compiled` can. ``file``: see :func:`uhl.runs.resumed`.
    """

    def measure(**_: object) -> pd.DataFrame:
        models = _methods(shape, methods)
        if compiled:
            models = _compiled(models, lambda model: host_step(model, batch, length, train))
            if methods[0] not in models:
                raise UHLError(f"{methods[0]}, to which the others are compared, does not compile as one graph")
        steps = {name: host_step(m, batch, length, train) for name, m in models.items()}
        return _costs(steps, repeats)

    size = {"host": shape, "batch": batch, "length": length, "tokens": batch * length}
    key = size | {"train": train, "compiled": compiled, "repeats": repeats, "rivals": ", ".join(methods)}
    return runs.resumed(measure, [key], file)


def _peak_of(method: str, shape: str, batch: int, length: int) -> float:
    warnings.simplefilter("ignore")  # of the libraries, in this process
    step = host_step(_methods(shape, [method])[method], batch, length, train=True)
    step()
    return _peak() / 1e6


def peaks(
    shape: str = "bert-base",
    batch: int = 8,
    length: int = 128,
    methods: Sequence[str] = ("bare", "LoRA r8", "UHL"),
    file: str | Path | None = None,
) -> pd.DataFrame:
    """Peak resident memory (MB) of one training step, each method in a process of its own.

    ``file``: see :func:`uhl.runs.resumed`.
    """

    def measure(method: str, **_: object) -> pd.DataFrame:
        return pd.DataFrame({"peak MB": [_alone(_peak_of, method, shape, batch, length)]})

    size = {"host": shape, "batch": batch, "length": length}
    return runs.resumed(measure, [{"method": method} | size for method in methods], file)


def to_lora(found: pd.DataFrame, value: str, by: Sequence[str], named: str = "step") -> pd.Series:
    """``value`` over rank-8 LoRA's in the rows that have the same entries in ``by``; methods stand in ``named``."""
    lora = found[found[named] == "LoRA r8"].set_index(list(by))[value]
    there = lora.reindex(pd.MultiIndex.from_frame(found[list(by)]))
    return pd.Series(found[value].to_numpy() / there.to_numpy(), found.index)


def power_law(found: pd.DataFrame, step: str, by: Sequence[str]) -> dict[str, float]:
    """Least squares of log(seconds over the bare weight's) on the logs of ``by``: exponents, ``seconds`` at 1, ``r2``.

    Sizes at which the step was not slower than the bare weight are left out.
    """
    table = found.pivot_table(index=list(by), columns="step", values="seconds").reset_index()
    extra = table[step] - table["bare"]
    table, extra = table[extra > 0], extra[extra > 0]
    design = np.column_stack([*(np.log(table[name].astype(float)) for name in by), np.ones(len(table))])
    wanted = np.log(extra.to_numpy())
    solution, *_ = np.linalg.lstsq(design, wanted, rcond=None)
    left = wanted - design @ solution
    r2 = 1 - float((left**2).sum() / ((wanted - wanted.mean()) ** 2).sum())
    return dict(zip(by, solution[:-1].tolist(), strict=True)) | {"seconds": float(np.exp(solution[-1])), "r2": r2}


LETTERS = {"tokens": "T", "d_in": "D", "atoms": "A", "top_k": "K"}


def formula(fit: dict[str, float]) -> str:
    """A fit of :func:`power_law` as text, such as `seconds = 3.1e-09 T^0.98 D^1.02 A^0.01`."""
    powers = " ".join(f"{LETTERS.get(name, name)}^{fit[name]:.2f}" for name in fit if name not in {"seconds", "r2"})
    return f"seconds = {fit['seconds']:.1e} {powers}"
