"""How near to what the machine can do each way of one weight's update comes: the roofline (Williams et al. 2009).

A way that does F FLOPs and must move M bytes takes at least max(F / peak, M / bandwidth) seconds, so its GFLOP/s lie
below min(peak, bandwidth * F / M). Both roofs are measured here, on the threads that torch is set to; a machine whose
speed varies may do more at another time.
"""

from __future__ import annotations

import time
from collections.abc import Callable

import pandas as pd
import torch

FLOAT = 4  # bytes


def _best(work: Callable[[], object], repeats: int) -> float:
    """Seconds of the quickest of some runs, after one that is not counted."""
    times = []
    for _ in range(repeats + 1):
        begun = time.perf_counter()
        work()
        times.append(time.perf_counter() - begun)
    return min(times[1:])


def machine(side: int = 2048, megabytes: int = 256, repeats: int = 5) -> dict[str, float]:
    """The roofs, float32: ``GB/s`` of copying ``megabytes`` (each byte is read and written), ``GFLOP/s`` of a product
    of two matrices of that ``side``.
    """
    source = torch.ones(megabytes * 1_000_000 // FLOAT)
    target, square = torch.empty_like(source), torch.ones(side, side)
    out = torch.empty_like(square)
    copied = _best(lambda: target.copy_(source), repeats)
    multiplied = _best(lambda: torch.mm(square, square, out=out), repeats)
    return {"GB/s": 2 * megabytes / 1e3 / copied, "GFLOP/s": 2 * side**3 / multiplied / 1e9}


def work(step: str, tokens: int, d_in: int, d_out: int, atoms: int, top_k: int, train: bool) -> tuple[int, int]:
    """(FLOPs, bytes) of a way of :func:`uhl.bench.weights`, the frozen weight's own included.

    FLOPs are those that the way does: a multiply and an add count as two, only matrix products and dots count. With R
    the rank that a token meets (8 of LoRA; A dense; K gathered) the weight has 2 T d_in d_out and the update 2 T R
    (d_in + d_out). A compiled way has its own way's. Bytes are those that no way can spare, in float32: the weight's x,
    W and y, and the update's x, both factors whole, y read and written. Gathered rows count once, however often they
    are read: A D is small enough for a cache. Training takes the weight's numbers twice (its output, x's gradient) and
    the update's three times (also the factors' gradients).
    """
    way = step.removesuffix(", compiled")
    rank = {"bare": 0, "LoRA r8": 8, "dense": atoms, "gather": top_k, "reference": top_k}[way]
    held = {"bare": 0, "LoRA r8": 8}.get(way, atoms)
    flops = 2 * tokens * d_in * d_out, 2 * tokens * rank * (d_in + d_out)
    moved = tokens * (d_in + d_out) + d_in * d_out, tokens * (d_in + 2 * d_out) + held * (d_in + d_out)
    times = (2, 3) if train else (1, 1)
    update = FLOAT * moved[1] * times[1] if held else 0
    return times[0] * flops[0] + times[1] * flops[1], FLOAT * times[0] * moved[0] + update


def roofline(measured: pd.DataFrame) -> pd.DataFrame:
    """A row for each measured (size, way): its ``flops``, ``bytes``, ``FLOP/byte``, and the ``GFLOP/s`` it achieved.

    ``measured`` as from :func:`uhl.bench.weights`. VeRA, whose factors are frozen, and VB-LoRA, which makes its own
    anew each time, are not counted by :func:`work` and left out.
    """
    names = ["step", "tokens", "d_in", "d_out", "atoms", "top_k", "train"]
    measured = measured[~measured["step"].str.contains("VeRA|VB-LoRA")]
    done = [work(*row) for row in measured[names].itertuples(index=False)]
    out = measured[[*names, "seconds"]].reset_index(drop=True)
    out["flops"], out["bytes"] = ([pair[i] for pair in done] for i in (0, 1))
    out["FLOP/byte"] = out["flops"] / out["bytes"]
    return out.assign(**{"GFLOP/s": out["flops"] / out["seconds"] / 1e9})
