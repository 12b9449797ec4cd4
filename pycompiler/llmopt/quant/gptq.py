"""GPTQ (Frantar et al. 2022, arXiv 2210.17323): columns are rounded one after the other, and each column's error is made up for
by the columns that are not rounded yet, as far as the sample inputs make them alike.

Groups keep their place and get their range when their first column is reached. Large second moments go first where a whole
group can (`by_importance` orders groups, not columns, so that a group's columns stay together).
"""

from __future__ import annotations

import torch
from torch import Tensor

from llmopt.quant.rounding import Codes, Grid, check, grid_of, packed
from llmopt.quant.schemes import Scheme

DAMPING = 0.01  # of the mean diagonal, added to it
BLOCK = 128  # columns whose errors are applied to the rest at once


def gptq(weight: Tensor, moments: Tensor, scheme: Scheme) -> Codes:
    """weight [N, K] float, moments [K, K] float32 (Σ x xᵀ over the samples) → codes.

    Raises ValueError when a weight or a moment is NaN or infinite, or the group does not divide K.
    """
    check(weight, scheme)
    if not moments.isfinite().all():
        raise ValueError("second moments of the inputs are NaN or infinite")
    n, k = weight.shape
    group = scheme.group_of(k)
    w = weight.detach().float().clone()
    order = _by_importance(moments, group)
    w, h = w[:, order], moments[order][:, order]
    upper = _inverse_factor(h)
    if upper is None:  # no input ever differs from zero: nothing to make up for
        upper = torch.eye(k, device=w.device)
    codes = torch.empty_like(w)
    grids = []
    step = max(group, BLOCK // group * group)
    for start in range(0, k, step):
        end = min(start + step, k)
        errors = torch.zeros((end - start, n), device=w.device)
        for first in range(start, end, group):
            own, before = slice(first, first + group), first - start
            w[:, own].addmm_(errors[:before].T, upper[start:first, own], alpha=-1)
            grid = grid_of(w[:, own].unsqueeze(1), scheme)
            codes[:, own] = _round_group(
                w[:, own], upper[own, own], grid, scheme.bits, errors[before : before + group]
            )
            grids.append(grid)
        w[:, end:].addmm_(errors.T, upper[start:end, end:], alpha=-1)
    back = order.view(-1, group)[:, 0].argsort()  # groups into their own places
    found = Grid(
        torch.cat([g.scale for g in grids], 1)[:, back],
        None if scheme.symmetric else torch.cat([g.offset for g in grids], 1)[:, back],  # type: ignore[misc]
    )
    return packed(codes.unflatten(1, (-1, group))[:, back], found, scheme.bits)


def _round_group(w: Tensor, upper: Tensor, grid: Grid, bits: int, errors: Tensor) -> Tensor:
    """Codes [N, G] of a group's columns w [N, G]; writes their errors [G, N].

    A column takes what those before it left only when it is reached, as one small product: changing all later columns after each one
    moves far more memory, and in pieces so large that torch wakes its threads for them.
    """
    codes = torch.empty_like(w)
    for j in range(w.shape[1]):
        column = w[:, j] - upper[:j, j] @ errors[:j]
        code = grid.nearest(column[:, None, None], bits)
        codes[:, j] = code[:, 0, 0]
        errors[j] = (column - grid.value(code, bits)[:, 0, 0]) / upper[j, j]
    return codes


def _by_importance(moments: Tensor, group: int) -> Tensor:
    """Columns with the groups of the largest second moments first."""
    mass = moments.diagonal().view(-1, group).sum(1)
    columns = torch.arange(moments.shape[0], device=moments.device).view(-1, group)
    return columns[mass.argsort(descending=True)].flatten()


def _inverse_factor(moments: Tensor) -> Tensor | None:
    """The upper Cholesky factor of the inverse of the damped moments; None when they are all zero."""
    h = moments.double()
    mean = float(h.diagonal().mean())
    if mean == 0:
        return None
    damping = DAMPING
    while True:
        damped = h + torch.eye(h.shape[0], dtype=h.dtype, device=h.device) * (damping * mean)
        lower, failed = torch.linalg.cholesky_ex(damped)
        if not failed:
            inverse = torch.cholesky_inverse(lower)
            upper, failed = torch.linalg.cholesky_ex(inverse, upper=True)
            if not failed:
                return upper.float()
        damping *= 10
