"""Training atoms for more hosts than one: under maps that are a little off, as those of a port are, or on another host
by turns. Notebook 07 compares what comes of it.
"""

from __future__ import annotations

import math
from dataclasses import replace

import torch
from jaxtyping import Float
from torch import Tensor, nn
from transformers import TrainerCallback, TrainerState

from uhl.frame import Basis
from uhl.layer import Attached
from uhl.train import Classifier


class Perturbed(TrainerCallback):
    """Trains atoms in canonical coordinates that are a little off, as a port's are: before each step the maps of the
    stream are M' = (I + E) M and N' = N (I + F), with random E and F, of which each row and column has a norm of about
    ``noise``. The router reads by M'; the head's coordinates stay.
    """

    def __init__(self, attached: Attached, basis: Basis, noise: float, seed: int) -> None:
        self.attached, self.basis, self.noise, self.seed = attached, basis, noise, seed

    def on_step_begin(self, args: object, state: TrainerState, *_: object, **__: object) -> None:
        """Draw the step's, the same when training is resumed."""
        draw = torch.Generator().manual_seed(1_000_003 * self.seed + state.global_step)

        def near_one(size: int) -> Float[Tensor, "C C"]:
            return torch.eye(size) + self.noise / math.sqrt(size) * torch.randn(size, size, generator=draw)

        read = tuple(near_one(len(m)) @ m for m in self.basis.read)
        write = tuple(n @ near_one(n.shape[1]) for n in self.basis.write)
        self.attached.set_frame(replace(self.basis, read=read, write=write).frame(self.attached.slots))


class ByTurns(TrainerCallback):
    """Trains on two hosts by turns: every second step is that of ``other``, to which the same adapter is attached."""

    def __init__(self, classifier: Classifier, other: nn.Module, attached: Attached) -> None:
        self.classifier = classifier
        self.places = (classifier.model, classifier._attached), (other, attached)

    def _turn(self, place: int) -> None:
        self.classifier.model, self.classifier._attached = self.places[place]

    def on_step_begin(self, args: object, state: TrainerState, *_: object, **__: object) -> None:
        """Whose step it is follows from its number, also when training is resumed."""
        self._turn(state.global_step % 2)

    def on_train_end(self, *_: object, **__: object) -> None:
        """The first host is the one that is scored and saved."""
        self._turn(0)
