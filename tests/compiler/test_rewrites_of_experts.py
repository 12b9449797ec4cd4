"""Mixtures of experts, as transformers and others write them: as in eager, and on our own kernels from the router to the sum."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.integrations import moe

from tests.compiler.rewriting import check, randn

TOKENS, WIDTH, INNER, EXPERTS, TOP = 7, 16, 24, 5, 2
ROUTED = ("topk", "sort_by_expert", "gather_tokens", "grouped_linear", "combine_experts")


class Experts(nn.Module):
    """What transformers' own forward of experts asks a module for."""

    _is_expert_parallel = False

    def __init__(
        self,
        act: Callable[[Tensor], Tensor] = F.silu,
        *,
        gated: bool = True,
        biased: bool = False,
        transposed: bool = False,
        post_norm: bool = False,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        super().__init__()
        self.num_experts, self.has_gate, self.has_bias = EXPERTS, gated, biased
        self.is_transposed, self.has_post_expert_norm, self.act_fn = transposed, post_norm, act
        up = (2 if gated else 1) * INNER
        name = "gate_up_proj" if gated else "up_proj"
        for leaf, n, k in ((name, up, WIDTH), ("down_proj", WIDTH, INNER)):
            size = (k, n) if transposed else (n, k)
            w = randn(EXPERTS, *size, seed=n) / k**0.5
            setattr(self, leaf, nn.Parameter(w.to(dtype)))
            if biased:
                setattr(self, f"{leaf}_bias", nn.Parameter(randn(EXPERTS, n, seed=k).to(dtype)))
        self.post_expert_norm = nn.RMSNorm(WIDTH, dtype=dtype)
        self.router = nn.Parameter(randn(EXPERTS, WIDTH, seed=9).to(dtype))

    def _apply_gate(self, both: Tensor) -> Tensor:
        gate, up = both.chunk(2, dim=-1)
        return self.act_fn(gate) * up

    def route(self, x: Tensor) -> tuple[Tensor, Tensor]:
        scores = F.softmax(F.linear(x, self.router).float(), dim=-1)
        weights, ids = torch.topk(scores, TOP, dim=-1)
        weights /= weights.sum(dim=-1, keepdim=True)
        return ids, weights.to(x.dtype)

    def forward(self, x: Tensor) -> Tensor:
        ids, weights = self.route(x)
        return x + moe.grouped_mm_experts_forward(self, x, ids, weights)


class Interleaved(Experts):
    """gpt-oss: gate and up next to each other, both limited."""

    def _apply_gate(self, both: Tensor) -> Tensor:
        gate, up = both[..., ::2], both[..., 1::2]
        gate, up = gate.clamp(max=1.0), up.clamp(min=-1.0, max=1.0)
        return (up + 1) * gate * torch.sigmoid(gate * 1.702)


class ScoresOfTop(Experts):
    """The scores of the chosen are weighed among themselves."""

    def route(self, x: Tensor) -> tuple[Tensor, Tensor]:
        scores, ids = torch.topk(F.linear(x, self.router), TOP, dim=-1)
        return ids, F.softmax(scores, dim=-1)


class Corrected(Experts):
    """DeepSeek's: who is chosen depends on a bias that does not weigh."""

    def route(self, x: Tensor) -> tuple[Tensor, Tensor]:
        scores = F.linear(x, self.router).float().sigmoid()
        ids = torch.topk(scores + self.correction, TOP, dim=-1, sorted=False)[1]
        weights = scores.gather(1, ids)
        weights = weights / (weights.sum(dim=-1, keepdim=True) + 1e-20)
        return ids, (weights * 2.5).to(x.dtype)

    correction = torch.linspace(-0.3, 0.3, EXPERTS)


class CorrectedInPlace(Corrected):
    """What is picked is divided where it lies."""

    def route(self, x: Tensor) -> tuple[Tensor, Tensor]:
        scores = F.linear(x, self.router).float().sigmoid()
        ids = torch.topk(scores + self.correction, TOP, dim=-1, sorted=False)[1]
        weights = scores.gather(1, ids)
        weights /= weights.sum(dim=-1, keepdim=True)
        return ids, weights.to(x.dtype)


class PickedFromOthers(Corrected):
    """From rows that are shorter than those the indices are of: PyTorch checks them."""

    def route(self, x: Tensor) -> tuple[Tensor, Tensor]:
        ids = torch.topk(F.linear(x, self.router)[:, :-1], TOP, dim=-1)[1]
        scores = F.linear(x, self.router[:-1]).sigmoid()
        longer = torch.cat((scores, scores), -1)
        return ids, scores.gather(1, ids) + longer.gather(1, ids)


class Nobody(Experts):
    """Half of the places name an expert that lives elsewhere."""

    _is_expert_parallel = True

    def route(self, x: Tensor) -> tuple[Tensor, Tensor]:
        ids, weights = super().route(x)
        lost = ids % 2 == 1
        return ids.masked_fill(lost, EXPERTS), weights.masked_fill(lost, 0.0)


class OneExpert(Experts):
    def route(self, x: Tensor) -> tuple[Tensor, Tensor]:
        ids, weights = super().route(x)
        return torch.full_like(ids, 3), weights


MODELS = {
    "gated": Experts(),
    "gelu": Experts(nn.GELU(approximate="tanh")),
    "without a gate": Experts(F.relu, gated=False),
    "without a kernel for its activation": Experts(torch.atan, gated=False),
    "biased": Experts(biased=True),
    "transposed": Experts(biased=True, transposed=True),
    "interleaved": Interleaved(biased=True, transposed=True),
    "a norm behind": Experts(post_norm=True),
    "scores of the chosen": ScoresOfTop(),
    "one expert for all": OneExpert(),
    "corrected": Corrected(),
    "corrected in place": CorrectedInPlace(),
    "picked from others": PickedFromOthers(),
    "bf16": Experts(dtype=torch.bfloat16),
    "fp16": Experts(dtype=torch.float16, biased=True),
}


@pytest.mark.parametrize("name", MODELS)
def test_experts_run_on_our_kernels(name: str) -> None:
    model = MODELS[name].eval()
    x = randn(TOKENS, WIDTH).to(model.router.dtype)
    left = {"atan"} if "activation" in name else set()
    left |= {"full_like"} if "one expert" in name else set()
    left |= {"gather", "add"} if "others" in name else set()
    check(model, x, takes=ROUTED, in_pytorch=left)


def test_any_number_of_tokens() -> None:
    for tokens in (1, 2, 33, 0):
        check(
            MODELS["biased"].eval(),
            randn(tokens, WIDTH),
            takes=ROUTED if tokens else (),
            dynamic=True,
        )


def test_places_without_an_expert() -> None:
    """Rows behind the last end are zeros, as transformers' own operator gives."""
    check(
        Nobody(biased=True).eval(),
        randn(TOKENS, WIDTH),
        takes=("grouped_linear", "combine_experts"),
    )


def test_a_quantised_mixture_is_near() -> None:
    model, x = MODELS["transposed"].eval(), randn(TOKENS, WIDTH)
    with torch.no_grad():
        want = model(x)
        for precision, bound in (("w8a16", 0.01), ("w8a8", 0.02), ("w4a16", 0.15)):
            torch._dynamo.reset()
            options = {"precision": precision, "group": "channel"}
            got = torch.compile(model, backend="llmopt", options=options)(x)
            error = (got - want).norm() / want.norm()
            assert 1e-5 < error < bound, f"{precision}: {error}"


# ---- other spellings, and what must not be taken for one

W = randn(EXPERTS, WIDTH, INNER).to(torch.bfloat16)
ENDS = torch.tensor([2, 2, 5, 7, 7], dtype=torch.int32)


class Product(nn.Module):
    """PyTorch's own function, with ends from outside."""

    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(W)

    def forward(self, x: Tensor, ends: Tensor) -> Tensor:
        return F.grouped_mm(x, self.w, offs=ends)


def test_a_product_alone() -> None:
    x = randn(TOKENS, WIDTH).to(torch.bfloat16)
    check(Product().eval(), x, ENDS, takes=("grouped_linear",), in_pytorch=())


def test_weights_that_are_no_parameters_stay() -> None:
    def product(x: Tensor, w: Tensor, ends: Tensor) -> Tensor:
        return F.grouped_mm(x, w, offs=ends)

    x = randn(TOKENS, WIDTH).to(torch.bfloat16)
    check(product, x, W, ENDS, leaves=("grouped_linear",), in_pytorch=("_grouped_mm",))


class Sorted(nn.Module):
    """Sorts places by hand; `spelling` does something with them."""

    def __init__(self, spelling: Callable[..., Any]) -> None:
        super().__init__()
        self.w, self.spelling = nn.Parameter(W), spelling

    def forward(self, x: Tensor, ids: Tensor) -> Any:
        in_order, order = torch.sort(ids)
        counts = torch.histc(in_order.float(), bins=EXPERTS, min=0, max=EXPERTS - 1)
        ends = torch.cumsum(counts, dim=0, dtype=torch.int32)
        return self.spelling(self.w, x, in_order, order, ends)


def back_by_argsort(w, x, in_order, order, ends):
    return F.grouped_mm(x[order // TOP], w, offs=ends)[torch.argsort(order)]


def order_is_returned(w, x, in_order, order, ends):
    y = F.grouped_mm(x[order // TOP], w, offs=ends)
    return y[torch.argsort(order)], in_order, ends


def other_rows(w, x, in_order, order, ends):
    """Every second row: not that of a place's token."""
    return F.grouped_mm(x.repeat(4, 1)[order * 2], w, offs=ends)[torch.argsort(order)]


def not_the_inverse(w, x, in_order, order, ends):
    """Another permutation is written: the rows come back reversed."""
    back = torch.empty_like(order)
    back[order.flip(0)] = torch.arange(2 * TOKENS)
    y = F.grouped_mm(x[order // TOP], w, offs=ends)
    # Equal ids may be in any order, so only what does not depend on it is returned.
    return y[back].float().sum(0)


def written_before_it_is_multiplied(w, x, in_order, order, ends):
    rows = x[order // TOP]
    x.mul_(2)
    return F.grouped_mm(rows, w, offs=ends)[torch.argsort(order)]


SPELLINGS = (
    back_by_argsort,
    order_is_returned,
    other_rows,
    not_the_inverse,
    written_before_it_is_multiplied,
)


@pytest.mark.parametrize("spelling", SPELLINGS, ids=lambda f: f.__name__)
def test_sorted_by_hand(spelling: Callable[..., Any]) -> None:
    x = randn(TOKENS, WIDTH).to(torch.bfloat16)
    ids = torch.tensor([4, 0, 1, 3, 0, 2, 4, 1, 1, 0, 3, 2, 4, 0])
    check(Sorted(spelling).eval(), x, ids, takes=("grouped_linear",))


def test_a_written_router_is_read_when_the_model_reads_it() -> None:
    class Written(Experts):
        def forward(self, x: Tensor) -> Tensor:
            ids, weights = self.route(x)
            y = moe.grouped_mm_experts_forward(self, x, ids, weights)
            x.add_(1.0)
            return x + y

    check(Written(biased=True).eval(), randn(TOKENS, WIDTH), takes=ROUTED)
