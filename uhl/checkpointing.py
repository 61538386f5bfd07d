"""Gradient checkpointing of a host that carries adapters: a layer that runs again begins as it did the first time."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from uhl.errors import UHLError
from uhl.layer import Attached, Held


class Rerouted:
    """A layer's gradient checkpointing function, made to say again how the layer begins when it runs the layer again.

    transformers checkpoints a layer's ``forward``, so that hooks on the layer do not run a second time.
    """

    def __init__(self, inner: Callable[..., Any], begin: Callable[..., list[Attached]]) -> None:
        self.inner, self.begin = inner, begin

    def __call__(self, run: Any, *args: Any, **kwargs: Any) -> Any:
        """Checkpoint ``run``."""
        return self.inner(_Again(run, self.begin), *args, **kwargs)


class _Again:
    """A checkpointed function. When it runs again, its layer begins with the folds of the forward pass.

    Under reentrant checkpointing, whose first run has no gradients, each layer has a backward pass of its own, and so
    a fold of its own.
    """

    def __init__(self, run: Any, begin: Callable[..., list[Attached]]) -> None:
        self.run, self.begin = run, begin
        self.gradients = torch.is_grad_enabled()
        self.folds: dict[Attached, Held | None] | None = None

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        given = getattr(self.run, "keywords", {}) | kwargs
        if self.folds is None:
            reentrant = self.gradients and not torch.is_grad_enabled()
            self.folds = {a: None if reentrant else a.held for a in self.begin(args, given)}
            if reentrant and any(a.adapter.config.routing == "model" for a in self.folds):
                raise UHLError(
                    "one route for all layers (routing='model') has no gradient under reentrant checkpointing; pass "
                    "gradient_checkpointing_kwargs={'use_reentrant': False}, or choose routing='layer'"
                )
            return self.run(*args, **kwargs)
        begun = self.begin(args, given, self.folds)
        try:
            return self.run(*args, **kwargs)
        finally:  # also where torch has what it wants, and stops
            for attached in begun:
                attached.end_again()
