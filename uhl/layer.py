"""An adapter at work in a host: one route per token and layer, and the layer that adds the update.

:class:`Attached` is the state of one adapter in one host; :class:`UHLLinear` wraps a host's weight and asks it for the
update. `uhl.peft_method` puts them into a host and takes them out again.
"""

from __future__ import annotations

import inspect
import warnings
import weakref
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from peft.tuners.tuners_utils import BaseTunerLayer, check_adapters_to_merge
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from uhl import ops
from uhl.adapter import Folded, UHLAdapter
from uhl.errors import UHLError
from uhl.folding import Fold, Folds, PerThread, in_backward
from uhl.frame import LAST, Frame, Times
from uhl.host import Slot, first_layers, is_encoder_decoder, shape, weight
from uhl.router import Route, choose


class Held(NamedTuple):
    """What a layer needs to run again in a backward pass: its fold, and the route that was made before it."""

    fold: Fold
    route: Route | None


class _Reading:
    """What a layer's weight has read, for the layer's other weights that read the same."""

    def __init__(self, x: Tensor, v: Tensor, chosen: Route, read: Callable[..., Tensor]) -> None:
        self.x = weakref.ref(x)  # weak: what is read lives no longer for it
        self.same = (v, chosen, read, *self._mode(x))
        self.dots = read(x, v, chosen)

    @staticmethod
    def _mode(x: Tensor) -> tuple[int, bool, int]:
        """What must be equal beside the tensors; in a backward pass, that it is the same one: it runs layers again."""
        return x._version, torch.is_grad_enabled(), torch._C._current_graph_task_id()

    def fits(self, x: Tensor, v: Tensor, chosen: Route, read: Callable[..., Tensor]) -> bool:
        """Whether it is what these would give, by identity."""
        now = (v, chosen, read, *self._mode(x))
        return self.x() is x and all(a is b or (type(a) is int and a == b) for a, b in zip(self.same, now, strict=True))


def _calls(model: nn.Module) -> int:
    """How many calls of the model are running in this thread."""
    count, frame = 0, inspect.currentframe()
    while frame is not None:
        count += frame.f_code is nn.Module._call_impl.__code__ and frame.f_locals["self"] is model
        frame = frame.f_back
    return count


def _decoder_keys(model: nn.Module, slots: Sequence[Slot]) -> set[int | str]:
    """Layers and weights of the decoder, where a host has an encoder too: its tokens have a mask of their own."""
    if not is_encoder_decoder(model):
        return set()
    own = [slot for slot in slots if "decoder" in slot.path.split(".")]
    return {slot.layer for slot in own} | {slot.path for slot in own}


def _same(x: Tensor, hidden: Tensor) -> bool:
    """Whether a weight reads its layer's own input."""
    return x is hidden if torch.compiler.is_compiling() else x.data_ptr() == hidden.data_ptr()


class _Pass:
    """What belongs to one forward pass."""

    def __init__(self) -> None:
        self.last = -1  # number of the layer that ran last
        self.layer: tuple[int, Tensor, Fold] | None = None  # the layer that is running, its input, its fold
        self.routes: dict[int | str, Route] = {}
        self.task = -1  # the backward pass that the last route was made in
        self.reading: _Reading | None = None  # the last one of the layer that is running
        self.paths: dict[str, str] = {}
        self.mask: Tensor | None = None
        self.decoder_mask: Tensor | None = None
        self.outer: list[tuple[dict[str, Any], Any]] = []  # passes that wait for this one, which they have called

    def suspend(self, folds: Folds) -> None:
        """Put the pass that is running aside, for :meth:`resume`."""
        mine = {name: value for name, value in vars(self).items() if name != "outer"}
        self.outer.append((mine, folds.suspended()))

    def resume(self, folds: Folds) -> None:
        """Go on with the pass that was put aside last."""
        mine, theirs = self.outer.pop()
        vars(self).update(mine)
        folds.resume(theirs)


class Attached:
    """One adapter at work in one host. After a forward pass ``routes`` holds each :class:`Route` that it made.

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
        self.model, self.adapter, self.task_name, self.path = model, adapter, task, path
        self.slots = list(slots)
        self.folds = Folds(adapter, task, self.slots, model, self._checked(frame), scale)
        self._first = first_layers(self.slots)
        self._decoder = _decoder_keys(model, self.slots)
        self._threads = PerThread(_Pass)
        self._detach: Callable[[], None] | None = None
        if path is not None:
            ops.get(path)
        adapter.task(task)

    @property
    def _now(self) -> _Pass:
        now: _Pass = self._threads.now
        return now

    @property
    def ported(self) -> bool:
        """Whether the frame was given, by a port or by the source's own basis."""
        return self.folds.given is not None

    def set_frame(self, frame: Frame | None, scale: float = 1.0) -> None:
        """Use another frame and scale from the next forward pass on. Raises :class:`UHLError` for another host's."""
        self.folds.given, self.folds.scale = self._checked(frame), scale
        self.refold()

    def _checked(self, frame: Frame | None) -> Frame | None:
        if frame is not None:
            frame.check(self.slots, dict(self.model.named_modules()))
        return frame

    def refold(self) -> None:
        """Forget what was folded. Needed only after parameters were written through ``.data``, which nothing shows."""
        self.folds.forget()
        self._threads = PerThread(_Pass)

    @property
    def routes(self) -> dict[int | str, Route]:
        """The last forward pass's routes, in this thread: by a layer's number; by a weight's path where each weight has
        its own; by the number of a stack's first layer where all its layers share one. Those of weights outside of
        layers, or that read other tokens than their layer's, are kept only where each weight has its own.
        """
        return self._now.routes

    @property
    def mask(self) -> Tensor | None:
        """The last forward pass's attention mask (B, T), where it had one."""
        return self._now.mask

    @property
    def levels(self) -> tuple[int, ...]:
        """The host's levels that the head reads: the frame's."""
        return self.folds.given.levels if self.folds.given else LAST

    @property
    def folded(self) -> Folded:
        """The adapter in the host's coordinates."""
        self._settle()
        return self.folds().folded

    @property
    def current(self) -> Frame:
        """The frame that :attr:`folded` was made with, in the same graph."""
        self._settle()
        return self.folds().frame

    @property
    def paths(self) -> dict[str, str]:
        """How the last forward pass computed each weight's update, in this thread; ``path`` decides for all."""
        return self._now.paths

    @property
    def frame(self) -> Frame:
        """The host's frame: the given one, or the dimension frame of the adapter's projector as it stands."""
        return self.folds.frame

    # --- one forward pass --------------------------------------------------------------------------------------------

    def before_host(self, kwargs: dict[str, Any], at_work: bool = True) -> None:
        """A forward pass of the whole host begins, with one fold for all of it; also inside of another one.

        ``at_work``: whether the adapter takes part in it.
        """
        if not torch.compiler.is_compiling() and (self.folds.inside or self._now.outer or self._now.layer):
            running = _calls(self.model) - 1
            while self.folds.inside and running <= len(self._now.outer):  # interrupted, so that its end was not told
                self.after_host()
            if self.folds.inside or in_backward():  # a layer that runs again may call the host too
                self._now.suspend(self.folds)
        if not at_work:
            return
        masks = (kwargs.get(name) for name in ("attention_mask", "decoder_attention_mask"))
        self._now.mask, self._now.decoder_mask = (m if isinstance(m, Tensor) and m.ndim == 2 else None for m in masks)
        self._begin_pass(inside=True)

    def after_host(self) -> None:
        """The forward pass has ended."""
        self.folds.end()
        self._now.layer = self._now.reading = None
        if self._now.outer:
            self._now.resume(self.folds)

    def _settle(self) -> None:
        """End a pass whose end was not told: hooks are not called where the keyboard has interrupted it."""
        if self.folds.inside and not torch.compiler.is_compiling() and not _calls(self.model):
            self._now.outer.clear()
            self.after_host()

    def before_layer(self, number: int, hidden: Tensor, held: Held | None = None) -> None:
        """A layer begins; its route is made from its input ``hidden`` (B, T, D) when a weight first asks for it.

        ``held`` is what the layer had in the forward pass where it runs again. Raises :class:`UHLError` where it would
        need the route of all layers, and nothing has held it.
        """
        now = self._now
        if number <= now.last:
            self._settle()
        if not self.folds.inside and number <= now.last and not in_backward():  # an encoder that is called alone, again
            self._begin_pass()
        now.layer, now.last, now.reading = (number, hidden, held.fold if held else self.folds()), number, None
        first = self._made_at(number)
        if first == number:
            now.routes.pop(number, None)
        elif held:
            now.routes |= {first: held.route} if held.route else {}
        elif in_backward() and now.task != torch._C._current_graph_task_id():
            raise UHLError(
                "one route for all layers (routing='model') is lost where a layer runs again by itself; checkpoint "
                "with the host's own gradient_checkpointing_enable, or choose routing='layer'"
            )

    def end_again(self) -> None:
        """A layer that ran again in a backward pass has ended: nothing keeps its graph, which that pass frees."""
        now = self._now
        now.layer = now.reading = None
        graphs = {key: route for key, route in now.routes.items() if route.gate.requires_grad}
        now.routes |= {key: Route(route.index, route.gate.detach()) for key, route in graphs.items()}

    def _made_at(self, number: int) -> int:
        """The layer at whose input a layer's route is made."""
        return self._first.get(number, number) if self.adapter.config.routing == "model" else number

    @property
    def held(self) -> Held | None:
        """What the layer that is running needs to run again."""
        layer = self._now.layer
        return Held(layer[2], self.routes.get(self._made_at(layer[0]))) if layer else None

    def _begin_pass(self, inside: bool = False) -> None:
        now = self._now
        now.routes, now.paths, now.layer, now.last, now.reading = {}, {}, None, -1, None
        self.folds.begin(inside)

    @property
    def stream(self) -> bool:
        """Whether updates are edits of the residual stream: see :mod:`uhl.frame`."""
        return self.folds.given is not None and self.folds.given.stream

    def before_weight(self, slot: Slot, given: Float[Tensor, "*b d"], x: Float[Tensor, "*b d"]) -> Tensor:
        """What a weight is given: ``given``, with the edit of its input ``x`` added where it reads the stream."""
        return self._update(slot, given, x) if self.stream and not slot.writer else given

    def after_weight(
        self,
        slot: Slot,
        result: Float[Tensor, "*b d_out"],
        y: Float[Tensor, "*b d_out"],
        x: Float[Tensor, "*b d_in"],
        bias: Float[Tensor, " d_out"] | None,
    ) -> Float[Tensor, "*b d_out"]:
        """``result`` with the update added where it belongs behind a weight, whose own output for ``x`` is ``y``."""
        if not self.stream:
            return self._update(slot, result, x)
        return self._update(slot, result, y, bias) if slot.writer else result

    def _update(self, slot: Slot, y: Tensor, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """``y`` plus what the atoms write there for what they read in ``x``, or in x - bias."""
        layer = self._now.layer
        inside = layer is not None and layer[0] == slot.layer
        if layer is None and slot.shared and slot.layer >= 0 and in_backward():
            raise UHLError(
                f"a part of layer {slot.layer} runs again by itself, and its layer's route is lost; checkpoint whole "
                "layers, as the host's own gradient_checkpointing_enable does"
            )
        fold = layer[2] if layer is not None and inside else self.folds()
        path = self.path or ops.choose(
            x.device.type, x.shape[:-1].numel(), self.adapter.config.atoms, x.shape[-1], y.shape[-1]
        )
        self._now.paths[slot.path] = path
        # Triton's kernels add in float32 whatever they read; a learning fold has gradients to give
        half = path == "fused" and not fold.learning
        folded = fold.like(x.dtype) if half else fold.folded
        v, u, strength = folded.atoms[slot.path]
        chosen = self._shared_route(slot, x, layer[1], folded) if layer is not None and inside else None
        if chosen is None:
            read = x if bias is None else x - bias
            chosen = self._route(read, self._own_reader(slot, fold.frame, folded), folded.embedding)
            if self.adapter.config.routing == "weight" and not (slot.twice and layer and not _same(x, layer[1])):
                self.routes[slot.path] = chosen
        offset = None if bias is None else fold.reads(slot.path, bias)
        halves = ops.halves(path) if inside and bias is None else None
        if halves is None or x.is_inference():  # whether those were written to since cannot be seen
            return ops.get(path)(y, x, v, u, strength, chosen, offset)
        reads, writes = halves
        return writes(y, self._read(x, v, chosen, reads), u, strength, chosen)

    def _read(self, x: Tensor, v: Tensor, chosen: Route, read: Callable[..., Tensor]) -> Tensor:
        """``read(x, v, chosen)``, once for weights one after the other (Q, K and V) that read the same."""
        now = self._now
        if now.reading is None or not now.reading.fits(x, v, chosen, read):
            now.reading = _Reading(x, v, chosen, read)
        return now.reading.dots

    def _shared_route(self, slot: Slot, x: Tensor, hidden: Tensor, folded: Folded) -> Route | None:
        """The route of a weight's layer, or of all layers; None where the weight's input is not those tokens."""
        first, now = self._made_at(slot.layer), self._now
        reader = folded.reader(first)
        if self.adapter.config.routing == "weight" or not slot.shared:
            return None
        if reader is not None and hidden.shape[-1] != reader.shape[-1]:
            return None
        if slot.twice and not _same(x, hidden):
            return None
        flat = x.ndim == 2 and hidden.ndim != 2 and len(x) == hidden.shape[:-1].numel()  # all tokens, flattened
        if x.shape[:-1] != hidden.shape[:-1] and not flat:
            return None
        if first not in now.routes:
            now.routes[first] = self._route(hidden, reader, folded.embedding)
            now.task = -1 if torch.compiler.is_compiling() else torch._C._current_graph_task_id()
        made = now.routes[first]
        if made.index.shape[:-1] != hidden.shape[:-1]:  # this layer has other tokens than the first
            return None
        return made.flat() if flat else made

    def _own_reader(self, slot: Slot, frame: Frame, folded: Folded) -> Float[Tensor, "A d"] | None:
        """The router at what a weight's atoms read: outside of layers, or where those are other tokens."""
        router, known = self.adapter.router, folded.own_routes
        if router is None or slot.path in known:
            return known.get(slot.path)
        return Times(router())(frame.slots[slot.path][0])

    def _route(self, hidden: Tensor, reader: Tensor | None, embedding: Float[Tensor, " A"]) -> Route:
        top_k = self.adapter.config.top_k
        if reader is not None:
            return ops.route(hidden.to(reader.dtype), reader, embedding, top_k, self.path)
        one = choose(embedding, top_k)
        shape = (*hidden.shape[:-1], one.index.shape[-1])
        return Route(one.index.expand(shape), one.gate.expand(shape))

    def active(self) -> Float[Tensor, ""]:
        """E[k] of the last forward pass: mean gate sum over :attr:`routes` and the tokens that are not padding."""
        if not self.routes:
            raise UHLError("no route was made yet; run the host's forward pass with the adapter active first")
        sums = [r.gate.sum(-1) for r in self.routes.values()]  # (B, T) each
        if torch.is_grad_enabled() and self.folds().learning and not any(s.requires_grad for s in sums):
            warnings.warn(
                "reentrant gradient checkpointing leaves E[k] without a gradient; pass use_reentrant=False",
                stacklevel=2,
            )
        masks = [self._mask_of(s, key) for s, key in zip(sums, self.routes, strict=True)]
        total = torch.stack([(s * m).sum() for s, m in zip(sums, masks, strict=True)]).sum()
        return total / torch.stack([m.sum() for m in masks]).sum()

    def _mask_of(self, sums: Float[Tensor, "*b T"], key: int | str) -> Tensor:
        """The attention mask of a route's tokens, also of all tokens in a row; ones for other tokens."""
        mask = self._now.decoder_mask if key in self._decoder else self.mask
        if mask is not None and sums.shape in (mask.shape, (mask.numel(),)):
            return mask.reshape(sums.shape)
        return sums.new_ones(sums.shape)

    def check_mergeable(self, name: str, slots: Sequence[Slot] | None = None) -> None:
        """Raise :class:`UHLError` where no weights equal the adapter called ``name``; ``slots``: all, by default."""
        if self.adapter.config.router == "token":
            raise UHLError(
                f"adapter {name!r} chooses atoms for each token, so no single weight equals it and it cannot be "
                f"merged; keep it attached, or train one with UHLConfig(router='static')"
            )
        for slot in self.slots if slots is None else slots:
            weight(self.model, slot)

    def delta(self, slot: Slot, own: Tensor | None = None) -> Float[Tensor, "d_out d_in"]:
        """The change of a weight under a static router, as a matrix; ``own``: the weight before it was merged."""
        folded = self.folds().folded
        v, u, strength = folded.atoms[slot.path]
        chosen = choose(folded.embedding, self.adapter.config.top_k)
        gates = strength[chosen.index] * chosen.gate
        change = u[chosen.index].T @ (gates[:, None] * v[chosen.index])
        if not self.stream:
            return change
        own = (weight(self.model, slot) if own is None else own).to(change)
        return change @ own if slot.writer else own @ change

    def detach(self) -> None:
        """Put the host's own modules back, where :func:`uhl.peft_method.attach` made this. Twice does no harm."""
        if self._detach is not None:
            self._detach()

    def __enter__(self) -> Attached:
        return self

    def __exit__(self, *_: object) -> None:
        self.detach()


class UHLLinear(nn.Module, BaseTunerLayer):
    """A host's `nn.Linear` or `Conv1D` with the updates of the active adapters, each added where its frame says.

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
        """Base output with the update of each active adapter."""
        if getattr(self, "_is_replica", False):
            raise UHLError(
                "nn.DataParallel copies modules without what adapters share; use DistributedDataParallel (torchrun) or "
                "one device (CUDA_VISIBLE_DEVICES=0)"
            )
        if self.disable_adapters and self.merged:
            self.unmerge()
        if self.disable_adapters or self.merged:
            return self.base_layer(x, *args, **kwargs)  # type: ignore[no-any-return]
        active = [(self._shared[1][name], self.slots[name]) for name in self.active_adapters if name in self.slots]
        given = x
        for attached, slot in active:
            given = attached.before_weight(slot, given, x)
        result = y = self.base_layer(given, *args, **kwargs)
        for attached, slot in active:
            result = attached.after_weight(slot, result, y, x, self.base.bias if slot.writer else None)
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
        kernel = self.base.weight
        deltas = {name: self.get_delta_weight(name) for name in names}  # all of them, before the weight is changed
        for name, delta in deltas.items():
            if safe_merge and not torch.isfinite(kernel + delta).all():
                raise ValueError(f"NaNs detected in the merged weights. The adapter {name} seems to be broken")
            if self._kept is None:
                self._kept = kernel.detach().clone()
            kernel.data += delta.to(kernel.dtype)
            self.merged_adapters.append(name)

    @torch.no_grad()
    def unmerge(self) -> None:
        """Put the base weight back, bit by bit."""
        if self._kept is not None:
            self.base.weight.data.copy_(self._kept)
        self._kept = None
        self.merged_adapters = []

    def get_delta_weight(self, adapter: str) -> Tensor:
        """The change of the weight, in the base layer's shape. Raises :class:`UHLError` for a token router."""
        self._shared[1][adapter].check_mergeable(adapter, [self.slots[adapter]])
        transposed = isinstance(self.base, Conv1D)
        own = self._kept.T if self._kept is not None and transposed else self._kept
        delta = self._shared[1][adapter].delta(self.slots[adapter], own)
        return delta.T if transposed else delta

    def __repr__(self) -> str:
        return "uhl." + super().__repr__()
