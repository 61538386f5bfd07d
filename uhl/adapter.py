"""The adapter: every learned part, and what it gives a host once folded into the host's frame.

    V~ = V P_in   U~ = U P_out^T   R~ = R P_route   strength = scale * g(depth, type) + d(depth, type)

One set of parts serves all layers and all hosts; folding makes the host's small copies, and the tokens never see the
canonical space.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from jaxtyping import Float
from torch import Tensor, nn

from uhl.config import Sizes
from uhl.dictionary import AtomDictionary
from uhl.errors import UHLError
from uhl.frame import Frame, Times, once
from uhl.host import Slot
from uhl.mixer import BASIS, Mixer, bias_features, type_features
from uhl.projector import Projector
from uhl.quant import fake_half, fake_quantise
from uhl.router import Router

if TYPE_CHECKING:
    from uhl.anchors import Anchors


REDRAWN = 1_000_003  # added to a seed, so that what is redrawn is not what an adapter of that seed begins with
TASK_BITS = {"bias": 4, "embedding": 8, "head": 8, "head_bias": 16}  # that a task's parameters are stored with


def check_task_name(name: str) -> None:
    """Raise :class:`UHLError` for a name that :class:`torch.nn.ModuleDict` does not take: ``train``, or ``a.b``."""
    if not name or "." in name or hasattr(nn.ModuleDict(), name):
        raise UHLError(f"a task cannot be called {name!r}, as PyTorch names no part so; rename its file or folder")


class TaskPart(nn.Module):
    """What belongs to one task: router embedding (A,), bias (8, A), head weight (labels, C) and bias (labels,).

    A task without labels has no head: the host's own is used. A static router's embedding starts with the gates of K
    random atoms open. ``own_head``: a head that no source has trained reads the own coordinates of this host ("": it is
    not trained yet). ``length``: tokens that a text is cut at, where it is not what the anchors say.
    """

    def __init__(
        self, config: Sizes, labels: Sequence[str], kind: str, own_head: str | None = None, length: int | None = None
    ) -> None:
        super().__init__()
        self.labels, self.kind, self.own_head, self.length = tuple(labels), kind, own_head, length
        self.embedding = nn.Parameter(torch.zeros(config.atoms))
        if config.router == "static":
            start = torch.rand(config.atoms, generator=torch.Generator().manual_seed(config.seed))
            self.embedding = nn.Parameter(start + 0.5)
        self.bias = nn.Parameter(torch.zeros(BASIS, config.atoms))
        self.head: nn.Parameter
        self.head_bias: nn.Parameter
        if labels:
            self.head = nn.Parameter(torch.zeros(len(labels), config.width))
            self.head_bias = nn.Parameter(torch.zeros(len(labels)))

    def route_embedding(self) -> Float[Tensor, " A"]:
        """The task's offset on the router's scores, as stored (8-bit)."""
        return fake_quantise(self.embedding, 8)

    def classify(self, codes: Float[Tensor, "*n C"]) -> Float[Tensor, "*n labels"]:
        """Logits of canonical codes, with the head as stored (8-bit rows, float16 bias)."""
        return codes @ fake_quantise(self.head, 8).T + fake_half(self.head_bias)


Vectors = tuple[Float[Tensor, "A d_in"], Float[Tensor, "A d_out"]]


@dataclass
class Folded:
    """An adapter in one host's coordinates. ``atoms`` maps a weight's path to (V~, U~, strength).

    ``routes`` read the layers' inputs: one reader for all layers, or one each (none: the router is static);
    ``own_routes`` read what the atoms of weights read that share no route: all weights, where each has its own.
    """

    atoms: dict[str, tuple[Float[Tensor, "A d_in"], Float[Tensor, "A d_out"], Float[Tensor, " A"]]]
    routes: tuple[Float[Tensor, "A D"], ...]
    own_routes: dict[str, Float[Tensor, "A d_in"]]
    embedding: Float[Tensor, " A"]

    def tensors(self) -> Iterator[Tensor]:
        """Every tensor; those that weights share come several times."""
        for parts in self.atoms.values():
            yield from parts
        yield from self.own_routes.values()
        yield self.embedding
        yield from self.routes

    def reader(self, layer: int) -> Float[Tensor, "A D"] | None:
        """What reads a layer's input; None where the router is static."""
        return self.routes[min(max(layer, 0), len(self.routes) - 1)] if self.routes else None

    def like(self, dtype: torch.dtype) -> Folded:
        """A copy whose readers and writers have another dtype; those that weights share go on being shared."""
        return self._map(once(lambda tensor: tensor.to(dtype)), lambda strength: strength)

    def apart(self) -> Folded:
        """A copy of which each tensor has its own memory: strengths are rows of one."""
        clone = once(torch.clone)
        return self._map(clone, clone)

    def _map(self, vectors: Callable[[Tensor], Tensor], others: Callable[[Tensor], Tensor]) -> Folded:
        atoms = {path: (vectors(v), vectors(u), others(strength)) for path, (v, u, strength) in self.atoms.items()}
        own = {path: vectors(reader) for path, reader in self.own_routes.items()}
        return Folded(atoms, tuple(map(vectors, self.routes)), own, others(self.embedding))


class UHLAdapter(nn.Module):
    """All parts of an adapter, and its tasks. Parameters are drawn from ``config.seed`` alone."""

    def __init__(self, config: Sizes) -> None:
        super().__init__()
        self.config = config
        generator = torch.Generator().manual_seed(config.seed)
        self.dictionary = AtomDictionary(config.atoms, config.width, generator)
        self.projector = Projector(config.width, generator)
        self.mixer = Mixer(config.atoms, config.hidden, generator)
        self.router = Router(config.atoms, config.width, generator) if config.router == "token" else None
        self.tasks = nn.ModuleDict()
        self.anchors: Anchors | None = None
        self.info: dict[str, object] = {}
        self._kept_features: tuple[object, tuple[Tensor, Tensor]] | None = None
        self.register_state_dict_post_hook(_as_stored)

    def bits(self) -> dict[str, int]:
        """Bits that each parameter is stored with, by name; 16 is float16."""
        parts = {"dictionary": 8, "projector": 8, "mixer": 4, "router": 8}
        names = [name for name, _ in self.named_parameters()]
        return {n: TASK_BITS[n.split(".")[-1]] if n.startswith("tasks.") else parts[n.split(".")[0]] for n in names}

    @property
    def device(self) -> torch.device:
        """Where the adapter's parameters are."""
        return self.mixer.first.device

    def add_task(
        self, name: str, labels: Sequence[str], kind: str, own_head: str | None = None, length: int | None = None
    ) -> TaskPart:
        """Add a task's own parts (zeros); replaces a task of that name. Raises as :func:`check_task_name`."""
        check_task_name(name)
        part = TaskPart(self.config, labels, kind, own_head, length)
        self.tasks[name] = part
        return part

    def task(self, name: str) -> TaskPart:
        """The parts of a task; :class:`UHLError` names the tasks there are."""
        if name not in self.tasks:
            raise UHLError(f"the adapter has no task {name!r}; it has {', '.join(self.tasks) or 'none'}")
        part = self.tasks[name]
        assert isinstance(part, TaskPart)
        return part

    def hand_over(self, old: str, name: str, labels: Sequence[str], kind: str) -> TaskPart:
        """Put a task in another's place, whose tokens it routes alike. For the same labels of the same kind it has all
        of the other's parts, and what the anchors say of them; else a head of its own, which begins as zeros.
        """
        before = self.task(old)
        check_task_name(name)
        del self.tasks[old]
        if (before.labels, before.kind) == (tuple(labels), kind):
            self.tasks[name] = before
            if self.anchors is not None and self.anchors.task == old:
                self.anchors.task = name
            return before
        part = self.add_task(name, labels, kind, own_head="")
        part.embedding, part.bias = before.embedding, before.bias
        return part

    @torch.no_grad()
    def redraw(self, seed: int) -> None:
        """Random atoms and routes in place of the learned ones, row by row of the same length, for a control. The mixer
        and the tasks' parts stay.
        """
        generator = torch.Generator().manual_seed(seed + REDRAWN)
        self.info["redrawn"] = seed
        learned = [self.dictionary.u, self.dictionary.v, *([self.router.weight] if self.router else [])]
        for rows in learned:
            drawn = torch.randn(rows.shape, generator=generator).to(rows)
            rows.copy_(nn.functional.normalize(drawn, dim=1) * rows.norm(dim=1, keepdim=True))

    def strengths(self, slots: Sequence[Slot], task: str, scale: float = 1.0) -> Float[Tensor, "slots A"]:
        """Alpha (scale * g + d) for every weight; ``scale`` weighs the mixer alone, so a tuned bias always acts."""
        inputs, basis = self._features(tuple((slot.depth, slot.type) for slot in slots))
        return self.config.alpha * (scale * self.mixer(inputs) + basis @ fake_quantise(self.task(task).bias, 4))

    def _features(self, places: tuple[tuple[float, str], ...]) -> tuple[Tensor, Tensor]:
        """What mixer and bias see of weights. Kept, as copying them to a device at every step would wait for it."""
        kept = self._kept_features
        dtype = torch.promote_types(self.mixer.first.dtype, torch.float32)  # as rounded parameters are
        if torch.compiler.is_compiling() or kept is None or kept[0] != (places, self.device, dtype):
            with torch.inference_mode(False):
                rows = ([make(*place) for place in places] for make in (type_features, bias_features))
                inputs, basis = (torch.stack(row).to(self.device, dtype) for row in rows)
            if torch.compiler.is_compiling():  # constants of the graph
                return inputs, basis
            kept = self._kept_features = (places, self.device, dtype), (inputs, basis)
        return kept[1]

    def vectors(self, frame: Frame, slots: Sequence[Slot]) -> dict[str, Vectors]:
        """(V~, U~) of every weight in a host's frame. Weights that share a P share the product."""
        writes, reads = (Times(rows) for rows in self.dictionary())
        pairs = ((slot.path, frame.slots[slot.path]) for slot in slots)
        return {path: (reads(p_in), writes.transposed(p_out)) for path, (p_in, p_out) in pairs}

    def fold(
        self,
        frame: Frame,
        slots: Sequence[Slot],
        task: str,
        scale: float = 1.0,
        vectors: dict[str, Vectors] | None = None,
    ) -> Folded:
        """Fold the atoms and the router into a host's frame. ``vectors`` spares the products where nothing changed."""
        vectors = self.vectors(frame, slots) if vectors is None else vectors
        strengths = self.strengths(slots, task, scale)
        atoms = {slot.path: (*vectors[slot.path], strength) for slot, strength in zip(slots, strengths, strict=True)}
        return Folded(atoms, *self.readers(frame, slots), self.task(task).route_embedding())

    def readers(self, frame: Frame, slots: Sequence[Slot]) -> tuple[tuple[Tensor, ...], dict[str, Tensor]]:
        """The router in a host's frame: readers of the layers' inputs, and of weights that have their own route."""
        if self.router is None:
            return (), {}
        reads, alone = Times(self.router()), self.config.routing == "weight"
        own = {slot.path: reads(frame.slots[slot.path][0]) for slot in slots if alone or not slot.shared}
        return tuple(reads(r) for r in frame.routes), own


def _as_stored(adapter: UHLAdapter, state: dict[str, Tensor], prefix: str, _metadata: object) -> None:
    """A state dict holds what the file would give back: saving, loading and asking again gives the same values."""
    for name, bits in adapter.bits().items():
        value = state[prefix + name]
        if value.device.type != "meta":
            stored = fake_half(value) if bits == 16 else fake_quantise(value.float(), bits)
            state[prefix + name] = stored.detach().to(value.dtype)
