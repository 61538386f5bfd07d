"""A frame: how one host's vectors are read into canonical coordinates and written back.

For every weight W (d_out, d_in) a frame holds P_in (C, d_in) and P_out (d_out, C); for a layer's input it holds the
router's reader (C, D); for the last states, the head's reader (C, D) and shift (C). Two ways to make one:

*dimension* (the hypothesis): every P comes from the projector's network and depends on the dimension alone.

*residual*: one reader M (C, D) and one writer N (D, C) of the residual stream, carried to every weight by the host's
own weights. An atom is then an edit N u (v . M x) of the residual stream, placed before a weight that reads the
stream (Q, K, V, FFN-in) and after a weight that writes to it (O, FFN-out):

    reader of the stream   P_in = M      P_out = W N
    writer to the stream   P_in = M W    P_out = N

so nothing depends on how heads or feed-forward neurons are numbered. These products are not formed: for BERT-large they
take 300 MB, and the host's weights are there already.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from jaxtyping import Float
from sklearn.covariance import ledoit_wolf_shrinkage
from torch import Tensor, nn

from uhl import host
from uhl.host import Slot
from uhl.projector import Projector


@dataclass(frozen=True, eq=False)
class Product:
    """left @ right, not formed, (n, m). One factor is the host's own weight, of any dtype and on any device.

    It is not a copy, so what is folded after the weight was changed in place is folded with the new values.
    """

    left: Float[Tensor, "n r"]
    right: Float[Tensor, "r m"]

    def formed(self) -> Float[Tensor, "n m"]:
        """The product as a tensor."""
        dtype = torch.promote_types(self.left.dtype, self.right.dtype)
        return self.left.to(dtype) @ self.right.to(self.left.device, dtype)


LAST = (-1,)
Factor = Tensor | Product
Pair = tuple[Factor, Factor]  # P_in (C, d_in), P_out (d_out, C)


class Times:
    """rows @ P for many P, rows (A, C) being an adapter's: a P, or a factor, that comes again is multiplied once."""

    def __init__(self, rows: Float[Tensor, "A C"]) -> None:
        self.rows = rows
        self.plain: dict[Factor, Tensor] = {}  # by identity, which keeps what it names alive
        self.turned: dict[Factor, Tensor] = {}

    def __call__(self, p: Factor) -> Float[Tensor, "A d"]:
        """Give rows @ p; a product's factors are multiplied in one after the other."""
        if p not in self.plain:
            left, right = (self(p.left), p.right) if isinstance(p, Product) else (self.rows, p)
            self.plain[p] = left @ right.to(self.rows)
        return self.plain[p]

    def transposed(self, p: Factor) -> Float[Tensor, "A d"]:
        """Give rows @ p.T."""
        if p not in self.turned:
            left, right = (self.transposed(p.right), p.left) if isinstance(p, Product) else (self.rows, p)
            self.turned[p] = left @ right.to(self.rows).T
        return self.turned[p]


@dataclass
class Frame:
    """Readers and writers of one host. ``rescale`` divides the head's input by its own root mean square.

    ``routes`` has a reader for the router, or one for each layer. ``head`` reads the states of ``levels`` one behind
    the other (0: the embeddings', -1: the last).
    """

    slots: dict[str, Pair]
    routes: tuple[Float[Tensor, "C D"], ...]
    head: Float[Tensor, "C D_levels"]
    shift: Float[Tensor, " C"]
    rescale: bool = False
    levels: tuple[int, ...] = LAST

    def to(self, device: torch.device) -> Frame:
        """The same frame on a device; weights that share a P go on sharing it."""
        moved: dict[Tensor, Tensor] = {}  # by identity

        def move(p: Tensor) -> Tensor:
            if p not in moved:
                moved[p] = p.to(device)
            return moved[p]

        def factor(p: Factor) -> Factor:
            return p if isinstance(p, Product) else move(p)  # a host's weight moves when it is multiplied, for as long

        slots = {path: (factor(a), factor(b)) for path, (a, b) in self.slots.items()}
        routes = tuple(move(r) for r in self.routes)
        return replace(self, slots=slots, routes=routes, head=move(self.head), shift=move(self.shift))

    def pair(self, path: str) -> tuple[Float[Tensor, "C d_in"], Float[Tensor, "d_out C"]]:
        """P_in and P_out of a weight, as tensors."""
        a, b = (p.formed() if isinstance(p, Product) else p for p in self.slots[path])
        return a, b

    def formed(self) -> Frame:
        """The same frame with every product formed: more memory, and quicker where it is folded over and over."""
        pairs: dict[str, Pair] = {path: self.pair(path) for path in self.slots}
        return replace(self, slots=pairs)

    def codes(self, hidden: Float[Tensor, "*n D_levels"]) -> Float[Tensor, "*n C"]:
        """Canonical coordinates of the states at ``levels``, what the head reads."""
        if self.rescale:
            hidden = hidden * hidden.pow(2).mean(-1, keepdim=True).clamp_min(1e-12).rsqrt()
        return hidden @ self.head.T + self.shift


def dimension_frame(projector: Projector, slots: Sequence[Slot], width: int) -> Frame:
    """Every P from the projector, with gradients to it. ``width`` is D of the host."""
    made: dict[tuple[int, bool], Tensor] = {}

    def p(dim: int, write: bool) -> Tensor:
        if (dim, write) not in made:
            rows = projector(dim, write)
            made[dim, write] = rows if write else rows.T
        return made[dim, write]

    reader = p(width, False)
    pairs: dict[str, Pair] = {s.path: (p(s.d_in, False), p(s.d_out, True)) for s in slots}
    return Frame(pairs, (reader,), reader, reader.new_zeros(projector.width), rescale=True)


def residual_frame(model: nn.Module, slots: Sequence[Slot], basis: Basis) -> Frame:
    """A basis's readers and writers of the residual stream, carried to every weight.

    Where the basis has a map for each level, attention takes that of its layer's input, the feed-forward block that of
    its layer's output.
    """
    pairs: dict[str, Pair] = {}
    for slot in slots:
        matrix = host.weight(model, slot)
        level = min(max(slot.layer, 0) + (slot.type == "FFN"), len(basis.read) - 1)
        read, write = basis.read[level], basis.write[level]
        pairs[slot.path] = (Product(read, matrix), write) if slot.writer else (read, Product(matrix, write))
    routes = tuple(read * rms for read, rms in zip(basis.read, basis.rms, strict=True))
    return Frame(pairs, routes, basis.head, basis.shift, levels=basis.levels)


@dataclass(frozen=True)
class Basis:
    """Canonical coordinates of a model's residual stream, and of what its head reads.

    ``read``, ``write`` and ``rms`` (typical root mean square of the stream's vectors, which the router divides by) are
    one for all levels, or one a level: the embeddings' output, then each layer's.
    """

    read: tuple[Float[Tensor, "C D"], ...]
    write: tuple[Float[Tensor, "D C"], ...]
    head: Float[Tensor, "C D_levels"]
    shift: Float[Tensor, " C"]
    rms: tuple[float, ...]
    levels: tuple[int, ...] = LAST

    def frame(self, model: nn.Module, slots: Sequence[Slot]) -> Frame:
        """The frame of a host that has this basis."""
        return residual_frame(model, slots, self)


def canonical_basis(
    moment: Float[Tensor, "D D"], final: Float[Tensor, "n2 D"], width: int, whiten: float = 0.5
) -> Basis:
    """Basis from the second moment of a source's token states of all depths, and the states that its head will read.

    The stream's coordinates are principal directions Q of the second moment, scaled towards unit variance:
    M = s^-w Q^T and N = Q s^w with standard deviations s and ``whiten`` w. The head's are centred principal
    directions of the final states, scaled towards unit variance, the variances shrunk as Ledoit & Wolf (2004) advise so
    that directions which few sentences hardly show are not blown up. When D < C the missing coordinates are zero.
    """
    directions, spread = principal(moment, width)
    scale = spread.clamp_min(1e-6 * spread.max()) ** whiten
    read, write = (directions / scale).T, directions * scale
    centre = final.double().mean(0)
    apart = final.double() - centre
    axes, deviation = principal(apart.T @ apart / len(apart), width)
    shrinkage = float(ledoit_wolf_shrinkage(apart.numpy(), assume_centered=True))
    typical = apart.pow(2).mean()
    head = (axes / ((1 - shrinkage) * deviation**2 + shrinkage * typical).sqrt()).T
    return Basis(
        (_pad(read, width, 0).float(),),
        (_pad(write, width, 1).float(),),
        _pad(head, width, 0).float(),
        _pad(-(head @ centre), width, 0).float(),
        (float(moment.diagonal().mean().sqrt()),),
    )


def principal(moment: Float[Tensor, "D D"], count: int) -> tuple[Float[Tensor, "D c"], Float[Tensor, " c"]]:
    """Leading principal directions of a second moment (a fixed sign each) and the root mean square along them."""
    values, vectors = torch.linalg.eigh(moment.double())
    directions = vectors.flip(1)[:, :count]
    peak = directions.gather(0, directions.abs().argmax(0, keepdim=True))
    return directions * peak.sign(), values.flip(0)[:count].clamp_min(0).sqrt()


def _pad(x: Tensor, size: int, dim: int) -> Tensor:
    """Zeros up to ``size`` along ``dim``, for hosts narrower than the canonical space."""
    if x.shape[dim] >= size:
        return x
    shape = list(x.shape)
    shape[dim] = size - x.shape[dim]
    return torch.cat([x, x.new_zeros(shape)], dim)
