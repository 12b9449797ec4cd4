"""Experts chosen from the best groups of them, as DeepSeek's models write it, and what only looks like that."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from tests.compiler.rewriting import INF, check, randn

EXPERTS, GROUPS, KEPT, TOP = 12, 4, 2, 3
SCORES = randn(9, EXPERTS)


def by_two_best(scores: Tensor) -> Tensor:
    return scores.view(-1, GROUPS, EXPERTS // GROUPS).topk(2, dim=-1)[0].sum(dim=-1)


def by_best(scores: Tensor) -> Tensor:
    return scores.view(-1, GROUPS, EXPERTS // GROUPS).max(dim=-1).values


def mask_of(group_scores: Tensor, kept: int = KEPT) -> Tensor:
    chosen = torch.topk(group_scores, k=kept, dim=-1, sorted=False)[1]
    mask = torch.zeros_like(group_scores)
    mask.scatter_(1, chosen, 1)
    return mask


def spread(mask: Tensor) -> Tensor:
    each = EXPERTS // GROUPS
    return mask.unsqueeze(-1).expand(-1, GROUPS, each).reshape(-1, EXPERTS)


def routed(scores: Tensor, kept: Tensor, fill: float = -INF) -> tuple[Tensor, Tensor]:
    limited = scores.masked_fill(~kept.bool(), fill)
    return limited, torch.topk(limited, k=TOP, dim=-1, sorted=False)[1].sort()[0]


def deepseek_v3(scores: Tensor) -> Any:
    return routed(scores * 2, spread(mask_of(by_two_best(scores * 2))))


def same_scores(scores: Tensor) -> Any:
    scores = scores.sigmoid() + 0.1
    return routed(scores, spread(mask_of(by_two_best(scores))))


def deepseek_v2(scores: Tensor) -> Any:
    scores = scores.softmax(-1)
    return routed(scores, spread(mask_of(by_best(scores))), 0.0)[0]


def one_group(scores: Tensor) -> Any:
    scores = scores.sigmoid()
    group_scores = scores.view(-1, 1, EXPERTS).topk(2, dim=-1)[0].sum(dim=-1)
    mask = mask_of(group_scores, 1).unsqueeze(-1).expand(-1, 1, EXPERTS)
    return routed(scores, mask.reshape(-1, EXPERTS))


@pytest.mark.parametrize("function", [same_scores, deepseek_v2, one_group])
@pytest.mark.parametrize("dynamic", [None, True], ids=["", "dynamic"])
def test_groups_limit_the_choice(function: Callable, dynamic: bool | None) -> None:
    check(function, SCORES, takes=["limit_groups"], dynamic=dynamic)


def of_other_scores(scores: Tensor) -> Any:
    scores = scores.sigmoid()
    return routed(scores, spread(mask_of(by_two_best(scores - scores.mean(0)))))


def of_the_worst(scores: Tensor) -> Any:
    scores = scores.sigmoid()
    return routed(scores, spread(mask_of(-by_two_best(scores))))


def kept_instead_of_dropped(scores: Tensor) -> Any:
    scores = scores.sigmoid()
    return scores.masked_fill(spread(mask_of(by_two_best(scores))).bool(), 0.0)


def groups_of_every_fourth(scores: Tensor) -> Any:
    scores = scores.sigmoid()
    mask = mask_of(by_two_best(scores))
    return routed(scores, mask.repeat(1, EXPERTS // GROUPS))


def turned_on_the_way(scores: Tensor) -> Any:
    scores = scores.sigmoid()
    mask = mask_of(by_two_best(scores)).unsqueeze(1).expand(-1, EXPERTS // GROUPS, GROUPS)
    return routed(scores, mask.reshape(-1, EXPERTS))


def written_twice(scores: Tensor) -> Any:
    scores = scores.sigmoid()
    mask = mask_of(by_two_best(scores))
    mask[:, 0] = 1
    return routed(scores, spread(mask))


def written_with_twos(scores: Tensor) -> Any:
    scores = scores.sigmoid()
    mask = mask_of(by_two_best(scores))
    return routed(scores, spread(mask - 1))


def mask_is_read(scores: Tensor) -> Any:
    scores = scores.sigmoid()
    mask = mask_of(by_two_best(scores))
    return *routed(scores, spread(mask)), mask * 2


def spread_before_it_is_written(scores: Tensor) -> Any:
    scores = scores.sigmoid()
    group_scores = by_two_best(scores)
    mask = torch.zeros_like(group_scores)
    wide = spread(mask)
    mask.scatter_(1, group_scores.topk(KEPT)[1], 1)
    return scores.masked_fill(~wide.bool(), 0.5)


def scores_are_written_between(scores: Tensor) -> Any:
    scores = scores.sigmoid()
    kept = spread(mask_of(by_two_best(scores)))
    scores[:, ::2] *= 0.5
    return routed(scores, kept)


def the_mask_is_used_twice(scores: Tensor) -> Any:
    scores = scores.sigmoid()
    kept = spread(mask_of(by_two_best(scores)))
    return routed(scores, kept)[0], scores * kept, kept


def its_contrary_is_used_twice(scores: Tensor) -> Any:
    scores = scores.sigmoid()
    dropped = ~spread(mask_of(by_two_best(scores))).bool()
    return scores.masked_fill(dropped, -INF), scores.masked_fill(dropped, 0.0)


def the_write_is_returned(scores: Tensor) -> Any:
    scores = scores.sigmoid()
    group_scores = by_two_best(scores)
    mask = torch.zeros_like(group_scores).scatter_(1, group_scores.topk(KEPT)[1], 1)
    return routed(scores, spread(mask))[0], spread(mask)


def ones_are_multiplied(scores: Tensor) -> Any:
    scores = scores.sigmoid()
    group_scores = by_two_best(scores)
    mask = torch.zeros_like(group_scores)
    mask.scatter_(1, group_scores.topk(KEPT)[1], 1, reduce="multiply")
    return scores.masked_fill(~spread(mask).bool(), 0.0)


def other_groups(scores: Tensor) -> Any:
    scores = scores.sigmoid()
    chosen = by_two_best(scores).topk(KEPT)[1]
    mask = torch.zeros_like(scores[:, :6])
    mask.scatter_(1, chosen, 1)
    kept = mask.unsqueeze(-1).expand(-1, 6, EXPERTS // 6).reshape(-1, EXPERTS)
    return scores.masked_fill(~kept.bool(), 0.0)


def written_on_the_way(place: int) -> Callable[[Tensor], Tensor]:
    def function(scores: Tensor) -> Tensor:
        scores = scores.sigmoid()
        best = scores.view(-1, GROUPS, EXPERTS // GROUPS).topk(2, dim=-1)[0]
        steps: list[Callable[[Tensor], Any]] = [
            lambda t: t[:, :2].mul_(-1),
            lambda t: t[:, :2].mul_(-1),
            lambda t: t.fill_(1),
            lambda t: t[:, :3].fill_(1),
            lambda t: t.logical_not_(),
        ]

        def step(now: int, value: Tensor) -> Tensor:
            if now == place:
                steps[now](value)
            return value

        group_scores = step(1, step(0, best).sum(-1))
        chosen = step(2, group_scores.topk(KEPT)[1])
        mask = torch.zeros_like(group_scores)
        mask.scatter_(1, chosen, 1)
        return scores.masked_fill(step(4, ~step(3, spread(mask)).bool()), 0.0)

    return function


def its_contrary_lies_in_memory_of_its_own(scores: Tensor) -> Any:
    scores = scores.sigmoid()
    memory = torch.empty(scores.shape, dtype=torch.bool)
    dropped = torch.logical_not(spread(mask_of(by_two_best(scores))).bool(), out=memory)
    memory[:, :3] = True
    return scores.masked_fill(dropped, 0.0)


def the_written_mask_is_read(scores: Tensor) -> Any:
    scores = scores.sigmoid()
    group_scores = by_two_best(scores)
    mask = torch.zeros_like(group_scores).scatter_(1, group_scores.topk(KEPT)[1], 1)
    return routed(scores, spread(mask))[0], mask.mean(-1)


OTHERS = (
    its_contrary_lies_in_memory_of_its_own, the_written_mask_is_read,
    the_mask_is_used_twice, its_contrary_is_used_twice, the_write_is_returned, ones_are_multiplied, other_groups,
    *map(written_on_the_way, range(5)),
    of_other_scores, of_the_worst, kept_instead_of_dropped, groups_of_every_fourth, turned_on_the_way, written_twice,
    written_with_twos, mask_is_read, spread_before_it_is_written, scores_are_written_between,
)  # fmt: skip


@pytest.mark.parametrize("function", OTHERS)
def test_what_looks_like_limiting_groups(function: Callable) -> None:
    check(function, SCORES, leaves=["limit_groups"])


def test_scores_computed_twice_are_one() -> None:
    """Equal operations become one only behind this pass: it is enough that the choice is right."""
    check(deepseek_v3, SCORES)


def test_a_cache_that_begins_as_an_empty_vector() -> None:
    def function(x: Tensor) -> Tensor:
        return F.layer_norm(torch.cat((torch.tensor([]), x * 2 + 1), -2), (8,))

    check(function, randn(2, 3, 8), in_pytorch=())


def test_memory_that_is_filled_in_parts() -> None:
    def function(x: Tensor) -> Tensor:
        y = x * 2 + 1
        both = y.new_empty(*y.shape[:-1], 12)
        both[..., :4].copy_(y[..., 4:])
        both[..., 4:].copy_(y)
        return F.layer_norm(both, (12,))

    check(function, randn(2, 3, 8), in_pytorch=())
    check(function, randn(2, 3, 8), dynamic=True)
