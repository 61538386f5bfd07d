"""A frame: how one host's vectors are read into canonical coordinates and written back.

For every weight W (d_out, d_in) a frame holds P_in and P_out; for a layer's input it holds the router's reader (C, D);
for the last states, the head's reader (C, D) and shift (C). Two ways to make one:

*dimension* (the hypothesis): every P comes from the projector's network and depends on the dimension alone. P_in
(C, d_in) reads the weight's input, P_out (d_out, C) writes to its output.

*residual*: one reader M (C, D) and one writer N (D, C) of the residual stream, for all weights of a level. An atom is
an edit E = N u (v . M x) of the residual stream, placed before a weight that reads the stream (Q, K, V, FFN-in) and
after the product of a weight that writes to it (O, FFN-out):

    reader of the stream   y = W (x + E x) + b
    writer to the stream   y = W x + E W x + b

so nothing depends on how heads or feed-forward neurons are numbered, and no weight of the host is looked at.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, replace

import torch
from jaxtyping import Float
from torch import Tensor

from uhl.errors import UHLError
from uhl.host import Slot
from uhl.projector import Projector

LAST = (-1,)
Pair = tuple[Float[Tensor, "C d_in"], Float[Tensor, "d_out C"]]  # P_in, P_out


class Times:
    """rows @ P for many P, rows (A, C) being an adapter's: a P that comes again is multiplied once."""

    def __init__(self, rows: Float[Tensor, "A C"]) -> None:
        self.rows = rows
        self.plain: dict[Tensor, Tensor] = {}  # by identity, which keeps what it names alive
        self.turned: dict[Tensor, Tensor] = {}

    def __call__(self, p: Float[Tensor, "C d"]) -> Float[Tensor, "A d"]:
        """Give rows @ p."""
        if p not in self.plain:
            self.plain[p] = self.rows @ p.to(self.rows)
        return self.plain[p]

    def transposed(self, p: Float[Tensor, "d C"]) -> Float[Tensor, "A d"]:
        """Give rows @ p.T."""
        if p not in self.turned:
            self.turned[p] = self.rows @ p.to(self.rows).T
        return self.turned[p]


def once(change: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    """``change``, whose result for a tensor is kept, by identity."""
    made: dict[Tensor, Tensor] = {}

    def changed(tensor: Tensor) -> Tensor:
        if tensor not in made:
            made[tensor] = change(tensor)
        return made[tensor]

    return changed


@dataclass
class Frame:
    """Readers and writers of one host. ``rescale`` divides the head's input by its own root mean square.

    ``stream``: the weights' pairs read and write the residual stream, D wide, and not the weights' own sides.
    ``routes`` has a reader for the router, or one for each layer. ``head`` reads the states of ``levels`` one behind
    the other (0: the embeddings', -1: the last).
    """

    slots: dict[str, Pair]
    routes: tuple[Float[Tensor, "C D"], ...]
    head: Float[Tensor, "C D_levels"]
    shift: Float[Tensor, " C"]
    rescale: bool = False
    levels: tuple[int, ...] = LAST
    stream: bool = False

    def to(self, device: torch.device) -> Frame:
        """The same frame on a device; weights that share a P go on sharing it."""
        move = once(lambda p: p.to(device))
        slots = {path: (move(a), move(b)) for path, (a, b) in self.slots.items()}
        routes = tuple(move(r) for r in self.routes)
        return replace(self, slots=slots, routes=routes, head=move(self.head), shift=move(self.shift))

    def check(self, slots: Sequence[Slot], modules: Collection[str]) -> None:
        """Raise :class:`UHLError` where this is not a frame for a host with these ``modules`` (their paths), of which
        ``slots`` carry atoms. A frame without any pair is one whose atoms are in the weights' own coordinates
        (:mod:`uhl.sat`).
        """
        if not self.slots:
            return
        for path in [slot.path for slot in slots if slot.path not in self.slots]:
            raise UHLError(f"the frame is of another host: it has nothing for {path}; port the adapter to this host")
        for path in [path for path in self.slots if path not in modules]:
            raise UHLError(f"the frame is of another host, which has {path}; port the adapter to this host")
        for slot in slots:
            read, write = self.slots[slot.path][0].shape[1], self.slots[slot.path][1].shape[0]
            if (read, write) != slot.sides(self.stream):
                raise UHLError(
                    f"the frame does not fit the host: at {slot.path} it reads {read} and writes {write} wide, the "
                    f"host {' and '.join(map(str, slot.sides(self.stream)))}; port the adapter to this host"
                )

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

    def frame(self, slots: Sequence[Slot]) -> Frame:
        """The frame of a host that has this basis.

        Where the basis has a map for each level, attention takes that of its layer's input, the feed-forward block that
        of its layer's output.
        """
        pairs: dict[str, Pair] = {}
        for slot in slots:
            level = min(max(slot.layer, 0) + (slot.type == "FFN"), len(self.read) - 1)
            pairs[slot.path] = self.read[level], self.write[level]
        routes = tuple(read * rms for read, rms in zip(self.read, self.rms, strict=True))
        return Frame(pairs, routes, self.head, self.shift, levels=self.levels, stream=True)


def canonical_basis(
    moment: Float[Tensor, "D D"], final: Float[Tensor, "n2 D_levels"], width: int, whiten: float = 0.5
) -> Basis:
    """Basis from the second moment of a source's token states of all depths, and the states that its head will read.

    The stream's coordinates are principal directions Q of the second moment, scaled towards unit variance:
    M = s^-w Q^T and N = Q s^w with standard deviations s and ``whiten`` w. The head's are centred principal
    directions of the final states, scaled towards unit variance, the variances shrunk as Ledoit & Wolf (2004) advise so
    that directions which few sentences hardly show are not blown up. When D < C the missing coordinates are zero.
    """
    from sklearn.covariance import ledoit_wolf_shrinkage

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
