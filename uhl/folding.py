"""Folding: when an adapter's copies in a host's coordinates are made, and how long they are kept.

A fold without gradients is kept until a parameter changes; each forward pass with gradients makes its own. So passes
may come between a forward pass and its backward pass, and gradient checkpointing that runs a layer again finds a fold
with gradients. A compiled host holds one fold's tensors, which are written anew when a parameter has changed.
"""

from __future__ import annotations

import itertools
import threading
import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from uhl.adapter import Folded, UHLAdapter, Vectors
from uhl.errors import UHLError
from uhl.frame import Frame, dimension_frame
from uhl.host import Slot, stream_width

HALF = (torch.float16, torch.bfloat16)  # a host's dtypes that have copies of a fold


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
class Fold:
    """An adapter folded into a host, and what it was made from."""

    frame: Frame
    folded: Folded
    learning: bool  # made with gradients
    state: _State | None  # None inside a compiled host, where tracing cannot ask
    backwards: int  # that had run before it was made
    spent: _Spent | None = None
    tensors: list[Tensor] = field(default_factory=list)  # each once, where compiled hosts hold them
    copies: dict[torch.dtype, Folded] = field(default_factory=dict)  # of :attr:`folded`
    read: dict[str, tuple[Tensor, object, Tensor]] = field(default_factory=dict)  # by :meth:`reads`

    def like(self, dtype: torch.dtype) -> Folded:
        """What was folded, in a half-precision host's dtype, so that its activations need not be cast; made once."""
        if dtype not in HALF:
            return self.folded
        if self.tensors:  # a copy made now would not be written anew
            return self.copies.get(dtype, self.folded)
        if dtype not in self.copies:
            with torch.inference_mode(False), torch.no_grad():
                self.copies[dtype] = self.folded.like(dtype)
        return self.copies[dtype]

    def reads(self, path: str, bias: Float[Tensor, " d_out"]) -> Float[Tensor, " A"]:
        """What a weight's atoms read in its bias, in float32, as the dots that it is subtracted from."""
        moving = self.learning or bias.requires_grad or torch.compiler.is_compiling() or bias.is_inference()
        state = None if moving else (bias._version, bias.data_ptr(), bias.dtype, bias.device)
        kept = self.read.get(path)
        if not moving and kept is not None and kept[0] is bias and kept[1] == state:
            return kept[2]
        reader = self.folded.atoms[path][0]
        with torch.autocast(reader.device.type, enabled=False):
            if moving:
                return reader @ bias.to(reader)
            with torch.inference_mode(False), torch.no_grad():
                made = reader @ bias.to(reader)
        self.read[path] = bias, state, made
        return made


def _distinct(fold: Fold) -> list[Tensor]:
    """Every tensor of a fold and of its copies, once."""
    copied = (t for copy in fold.copies.values() for t in copy.tensors())
    return list({id(t): t for t in (*fold.folded.tensors(), fold.frame.head, *copied)}.values())


def in_backward() -> bool:
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
            not any(p.is_inference() for p in mine)  # what is written to them shows nowhere
            and self.marks == other.marks
            and self.others == other.others
            and all(a is b for a, b in zip(mine, theirs, strict=True))
        )


def _version(parameter: Tensor) -> int:
    return -1 if parameter.is_inference() else parameter._version


class PerThread(threading.local):
    """Each thread's ``now``, made by ``make``, so that concurrent passes do not meet; never copied with its owner.

    Dynamo loses what a compiled host writes to a thread-local object itself, but not what it writes to ``now``.
    """

    def __init__(self, make: Callable[[], Any]) -> None:
        self.make, self.now = make, make()

    def __deepcopy__(self, _memo: dict[int, Any]) -> PerThread:
        return PerThread(self.make)

    def __reduce__(self) -> Any:
        return PerThread, (self.make,)


class _Now:
    """The folds of one forward pass."""

    def __init__(self) -> None:
        self.inside = False  # the host's own forward pass is running
        self.folds: dict[bool, Fold] = {}  # of this pass, with gradients and without
        self.graph: Fold | None = None  # the last one with gradients


@dataclass
class _Cache:
    """What is computed from parameters: never copied with its owner, made again when it is needed."""

    plain: Fold | None = None
    graph: Fold | None = None  # the last one with gradients of any thread, for backward passes in threads of their own
    # whose tensors compiled hosts of a dtype hold; `uhl::refresh` writes into them
    compiled: dict[torch.dtype, Fold] = field(default_factory=dict)
    vectors: tuple[_State, Frame, dict[str, Vectors]] | None = None  # of a frozen dictionary and projector
    placed: tuple[Frame, torch.device, Frame] | None = None  # the given frame on the adapter's device
    backwards: int = 0
    key: int = field(default_factory=itertools.count().__next__)  # names the owner to `uhl::refresh`
    threads: PerThread = field(default_factory=lambda: PerThread(_Now))

    @property
    def now(self) -> _Now:
        """The pass that this thread is in."""
        now: _Now = self.threads.now
        return now

    def __deepcopy__(self, _memo: dict[int, Any]) -> _Cache:
        return _Cache()

    def __reduce__(self) -> Any:
        return _Cache, ()


_OWNERS: weakref.WeakValueDictionary[int, Folds] = weakref.WeakValueDictionary()  # by what compiled hosts know


class Folds:
    """The folds of one adapter in one host, whose weights ``slots`` carry it.

    ``given`` is the host's frame where there is one, ``scale`` weighs the mixer.
    """

    def __init__(
        self,
        adapter: UHLAdapter,
        task: str,
        slots: Sequence[Slot],
        model: nn.Module,
        given: Frame | None = None,
        scale: float = 1.0,
    ) -> None:
        self.adapter, self.task, self.slots, self.model = adapter, task, slots, model
        self.width = stream_width(model) or (slots[0].d_in if slots else 0)
        self.given, self.scale = given, scale
        self._cache = _Cache()
        _OWNERS[self._cache.key] = self

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)  # of a copy, whose cache is its own
        _OWNERS[self._cache.key] = self

    def forget(self) -> None:
        """Make everything anew when it is next asked for."""
        _OWNERS.pop(self._cache.key, None)
        self._cache = _Cache()
        _OWNERS[self._cache.key] = self

    def begin(self, inside: bool) -> None:
        """A forward pass begins; ``inside``: the host's own, which has one fold for all of it."""
        now = self._cache.now
        now.inside, now.folds, now.graph = inside or now.inside, {}, None
        if inside:
            self()

    @property
    def inside(self) -> bool:
        """Whether the host's own forward pass is running in this thread."""
        return self._cache.now.inside

    def end(self) -> None:
        """The host's forward pass has ended."""
        now = self._cache.now
        now.inside, now.folds = False, {}

    def suspended(self) -> tuple[bool, dict[bool, Fold], Fold | None]:
        """What the forward pass that is running has folded, for :meth:`resume`."""
        now = self._cache.now
        return now.inside, now.folds, now.graph

    def resume(self, suspended: tuple[bool, dict[bool, Fold], Fold | None]) -> None:
        """Go on with a forward pass that another one, now ended, had interrupted."""
        now = self._cache.now
        now.inside, now.folds, now.graph = suspended

    @property
    def frame(self) -> Frame:
        """The host's frame: the given one, or the dimension frame of the adapter's projector as it stands."""
        if self.given is None and self.adapter.config.projector == "canonical":
            raise UHLError(
                "a canonical adapter has no projectors of its own for this host; port it first: "
                "uhl.port_model(model, tokenizer) of a PEFT model, else attach() with the frame of uhl.port()"
            )
        cache, device = self._cache, self.adapter.device
        if self.given is None:
            return dimension_frame(self.adapter.projector, self.slots, self.width).to(device)
        if torch.compiler.is_compiling():
            return self.given.to(device)
        placed = cache.placed
        if placed is None or placed[0] is not self.given or placed[1] != device:
            with torch.inference_mode(False):
                placed = cache.placed = self.given, device, self.given.to(device)
        return placed[2]

    def _moving(self) -> list[nn.Parameter]:
        """Parameters that V~ and U~ depend on."""
        return [*self.adapter.dictionary.parameters(), *self.adapter.projector.parameters()]

    def __call__(self) -> Fold:
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
            fold = now.graph or (cache.graph if in_backward() else None)
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
        return _State(list(self.adapter.parameters()), self.task, self.scale, id(self.given))

    def _traced_fold(self, learning: bool) -> Fold:
        """The fold of a host that is being compiled. What trains is folded inside the graph, for its gradients.

        What does not is kept outside of it, and the graph begins by asking whether it still holds: tracing cannot.
        """
        atoms_train = learning and any(p.requires_grad for p in self._moving())
        if atoms_train:
            frame, vectors = self.frame, None
        else:
            dtype = torch.float32 if learning else getattr(self.model, "dtype", torch.float32)
            _prepare(self._cache.key, dtype)
            kept = self._cache.compiled[dtype]
            refresh(kept.tensors, self._cache.key, dtype)
            frame = kept.frame
            if not learning:
                return kept
            vectors = {path: (v, u) for path, (v, u, _) in kept.folded.atoms.items()}
        with torch.autocast(self.adapter.device.type, enabled=False):
            folded = self.adapter.fold(frame, self.slots, self.task, self.scale, vectors)
        return Fold(frame, folded, learning, None, 0)

    def prepare_compiled(self, dtype: torch.dtype) -> None:
        """Make the fold that compiled hosts of a dtype hold, if there is none on the adapter's device."""
        held = self._cache.compiled.get(dtype)
        if held is None or held.tensors[0].device != self.adapter.device:
            self._cache.compiled[dtype] = fold = self._new_fold(False, self._state())
            with torch.inference_mode(False), torch.no_grad():  # compilers lose track of views that are written to
                fold.folded = fold.folded.apart()
                fold.frame = replace(fold.frame, head=fold.frame.head.clone())
                if dtype in HALF:
                    fold.copies[dtype] = fold.folded.like(dtype)
            fold.tensors = _distinct(fold)

    def refresh_compiled(self, tensors: Sequence[Tensor], dtype: torch.dtype) -> None:
        """Write anew what compiled hosts of a dtype hold, where a parameter has changed since."""
        cache, state = self._cache, self._state()
        held = cache.compiled.get(dtype)
        if held is None or (held.state and held.state.same(state) and held.backwards == cache.backwards):
            return
        fold = self._new_fold(False, state)
        with torch.no_grad():
            fold.copies = {name: fold.folded.like(name) for name in held.copies}
            for old, new in zip(tensors, _distinct(fold), strict=True):
                old.copy_(new)
        held.state, held.backwards = state, cache.backwards

    def _new_fold(self, learning: bool, state: _State) -> Fold:
        """In float32, also under autocast. What has no gradients is usable in any later pass with them."""
        cache, device = self._cache, self.adapter.device.type
        with torch.inference_mode(False), torch.set_grad_enabled(learning), torch.autocast(device, enabled=False):
            frame, vectors = self._vectors(learning)
            folded = self.adapter.fold(frame, self.slots, self.task, self.scale, vectors)
        fold = Fold(frame, folded, learning, state, cache.backwards)
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
        if learning and trained:
            return self.frame, None
        state = _State(moving, id(self.given), self._cache.backwards if trained else 0)
        kept = self._cache.vectors
        if kept is None or not kept[0].same(state):
            with torch.no_grad():
                frame = self.frame
                kept = self._cache.vectors = (state, frame, self.adapter.vectors(frame, self.slots))
        return kept[1], kept[2]


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def _prepare(key: int, dtype: torch.dtype) -> None:
    """Runs once, while the host is compiled."""
    _OWNERS[key].prepare_compiled(dtype)


@torch.library.custom_op(
    "uhl::refresh",
    mutates_args=("tensors",),
    schema="(Tensor(a!)[] tensors, int key, ScalarType dtype) -> ()",
    tags=(torch.Tag.cudagraph_unsafe,),  # it asks each time: nothing that a recorded graph could repeat
)
def refresh(tensors: list[Tensor], key: int, dtype: torch.dtype) -> None:
    """The first thing that a compiled host does: have its folds written anew if a parameter has changed."""
    owner = _OWNERS.get(key)
    if owner is not None:
        owner.refresh_compiled(tensors, dtype)


@refresh.register_fake
def _(tensors: list[Tensor], key: int, dtype: torch.dtype) -> None:
    return None
