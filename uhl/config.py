"""Settings of an adapter: the sizes of the design (A, C, K, ...) and how it is trained. Unknown names are errors."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from uhl.errors import UHLError

WeightType = Literal["Q", "K", "V", "O", "FFN"]
WEIGHT_TYPES: tuple[WeightType, ...] = ("Q", "K", "V", "O", "FFN")
ProjectorKind = Literal["dimension", "canonical"]
ARMS = ("dimension", "lineage", "anchor", "zero-atoms", "random-p", "shuffled")


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)

    def __init__(self, **values: object) -> None:
        try:
            super().__init__(**values)
        except ValidationError as error:
            first = error.errors()[0]
            name = ".".join(map(str, first["loc"])) or type(self).__name__
            known = ", ".join(type(self).model_fields)
            raise UHLError(f"{type(self).__name__}, {name}: {first['msg']}; settings are: {known}") from error


class UHLConfig(_Strict):
    """Sizes of an adapter. The defaults are the hypothesis's."""

    atoms: int = Field(128, ge=1, description="A, rank-1 atoms in the dictionary")
    width: int = Field(256, ge=1, description="C, canonical width")
    top_k: int = Field(2, ge=1, description="K, most atoms that a token may use")
    hidden: int = Field(14, ge=1, description="hidden units of the mixer")
    alpha: float = Field(1.0, gt=0, le=1e4, allow_inf_nan=False, description="scale of the whole update")
    projector: ProjectorKind = Field("canonical", description="how P is obtained on the source")
    types: tuple[WeightType, ...] = Field(WEIGHT_TYPES, min_length=1, description="weight types that carry atoms")
    seed: int = Field(0, ge=0, lt=1 << 63, description="of the initial parameters")


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
    warmup: float = Field(0.1, ge=0, lt=1, description="share of the steps")
    max_length: int = Field(64, ge=8, description="tokens")
    seed: int = Field(0, ge=0)
