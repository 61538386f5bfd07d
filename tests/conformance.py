"""PEFT's own tests, run on :class:`uhl.UHLConfig` in place of PEFT's methods.

    python tests/conformance.py                     # static and token router
    python tests/conformance.py -k checkpointing    # further arguments go to pytest

The static router runs all of them, the token router all but those of merging. The tests come from the source
distribution of the installed peft; models that they take from the hub are replaced by random ones of the same family.
The file is its own pytest plugin: while PEFT's test modules are imported, lists of methods in `pytest.mark.parametrize`
are replaced by ours, and tests that have none are left out.
"""

from __future__ import annotations

import argparse
import gc
import os
import subprocess
import sys
import tarfile
from collections.abc import Iterator, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest

from uhl.sources import Package, cache_dir, fetch_folder

FILES = ("custom_models", "config", "feature_extraction_models", "seq_classifier", "token_classification_qa")
FILES += ("decoder_models", "encoder_decoder_models")
LAYERS = (["lin0"], ["lin1"], ["lin0", "lin1"], "lin0")
# PEFT leaves these out by name of the class, for its own methods with shared weights, and with updates by token.
NOT_OURS = {"layer_indexing": "weights are shared by layers", "prompt_learning": "a test of prompt learning's models"}
NOT_MERGED = {"merg": "a token router cannot be merged"}


# --- the plugin ------------------------------------------------------------------------------------------------------


def our_cases(names: tuple[str, ...], theirs: Sequence[Any]) -> list[Any] | None:
    """What replaces a list of PEFT's methods; None for a list of something else."""
    from uhl import UHLConfig

    routers: list[dict[str, Any]] = [{"router": "static"}, {"router": "token"}]
    if names == ("test_name", "model_id", "config_cls", "config_kwargs"):
        cases: list[dict[str, Any]] = [{"target_modules": layers} for layers in LAYERS]
        cases += [{"target_modules": layers, "modules_to_save": ["lin1"]} for layers in (["lin0"], ["lin0", "lin1"])]
        cases.append({"target_modules": ["lin0"], "exclude_modules": ["lin1"]})
        few = {"static": cases, "token": cases[2:5:2]}  # which layers are named is nothing to a router
        return [(f"uhl {r} {i}", "MLP", UHLConfig, c | {"router": r}) for r in few for i, c in enumerate(few[r])]
    if names == ("test_name", "tuner_method", "config_cls", "config_kwargs_1", "config_kwargs_2"):
        first, other = ({"target_modules": [layer], "init_weights": False} for layer in ("lin0", "lin1"))
        pairs = {"same": (first, first), "different": (first, other)}
        return [(name, "uhl", UHLConfig, a | r, b | r) for name, (a, b) in pairs.items() for r in routers]
    if names == ("config_cls", "config_kwargs") and "task_type" in theirs[0][1]:
        task = {"task_type": theirs[0][1]["task_type"], "target_modules": None}
        return [(UHLConfig, task | router) for router in routers]
    if names == ("config_cls",) and len(theirs) > 10:  # every method
        return [UHLConfig]
    if names == ("config_class", "mandatory_kwargs") and len(theirs) >= 30:  # every configuration
        return [(UHLConfig, router) for router in routers]
    return None


def pytest_configure(config: pytest.Config) -> None:
    """Put our methods into the lists as PEFT's test modules are imported."""
    real = pytest.mark.parametrize

    def parametrize(argnames: str | Sequence[str], argvalues: Any, *args: Any, **kwargs: Any) -> Any:
        names = argnames.split(",") if isinstance(argnames, str) else argnames
        values = list(argvalues)
        ours = our_cases(tuple(name.strip() for name in names), values) if values else None
        return real(argnames, values if ours is None else ours, *args, **kwargs)

    pytest.mark.parametrize = parametrize  # type: ignore[misc,method-assign]


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Keep the tests of our configuration."""
    from uhl import UHLConfig

    kept = [i for i in items if UHLConfig in getattr(getattr(i, "callspec", None), "params", {}).values()]
    config.hook.pytest_deselected(items=[item for item in items if item not in kept])
    items[:] = kept
    for item in kept:
        token = by_token(*item.callspec.params.values())  # type: ignore[attr-defined]
        for word, reason in (NOT_OURS | (NOT_MERGED if token else {})).items():
            if word in item.name.split("[")[0]:
                item.add_marker(pytest.mark.skip(reason=reason))
    for module in {item.module for item in kept}:  # type: ignore[attr-defined]
        for place in (module, sys.modules[module.__package__ + ".testing_common"]):
            if hasattr(place, "_skip_if_merging_not_supported"):  # what tests that merge as one of many steps ask
                place._skip_if_merging_not_supported = skip_merging


def pytest_collection_finish() -> None:
    """Let collections, one or more a test, look at what tests made, not at a million objects of the libraries."""
    gc.freeze()


def by_token(*given: object) -> bool:
    """Whether a test's parameters ask for the token router, which is also what a configuration without one gets."""
    routers = [one["router"] for one in given if isinstance(one, dict) and "router" in one]
    return routers != ["static"] * max(len(routers), 1)


def skip_merging(*given: object) -> None:
    """Skip the rest of a test that goes on to merge a token router."""
    if by_token(*given):
        pytest.skip(NOT_MERGED["merg"])


# --- PEFT's tests, and models for them -------------------------------------------------------------------------------


PEFT = Package("peft", "0.21.2", "b803ccfb3f3f316004d850284306687833a2235ea278fb56abc856203456142e", sdist=True)


def fetch_tests(folder: Path) -> Path:
    """The folder that holds `tests`, from the source distribution of the peft that is installed."""
    release = f"peft-{PEFT.version}"
    if version("peft") != PEFT.version:
        sys.exit(f"peft {version('peft')} is installed, its tests are pinned at {PEFT.version}; change PEFT here")

    def unpack(files: list[Path], into: Path) -> None:
        with tarfile.open(files[0]) as archive:
            archive.extractall(into, [m for m in archive if m.name.startswith(f"{release}/tests/")], filter="data")
        (into / release / "tests" / "__init__.py").touch()

    return fetch_folder(folder / "tests", [PEFT], unpack) / release


def tiny_models() -> Iterator[tuple[str, Any]]:
    """Random models under the hub names that PEFT's tests use."""
    import transformers as t

    bert = {"vocab_size": 120, "hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 4}
    bert |= {"intermediate_size": 40, "max_position_embeddings": 80, "initializer_range": 0.3}
    deberta = bert | {"relative_attention": True, "pos_att_type": ["c2p", "p2c"]}
    llama = {"vocab_size": 120, "hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 4}
    llama |= {"num_key_value_heads": 2, "intermediate_size": 40, "initializer_range": 0.3, "bos_token_id": 0}
    llama |= {"eos_token_id": 1, "max_position_embeddings": 200}
    gpt = {"vocab_size": 120, "n_embd": 24, "n_layer": 2, "n_head": 4, "n_positions": 100, "initializer_range": 0.3}
    gpt |= {"bos_token_id": 1, "eos_token_id": 1, "pad_token_id": 1}
    opt = {"vocab_size": 120, "hidden_size": 24, "word_embed_proj_dim": 24, "num_hidden_layers": 2, "ffn_dim": 40}
    t5 = {"vocab_size": 120, "d_model": 24, "d_kv": 6, "d_ff": 40, "num_layers": 2, "num_heads": 4}
    bart = {"vocab_size": 120, "d_model": 24, "encoder_layers": 2, "decoder_layers": 2, "encoder_ffn_dim": 40}
    bart |= {"decoder_ffn_dim": 40, "encoder_attention_heads": 4, "decoder_attention_heads": 4, "init_std": 0.3}
    bart |= {"bos_token_id": 0, "pad_token_id": 1, "eos_token_id": 2, "forced_eos_token_id": None}
    own, hf, trl = "peft-internal-testing", "hf-internal-testing", "trl-internal-testing"
    yield f"{own}/tiny-random-OPTForCausalLM", t.OPTForCausalLM(t.OPTConfig(**opt, num_attention_heads=4, init_std=0.3))
    yield f"{own}/tiny-random-GPT2LMHeadModel", t.GPT2LMHeadModel(t.GPT2Config(**gpt))
    yield f"{own}/tiny-random-GPTJForCausalLM", t.GPTJForCausalLM(t.GPTJConfig(**gpt, rotary_dim=4))
    yield f"{trl}/tiny-random-LlamaForCausalLM", t.LlamaForCausalLM(t.LlamaConfig(**llama))
    yield f"{own}/tiny-dummy-qwen2", t.Qwen2ForCausalLM(t.Qwen2Config(**llama))
    gemma = t.Gemma3TextConfig(**llama, head_dim=6)
    yield f"{hf}/tiny-random-Gemma3ForCausalLM", t.Gemma3ForCausalLM(gemma)
    name = f"{own}/tiny-random-T5ForConditionalGeneration-calibrated"
    yield name, t.T5ForConditionalGeneration(t.T5Config(**t5, decoder_start_token_id=0))
    name = f"{own}/tiny-random-BartForConditionalGeneration"
    yield name, t.BartForConditionalGeneration(t.BartConfig(**bart, max_position_embeddings=80))
    for family, sizes in (("Bert", bert), ("Roberta", bert), ("Deberta", deberta), ("DebertaV2", deberta)):
        config = getattr(t, f"{family}Config")(**sizes)
        yield f"{own}/tiny-random-{family}Model", getattr(t, f"{family}Model")(config)
        if sizes is bert:
            model = getattr(t, f"{family}ForSequenceClassification")(config)
            yield f"{own}/tiny-random-{family}ForSequenceClassification", model
    padded = t.LlamaConfig(**llama, pad_token_id=2)
    yield f"{trl}/tiny-LlamaForSequenceClassification-3.2", t.LlamaForSequenceClassification(padded)


def make_models(folder: Path) -> None:
    """Save :func:`tiny_models` where their names are paths, and the one adapter that a test reads."""
    import torch
    from peft import LoraConfig

    if (folder / "made").is_file():
        return
    torch.manual_seed(0)
    for name, model in tiny_models():
        model.save_pretrained(folder / name)
    lora = LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj", "v_proj"])
    lora.save_pretrained(str(folder / "peft-internal-testing" / "tiny-opt-lora-revision"))
    (folder / "made").touch()


def main() -> int:
    """Fetch, make, run; the exit status is pytest's."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-n", default="2", help="processes")
    options, rest = parser.parse_known_args()
    folder = cache_dir() / "conformance"
    models, site = folder / "models", folder / "site"
    for path in (models, site / "diffusers"):
        path.mkdir(parents=True, exist_ok=True)
    (site / "diffusers" / "__init__.py").write_text("class StableDiffusionPipeline: ...\n")  # imported, never used here
    tests = fetch_tests(folder)
    make_models(models)
    environment = dict(os.environ, HF_HUB_OFFLINE="1", OMP_NUM_THREADS="1")
    here = Path(__file__).resolve().parent
    environment["PYTHONPATH"] = os.pathsep.join(map(str, (here, here.parent, site, tests)))
    command = [sys.executable, "-m", "pytest", "-p", "conformance", "-c", os.devnull, "--rootdir", str(tests), "-q"]
    command += ["-n", options.n, "-p", "no:cacheprovider", "-W", "ignore", "--tb=short"]
    command += [str(tests / "tests" / f"test_{name}.py") for name in FILES]
    print(f"PEFT's tests, peft {PEFT.version}", flush=True)
    return subprocess.run([*command, *rest], cwd=models, env=environment, check=False).returncode


if __name__ == "__main__":
    sys.exit(main())
