"""Ridge regression with penalties chosen by cross-validation: how maps between two models' states are fitted."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float, Int64
from torch import Tensor

from uhl.errors import UHLError

FREE = 0.1  # least share of the rows that a regression leaves as degrees of freedom
FOLDS = 8  # of groups of rows, each predicted from the others
PENALTIES = tuple(10.0 ** (e / 2) for e in range(-8, 9))  # times the mean squared singular value


@dataclass
class Fit:
    """A ridge regression Y = X B + c, a penalty for each column of Y, and what it explains of Y's variance.

    ``explained`` is 1 - (sum over columns of the criterion) / (sum of variances): an estimate for unseen rows;
    ``columns`` the same for each column. ``left_out`` predicts each row from all others, or from all other groups or
    folds.
    """

    matrix: Float[Tensor, "D C"]
    shift: Float[Tensor, " C"]
    penalty: Float[Tensor, " C"]
    explained: float
    columns: Float[Tensor, " C"]
    left_out: Float[Tensor, "rows C"]  # all of them, or none


@dataclass(frozen=True)
class Rows:
    """Rows of a regression that are not alike: ``weights``, of which those of 1 judge it, and ``groups`` of rows that
    are left out together.
    """

    weights: Float[Tensor, " n"]
    groups: Int64[Tensor, " n"]


def ridge(
    x: Float[Tensor, "n D"],
    y: Float[Tensor, "n C"],
    centre: bool = True,
    each: bool = True,
    held: bool = True,
    rows: Rows | None = None,
    one_se: bool = False,
) -> Fit:
    """Ridge regression in float64; generalised cross-validation chooses each column's penalty (Golub et al. 1979).

    GCV_c(l) = n ||y_c - y_c,l||^2 / (n - df_l)^2 with df_l the trace of the smoother. Columns differ in how well they
    can be predicted (leading directions well, the tail hardly), so one penalty for all would fit neither. Where the
    columns are a host's own coordinates, which may be turned at will, ``each`` is false: one penalty for all, chosen
    for their sum. ``centre`` adds an intercept, ``held`` wants ``left_out``. Penalties that leave fewer than
    :data:`FREE` of the rows as degrees of freedom are not considered: near interpolation GCV is 0 / 0. With ``rows``
    the regression is weighted, and the criterion is the error of each group of rows, predicted from all others, over
    the rows that count; ``one_se`` then takes the largest penalty whose error is at most a standard error above the
    least, of rows taken as independent (Breiman et al. 1984). Raises :class:`UHLError` for fewer than 16 rows.
    """
    counts = [len(x)] if rows is None else [len(rows.groups.unique()), int((rows.weights == 1).sum())]
    _enough(min(counts))
    x, y = x.double(), y.double()
    root = torch.ones(len(x), 1, dtype=x.dtype) if rows is None else rows.weights.double().sqrt()[:, None]
    share = root.pow(2) / root.pow(2).sum()
    x_mean, y_mean = ((share.T @ t)[0] if centre else torch.zeros_like(t[0]) for t in (x, y))
    x = x - x_mean  # x is by far the largest table: no second one is kept
    left, values, right = _svd(x if rows is None else x.mul_(root))
    count, shape = len(x), x.shape
    del x
    near = (y - y_mean).mul_(root)
    target = left.T @ near  # (r, C)
    total = near.pow(2).sum(0)  # (C,)
    power = values.pow(2)
    penalties = torch.tensor(PENALTIES, dtype=power.dtype) * power.sum() / min(shape)
    shrink = power / (power + penalties[:, None])  # (penalties, r)
    free = count - shrink.sum(1) - float(centre)
    if rows is None:
        residual = total - target.pow(2).sum(0) + (1 - shrink).pow(2) @ target.pow(2)  # (penalties, C)
        error, spread = count * residual / free[:, None].clamp_min(1e-9) ** 2, total / count
    else:
        missed = _left_out(left, shrink, target, near, root, rows.groups, centre)
        judges = rows.weights == 1
        error, spread = missed[:, judges].pow(2).mean(1), y[judges].var(0, correction=0)
    error[free < FREE * count] = torch.inf
    criterion = error if each else error.sum(1, keepdim=True)
    best = criterion.argmin(0)
    if rows is not None and one_se:
        squares = missed.gather(0, best.expand(1, *y.shape))[0][judges].pow(2)
        squares = squares if each else squares.sum(1, keepdim=True)
        limit = criterion.gather(0, best[None]) + squares.std(0) / len(squares) ** 0.5
        best = len(penalties) - 1 - (criterion <= limit).flip(0).int().argmax(0)  # penalties grow
    best = best.expand(y.shape[1])  # (C,)
    error = error.gather(0, best[None])[0]
    inverse = values[:, None] / (power[:, None] + penalties[best])  # (r, C)
    matrix = right.T @ (inverse * target)
    explained, columns = 1 - float(error.sum() / spread.sum().clamp_min(1e-12)), 1 - error / spread.clamp_min(1e-12)
    left_out = y[:0]
    if rows is not None:
        left_out = y - missed.gather(0, best.expand(1, *y.shape))[0]
    elif held:
        leverage = left.pow(2) @ shrink[best].T + (1 / count if centre else 0.0)  # (n, C), a row's share in its fit
        left_out = y - (near - left @ (shrink[best].T * target)) / (1 - leverage).clamp_min(1e-9)
    shift = (y_mean - x_mean @ matrix).float()
    return Fit(matrix.float(), shift, penalties[best].float(), explained, columns, left_out)


def ridge_of_groups(
    x: Float[Tensor, "n D"], y: Float[Tensor, "n C"], groups: Int64[Tensor, " n"], each: bool = True, held: bool = True
) -> Fit:
    """Ridge regression without an intercept, in float64, of many rows that come in groups: states of one text at
    several words and levels. Rows of a group resemble each other, so that a row left out alone is half known.

    Groups are dealt out into :data:`FOLDS`. The criterion is what the fits of all other folds miss in one, from Gram
    matrices alone: of ``x`` a fold at a time is copied. ``each`` and ``held`` as in :func:`ridge`. Raises
    :class:`UHLError` for fewer than 16 groups.
    """
    names, places = groups.unique(return_inverse=True)
    _enough(len(names))
    folds = [(places % FOLDS == f).nonzero()[:, 0] for f in range(FOLDS)]
    grams, crosses, total = [], [], torch.zeros(y.shape[1], dtype=torch.float64)
    for rows in folds:
        a, b = x[rows].double(), y[rows].double()
        grams.append(a.T @ a)
        crosses.append(a.T @ b)
        total += b.pow(2).sum(0)
    gram, cross = torch.stack(grams).sum(0), torch.stack(crosses).sum(0)
    penalties = torch.tensor(PENALTIES, dtype=gram.dtype) * gram.trace().clamp_min(1e-300) / min(x.shape)
    error, solvers = total.repeat(len(penalties), 1), []  # (penalties, C)
    for own_gram, own_cross in zip(grams, crosses, strict=True):
        solver = _Solver(gram - own_gram, cross - own_cross)
        seen, told = solver.vectors.T @ own_gram @ solver.vectors, solver.vectors.T @ own_cross
        for missed, penalty in zip(error, penalties, strict=True):
            turned = solver.turned(penalty)
            missed += (turned * (seen @ turned - 2 * told)).sum(0)
        solvers.append(solver)
    best = (error if each else error.sum(1, keepdim=True).expand_as(error)).argmin(0)
    chosen, error = penalties[best], error.gather(0, best[None])[0]
    left_out = gram.new_empty(len(y) if held else 0, y.shape[1])
    if held:
        for rows, solver in zip(folds, solvers, strict=True):
            left_out[rows] = x[rows].double() @ solver.matrix(chosen)
    explained, columns = 1 - float(error.sum() / total.sum().clamp_min(1e-12)), 1 - error / total.clamp_min(1e-12)
    matrix = _Solver(gram, cross).matrix(chosen).float()
    return Fit(matrix, matrix.new_zeros(matrix.shape[1]), chosen.float(), explained, columns, left_out)


def _enough(count: int) -> None:
    if count < 16:
        raise UHLError(f"{count} anchors are too few for a regression; use at least 16")


class _Solver:
    """Solutions (G + l)^-1 X^T Y for any penalties l."""

    def __init__(self, gram: Float[Tensor, "D D"], cross: Float[Tensor, "D C"]) -> None:
        power, self.vectors = torch.linalg.eigh(gram)
        self.power, self.target = power.clamp_min(0)[:, None], self.vectors.T @ cross

    def turned(self, penalty: Tensor) -> Float[Tensor, "D C"]:
        """In the Gram matrix's own directions, for one penalty or one for each column."""
        return self.target / (self.power + penalty)

    def matrix(self, penalty: Tensor) -> Float[Tensor, "D C"]:
        """As a matrix for rows of X."""
        return self.vectors @ self.turned(penalty)


def _left_out(
    left: Float[Tensor, "n r"],
    shrink: Float[Tensor, "penalties r"],
    target: Float[Tensor, "r C"],
    y: Float[Tensor, "n C"],
    root: Float[Tensor, "n 1"],
    groups: Int64[Tensor, " n"],
    centre: bool,
) -> Float[Tensor, "penalties n C"]:
    """What each row misses when its whole group is left out of the fit: (I - H_g)^-1 r_g, with H_g the group's block of
    the smoother and r_g its residuals. ``left`` and ``y`` are weighted by ``root``; the result is not.
    """
    missed = y - torch.stack([left @ (s[:, None] * target) for s in shrink])
    by_size: dict[int, list[Tensor]] = {}
    order = groups.argsort(stable=True)
    for members in order.split(groups[order].unique_consecutive(return_counts=True)[1].tolist()):
        by_size.setdefault(len(members), []).append(members)
    for size, found in by_size.items():
        members = torch.stack(found)  # (G, size)
        rows, ones = left[members], torch.eye(size, dtype=left.dtype)
        mean = root[members] @ root[members].mT / root.pow(2).sum() if centre else 0.0
        for part, s in zip(missed, shrink, strict=True):
            part[members] = torch.linalg.solve(ones - (rows * s) @ rows.mT - mean, part[members])
    return missed / root


def _svd(x: Float[Tensor, "n D"]) -> tuple[Tensor, Tensor, Tensor]:
    """Singular vectors and values (n, r), (r,), (r, D), through the smaller Gram matrix; none of no size."""
    wide = x.shape[0] < x.shape[1]
    power, vectors = torch.linalg.eigh(x @ x.T if wide else x.T @ x)
    keep = power > 1e-13 * power.max()
    values, vectors = power[keep].sqrt(), vectors[:, keep]
    if wide:
        return vectors, values, (vectors.T @ x) / values[:, None]
    return (x @ vectors) / values, values, vectors.T
