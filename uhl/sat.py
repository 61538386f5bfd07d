"""SAT-LoRA and HF-SAT-LoRA, the rivals that are learned anew for every architecture.

Neither is public. As the README defines them: rank-1 atoms in the host's own coordinates, shared by all layers, a
dictionary of them for each shape of weight; at most K atoms a token, chosen once a layer as ours are; and how strongly
a weight uses each atom, which SAT-LoRA learns as one vector a weight, HF-SAT-LoRA as a function of depth and type (our
mixer). They run on the layers of `uhl.layer`, so that what differs from our adapter is the canonical space alone.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor, nn

from uhl.adapter import UHLAdapter, Vectors
from uhl.config import Sizes
from uhl.dictionary import AtomDictionary
from uhl.frame import Frame
from uhl.host import Slot
from uhl.mixer import SPREAD
from uhl.quant import fake_quantise, pack4, quantise
from uhl.router import Router


class Strengths(nn.Module):
    """SAT-LoRA's mixing vectors, one a weight, (weights, A), stored at 8 bits."""

    def __init__(self, weights: int, atoms: int, generator: torch.Generator) -> None:
        super().__init__()
        self.first = nn.Parameter(torch.randn(weights, atoms, generator=generator) * SPREAD)

    def forward(self) -> Float[Tensor, "weights A"]:
        """The vectors as a file gives them back."""
        return fake_quantise(self.first, 8)


class SATAdapter(UHLAdapter):
    """Atoms of one host, which has the weights ``slots`` and a residual stream of ``width``.

    ``functional``: HF-SAT-LoRA, whose mixer is a function; else SAT-LoRA.
    """

    def __init__(self, config: Sizes, slots: Sequence[Slot], width: int, functional: bool) -> None:
        super().__init__(config)
        generator = torch.Generator().manual_seed(config.seed)
        shapes = dict.fromkeys((s.d_in, s.d_out) for s in slots)
        self.dictionary: nn.Module = nn.ModuleDict(  # type: ignore[assignment]
            {f"{i}x{o}": AtomDictionary(config.atoms, i, generator, o) for i, o in shapes}
        )
        self.projector = nn.Module()  # type: ignore[assignment]
        self.router = Router(config.atoms, width, generator)
        self.functional = functional
        if not functional:
            self.mixer = Strengths(len(slots), config.atoms, generator)  # type: ignore[assignment]

    def bits(self) -> dict[str, int]:
        """Bits that each parameter is stored with: as ours, and the mixing vectors with 8."""
        return {n: 8 if n == "mixer.first" and not self.functional else b for n, b in super().bits().items()}

    def strengths(self, slots: Sequence[Slot], task: str, scale: float = 1.0) -> Float[Tensor, "slots A"]:
        """Alpha times the mixing vectors of ``slots``, which are all weights of the host in their order."""
        return super().strengths(slots, task, scale) if self.functional else self.config.alpha * self.mixer()

    def vectors(self, frame: Frame, slots: Sequence[Slot]) -> dict[str, Vectors]:
        """(V, U) of every weight, those of its shape."""
        assert isinstance(self.dictionary, nn.ModuleDict)
        made = {name: atoms() for name, atoms in self.dictionary.items()}
        return {s.path: (v, u) for s in slots for u, v in [made[f"{s.d_in}x{s.d_out}"]]}

    def readers(self, frame: Frame, slots: Sequence[Slot]) -> tuple[tuple[Tensor, ...], dict[str, Tensor]]:
        """The router as it is: it reads the host's own states."""
        assert self.router is not None
        return (self.router(),), {}

    def stored(self, task: str) -> dict[str, Tensor]:
        """What a file would hold: integers and float16 scales of every parameter but the task's bias and head."""
        out: dict[str, Tensor] = {}
        for name, parameter in self.named_parameters():
            if not name.startswith("tasks.") or name == f"tasks.{task}.embedding":
                bits = self.bits()[name]
                integers, out[f"{name}.scale"] = quantise(parameter.detach(), bits)
                out[name] = pack4(integers) if bits == 4 else integers
        return out
