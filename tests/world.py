"""Fixtures: tiny hosts, a toy task, an adapter; and how tests run: types checked, no hub, files in a folder apart."""

import gc
import os

os.environ["UHL_BATCH"] = "1"
os.environ["HF_HUB_OFFLINE"] = "1"  # nothing here asks a hub
if not os.path.exists("/dev/nvidia0"):  # Triton's kernels run in its interpreter; must be said before it is imported
    os.environ["TRITON_INTERPRET"] = "1"

import importlib

import jaxtyping

# Before the checkers' import hook: what is imported under it is compiled again, however it is cached.
for name in ("datasets", "peft", "seaborn", "sklearn.linear_model", "transformers.trainer"):
    importlib.import_module(name)

if "UHL_UNCHECKED" not in os.environ:  # set where functions are compiled, which checkers around them would prevent
    jaxtyping.install_import_hook("uhl", "beartype.beartype")  # shapes in annotations are enforced

import pytest
import torch
from datasets import Dataset, DatasetDict
from tokenizers import ByteLevelBPETokenizer, Tokenizer, models, normalizers, pre_tokenizers, processors
from transformers import AutoModel, BertConfig, PreTrainedTokenizerFast

from uhl import runs
from uhl.adapter import UHLAdapter
from uhl.config import Sizes
from uhl.models import Encoder
from uhl.tasks import Task

WORDS = [
    "good",
    "fine",
    "great",
    "bad",
    "poor",
    "dull",
    "film",
    "plot",
    "cast",
    "joy",
    "was",
    "is",
    "not",
    "very",
    "the",
    "a",
]


def pytest_collection_finish():
    gc.freeze()  # collections then look at what tests made, not at a million objects of the libraries


@pytest.fixture(autouse=True)
def _types(request):
    """Checks take a third of the time; tests that make the same long runs as others do without."""
    unchecked = request.node.get_closest_marker("unchecked") and not request.node.get_closest_marker("checked")
    jaxtyping.config.update("jaxtyping_disable", bool(unchecked))


@pytest.fixture(autouse=True)
def _quiet(tmp_path, monkeypatch):
    runs.quiet()
    torch.manual_seed(0)
    monkeypatch.setenv("UHL_RUNS", str(tmp_path / "runs"))


@pytest.fixture(scope="session")
def tokenizer():
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    vocab = {w: i for i, w in enumerate([*special, *WORDS, *(f"##{w}" for w in WORDS)])}
    made = Tokenizer(models.WordPiece(vocab, unk_token="[UNK]"))
    made.normalizer = normalizers.Lowercase()
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    made.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B:1 [SEP]:1", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    names = dict(pad_token="[PAD]", unk_token="[UNK]", cls_token="[CLS]", sep_token="[SEP]", mask_token="[MASK]")
    return PreTrainedTokenizerFast(tokenizer_object=made, **names)


@pytest.fixture(scope="session")
def bpe():
    """Byte-level BPE as RoBERTa's: a word at the beginning of a text is another token than behind a blank."""
    made = ByteLevelBPETokenizer()
    made.train_from_iterator(sentences(300), vocab_size=300, show_progress=False)
    made.add_special_tokens(["<s>", "</s>", "<pad>"])
    ends = [(name, made.token_to_id(name)) for name in ("</s>", "<s>")]
    made.post_processor = processors.RobertaProcessing(*ends, add_prefix_space=False)
    return PreTrainedTokenizerFast(
        tokenizer_object=made._tokenizer, pad_token="<pad>", bos_token="<s>", eos_token="</s>"
    )


@pytest.fixture
def make_encoder(tokenizer):
    def make(layers=3, width=24, seed=0, vocab_size=64, **extra):
        torch.manual_seed(seed)
        config = BertConfig(
            vocab_size=vocab_size,
            hidden_size=width,
            num_hidden_layers=layers,
            num_attention_heads=4,
            intermediate_size=2 * width,
            hidden_dropout_prob=0.0,
            attention_probs_dropout_prob=0.0,
            **extra,
        )
        model = AutoModel.from_config(config, attn_implementation="eager").eval()
        for p in model.parameters():
            p.requires_grad_(False)
            p.mul_(3.0) if p.ndim == 2 else None  # larger than at initialisation, so that outputs depend on inputs
        return Encoder(f"tiny-{layers}x{width}", model, tokenizer, "none")

    return make


@pytest.fixture
def encoder(make_encoder):
    return make_encoder()


@pytest.fixture
def config():
    return Sizes(atoms=12, width=16, hidden=6)


def fill(adapter):
    """Give every part of an adapter some value, so that nothing is tested at zero."""
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for p in adapter.parameters():
            p.add_(torch.randn(p.shape, generator=generator) * 0.3)
    return adapter


@pytest.fixture
def adapter(config):
    made = UHLAdapter(config)
    made.add_task("mood", ("negative", "positive"), "sentence")
    return fill(made)


def sentences(count, seed=0):
    generator = torch.Generator().manual_seed(seed)
    picks = torch.randint(0, len(WORDS), (count, 6), generator=generator)
    return [" ".join(WORDS[i] for i in row) for row in picks.tolist()]


@pytest.fixture
def task():
    def split(count, seed):
        texts = sentences(count, seed)
        return Dataset.from_dict({"text": texts, "label": [int("good" in t or "fine" in t) for t in texts]})

    parts = {"train": split(48, 1), "dev": split(16, 2), "test": split(16, 3)}
    parts["unlabelled"] = Dataset.from_dict({"text": sorted(set(sentences(80, 4)))})
    return Task("mood", "sentence", ("negative", "positive"), DatasetDict(parts))
