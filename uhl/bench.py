"""What an adapter costs a host in time and memory, measured. Each measurement runs in a process of its own."""

from __future__ import annotations

import multiprocessing
import resource
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from peft import LoraConfig, PeftConfig, PeftModel, get_peft_model
from torch import nn
from transformers import BertConfig, BertModel

from uhl.config import UHLConfig

SHAPES = {"bert-base": (12, 768, 3072, 12), "bert-large": (24, 1024, 4096, 16)}  # layers, width, inner, heads


def bert(shape: str) -> nn.Module:
    """A BERT of that shape with random weights, in evaluation mode."""
    layers, width, inner, heads = SHAPES[shape]
    torch.manual_seed(0)
    config = BertConfig(num_hidden_layers=layers, hidden_size=width, intermediate_size=inner, num_attention_heads=heads)
    return BertModel(config, add_pooling_layer=False).eval()


def _configs() -> dict[str, PeftConfig]:
    six = ["query", "key", "value", "output.dense", "intermediate.dense"]
    return {"UHL": UHLConfig(seed=0, init_weights=False), "LoRA r8": LoraConfig(r=8, target_modules=six)}


def _peak() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


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
            before = _peak()
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


def _alone(work: Callable[..., Any], *args: Any) -> Any:
    """Run in a fresh process, so that one measurement's memory is not another's."""
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(work, args)
