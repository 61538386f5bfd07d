"""Settings of an adapter: the sizes of the design (A, C, K, ...), how it is trained, and the PEFT configuration.

Unknown names are errors.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Literal, get_args

from huggingface_hub import hf_hub_download
from peft import PeftConfig
from peft.utils import SAFETENSORS_WEIGHTS_NAME
from peft.utils.peft_types import PeftType, TaskType
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from uhl.errors import UHLError

if TYPE_CHECKING:
    from uhl.fileformat import Content, Header

WeightType = Literal["Q", "K", "V", "O", "FFN"]
WEIGHT_TYPES: tuple[WeightType, ...] = ("Q", "K", "V", "O", "FFN")
Kind = Literal["sentence", "pair", "token"]  # of a task
METRICS: dict[Kind, str] = {"sentence": "accuracy", "pair": "accuracy", "token": "f1"}
PAIR = "\t"  # between the two parts of a pair that is one text
ProjectorKind = Literal["dimension", "canonical"]
RouterKind = Literal["token", "static"]
Routing = Literal["layer", "weight", "model"]
ROUTINGS: tuple[Routing, ...] = ("layer", "weight", "model")
MAX_FILE = 16 << 20  # bytes of an adapter's file
Arm = Literal[
    "dimension", "lineage", "embedding", "anchor", "refresh", "zero-atoms", "random-p", "shuffled", "refresh-random"
]
ARMS: tuple[Arm, ...] = get_args(Arm)
CONTROLS = ("no-adapter", "zero-atoms", "random-p", "shuffled", "refresh-random", "untrained")
Method = Literal[  # a baseline
    "head", "bitfit", "lora-r8", "lora-1mb", "vera", "vb-lora", "uni-lora", "sat-lora", "hf-sat-lora", "full"
]
METHODS: tuple[Method, ...] = get_args(Method)


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)

    def __init__(self, /, **values: object) -> None:
        try:
            super().__init__(**values)
        except ValidationError as error:
            first = error.errors()[0]
            name = ".".join(map(str, first["loc"])) or type(self).__name__
            known = ", ".join(type(self).model_fields)
            raise UHLError(f"{type(self).__name__}, {name}: {first['msg']}; settings are: {known}") from error


class Sizes(_Strict):
    """What an adapter's parts are, as its file records it. The defaults are the hypothesis's."""

    atoms: int = Field(128, ge=1, description="A, rank-1 atoms in the dictionary")
    width: int = Field(256, ge=1, description="C, canonical width")
    top_k: int = Field(2, ge=1, description="K, most atoms that a token may use")
    hidden: int = Field(14, ge=1, description="hidden units of the mixer")
    alpha: float = Field(1.0, gt=0, le=1e4, allow_inf_nan=False, description="scale of the whole update")
    projector: ProjectorKind = Field("dimension", description="how P is obtained on the source")
    router: RouterKind = Field("token", description="atoms chosen per token, or (static) per task, which can be merged")
    routing: Routing = Field("layer", description="a token's routes: one a layer, one a weight, or one for all layers")
    types: tuple[WeightType, ...] = Field(WEIGHT_TYPES, min_length=1, description="weight types that carry atoms")
    seed: int = Field(0, ge=0, lt=1 << 63, description="of the initial parameters")

    @model_validator(mode="after")
    def _fits_a_file(self) -> Sizes:
        size = self.atoms * (3 * self.width + self.hidden) + 10 * self.width
        if size > MAX_FILE:
            raise ValueError(f"parts of about {size:,} bytes; a file holds at most {MAX_FILE:,}: lower atoms or width")
        return self

    @model_validator(mode="after")
    def _routes(self) -> Sizes:
        if self.router == "static" and self.routing != "layer":
            raise ValueError("a static router reads no input; leave routing at `layer`, or choose router='token'")
        return self

    def routed(self) -> str:
        """The router in words."""
        return "static router" if self.router == "static" else f"token router, one route a {self.routing}"

    def stored(self) -> dict[str, object]:
        """As a file's header holds them: without ``routing`` where it is `layer`, so that older releases read on."""
        return self.model_dump(mode="json", exclude={"routing"} if self.routing == "layer" else None)


class TrainConfig(_Strict):
    """Settings of one training run; the ranges in the comments are the hypothesis's search ranges."""

    steps: int | None = Field(None, ge=1, description="optimiser steps; None: ``epochs`` passes")
    epochs: float = Field(2.0, gt=0)
    batch: int = Field(32, ge=1, description="32, 64 or 128")
    rate: float = Field(5e-3, gt=0, description="learning rate, 5e-5 to 5e-4")
    mixer_rate: float = Field(1e-2, gt=0, description="learning rate of the mixer and of the task bias")
    head_rate: float = Field(1e-3, gt=0, description="learning rate of the head")
    lambda_f: float = Field(0.01, ge=0, description="weight of E[k], 0.01 to 0.1")
    lambda_q: float = Field(1e-5, ge=0, description="weight of the task bias's square, 1e-6 to 1e-4")
    teacher_weight: float = Field(0.7, ge=0, le=1, description="of a teacher's word beside a label, where there is one")
    warmup: float = Field(0.1, ge=0, lt=1, description="share of the steps")
    max_length: int = Field(64, ge=8, description="tokens")
    bf16: bool = Field(False, description="train under bfloat16 autocast; parameters and scores stay float32")
    seed: int = Field(0, ge=0)

    def steps_for(self, rows: int) -> int:
        """Optimiser steps on so many training examples."""
        return self.steps or math.ceil(rows / self.batch * self.epochs)


NAME = "UNIHYPERLORA"


def _peft_type() -> PeftType:
    """The method's member of PEFT's enumeration, added once: a plain string would break those who ask for its value."""
    if NAME not in PeftType.__members__:
        member = str.__new__(PeftType, NAME)
        member._name_, member._value_ = NAME, NAME
        type.__setattr__(PeftType, NAME, member)  # from Python 3.12 on members are found as attributes only
        PeftType._member_map_[NAME] = PeftType._value2member_map_[NAME] = member
        PeftType._member_names_.append(NAME)
    return PeftType(NAME)


@dataclass
class UHLConfig(PeftConfig):
    """Configuration of the PEFT method `UNIHYPERLORA`; the first ten fields are those of :class:`Sizes`.

    ``target_modules`` (names, or a regular expression) defaults to every weight of a known type, found in the host at
    hand and not stored, so that the same adapter serves other hosts. ``task`` names the task whose parts are used.
    ``init_weights=False`` draws U at random, so that a new adapter changes the host's outputs.
    """

    atoms: int = field(default=128, metadata={"help": "A, rank-1 atoms in the dictionary"})
    width: int = field(default=256, metadata={"help": "C, canonical width"})
    top_k: int = field(default=2, metadata={"help": "K, most atoms that a token may use"})
    hidden: int = field(default=14, metadata={"help": "hidden units of the mixer"})
    alpha: float = field(default=1.0, metadata={"help": "scale of the whole update"})
    projector: str = field(default="dimension", metadata={"help": "dimension or canonical"})
    router: str = field(default="token", metadata={"help": "token, or static (can be merged)"})
    routing: str = field(default="layer", metadata={"help": "a token's routes: one a layer, a weight, or a model"})
    types: list[str] | None = field(default=None, metadata={"help": "weight types that carry atoms; all by default"})
    seed: int | None = field(default=None, metadata={"help": "of the initial parameters; by default torch's own"})
    task: str = field(default="main", metadata={"help": "the task whose parts are used"})
    target_modules: list[str] | str | None = field(default=None, metadata={"help": "weights to adapt; by default all"})
    exclude_modules: list[str] | str | None = field(default=None, metadata={"help": "weights not to adapt"})
    modules_to_save: list[str] | None = field(default=None, metadata={"help": "modules trained and saved beside"})
    init_weights: bool = field(default=True, metadata={"help": "U at zero; for tests, False makes it random"})

    def __post_init__(self) -> None:
        super().__post_init__()
        self._file: Path | None = None  # where it was loaded from
        self._content: Content[Header] | None = None  # of that file, while it is being loaded
        self._left: list[str] = []  # modules_to_save of that file that do not fit the host
        self._pending: Callable[[Path], None] | None = None  # completes the file that PEFT is writing
        self.peft_type = _peft_type()
        if isinstance(self.target_modules, (list, tuple)):
            self.target_modules = set(self.target_modules)  # type: ignore[assignment]
        if self.task in set(TaskType):
            raise UHLError(f"task={self.task!r} would name a task of the adapter's; PEFT's kind of task is `task_type`")
        self.sizes()

    def sizes(self) -> Sizes:
        """The adapter's sizes, checked. Raises :class:`UHLError`."""
        given = {name: getattr(self, name) for name in Sizes.model_fields}
        given["types"] = WEIGHT_TYPES if self.types is None else tuple(self.types)
        return Sizes(**{name: value for name, value in given.items() if value is not None})

    def save_pretrained(self, save_directory: str | Path, **kwargs: object) -> None:
        """PEFT's configuration file; the tuner completes the adapter's file beside it."""
        super().save_pretrained(str(save_directory), **kwargs)
        complete, self._pending = self._pending, None
        if complete is not None:
            complete(Path(save_directory))

    def __getstate__(self) -> dict[str, object]:
        """Without what a load or a save that is under way has left."""
        return vars(self) | {"_content": None, "_pending": None}

    @classmethod
    def from_pretrained(
        cls, pretrained_model_name_or_path: str | Path, subfolder: str | None = None, **kwargs: object
    ) -> UHLConfig:
        """PEFT's, and where the adapter's file is: its header says what the configuration must agree with."""
        found: UHLConfig = super().from_pretrained(str(pretrained_model_name_or_path), subfolder, **kwargs)
        if isinstance(found, UHLConfig):
            path = Path(pretrained_model_name_or_path, subfolder or "", SAFETENSORS_WEIGHTS_NAME)
            if not path.is_file() and not path.parent.is_dir():
                path = _from_hub(str(pretrained_model_name_or_path), subfolder, kwargs)
            if path.is_file():
                found._file = path
        return found


def _from_hub(name: str, subfolder: str | None, kwargs: dict[str, object]) -> Path:
    """The adapter's file in the hub's cache; PEFT reports it when there is none."""
    known = {key: kwargs[key] for key in ("revision", "cache_dir", "token", "local_files_only") if key in kwargs}
    try:
        return Path(hf_hub_download(name, SAFETENSORS_WEIGHTS_NAME, subfolder=subfolder, **known))  # type: ignore[call-overload]
    except Exception:  # many kinds; PEFT itself says what is missing when it loads the weights
        return Path()
