"""An adapter at work in a host: folding, one route per token and layer, and the layer that adds the update.

:class:`Attached` is the state of one adapter in one host; :class:`UHLLinear` wraps a host's weight and asks it for the
update. `uhl.peft_method` puts them into a host and takes them out again.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from jaxtyping import Float
from peft.tuners.tuners_utils import BaseTunerLayer, check_adapters_to_merge
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from uhl import ops
from uhl.adapter import Folded, UHLAdapter
from uhl.errors import UHLError
from uhl.frame import Frame, dimension_frame
from uhl.host import Slot, shape, stream_width
from uhl.router import Route, choose, route


class _Cache:
    """What is computed from parameters: never copied with its owner, made again when it is needed."""

    def __init__(self) -> None:
        self.frame: Frame | None = None
        self.vectors: Any = None
        self.folded: Folded | None = None
        self.vectors_stamp: tuple[object, ...] = ()
        self.stamp: tuple[object, ...] = ()
        self.graph = self.segmented = False  # folded with gradients; layers run without them, to be run again
        self.inputs: dict[int, Tensor] = {}  # of layers that may be run again
        self.again: int | None = None  # the layer that is being run again
        self.routes: dict[int, Route] = {}
        self.mask: Tensor | None = None

    def __deepcopy__(self, _memo: dict[int, Any]) -> _Cache:
        return _Cache()

    def __reduce__(self) -> Any:
        return _Cache, ()


class Attached:
    """One adapter at work in one host. After a forward pass ``routes`` maps a layer's number to its :class:`Route`.

    ``frame`` is what a port returned; without one the adapter's own projector gives it. ``scale`` weighs the mixer.
    """

    def __init__(
        self,
        model: nn.Module,
        adapter: UHLAdapter,
        task: str,
        slots: Sequence[Slot],
        frame: Frame | None = None,
        scale: float = 1.0,
        path: str | None = None,
    ) -> None:
        self.model, self.adapter, self.task_name, self.scale = model, adapter, task, scale
        self.slots = list(slots)
        self.update: Callable[..., Tensor] = ops.get(path or "dense")
        self.detach: Callable[[], None] = lambda: None
        self._fixed, self._path = frame, path
        self._width = stream_width(model) or (self.slots[0].d_in if self.slots else 0)
        self._inside = False
        self._cache = _Cache()
        adapter.task(task)

    @property
    def ported(self) -> bool:
        """Whether the frame was given, by a port or by the source's own basis."""
        return self._fixed is not None

    def set_frame(self, frame: Frame | None, scale: float = 1.0) -> None:
        """Use another frame and scale from the next forward pass on."""
        self._fixed, self.scale, self._cache = frame, scale, _Cache()

    @property
    def routes(self) -> dict[int, Route]:
        """The last forward pass's routes by layer."""
        return self._cache.routes

    @property
    def mask(self) -> Tensor | None:
        """The last forward pass's attention mask (B, T), where it had one."""
        return self._cache.mask

    @property
    def folded(self) -> Folded:
        """The adapter in the host's coordinates, as last folded."""
        if self._cache.folded is None:
            self.refold()
        assert self._cache.folded is not None
        return self._cache.folded

    @property
    def current(self) -> Frame:
        """The frame as last folded."""
        assert self.folded is not None and self._cache.frame is not None  # noqa: PT018
        return self._cache.frame

    @property
    def frame(self) -> Frame:
        """The host's frame: the given one, or the dimension frame of the adapter's projector as it stands."""
        if self._fixed is None and self.adapter.config.projector == "canonical":
            raise UHLError(
                "a canonical adapter has no projectors of its own for this host; make them with uhl.port.port(adapter, "
                "host, task) and pass its frame (attach(..., frame), or set_frame on the PEFT model's base_model)"
            )
        frame = self._fixed or dimension_frame(self.adapter.projector, self.slots, self._width)
        return frame.to(self.adapter.device)

    def refold(self) -> None:
        """Fold again where gradients are wanted or a parameter changed since the last time.

        Atoms that do not train are multiplied by the frame once. The update is dense, but for tuning (gradients through
        atoms that do not train themselves), where gathering a token's atoms is quicker. Folding is in float32, also
        under autocast.
        """
        with torch.autocast(self.adapter.device.type, enabled=False):
            self._refold()

    def _refold(self) -> None:
        adapter, cache = self.adapter, self._cache
        moving = [*adapter.dictionary.parameters(), *adapter.projector.parameters()]
        learned, stamp = self._state(moving)
        tuning = torch.is_grad_enabled() and not learned
        self.update = ops.get(self._path or ("reference" if tuning else "dense"))
        if learned or stamp != cache.vectors_stamp:
            cache.frame = self.frame
            cache.vectors = adapter.vectors(cache.frame, self.slots)
            cache.vectors_stamp = stamp
        wanted, stamp = self._state(adapter.parameters())
        if wanted or stamp != cache.stamp:
            assert cache.frame is not None
            cache.folded = adapter.fold(cache.frame, self.slots, self.task_name, self.scale, cache.vectors)
            cache.stamp, cache.graph = stamp, wanted

    def _state(self, parameters: Iterable[nn.Parameter]) -> tuple[bool, tuple[object, ...]]:
        """Whether gradients to these parameters are wanted now, and a stamp that changes when they do."""
        every = list(parameters)
        wanted = torch.is_grad_enabled() and any(p.requires_grad for p in every)
        marks = ((id(p), p._version, p.device) for p in every)
        return wanted, (wanted, self.task_name, self.scale, id(self._fixed), *marks)

    def active(self) -> Float[Tensor, ""]:
        """E[k] of the last forward pass: mean gate sum over the layers and the tokens that are not padding."""
        sums = torch.stack([r.gate.sum(-1) for r in self.routes.values()])  # (L, B, T)
        if self.mask is None or self.mask.shape != sums.shape[1:]:
            return sums.mean()
        mask = self.mask.to(sums.dtype)
        return (sums * mask).sum() / (mask.sum() * len(sums))

    def before_host(self, kwargs: dict[str, Any]) -> None:
        """Fold once for a forward pass of the whole host."""
        mask = kwargs.get("attention_mask")
        self._cache.mask = mask if isinstance(mask, Tensor) and mask.ndim == 2 else None
        self._cache.segmented, self._cache.again, self._cache.inputs = False, None, {}
        self.refold()
        self._inside = True

    def after_host(self) -> None:
        """The forward pass has ended."""
        self._inside = False

    def before_layer(self, number: int, hidden: Tensor) -> None:
        """Choose atoms for the tokens at a layer's input."""
        self._fresh()
        if self._cache.graph and getattr(self.model, "is_gradient_checkpointing", False):
            self._cache.inputs[number] = hidden.detach()
        reader = self.folded.route
        if reader is None or hidden.shape[-1] == reader.shape[-1]:
            self.routes[number] = self._route(hidden, reader)

    def update_of(self, slot: Slot, x: Float[Tensor, "*b d_in"]) -> Float[Tensor, "*b d_out"]:
        """The term to add to a weight's output."""
        self._segment(slot.layer)
        if not slot.shared:
            self._fresh()
        v, u, strength = self.folded.atoms[slot.path]
        x = x.to(v.dtype)
        chosen = self.routes.get(slot.layer) if slot.shared else None
        if chosen is None or chosen.index.shape[:-1] != x.shape[:-1]:
            chosen = self._route(x, self._own_reader(slot))
        return self.update(x, v, u, strength, chosen)

    def _own_reader(self, slot: Slot) -> Float[Tensor, "A d_in"] | None:
        """The router at a weight's own input: outside of layers, or where a layer's tokens are not what it reads."""
        router, known = self.adapter.router, self.folded.own_routes
        if router is None or slot.path in known:
            return known.get(slot.path)
        return router() @ self.current.slots[slot.path][0]

    def delta(self, slot: Slot) -> Float[Tensor, "d_out d_in"]:
        """The change of a weight under a static router, as a matrix."""
        self.refold()
        v, u, strength = self.folded.atoms[slot.path]
        chosen = choose(self.folded.embedding, self.adapter.config.top_k)
        weight = strength[chosen.index] * chosen.gate
        return u[chosen.index].T @ (weight[:, None] * v[chosen.index])

    def _route(self, hidden: Tensor, reader: Tensor | None) -> Route:
        top_k, embedding = self.adapter.config.top_k, self.folded.embedding
        if reader is not None:
            return route(hidden.to(reader.dtype), reader, embedding, top_k)
        one = choose(embedding, top_k)
        shape = (*hidden.shape[:-1], one.index.shape[-1])
        return Route(one.index.expand(shape), one.gate.expand(shape))

    def _fresh(self) -> None:
        """Outside of the host's own forward pass (an encoder is called alone), fold again where something changed.

        Not where nothing did: gradient checkpointing that runs a layer again needs the tensors of the forward pass.
        """
        if not self._inside:
            _, stamp = self._state(self.adapter.parameters())
            if stamp != self._cache.stamp or self._cache.folded is None:
                self.refold()

    def _segment(self, layer: int) -> None:
        """Reentrant gradient checkpointing: each layer runs again with a backward pass, so with a fold, of its own.

        Its route is made again from the layer's input, whose own gradient does not pass through the gates any more.
        """
        cache, enabled = self._cache, torch.is_grad_enabled()
        if self._inside and cache.graph and not enabled and not cache.segmented:
            cache.segmented = True
            warnings.warn(
                "reentrant gradient checkpointing cuts the gradient through the router's gates to earlier layers; pass "
                "use_reentrant=False",
                stacklevel=2,
            )
        if not self._inside and cache.segmented and enabled and cache.again != layer:
            self.refold()
            cache.again = layer
            if layer in cache.inputs:
                self.routes[layer] = self._route(cache.inputs[layer], self.folded.route)

    def __enter__(self) -> Attached:
        return self

    def __exit__(self, *_: object) -> None:
        self.detach()


class UHLLinear(nn.Module, BaseTunerLayer):
    """A host's `nn.Linear` or `Conv1D` with the updates of the active adapters added to its output.

    It has no parameters of its own: ``uhl_adapters`` shows those of the tuner, which all layers share.
    """

    adapter_layer_names = ("uhl_adapters",)
    other_param_names = ("slots",)

    def __init__(self, base_layer: nn.Module, adapters: nn.ModuleDict, attached: dict[str, Attached]) -> None:
        super().__init__()
        self.base_layer = base_layer
        self.slots: dict[str, Slot] = {}
        self._shared = (adapters, attached)  # in a tuple, so that it is not registered here
        self._disable_adapters = False
        self.merged_adapters: list[str] = []
        self._kept: Tensor | None = None
        self.out_features, self.in_features = shape(self.base)

    @property
    def base(self) -> nn.Linear | Conv1D:
        """The host's own module."""
        found = self.get_base_layer()
        assert isinstance(found, (nn.Linear, Conv1D))
        return found

    @property
    def uhl_adapters(self) -> nn.ModuleDict:
        """The tuner's adapters by name."""
        return self._shared[0]

    def _get_available_adapters(self) -> set[str]:
        return set(self.slots)

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Base output plus the update of each active adapter."""
        if self.disable_adapters and self.merged:
            self.unmerge()
        result: Tensor = self.base_layer(x, *args, **kwargs)
        if self.disable_adapters or self.merged:
            return result
        for name in self.active_adapters:
            if name in self.slots:
                result = result + self._shared[1][name].update_of(self.slots[name], x).to(result.dtype)
        return result

    def _move_adapter_to_device_of_base_layer(self, adapter_name: str, device: torch.device | None = None) -> None:
        """To the weight's device; the adapter keeps its dtype."""
        place = device or self.base.weight.device
        if adapter_name in self.uhl_adapters and place.type != "meta":
            self.uhl_adapters[adapter_name].to(place)

    @torch.no_grad()
    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Add static adapters to the base weight; the weight itself is kept for :meth:`unmerge`."""
        names = [n for n in check_adapters_to_merge(self, adapter_names) if n in self.slots]
        weight = self.base.weight
        for name in names:
            delta = self.get_delta_weight(name)
            if safe_merge and not torch.isfinite(weight + delta).all():
                raise ValueError(f"NaNs detected in the merged weights. The adapter {name} seems to be broken")
            if self._kept is None:
                self._kept = weight.detach().clone()
            weight.data += delta.to(weight.dtype)
            self.merged_adapters.append(name)

    @torch.no_grad()
    def unmerge(self) -> None:
        """Put the base weight back, bit by bit."""
        if self._kept is not None:
            self.base.weight.data.copy_(self._kept)
        self._kept = None
        self.merged_adapters = []

    def get_delta_weight(self, adapter: str) -> Tensor:
        """The change of the weight, in the base layer's shape."""
        delta = self._shared[1][adapter].delta(self.slots[adapter])
        return delta.T if isinstance(self.base, Conv1D) else delta

    def __repr__(self) -> str:
        return "uhl." + super().__repr__()


def not_mergeable(name: str) -> UHLError:
    """Why a token router cannot be merged."""
    return UHLError(
        f"adapter {name!r} chooses atoms for each token, so no single weight equals it and it cannot be merged; keep "
        f"it attached, or train one with UHLConfig(router='static')"
    )
