"""Attach an adapter to a host and take it off again.

Each weight's `nn.Linear` is wrapped (the host's own module is kept, untouched, as ``base_layer``); a hook at each
layer's input decides the route once; a hook at the host's input folds the adapter when its parameters changed.
Detaching puts the host's modules back: the host is bit-identical to what it was.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from uhl import ops
from uhl.adapter import Folded, UHLAdapter
from uhl.errors import UHLError
from uhl.frame import Frame, dimension_frame
from uhl.host import Slot, find_slots
from uhl.router import Route, route


class AdaptedLinear(nn.Module):
    """A host's linear layer with the adapter's update added to its output."""

    def __init__(self, base_layer: nn.Linear, slot: Slot, owner: Attached) -> None:
        super().__init__()
        self.base_layer = base_layer
        self.slot = slot
        self._owner = (owner,)  # in a tuple, so that the owner's parameters are not registered here

    def forward(self, x: Float[Tensor, "*b T d_in"]) -> Float[Tensor, "*b T d_out"]:
        """Base output plus the update of the chosen atoms."""
        owner = self._owner[0]
        v, u, strength = owner.folded.atoms[self.slot.path]
        return self.base_layer(x) + owner.update(x, v, u, strength, owner.routes[self.slot.layer])


class Attached:
    """An adapter at work in a host. Use as ``with attach(...):`` or call :meth:`detach`.

    After a forward pass ``routes`` maps a layer's number to its :class:`Route`.
    """

    def __init__(
        self, model: nn.Module, adapter: UHLAdapter, task: str, frame: Frame | None, scale: float, path: str | None
    ) -> None:
        self.model, self.adapter, self.task_name, self.scale = model, adapter, task, scale
        self.slots = find_slots(model, adapter.config.types)
        self.update: Callable[..., Tensor] = ops.get(path or "dense")
        self.routes: dict[int, Route] = {}
        self.mask: Tensor | None = None
        self._fixed, self._path = frame, path
        self._stamp: tuple[object, ...] = ()
        self._vectors_stamp: tuple[object, ...] = ()
        self._handles: list[Any] = []
        if any(isinstance(model.get_submodule(s.path), AdaptedLinear) for s in self.slots):
            raise UHLError("the host already carries an adapter; detach it first")
        self._width = int(model.config.hidden_size)  # type: ignore[union-attr,arg-type]
        self.refold()
        self._install()

    @property
    def frame(self) -> Frame:
        """The host's frame: the given one, or the dimension frame of the adapter's projector as it stands."""
        frame = self._fixed or dimension_frame(self.adapter.projector, self.slots, self._width)
        return frame.to(self.adapter.router.weight.device)

    def refold(self) -> None:
        """Fold again where gradients are wanted or a parameter changed since the last time.

        Atoms that do not train are multiplied by the frame once. The update is dense, but for tuning (gradients through
        atoms that do not train themselves), where gathering a token's atoms is quicker.
        """
        adapter = self.adapter
        moving = [*adapter.dictionary.parameters(), *adapter.projector.parameters()]
        learned, stamp = self._state(moving)
        tuning = torch.is_grad_enabled() and not learned
        self.update = ops.get(self._path or ("reference" if tuning else "dense"))
        if learned or stamp != self._vectors_stamp:
            self.current = self.frame
            self._vectors = adapter.vectors(self.current, self.slots)
            self._vectors_stamp = stamp
        wanted, stamp = self._state(adapter.parameters())
        if wanted or stamp != self._stamp:
            self.folded: Folded = adapter.fold(self.current, self.slots, self.task_name, self.scale, self._vectors)
            self._stamp = stamp

    def _state(self, parameters: Iterable[nn.Parameter]) -> tuple[bool, tuple[object, ...]]:
        """Whether gradients to these parameters are wanted now, and a stamp that changes when they do."""
        every = list(parameters)
        wanted = torch.is_grad_enabled() and any(p.requires_grad for p in every)
        return wanted, (wanted, self.task_name, self.scale, *(p._version for p in every))

    def active(self) -> Float[Tensor, ""]:
        """E[k] of the last forward pass: mean gate sum over the layers and the tokens that are not padding."""
        sums = torch.stack([r.gate.sum(-1) for r in self.routes.values()])  # (L, B, T)
        if self.mask is None:
            return sums.mean()
        mask = self.mask.to(sums.dtype)
        return (sums * mask).sum() / (mask.sum() * len(sums))

    def detach(self) -> None:
        """Put the host's own modules back and remove the hooks. Calling it twice does no harm."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        for slot in self.slots:
            module = self.model.get_submodule(slot.path)
            if isinstance(module, AdaptedLinear):
                _put(self.model, slot.path, module.base_layer)

    def __enter__(self) -> Attached:
        return self

    def __exit__(self, *_: object) -> None:
        self.detach()

    def _install(self) -> None:
        self._handles.append(self.model.register_forward_pre_hook(self._before_host, with_kwargs=True))
        for number, path in sorted({(s.layer, s.layer_path) for s in self.slots}):
            layer = self.model.get_submodule(path)
            self._handles.append(layer.register_forward_pre_hook(self._before_layer(number), with_kwargs=True))
        for slot in self.slots:
            base = self.model.get_submodule(slot.path)
            assert isinstance(base, nn.Linear)
            _put(self.model, slot.path, AdaptedLinear(base, slot, self))

    def _before_host(self, _module: nn.Module, _args: Any, kwargs: dict[str, Any]) -> None:
        mask = kwargs.get("attention_mask")
        self.mask = mask if isinstance(mask, Tensor) and mask.ndim == 2 else None
        self.refold()

    def _before_layer(self, number: int) -> Callable[..., None]:
        def decide(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            hidden = args[0] if args else kwargs["hidden_states"]
            folded = self.folded
            self.routes[number] = route(hidden, folded.route, folded.embedding, self.adapter.config.top_k)

        return decide


def attach(
    model: nn.Module,
    adapter: UHLAdapter,
    task: str,
    frame: Frame | None = None,
    scale: float = 1.0,
    path: str | None = None,
) -> Attached:
    """Attach ``adapter`` to every weight of a known type in ``model``, for one of the adapter's tasks.

    ``frame`` is what a port returned; without one the adapter's own projector gives it (the `dimension` arm).
    ``scale`` in [0, 1] says how much of the ported atoms to use. ``path`` names one way to compute the update (see
    :mod:`uhl.ops`); by default it is chosen. Raises :class:`UHLError` for a host without weights
    of a known type and for a host that carries an adapter already.
    """
    adapter.to(next(model.parameters()).device)
    return Attached(model, adapter, task, frame, scale, path)


def _put(model: nn.Module, path: str, module: nn.Module) -> None:
    parent, _, name = path.rpartition(".")
    setattr(model.get_submodule(parent), name, module)
