"""What the layers cost on a CUDA device: the kernels beside the memory's bandwidth, one weight by each path, hosts.

`uhl bench --gpu` measures all of it, goes on where it stopped, and writes figures/speed_gpu_*.csv with the device's
name and the commit. Times of kernels are those of recorded launches, so that none waits for Python; hosts are timed as
they are used.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pandas as pd
import torch

from uhl import bench, ops, runs
from uhl.errors import UHLError
from uhl.router import Places, Route

ATOMS, TOP_K = 128, 2
KERNELS = [(4096, 1024), (4096, 4096), (65536, 1024), (65536, 4096)]  # tokens, width
TOKENS = (1, 16, 128, 1024, 4096)  # of one weight
HOSTS = [("bert-large", 8, 512), ("llama-7b", 1, 4096)]  # shape, batch, length
METHODS = ("bare", "LoRA r8", "LoRA r8, half", "UHL")  # eager; compiled ones have "UHL fused" too
MODES = ("eager", "reduce-overhead")  # the latter of torch.compile: recorded, so that nothing waits for Python
BUFFER = 256 << 20  # bytes that the inputs of one measurement cover, so that no cache holds them


def _versions() -> dict[str, str]:
    return {name: version(name) for name in ("torch", "triton")}


def _draw(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(shape, device="cuda", dtype=dtype)


def _recorded(work: Callable[[], object], repeats: int = 15) -> float:
    """Median seconds of a piece of work that is recorded as a graph and replayed."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(2):
            work()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        work()
    times = []
    for number in range(repeats + 3):
        begun, ended = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begun.record()
        graph.replay()
        ended.record()
        torch.cuda.synchronize()
        if number >= 3:
            times.append(begun.elapsed_time(ended) / 1e3)
    return statistics.median(times)


def _kernels(tokens: int, width: int) -> pd.DataFrame:
    """Microseconds of each kernel in bfloat16, and the bytes that it must move a second beside a copy's.

    Bytes are those of x, y and the result, and of what is (tokens, K) or (tokens, A); gathered rows count as nothing.
    """
    from uhl.ops import fused  # needs Triton

    half, one = torch.bfloat16, tokens * width * 2
    sets = max(2, -(-BUFFER // (2 * one)))
    given = [tuple(_draw(tokens, width, dtype=half) for _ in range(2)) for _ in range(sets)]
    v, u = (_draw(ATOMS, width, dtype=half) for _ in range(2))
    strength, task = (_draw(ATOMS) for _ in range(2))
    chosen = Route(_draw(tokens, ATOMS).topk(TOP_K).indices, torch.ones(tokens, TOP_K).cuda())
    places, few, gate = chosen.places(), tokens * TOP_K * 12, chosen.gate
    by_atom = places.by_atom(ATOMS)
    most = Places((chosen.index * (torch.rand(tokens, TOP_K, device="cuda") < 0.2)).contiguous()).by_atom(ATOMS)
    dots, scores = _draw(tokens, TOP_K), _draw(tokens, ATOMS, dtype=half)

    def rows(x: torch.Tensor, y: torch.Tensor | None, keep: bool, read: torch.Tensor | None = None) -> object:
        return fused.rows(x, v, u, strength, gate, places.index, y, None, read, keep)

    work: dict[str, tuple[Callable[..., object], int]] = {
        "copy": (lambda x, y: y.copy_(x), 2 * one),
        "update of x": (lambda x, y: rows(x, x, False), 2 * one + few),
        "update of y": (lambda x, y: rows(x, y, False), 3 * one + few),
        "update of y, for training": (lambda x, y: rows(x, y, True), 3 * one + few),
        "backward, to x and gates": (lambda x, y: rows(x, None, True, dots), 2 * one + 2 * few),
        "backward, to atoms": (
            lambda x, y: fused.sums(x, y, strength, gate, dots, dots, by_atom.order, by_atom.starts),
            2 * one + 2 * few,
        ),
        "backward, to atoms, one of which has 80 %": (
            lambda x, y: fused.sums(x, y, strength, gate, dots, dots, most.order, most.starts),
            2 * one + 2 * few,
        ),
        "choice of atoms": (lambda x, y: fused.best(scores, TOP_K, x, task), one + tokens * ATOMS * 2 + few),
    }
    found = []
    for name, (step, size) in work.items():
        with torch.no_grad():
            seconds = _recorded(lambda step=step: [step(x, y) for x, y in given]) / sets  # type: ignore[misc]
        found.append({"kernel": name, "us": seconds * 1e6, "GB/s": size / seconds / 1e9})
    out = pd.DataFrame(found).assign(**_versions())
    return out.assign(**{"% of copy": 100 * out["GB/s"] / out["GB/s"][0]})


def kernels(file: str | Path | None = None) -> pd.DataFrame:
    """:data:`KERNELS`' sizes; ``file``: kept there as soon as measured, and not measured again."""
    return runs.resumed(_kernels, [{"tokens": t, "width": d} for t, d in KERNELS], file)


def _weight(tokens: int, width: int, train: bool, repeats: int) -> pd.DataFrame:
    """One frozen weight in bfloat16 with each path, as Python calls it, routing not included."""
    half = torch.bfloat16
    linear = torch.nn.Linear(width, width, device="cuda", dtype=half).requires_grad_(False)
    x, strength = _draw(tokens, width, dtype=half).requires_grad_(train), _draw(ATOMS).requires_grad_(train)
    atoms = torch.float32 if train else half  # as in hosts
    v, u = (_draw(ATOMS, width, dtype=atoms).requires_grad_(train) for _ in range(2))
    index = _draw(tokens, ATOMS).topk(TOP_K).indices
    down, up = (_draw(*shape).requires_grad_(train) for shape in ((8, width), (width, 8)))

    def step(forward: Callable[[], torch.Tensor]) -> bench.Step:
        def run() -> None:
            with torch.set_grad_enabled(train):
                y = forward()
            if train:
                y.float().sum().backward()

        return run

    def path(name: str) -> Callable[[], torch.Tensor]:
        def forward() -> torch.Tensor:
            chosen = Route(index, torch.ones(tokens, TOP_K, device="cuda"))
            return ops.get(name)(linear(x), x, v, u, strength, chosen)

        return forward

    steps = {"bare": step(lambda: linear(x))} | {name: step(path(name)) for name in ("fused", "gather", "dense")}
    steps["LoRA r8"] = step(lambda: linear(x) + ((x.float() @ down.T) @ up.T).to(x.dtype))
    return bench.paired(steps, repeats).assign(**_versions())


def weights(file: str | Path | None = None, repeats: int = 30) -> pd.DataFrame:
    """Times of one 1,024-wide weight by path and number of tokens; ``file`` as for :func:`kernels`."""
    sizes = [{"tokens": t, "width": 1024, "train": train} for train in (False, True) for t in TOKENS]
    return runs.resumed(_weight, [size | {"repeats": repeats} for size in sizes], file)


def _busy(step: Callable[[], object]) -> float:
    """Milliseconds that a step's kernels run, without what waits for Python between them."""
    both = [torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
    with torch.profiler.profile(activities=both) as profile:
        step()
        torch.cuda.synchronize()
    rows = [r for r in profile.key_averages() if r.device_type == torch.autograd.DeviceType.CUDA]
    return float(sum(r.self_device_time_total for r in rows) / 1e3)


def _hosts(shape: str, batch: int, length: int, train: bool, mode: str, repeats: int) -> pd.DataFrame:
    """Hosts in turn; ``kernels ms`` are those of :func:`_busy`, ``step MB`` is the most that an eager step takes beside
    what is there before it.
    """
    names = METHODS if mode == "eager" else (*METHODS, "UHL fused")
    models: dict[str, Any] = dict(bench._methods(shape, names, "cuda", torch.bfloat16))
    if mode != "eager":
        torch._dynamo.reset()
        models = {name: torch.compile(model, fullgraph=True, mode=mode) for name, model in models.items()}
    steps = {name: bench.host_step(model, batch, length, train) for name, model in models.items()}
    found = bench.paired(steps, repeats, warm=3)
    most = {}
    for name, step in steps.items() if mode == "eager" else ():
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        step()
        most[name] = (torch.cuda.max_memory_allocated() - before) / 1e6
    busy = {name: _busy(step) for name, step in steps.items()}
    del models, steps
    torch.cuda.empty_cache()
    more = {"kernels ms": found["step"].map(busy), "step MB": found["step"].map(most)}
    return found.assign(**more, **_versions())


def hosts(
    sizes: Sequence[tuple[str, int, int]] = HOSTS,
    modes: Sequence[str] = MODES,
    file: str | Path | None = None,
    repeats: int = 15,
) -> pd.DataFrame:
    """Forward passes and training steps of hosts in bfloat16, in turn, in each of ``modes``; ``file`` as for
    :func:`kernels`. A bare host is only ever a forward pass. PEFT keeps LoRA's weights in float32 unless it is told not
    to ("half").
    """
    keys = [
        {"shape": shape, "batch": b, "length": n, "train": train, "mode": mode, "repeats": repeats}
        for mode in modes
        for shape, b, n in sizes
        for train in (False, True)
    ]
    return runs.resumed(_hosts, keys, file)


def measure(folder: str | Path) -> list[Path]:
    """Everything, into ``folder``; returns the files. :class:`UHLError` without a CUDA device or Triton."""
    if not torch.cuda.is_available():
        raise UHLError("no CUDA device here; run `uhl bench --gpu` on a machine that has one")
    ops.get("fused")  # says what is missing, if Triton is
    files = {name: Path(folder) / f"speed_gpu_{name}.csv" for name in ("kernels", "weights", "hosts")}
    kernels(files["kernels"])
    weights(files["weights"])
    hosts(file=files["hosts"])
    return list(files.values())
