"""The operations of :mod:`uhl.ops.gather` as Triton kernels, and the router's choice.

``_rows`` takes some tokens through both steps, dots and sum, with the dots in registers: x is read once, y written
once, forward and for the gradient of x. ``_sums``, for the atoms' gradients, gives each atom and block of columns to a
few programs, which read a token once for each atom that it chose, and add the atom's tokens in their order. Nothing is
added atomically, so every run gives the same bits. Products are formed in float32 whatever the tensors' dtype.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from functools import cache
from typing import Any

import torch
import triton
import triton.language as tl
from jaxtyping import Float, Int64
from torch import Tensor
from torch.autograd.function import once_differentiable

from uhl import router
from uhl.errors import UHLError
from uhl.router import Places, Route

NUMBERS = 2048  # of a block, tokens x atoms x columns, where one token's are no more (quickest of 13 on an H200)
COLUMNS = 1024  # of a block, at most
SUMMED = 32, 128  # tokens and columns of a block of an atom's sum
PARTS = 8  # of an atom's tokens, at most, that are summed apart: trained routers give some atoms most of the tokens


class _Kernel:
    """A kernel of Triton's, launched on its tensors' device.

    Triton binds and specialises the arguments at each launch, which takes longer than most of these kernels run. So
    what it has compiled is kept by all that it looks at, and launched directly.
    """

    def __init__(self, function: Callable[..., Any]) -> None:
        self.function = inspect.unwrap(function)  # where a checker of types has wrapped it: Triton reads its globals
        self.jit = triton.jit(self.function)
        self.compiled: dict[tuple[Any, ...], Any] = {}

    def __call__(
        self, grid: tuple[int, ...], tensors: Sequence[Tensor], sizes: tuple[int, ...], constants: tuple[int, ...]
    ) -> None:
        device = tensors[0].device
        if device.type == "cuda" and device.index != torch.cuda.current_device():
            with torch.cuda.device(device):
                return self(grid, tensors, sizes, constants)
        aligned = not any(t.data_ptr() % 16 for t in tensors)
        numbers = ((n == 1, n % 16 == 0, n < 2**31) for n in sizes)
        key = device.index, constants, *(t.dtype for t in tensors), *numbers
        found = self.compiled.get(key) if aligned else None
        if found is not None:
            found[(*grid, 1, 1)[:3]](*tensors, *sizes, *constants)
            return None
        found = self.jit[grid](*tensors, *sizes, *constants)
        if aligned and found is not None:  # nothing is compiled in Triton's interpreter
            self.compiled[key] = found
        return None


def update(
    y: Float[Tensor, "*b T d_out"],
    x: Float[Tensor, "*b T d_in"],
    v: Float[Tensor, "A d_in"],
    u: Float[Tensor, "A d_out"],
    strength: Float[Tensor, " A"],
    chosen: Route,
    offset: Float[Tensor, " A"] | None = None,
) -> Float[Tensor, "*b T d_out"]:
    """Same result as :func:`uhl.ops.reference.update`, to float32's precision; the tensors may have several dtypes.

    First gradients only.
    """
    places = chosen.places()
    index = places.index
    gate = chosen.gate.reshape(index.shape)
    given = y.reshape(-1, y.shape[-1]), x.reshape(-1, x.shape[-1]), v, u, strength, gate
    learning = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (*given, offset))
    if torch.compiler.is_compiling():
        summed = learning and any(t is not None and t.requires_grad for t in (v, u, strength, offset))
        tables = places.by_atom(len(v)) if summed else None
        order, starts = (tables.order, tables.starts) if tables else (None, None)
        out: Tensor = _opaque_rows(*given[1:], index, given[0], offset, None, learning, y.dtype, order, starts)[0]
    elif learning:
        out = _Update.apply(*given, offset, index, places)
    else:
        out, _ = rows(*given[1:], index, given[0], offset, keep=False)
    return out.view(y.shape)


def route(
    hidden: Float[Tensor, "*b T D"], folded: Float[Tensor, "A D"], task: Float[Tensor, " A"], top_k: int
) -> Route:
    """Same decisions as :func:`uhl.router.route`; of equal scores the first is taken."""
    k, find = min(top_k, len(task)), _opaque_best if torch.compiler.is_compiling() else best
    if torch.is_grad_enabled() and (hidden.requires_grad or folded.requires_grad or task.requires_grad):
        scores = router.scores(hidden, folded, task)
        return router.choose(scores, k, find(scores.detach(), k, None, None)[0])
    return Route(*find(hidden @ folded.T, k, hidden, task))


@_Kernel
def _rows(  # type: ignore[no-untyped-def]
    x_ptr, v_ptr, u_ptr, strength_ptr, gate_ptr, index_ptr, y_ptr, offset_ptr, read_ptr,
    out_ptr, dots_ptr, for_gate_ptr,
    count, d_in, d_out,
    ADD: tl.constexpr, LESS: tl.constexpr, KEEP: tl.constexpr, BACK: tl.constexpr,
    K: tl.constexpr, WIDE: tl.constexpr, TOKENS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    t = (tl.program_id(0) * TOKENS + tl.arange(0, TOKENS)).to(tl.int64)
    k = tl.arange(0, WIDE)  # K rounded up to a power of two
    live = t < count
    chosen = live[:, None] & (k < K)[None, :]
    places = t[:, None] * K + k[None, :]
    gate = tl.load(gate_ptr + places, mask=chosen, other=0.0).to(tl.float32)
    wanted = chosen  # places whose atoms are read
    if not KEEP:
        wanted = chosen & (gate != 0.0)
    atom = tl.load(index_ptr + places, mask=wanted, other=0)
    strength = tl.load(strength_ptr + atom, mask=wanted, other=0.0).to(tl.float32)
    parts = tl.zeros((TOKENS, WIDE, COLUMNS), tl.float32)
    for start in range(0, d_in, COLUMNS):
        d = start + tl.arange(0, COLUMNS)
        inside = d < d_in
        x = tl.load(x_ptr + t[:, None] * d_in + d[None, :], mask=live[:, None] & inside[None, :], other=0.0)
        where = wanted[:, :, None] & inside[None, None, :]
        v = tl.load(v_ptr + atom[:, :, None] * d_in + d[None, None, :], mask=where, other=0.0)
        parts += x.to(tl.float32)[:, None, :] * v.to(tl.float32)
    dots = tl.sum(parts, axis=2)
    if LESS:
        dots -= tl.load(offset_ptr + atom, mask=wanted, other=0.0).to(tl.float32)
    if KEEP:
        tl.store(dots_ptr + places, dots, mask=chosen)
    if BACK:  # x is a gradient: what the atoms had read, times this, is the gates'
        read = tl.load(read_ptr + places, mask=chosen, other=0.0)
        tl.store(for_gate_ptr + places, dots * read * strength, mask=chosen)
    s = dots * gate * strength
    for start in range(0, d_out, COLUMNS):
        d = start + tl.arange(0, COLUMNS)
        inside = d < d_out
        where = wanted[:, :, None] & inside[None, None, :]
        u = tl.load(u_ptr + atom[:, :, None] * d_out + d[None, None, :], mask=where, other=0.0)
        out = tl.sum(s[:, :, None] * u.to(tl.float32), axis=1)
        tile = t[:, None] * d_out + d[None, :]
        here = live[:, None] & inside[None, :]
        if ADD:
            out += tl.load(y_ptr + tile, mask=here, other=0.0).to(tl.float32)
        tl.store(out_ptr + tile, out.to(out_ptr.dtype.element_ty), mask=here)


@_Kernel
def _sums(  # type: ignore[no-untyped-def]
    x_ptr, g_ptr, strength_ptr, gate_ptr, dots_ptr, back_ptr, order_ptr, starts_ptr, out_ptr,
    atoms, places, d_in, d_out, width,
    V: tl.constexpr, U: tl.constexpr, K: tl.constexpr,
    SPLIT: tl.constexpr, TOKENS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    atom = tl.program_id(0).to(tl.int64)
    d = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    part = tl.program_id(2)
    begin = tl.load(starts_ptr + atom)
    end = tl.load(starts_ptr + atom + 1, mask=atom + 1 < atoms, other=places)
    each = (end - begin + SPLIT - 1) // SPLIT  # of the atom's places, to each part
    begin += part * each
    end = tl.minimum(end, begin + each)
    read, written = tl.zeros((TOKENS, COLUMNS), tl.float32), tl.zeros((TOKENS, COLUMNS), tl.float32)
    whole, plain = tl.zeros((TOKENS,), tl.float32), tl.zeros((TOKENS,), tl.float32)
    for first in range(begin, end, TOKENS):
        at = first + tl.arange(0, TOKENS)
        here = at < end
        place = tl.load(order_ptr + at, mask=here, other=0)
        token = place // K
        gate = tl.load(gate_ptr + place, mask=here, other=0.0).to(tl.float32)
        dots = gate * tl.load(dots_ptr + place, mask=here, other=0.0)
        back = tl.load(back_ptr + place, mask=here, other=0.0)
        whole += dots * back
        plain += gate * back
        if V:
            x = tl.load(x_ptr + token[:, None] * d_in + d[None, :], mask=here[:, None] & (d < d_in)[None, :], other=0.0)
            read += (gate * back)[:, None] * x.to(tl.float32)
        if U:
            inside = here[:, None] & (d < d_out)[None, :]
            g = tl.load(g_ptr + token[:, None] * d_out + d[None, :], mask=inside, other=0.0)
            written += dots[:, None] * g.to(tl.float32)
    strength = tl.load(strength_ptr + atom).to(tl.float32)
    row = out_ptr + (part * atoms + atom) * width
    if V:
        tl.store(row + d, strength * tl.sum(read, axis=0), mask=d < d_in)
    if U:
        tl.store(row + width - 2 - d_out + d, strength * tl.sum(written, axis=0), mask=d < d_out)
    if tl.program_id(1) == 0:
        tl.store(row + width - 2, tl.sum(whole, axis=0))
        tl.store(row + width - 1, -strength * tl.sum(plain, axis=0))


@_Kernel
def _best(  # type: ignore[no-untyped-def]
    scores_ptr, hidden_ptr, task_ptr, index_ptr, gate_ptr,
    count, width, atoms,
    RAW: tl.constexpr, K: tl.constexpr, TOKENS: tl.constexpr, ATOMS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    t = (tl.program_id(0) * TOKENS + tl.arange(0, TOKENS)).to(tl.int64)
    live = t < count
    a = tl.arange(0, ATOMS)  # atoms rounded up to a power of two
    known = live[:, None] & (a < atoms)[None, :]
    scores = tl.load(scores_ptr + t[:, None] * atoms + a[None, :], mask=known, other=0.0).to(tl.float32)
    if RAW:
        squares = tl.zeros((TOKENS, COLUMNS), tl.float32)
        for start in range(0, width, COLUMNS):
            d = start + tl.arange(0, COLUMNS)
            here = live[:, None] & (d < width)[None, :]
            h = tl.load(hidden_ptr + t[:, None] * width + d[None, :], mask=here, other=0.0).to(tl.float32)
            squares += h * h
        rms = tl.maximum(tl.sqrt(tl.sum(squares, axis=1) / width), 1e-6)
        scores = scores / rms[:, None] + tl.load(task_ptr + a, mask=a < atoms, other=0.0).to(tl.float32)[None, :]
    scores = tl.where(known, scores, float("-inf"))
    for k in tl.static_range(K):
        top = tl.max(scores, axis=1)
        at = tl.min(tl.where(scores == top[:, None], a[None, :], atoms - 1), axis=1)
        soft = 1.0 / (1.0 + tl.exp(-top))
        tl.store(index_ptr + t * K + k, at.to(tl.int64), mask=live)
        tl.store(gate_ptr + t * K + k, (soft > 0.5).to(gate_ptr.dtype.element_ty), mask=live)
        scores = tl.where(a[None, :] == at[:, None], float("-inf"), scores)


def _padded(count: int) -> int:
    """The next power of two."""
    return 1 << (count - 1).bit_length()


@cache
def _tile(width: int, wide: int) -> tuple[int, int]:
    """Tokens and columns of a block for that many columns, and ``wide`` numbers of each."""
    columns = min(COLUMNS, max(16, _padded(width)))
    return max(1, NUMBERS // (columns * wide)), columns


def rows(
    x: Float[Tensor, "T d_in"],
    v: Float[Tensor, "A d_in"],
    u: Float[Tensor, "A d_out"],
    strength: Float[Tensor, " A"],
    gate: Float[Tensor, "T K"],
    index: Int64[Tensor, "T K"],
    y: Float[Tensor, "T d_out"] | None = None,
    offset: Float[Tensor, " A"] | None = None,
    read: Float[Tensor, "T K"] | None = None,
    keep: bool = True,
    dtype: torch.dtype | None = None,
) -> tuple[Float[Tensor, "T d_out"], tuple[Float[Tensor, "T K"], Float[Tensor, "T K"]] | None]:
    """(out, kept): ``y`` plus the update, in ``dtype``, by default y's (else x's).

    ``kept`` are the float32 dots less the offsets, and their products with ``read`` and the strengths where ``read`` is
    given (else the dots again); none is formed without ``keep``, and then closed gates cost nothing.
    """
    count, k = index.shape
    out = torch.empty(count, u.shape[-1], device=x.device, dtype=dtype or (x if y is None else y).dtype)
    dots = torch.empty(count, k, device=x.device, dtype=torch.float32) if keep else out
    products = dots if read is None else torch.empty_like(dots)
    if not index.numel():
        out.zero_() if y is None else out.copy_(y)
        return out, (dots, products) if keep else None
    others = out if y is None else y, strength if offset is None else offset, dots if read is None else read
    given = [t.contiguous() for t in (x, v, u, strength, gate, index, *others)]
    wide = _padded(k)
    tokens, columns = _tile(max(x.shape[-1], u.shape[-1]), wide)
    modes = y is not None, offset is not None, keep, read is not None
    sizes = count, x.shape[-1], u.shape[-1]
    _rows((-(-count // tokens),), (*given, out, dots, products), sizes, (*modes, k, wide, tokens, columns))
    return out, (dots, products) if keep else None


def sums(
    x: Float[Tensor, "T d_in"],
    g: Float[Tensor, "T d_out"],
    strength: Float[Tensor, " A"],
    gate: Float[Tensor, "T K"],
    dots: Float[Tensor, "T K"],
    back: Float[Tensor, "T K"],
    order: Int64[Tensor, " TK"],
    starts: Int64[Tensor, " A"],
    for_v: bool = True,
    for_u: bool = True,
) -> Float[Tensor, "A width"]:
    """Gradients of V~ and U~, where they are wanted, of the strengths and of the offsets, side by side in float32.

    Each atom's are summed over its tokens, which ``order`` and ``starts`` give as :class:`ByAtom` does. Where there are
    many, in a few parts, which are then added.
    """
    atoms, (places, k) = len(starts), (gate.numel(), gate.shape[1])
    d_in, d_out = x.shape[-1], g.shape[-1]
    width = for_v * d_in + for_u * d_out + 2
    if not places:
        return torch.zeros(atoms, width, device=x.device, dtype=torch.float32)
    tokens, columns = SUMMED if for_v or for_u else (SUMMED[1], 1)
    split = min(PARTS, _padded(max(1, places // (2 * SUMMED[0] * atoms))))
    out = torch.empty(split, atoms, width, device=x.device, dtype=torch.float32)
    grid = atoms, -(-max(for_v * d_in, for_u * d_out, 1) // columns), split
    given = x, g, strength, gate, dots, back, order, starts
    _sums(
        grid,
        (*(t.contiguous() for t in given), out),
        (atoms, places, d_in, d_out, width),
        (for_v, for_u, k, split, tokens, columns),
    )
    return out[0] if split == 1 else out.sum(0)


def best(
    scores: Float[Tensor, "*b A"],
    k: int,
    hidden: Float[Tensor, "*b D"] | None = None,
    task: Float[Tensor, " A"] | None = None,
) -> tuple[Int64[Tensor, "*b K"], Float[Tensor, "*b K"]]:
    """The best k atoms of each token, best first, and their gates, without gradients.

    With ``hidden`` and ``task`` the scores are those of before the division by hidden's root mean square.
    """
    atoms, shape = scores.shape[-1], (*scores.shape[:-1], k)
    flat = scores.reshape(-1, atoms).contiguous()
    index = torch.empty(shape, device=scores.device, dtype=torch.int64)
    gate = torch.empty(shape, device=scores.device, dtype=scores.dtype if task is None else task.dtype)
    if index.numel():
        h = flat if hidden is None else hidden.reshape(-1, hidden.shape[-1]).contiguous()
        padded = _padded(atoms)
        tokens, columns = _tile(max(h.shape[-1], padded), 1)
        e = flat if task is None else task.contiguous()
        sizes, grid = (len(flat), h.shape[-1], atoms), (-(-len(flat) // tokens),)
        _best(grid, (flat, h, e, index, gate), sizes, (hidden is not None, k, tokens, padded, columns))
    return index, gate


def _by_atom(
    launch: Callable[..., Tensor],
    given: Sequence[Tensor],
    vectors: tuple[Tensor, Tensor],
    wanted: Sequence[bool],
) -> tuple[Tensor | None, ...]:
    """Gradients of V~, U~, strengths and offsets, where ``wanted``: ``launch`` is :func:`sums` or its operator, and
    ``given`` all that it is given before ``for_v`` and ``for_u``.
    """
    (v, u), strength = vectors, given[2]
    if not any(wanted):
        return None, None, None, None
    for_v, for_u, for_strength, for_offset = wanted
    every = launch(*given, for_v, for_u)
    return (
        every[:, : v.shape[-1]].to(v.dtype) if for_v else None,
        every[:, -2 - u.shape[-1] : -2].to(u.dtype) if for_u else None,
        every[:, -2].to(strength.dtype) if for_strength else None,
        every[:, -1].to(strength.dtype) if for_offset else None,
    )


class _Update(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        y: Tensor,
        x: Tensor,
        v: Tensor,
        u: Tensor,
        strength: Tensor,
        gate: Tensor,
        offset: Tensor | None,
        index: Tensor,
        places: Places,
    ) -> Tensor:
        out, kept = rows(x, v, u, strength, gate, index, y, offset)
        assert kept is not None
        ctx.places = places
        ctx.save_for_backward(x, v, u, strength, gate, index, kept[0])
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        x, v, u, strength, gate, index, dots = ctx.saved_tensors
        _, for_x, for_v, for_u, for_strength, for_gate, for_offset, *_ = ctx.needs_input_grad
        dx, kept = rows(g, u, v, strength, gate, index, read=dots, dtype=x.dtype)
        assert kept is not None
        back, by_gate = kept
        wanted, given = (for_v, for_u, for_strength, for_offset), [x, g, strength, gate, dots, back]
        if any(wanted):
            tables = ctx.places.by_atom(len(v))
            given += [tables.order, tables.starts]
        by_v, by_u, by_strength, by_offset = _by_atom(sums, given, (v, u), wanted)
        gates = by_gate.to(gate.dtype) if for_gate else None
        return g, dx if for_x else None, by_v, by_u, by_strength, gates, by_offset, None, None


# --- what compilers see of the launches: operators that they call and do not look into -------------------------------
#
# Dynamo would take long to look into each `autograd.Function`. Results may share no memory, so what is not there is an
# empty tensor of its own. Schemas are written out, as none can be inferred where a checker has wrapped the functions.


@torch.library.custom_op(
    "uhl::rows",
    mutates_args=(),
    schema="(Tensor x, Tensor v, Tensor u, Tensor strength, Tensor gate, Tensor index, Tensor? y, Tensor? offset, "
    "Tensor? read, bool keep, ScalarType dtype, Tensor? order, Tensor? starts) -> (Tensor, Tensor, Tensor)",
)
def _opaque_rows(
    x: Tensor,
    v: Tensor,
    u: Tensor,
    strength: Tensor,
    gate: Tensor,
    index: Tensor,
    y: Tensor | None,
    offset: Tensor | None,
    read: Tensor | None,
    keep: bool,
    dtype: torch.dtype,
    order: Tensor | None,
    starts: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """:func:`rows`; ``order`` and ``starts`` are for the gradients, as :func:`sums` has them."""
    out, kept = rows(x, v, u, strength, gate, index, y, offset, read, keep, dtype)
    dots, products = kept or (None, None)
    return (
        out,
        x.new_empty(0) if dots is None else dots,
        x.new_empty(0) if products is None or read is None else products,
    )


@_opaque_rows.register_fake
def _(x: Tensor, _v: Tensor, u: Tensor, *others: Any) -> tuple[Tensor, Tensor, Tensor]:
    _strength, _gate, index, _y, _offset, read, keep, dtype, *_ = others
    return (
        x.new_empty((x.shape[0], u.shape[-1]), dtype=dtype),
        index.new_empty(index.shape, dtype=torch.float32) if keep else x.new_empty(0),
        index.new_empty(index.shape, dtype=torch.float32) if keep and read is not None else x.new_empty(0),
    )


@torch.library.custom_op(
    "uhl::sums",
    mutates_args=(),
    schema="(Tensor x, Tensor g, Tensor strength, Tensor gate, Tensor dots, Tensor back, Tensor order, Tensor starts, "
    "bool for_v, bool for_u) -> Tensor",
)
def _opaque_sums(
    x: Tensor,
    g: Tensor,
    strength: Tensor,
    gate: Tensor,
    dots: Tensor,
    back: Tensor,
    order: Tensor,
    starts: Tensor,
    for_v: bool,
    for_u: bool,
) -> Tensor:
    """:func:`sums`."""
    return sums(x, g, strength, gate, dots, back, order, starts, for_v, for_u)


@_opaque_sums.register_fake
def _(x: Tensor, g: Tensor, *others: Any) -> Tensor:
    *_, starts, for_v, for_u = others
    width = for_v * x.shape[-1] + for_u * g.shape[-1] + 2
    return x.new_empty((starts.shape[0], width), dtype=torch.float32)


@torch.library.custom_op(
    "uhl::best",
    mutates_args=(),
    schema="(Tensor scores, int k, Tensor? hidden, Tensor? task) -> (Tensor, Tensor)",
)
def _opaque_best(scores: Tensor, k: int, hidden: Tensor | None, task: Tensor | None) -> tuple[Tensor, Tensor]:
    """:func:`best`."""
    return best(scores, k, hidden, task)


@_opaque_best.register_fake
def _(scores: Tensor, k: int, hidden: Tensor | None, task: Tensor | None) -> tuple[Tensor, Tensor]:
    index = scores.new_empty((*scores.shape[:-1], k), dtype=torch.int64)
    return index, torch.empty_like(index, dtype=(scores if task is None else task).dtype)


def _remember(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    x, v, u, strength, gate, index, _, _, _, keep, _, order, starts = inputs
    ctx.save_for_backward(x, v, u, strength, gate, index, output[1], order, starts)
    ctx.kept = keep


def _backward(ctx: Any, g: Tensor, *_: Tensor | None) -> tuple[Tensor | None, ...]:
    if torch.is_grad_enabled() or not ctx.kept:
        raise UHLError("the Triton kernels have first gradients only; choose path='reference' for others")
    x, v, u, strength, gate, index, dots, order, starts = ctx.saved_tensors
    for_x, for_v, for_u, for_strength, for_gate, _, for_y, for_offset, *_ = ctx.needs_input_grad
    dx, back, by_gate = _opaque_rows(g, u, v, strength, gate, index, None, None, dots, True, x.dtype, None, None)
    given, wanted = [x, g, strength, gate, dots, back, order, starts], (for_v, for_u, for_strength, for_offset)
    by_v, by_u, by_strength, by_offset = _by_atom(_opaque_sums, given, (v, u), wanted)
    gates = by_gate.to(gate.dtype) if for_gate else None
    tensors = dx if for_x else None, by_v, by_u, by_strength, gates, None, g if for_y else None, by_offset
    return *tensors, None, None, None, None, None


_opaque_rows.register_autograd(_backward, setup_context=_remember)
