"""An adapter at work in a host: folding, one route per token and layer, and the layer that adds the update.

:class:`Attached` is the state of one adapter in one host; :class:`UHLLinear` wraps a host's weight and asks it for the
update. `uhl.peft_method` puts them into a host and takes them out again.
"""

from __future__ import annotations

import itertools
import threading
import warnings
import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from peft.tuners.tuners_utils import BaseTunerLayer, check_adapters_to_merge
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from uhl import ops
from uhl.adapter import Folded, UHLAdapter, Vectors
from uhl.errors import UHLError
from uhl.frame import LAST, Frame, Times, dimension_frame
from uhl.host import Slot, first_layers, shape, stream_width, weight
from uhl.router import Route, choose, route


class _Spent:
    """Whether a backward pass has run through a fold, which frees what the fold's graph has kept."""

    def __init__(self, cache: _Cache) -> None:
        self.cache, self.yes = weakref.ref(cache), False  # weak: the graph holds this, and the cache the graph

    def __call__(self, _gradient: Tensor | None) -> None:
        cache = self.cache()
        if not self.yes and cache is not None:
            cache.backwards += 1
        self.yes = True


@dataclass
class _Fold:
    """An adapter folded into a host, and what it was made from."""

    frame: Frame
    folded: Folded
    learning: bool  # made with gradients
    state: _State | None  # None inside a compiled host, where tracing cannot ask
    backwards: int  # that had run before it was made
    spent: _Spent | None = None
    tensors: list[Tensor] = field(default_factory=list)  # each once, where compiled hosts hold them
    copies: dict[torch.dtype, Folded] = field(default_factory=dict)  # of :attr:`folded`

    def like(self, dtype: torch.dtype) -> Folded:
        """What was folded, in a half-precision host's dtype, so that its activations need not be cast; made once."""
        if dtype not in (torch.float16, torch.bfloat16):
            return self.folded
        if dtype not in self.copies:
            with torch.inference_mode(False), torch.no_grad():
                self.copies[dtype] = self.folded.like(dtype)
        return self.copies[dtype]


def _distinct(fold: _Fold) -> list[Tensor]:
    """Every tensor of a fold, once."""
    return list({id(t): t for t in (*fold.folded.tensors(), fold.frame.head)}.values())


class _Held(NamedTuple):
    """What a layer needs to run again in a backward pass: its fold, and the route that was made before it."""

    fold: _Fold
    route: Route | None


def _in_backward() -> bool:
    """Whether this thread is in a backward pass, where gradient checkpointing runs layers again."""
    return not torch.compiler.is_compiling() and bool(torch._C._current_graph_task_id() != -1)


class _State:
    """What a fold depends on. Writes through ``.data`` are not seen before the next backward pass or ``refold()``."""

    def __init__(self, parameters: Sequence[nn.Parameter], *others: object) -> None:
        self.parameters = list(parameters)  # kept, so that no new parameter can have the identity of an old one
        self.marks = [(_version(p), p.data_ptr(), p.device, p.dtype, p.requires_grad) for p in parameters]
        self.others = others

    def same(self, other: _State) -> bool:
        mine, theirs = self.parameters, other.parameters
        return (
            self.marks == other.marks
            and self.others == other.others
            and all(a is b for a, b in zip(mine, theirs, strict=True))
        )


def _version(parameter: Tensor) -> int:
    return -1 if parameter.is_inference() else parameter._version


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


def _same(x: Tensor, hidden: Tensor) -> bool:
    """Whether a weight reads its layer's own input."""
    return x is hidden if torch.compiler.is_compiling() else x.data_ptr() == hidden.data_ptr()


class _Pass(threading.local):
    """What belongs to one forward pass. Each thread has its own, so that concurrent passes do not meet."""

    def __init__(self) -> None:
        self.inside = False  # the host's own forward pass is running
        self.folds: dict[bool, _Fold] = {}  # of this pass, with gradients and without
        self.graph: _Fold | None = None  # the last one with gradients
        self.last = -1  # number of the layer that ran last
        self.layer: tuple[int, Tensor, _Fold] | None = None  # the layer that is running, its input, its fold
        self.routes: dict[int | str, Route] = {}
        self.task = -1  # the backward pass that the last route was made in
        self.reading: _Reading | None = None  # the last one of the layer that is running
        self.paths: dict[str, str] = {}
        self.mask: Tensor | None = None


@dataclass
class _Cache:
    """What is computed from parameters: never copied with its owner, made again when it is needed."""

    plain: _Fold | None = None
    graph: _Fold | None = None  # the last one with gradients of any thread, for backward passes in threads of their own
    compiled: _Fold | None = None  # whose tensors compiled hosts hold; `uhl::refresh` writes into them
    vectors: tuple[_State, Frame, dict[str, Vectors]] | None = None  # of a frozen dictionary and projector
    formed: Frame | None = None  # a given frame with its products formed, where the dictionary trains
    backwards: int = 0
    key: int = field(default_factory=itertools.count().__next__)  # names the owner to `uhl::refresh`
    now: _Pass = field(default_factory=_Pass)

    def __deepcopy__(self, _memo: dict[int, Any]) -> _Cache:
        return _Cache()

    def __reduce__(self) -> Any:
        return _Cache, ()


class Attached:
    """One adapter at work in one host. After a forward pass ``routes`` holds each :class:`Route` that it made.

    ``frame`` is what a port returned; without one the adapter's own projector gives it. ``scale`` weighs the mixer.

    Folds are made when an update is asked for. One without gradients is kept until a parameter changes; each forward
    pass with gradients makes its own. So passes may come between a forward pass and its backward pass, and gradient
    checkpointing that runs a layer again finds a fold with gradients.
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
        self._fixed, self.path = frame, path
        self._width = stream_width(model) or (self.slots[0].d_in if self.slots else 0)
        self._first = first_layers(self.slots)
        self._cache = _Cache()
        self._detach: Callable[[], None] | None = None
        if path is not None:
            ops.get(path)
        adapter.task(task)

    @property
    def ported(self) -> bool:
        """Whether the frame was given, by a port or by the source's own basis."""
        return self._fixed is not None

    def set_frame(self, frame: Frame | None, scale: float = 1.0) -> None:
        """Use another frame and scale from the next forward pass on."""
        self._fixed, self.scale = frame, scale
        self.refold()

    def refold(self) -> None:
        """Forget what was folded. Needed only after parameters were written through ``.data``, which nothing shows."""
        self._cache = _Cache()

    @property
    def routes(self) -> dict[int | str, Route]:
        """The last forward pass's routes, in this thread: by a layer's number; by a weight's path where each weight has
        its own; by the number of a stack's first layer where all its layers share one. Those of weights outside of
        layers, or that read other tokens than their layer's, are kept only where each weight has its own.
        """
        return self._cache.now.routes

    @property
    def mask(self) -> Tensor | None:
        """The last forward pass's attention mask (B, T), where it had one."""
        return self._cache.now.mask

    @property
    def levels(self) -> tuple[int, ...]:
        """The host's levels that the head reads: the frame's."""
        return self._fixed.levels if self._fixed else LAST

    @property
    def folded(self) -> Folded:
        """The adapter in the host's coordinates."""
        return self._fold().folded

    @property
    def current(self) -> Frame:
        """The frame that :attr:`folded` was made with, in the same graph."""
        return self._fold().frame

    @property
    def paths(self) -> dict[str, str]:
        """How the last forward pass computed each weight's update, in this thread; ``path`` decides for all."""
        return self._cache.now.paths

    @property
    def frame(self) -> Frame:
        """The host's frame: the given one, or the dimension frame of the adapter's projector as it stands."""
        if self._fixed is None and self.adapter.config.projector == "canonical":
            raise UHLError(
                "a canonical adapter has no projectors of its own for this host; make them with uhl.port(adapter, "
                "host, task) and pass its frame (attach(..., frame), or set_frame on the PEFT model's base_model)"
            )
        frame = self._fixed or dimension_frame(self.adapter.projector, self.slots, self._width)
        return frame.to(self.adapter.device)

    # --- folding -----------------------------------------------------------------------------------------------------

    def _moving(self) -> list[nn.Parameter]:
        """Parameters that V~ and U~ depend on."""
        return [*self.adapter.dictionary.parameters(), *self.adapter.projector.parameters()]

    def _fold(self) -> _Fold:
        """The fold to use now: a kept one, or a new one where it was spent or something has changed."""
        cache, now = self._cache, self._cache.now
        with_gradients = torch.is_grad_enabled()
        if now.inside and with_gradients in now.folds:
            return now.folds[with_gradients]
        learning = with_gradients and any(p.requires_grad for p in self.adapter.parameters())
        if torch.compiler.is_compiling():
            now.folds[with_gradients] = self._traced_fold(learning)
            return now.folds[with_gradients]
        state = self._state()
        fold = cache.plain
        if learning:
            fold = now.graph or (cache.graph if _in_backward() else None)
        if learning:
            kept = fold is not None and not (fold.spent and fold.spent.yes)
        else:
            kept = fold is not None and fold.backwards == cache.backwards
        if fold is None or not kept or fold.state is None or not fold.state.same(state):
            fold = self._new_fold(learning, state)
            if learning:
                now.graph = cache.graph = fold
            else:
                cache.plain = fold
        if now.inside:
            now.folds[with_gradients] = fold
        return fold

    def _state(self) -> _State:
        return _State(list(self.adapter.parameters()), self.task_name, self.scale, id(self._fixed))

    def _traced_fold(self, learning: bool) -> _Fold:
        """The fold of a host that is being compiled. What trains is folded inside the graph, for its gradients.

        What does not is kept outside of it, and the graph begins by asking whether it still holds: tracing cannot.
        """
        atoms_train = learning and any(p.requires_grad for p in self._moving())
        if atoms_train:
            frame, vectors = self.frame, None
        else:
            _prepare(self)
            kept = self._cache.compiled
            assert kept is not None
            refresh(kept.tensors, self._cache.key)
            frame = kept.frame
            if not learning:
                return kept
            vectors = {path: (v, u) for path, (v, u, _) in kept.folded.atoms.items()}
        with torch.autocast(self.adapter.device.type, enabled=False):
            folded = self.adapter.fold(frame, self.slots, self.task_name, self.scale, vectors)
        return _Fold(frame, folded, learning, None, 0)

    def prepare_compiled(self) -> None:
        """Make the fold that compiled hosts hold, if there is none."""
        if self._cache.compiled is None:
            self._cache.compiled = fold = self._new_fold(False, self._state())
            fold.tensors = _distinct(fold)
            _OWNERS[self._cache.key] = self

    def refresh_compiled(self, tensors: Sequence[Tensor]) -> None:
        """Write anew what compiled hosts hold, where a parameter has changed since."""
        cache, state = self._cache, self._state()
        held = cache.compiled
        if held is None or (held.state and held.state.same(state) and held.backwards == cache.backwards):
            return
        with torch.no_grad():
            for old, new in zip(tensors, _distinct(self._new_fold(False, state)), strict=True):
                old.copy_(new)
        held.state, held.backwards = state, cache.backwards

    def _new_fold(self, learning: bool, state: _State) -> _Fold:
        """In float32, also under autocast. What has no gradients is usable in any later pass with them."""
        cache, device = self._cache, self.adapter.device.type
        with torch.inference_mode(False), torch.set_grad_enabled(learning), torch.autocast(device, enabled=False):
            frame, vectors = self._vectors(learning)
            folded = self.adapter.fold(frame, self.slots, self.task_name, self.scale, vectors)
        fold = _Fold(frame, folded, learning, state, cache.backwards)
        if learning:
            fold.spent = _Spent(cache)
            for tensor in _distinct(fold):
                if tensor.requires_grad:
                    tensor.register_hook(fold.spent)
        return fold

    def _vectors(self, learning: bool) -> tuple[Frame, dict[str, Vectors] | None]:
        """The frame, and the products V~ and U~ where they do not train: these are kept while they do not change."""
        moving = self._moving()
        trained = any(p.requires_grad for p in moving)
        if learning and trained:  # folded in every step, which formed products make cheaper
            if self._fixed is not None and self._cache.formed is None:
                self._cache.formed = self._fixed.formed()
            return (self._cache.formed or self.frame).to(self.adapter.device), None
        state = _State(moving, id(self._fixed), self._cache.backwards if trained else 0)
        kept = self._cache.vectors
        if kept is None or not kept[0].same(state):
            with torch.no_grad():
                frame = self.frame
                kept = self._cache.vectors = (state, frame, self.adapter.vectors(frame, self.slots))
        return kept[1], kept[2]

    # --- one forward pass --------------------------------------------------------------------------------------------

    def before_host(self, kwargs: dict[str, Any]) -> None:
        """A forward pass of the whole host begins, with one fold for all of it."""
        now, mask = self._cache.now, kwargs.get("attention_mask")
        now.mask = mask if isinstance(mask, Tensor) and mask.ndim == 2 else None
        now.inside = True
        self._begin_pass()
        self._fold()

    def after_host(self) -> None:
        """The forward pass has ended."""
        now = self._cache.now
        now.inside, now.folds, now.layer, now.reading = False, {}, None, None

    def before_layer(self, number: int, hidden: Tensor, held: _Held | None = None) -> None:
        """A layer begins; its route is made from its input ``hidden`` (B, T, D) when a weight first asks for it.

        ``held`` is what the layer had in the forward pass where it runs again. Raises :class:`UHLError` where it would
        need the route of all layers, and nothing has held it.
        """
        now = self._cache.now
        if not now.inside and number <= now.last and not _in_backward():  # an encoder that is called alone, again
            self._begin_pass()
        now.layer, now.last, now.reading = (number, hidden, held.fold if held else self._fold()), number, None
        first = self._made_at(number)
        if first == number:
            now.routes.pop(number, None)
        elif held:
            now.routes |= {first: held.route} if held.route else {}
        elif _in_backward() and now.task != torch._C._current_graph_task_id():
            raise UHLError(
                "one route for all layers (routing='model') is lost where a layer runs again by itself; checkpoint "
                "with the host's own gradient_checkpointing_enable, or choose routing='layer'"
            )

    def _made_at(self, number: int) -> int:
        """The layer at whose input a layer's route is made."""
        return self._first.get(number, number) if self.adapter.config.routing == "model" else number

    @property
    def held(self) -> _Held | None:
        """What the layer that is running needs to run again."""
        layer = self._cache.now.layer
        return _Held(layer[2], self.routes.get(self._made_at(layer[0]))) if layer else None

    def _begin_pass(self) -> None:
        now = self._cache.now
        now.folds, now.graph, now.routes, now.layer, now.last, now.reading = {}, None, {}, None, -1, None

    def update(
        self, slot: Slot, y: Float[Tensor, "*b d_out"], x: Float[Tensor, "*b d_in"]
    ) -> Float[Tensor, "*b d_out"]:
        """A weight's output ``y`` for the input ``x``, with the update added."""
        layer = self._cache.now.layer
        inside = layer is not None and layer[0] == slot.layer
        fold = layer[2] if layer is not None and inside else self._fold()
        path = self.path or ops.choose(
            x.device.type, x.shape[:-1].numel(), self.adapter.config.atoms, slot.d_in, slot.d_out
        )
        self._cache.now.paths[slot.path] = path
        # Triton's kernels add in float32 whatever they read; a learning fold has gradients to give
        half = path == "fused" and not fold.learning and not torch.compiler.is_compiling()
        folded = fold.like(x.dtype) if half else fold.folded
        v, u, strength = folded.atoms[slot.path]
        chosen = self._shared_route(slot, x, layer[1], folded) if layer is not None and inside else None
        if chosen is None:
            chosen = self._route(x, self._own_reader(slot, fold.frame, folded), folded.embedding)
            if self.adapter.config.routing == "weight" and not (slot.twice and layer and not _same(x, layer[1])):
                self.routes[slot.path] = chosen
        halves = ops.halves(path) if inside else None
        if halves is None or x.is_inference():  # whether those were written to since cannot be seen
            return ops.get(path)(y, x, v, u, strength, chosen)
        read, write = halves
        return write(y, self._read(x, v, chosen, read), u, strength, chosen)

    def _read(self, x: Tensor, v: Tensor, chosen: Route, read: Callable[..., Tensor]) -> Tensor:
        """``read(x, v, chosen)``, once for weights one after the other (Q, K and V) that read the same."""
        now = self._cache.now
        if now.reading is None or not now.reading.fits(x, v, chosen, read):
            now.reading = _Reading(x, v, chosen, read)
        return now.reading.dots

    def _shared_route(self, slot: Slot, x: Tensor, hidden: Tensor, folded: Folded) -> Route | None:
        """The route of a weight's layer, or of all layers; None where the weight's input is not those tokens."""
        first, now = self._made_at(slot.layer), self._cache.now
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

    def _own_reader(self, slot: Slot, frame: Frame, folded: Folded) -> Float[Tensor, "A d_in"] | None:
        """The router at a weight's own input: outside of layers, or where a layer's tokens are not what it reads."""
        router, known = self.adapter.router, folded.own_routes
        if router is None or slot.path in known:
            return known.get(slot.path)
        return Times(router())(frame.slots[slot.path][0])

    def _route(self, hidden: Tensor, reader: Tensor | None, embedding: Float[Tensor, " A"]) -> Route:
        top_k = self.adapter.config.top_k
        if reader is not None:
            return route(hidden.to(reader.dtype), reader, embedding, top_k)
        one = choose(embedding, top_k)
        shape = (*hidden.shape[:-1], one.index.shape[-1])
        return Route(one.index.expand(shape), one.gate.expand(shape))

    def active(self) -> Float[Tensor, ""]:
        """E[k] of the last forward pass: mean gate sum over :attr:`routes` and the tokens that are not padding."""
        if not self.routes:
            raise UHLError("no route was made yet; run the host's forward pass with the adapter active first")
        sums = [r.gate.sum(-1) for r in self.routes.values()]  # (B, T) each
        if torch.is_grad_enabled() and self._fold().learning and not any(s.requires_grad for s in sums):
            warnings.warn(
                "reentrant gradient checkpointing leaves E[k] without a gradient; pass use_reentrant=False",
                stacklevel=2,
            )
        masks = [self._mask_of(s) for s in sums]
        total = torch.stack([(s * m).sum() for s, m in zip(sums, masks, strict=True)]).sum()
        return total / torch.stack([m.sum() for m in masks]).sum()

    def _mask_of(self, sums: Float[Tensor, "*b T"]) -> Tensor:
        """The attention mask of a route's tokens, also of all tokens in a row; ones for other tokens."""
        mask = self.mask
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

    def delta(self, slot: Slot) -> Float[Tensor, "d_out d_in"]:
        """The change of a weight under a static router, as a matrix."""
        folded = self._fold().folded
        v, u, strength = folded.atoms[slot.path]
        chosen = choose(folded.embedding, self.adapter.config.top_k)
        gates = strength[chosen.index] * chosen.gate
        return u[chosen.index].T @ (gates[:, None] * v[chosen.index])

    def detach(self) -> None:
        """Put the host's own modules back, where :func:`uhl.peft_method.attach` made this. Twice does no harm."""
        if self._detach is not None:
            self._detach()

    def __enter__(self) -> Attached:
        return self

    def __exit__(self, *_: object) -> None:
        self.detach()


_OWNERS: weakref.WeakValueDictionary[int, Attached] = weakref.WeakValueDictionary()  # of what compiled hosts hold


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def _prepare(attached: Attached) -> None:
    """Runs once, while the host is compiled."""
    attached.prepare_compiled()


@torch.library.custom_op("uhl::refresh", mutates_args=("tensors",), schema="(Tensor(a!)[] tensors, int key) -> ()")
def refresh(tensors: list[Tensor], key: int) -> None:
    """The first thing that a compiled host does: have its folds written anew if a parameter has changed."""
    owner = _OWNERS.get(key)
    if owner is not None:
        owner.refresh_compiled(tensors)


@refresh.register_fake
def _(tensors: list[Tensor], key: int) -> None:
    return None


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
        self.folds: dict[Attached, _Held | None] | None = None

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
        else:
            self.begin(args, given, self.folds)
        return self.run(*args, **kwargs)


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
                result = self._shared[1][name].update(self.slots[name], result, x)
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
        delta = self._shared[1][adapter].delta(self.slots[adapter])
        return delta.T if isinstance(self.base, Conv1D) else delta

    def __repr__(self) -> str:
        return "uhl." + super().__repr__()
