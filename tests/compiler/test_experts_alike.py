"""What looks like a mixture of experts and differs in one place: as in eager, whatever runs it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.integrations import moe

from tests.compiler.rewriting import check, randn

TOKENS, TOP, WIDTH, INNER, PLACES = 7, 2, 16, 8, 14
# Every place has an expert of its own, so that no order among equal ids is anybody's to choose.
IDS = torch.tensor([3, 0, 12, 5, 9, 1, 13, 7, 2, 10, 4, 11, 8, 6])
WEIGHTS = randn(TOKENS, TOP, seed=4).abs()


class Mixture(nn.Module):
    """A mixture whose steps a case may replace."""

    def __init__(self, experts: int = PLACES) -> None:
        super().__init__()
        self.experts = experts
        self.w = nn.Parameter(randn(experts, WIDTH, INNER) / 4)
        self.b = nn.Parameter(randn(experts, INNER, seed=1))

    def sort(self, ids: Tensor) -> tuple[Tensor, Tensor]:
        return torch.sort(ids)

    def ends(self, in_order: Tensor) -> Tensor:
        counts = torch.histc(in_order.float(), bins=self.experts, min=0, max=self.experts - 1)
        return torch.cumsum(counts, dim=0, dtype=torch.int32)

    def inverse(self, order: Tensor) -> Tensor:
        back = torch.empty_like(order)
        back[order] = torch.arange(PLACES)
        return back

    def product(self, x: Tensor, order: Tensor, ends: Tensor, in_order: Tensor) -> Tensor:
        return moe._grouped_mm(x[order // TOP], self.w, ends)

    def combined(self, y: Tensor, weights: Tensor, order: Tensor, back: Tensor) -> Any:
        y = y * weights.reshape(-1)[order].unsqueeze(-1)
        return y[back].view(TOKENS, TOP, INNER).sum(1)

    def forward(self, x: Tensor, weights: Tensor, ids: Tensor) -> Any:
        in_order, order = self.sort(ids)
        ends, back = self.ends(in_order), self.inverse(order)
        y = self.product(x, order, ends, in_order)
        return self.combined(y, weights, order, back)


def case(**steps: Callable) -> type[Mixture]:
    """A mixture with these steps."""
    return type("Case", (Mixture,), steps)


def descending(self, ids):
    return torch.sort(ids, descending=True)


def ends_of_descending(self, in_order):
    return Mixture.ends(self, in_order.flip(0))


def ends_of_halves(self, in_order):
    """Half precision rounds large ids."""
    counts = torch.histc(in_order.bfloat16(), bins=self.experts, min=0, max=self.experts - 1)
    return torch.cumsum(counts, dim=0, dtype=torch.int32)


def ends_of_halved_ids(self, in_order):
    counts = torch.histc(in_order * 0.5, bins=self.experts, min=0, max=self.experts - 1)
    return torch.cumsum(counts, dim=0, dtype=torch.int32)


def ends_beside_a_size(self, in_order):
    ends = Mixture.ends(self, in_order)
    return ends.clamp(max=in_order.size(0)) if in_order.shape[0] > 3 else ends


def ends_written(self, in_order):
    ends = Mixture.ends(self, in_order)
    ends.copy_(torch.arange(2, self.experts + 2).clamp(max=PLACES))
    return ends


def inverse_written_twice(self, order):
    back = Mixture.inverse(self, order)
    back[0:2] = back[0:2].flip(0)
    return back


def inverse_rewritten(self, order):
    back = Mixture.inverse(self, order)
    back.mul_(0)
    return back


def inverse_counted_anew(self, order):
    back, counted = torch.empty_like(order), torch.arange(PLACES)
    counted.copy_(counted.flip(0))
    back[order] = counted
    return back


def inverse_of_another_order(self, order):
    return Mixture.inverse(self, order.flip(0))


def order_rewritten(self, x, order, ends, in_order):
    index = order // TOP
    order.copy_(order.flip(0))
    return moe._grouped_mm(x[index], self.w, ends)


def written_before_its_activation(self, x, order, ends, in_order):
    rows = x[order // TOP]
    y = moe._grouped_mm(rows, self.w, ends)
    rows.zero_()
    return F.silu(y)


def bias_of_written_ids(self, x, order, ends, in_order):
    y = moe._grouped_mm(x[order // TOP], self.w, ends)
    in_order.zero_()
    return y + self.b[in_order]


def bias_of_other_rows(self, x, order, ends, in_order):
    return moe._grouped_mm(x[order // TOP], self.w, ends) + self.b[in_order.flip(0)]


def activation_times_a_number(self, x, order, ends, in_order):
    return F.silu(moe._grouped_mm(x[order // TOP], self.w, ends)) * 2.0


def half_times_itself(self, x, order, ends, in_order):
    gate, up = moe._grouped_mm(x[order // TOP], self.w, ends).chunk(2, -1)
    return torch.cat((F.silu(gate) * gate, up), -1)


def sum_in_double(self, y, weights, order, back):
    y = y * weights.reshape(-1)[order].unsqueeze(-1)
    return y[back].view(TOKENS, TOP, INNER).sum(1, dtype=torch.float64).float()


def sum_that_keeps_its_dimension(self, y, weights, order, back):
    y = y * weights.reshape(-1)[order].unsqueeze(-1)
    return y[back].view(TOKENS, TOP, INNER).sum(1, keepdim=True)


def sum_of_other_places(self, y, weights, order, back):
    y = y * weights.reshape(-1)[order].unsqueeze(-1)
    return y[back].view(TOP, TOKENS, INNER).sum(1)


def one_token_with_all_places(self, y, weights, order, back):
    y = y * weights.reshape(-1)[order].unsqueeze(-1)
    return y[back].view(1, PLACES, INNER).sum(1)


def weights_in_another_order(self, y, weights, order, back):
    y = y * weights.reshape(-1)[back].unsqueeze(-1)
    return y[back].view(TOKENS, TOP, INNER).sum(1)


def weights_as_they_came(self, y, weights, order, back):
    y = y * weights.reshape(-1).unsqueeze(-1)
    return y[back].view(TOKENS, TOP, INNER).sum(1)


def read_by_another_too(self, y, weights, order, back):
    y = y * weights.reshape(-1)[order].unsqueeze(-1)
    return y[back].view(TOKENS, TOP, INNER).sum(1), y


CASES = {
    "plain": {},
    "descending": {"sort": descending, "ends": ends_of_descending},
    "ends of halves": {"ends": ends_of_halves},
    "ends of halved ids": {"ends": ends_of_halved_ids},
    "ends beside a size": {"ends": ends_beside_a_size},
    "ends written": {"ends": ends_written},
    "inverse written twice": {"inverse": inverse_written_twice},
    "inverse rewritten": {"inverse": inverse_rewritten},
    "inverse counted anew": {"inverse": inverse_counted_anew},
    "inverse of another order": {"inverse": inverse_of_another_order},
    "order rewritten": {"product": order_rewritten},
    "written before its activation": {"product": written_before_its_activation},
    "bias of written ids": {"product": bias_of_written_ids},
    "bias of other rows": {"product": bias_of_other_rows},
    "activation times a number": {"product": activation_times_a_number},
    "half times itself": {"product": half_times_itself},
    "sum in double": {"combined": sum_in_double},
    "sum that keeps its dimension": {"combined": sum_that_keeps_its_dimension},
    "sum of other places": {"combined": sum_of_other_places},
    "one token with all places": {"combined": one_token_with_all_places},
    "weights in another order": {"combined": weights_in_another_order},
    "weights as they came": {"combined": weights_as_they_came},
    "read by another too": {"combined": read_by_another_too},
}


@pytest.mark.parametrize("name", CASES)
def test_as_in_eager(name: str) -> None:
    experts = 300 if name == "ends of halves" else PLACES
    ids = IDS * 21 if name == "ends of halves" else IDS
    model = case(**CASES[name])(experts).eval()
    check(model, randn(TOKENS, WIDTH), WEIGHTS, ids, takes=("grouped_linear",))


def test_rows_of_no_expert_are_zeros() -> None:
    """Where transformers' own operator multiplies: PyTorch's says nothing about them."""

    class Product(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.w = nn.Parameter(randn(3, WIDTH, INNER))

        def forward(self, x: Tensor, ends: Tensor) -> Tensor:
            return torch.ops.transformers.grouped_mm_fallback(x, self.w, ends)

    ends = torch.tensor([1, 1, 4], dtype=torch.int32)
    check(Product().eval(), randn(9, WIDTH), ends, takes=("grouped_linear",))


def test_indices_that_are_written_are_checked_by_pytorch() -> None:
    linear = nn.Linear(WIDTH, 6)

    def pick(x: Tensor, number: int) -> Tensor:
        scores = linear(x)
        ids = torch.topk(scores, 2)[1]
        ids.fill_(number)
        return scores.gather(1, ids)

    check(lambda x: pick(x, 3), randn(5, WIDTH))
    with torch.no_grad(), pytest.raises(RuntimeError, match="out of bounds"):
        torch.compile(lambda x: pick(x, 100), backend="llmopt")(randn(5, WIDTH))
