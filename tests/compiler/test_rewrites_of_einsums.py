"""torch.einsum as linears and as attention, and what of it stays PyTorch's."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from llmopt.compiled import alive
from torch import Tensor, nn

from tests.compiler.rewriting import check, check_memory, randn

E = torch.einsum


class Layer(nn.Module):
    """A function of a layer's weights and its input."""

    def __init__(self, function: Callable[..., Tensor]) -> None:
        super().__init__()
        self.function = function
        self.heads, self.back = (nn.Parameter(randn(*s) / 4) for s in ((16, 3, 8), (3, 8, 16)))
        self.square, self.wide = (nn.Parameter(randn(*s) / 4) for s in ((16, 16), (20, 16)))

    def forward(self, *inputs: Tensor) -> Tensor:
        return self.function(self, *inputs)


LINEARS: dict[str, tuple[Callable[..., Tensor], Tensor]] = {
    "outputs first": (lambda m, x: E("bld,od->blo", x, m.wide), randn(2, 5, 16)),
    "inputs first": (lambda m, x: E("bld,do->blo", x, m.wide.t().contiguous()), randn(2, 5, 16)),
    "the weight first": (lambda m, x: E("od,bld->blo", m.wide, x), randn(2, 5, 16)),
    "no result named": (lambda m, x: E("ij, jk", x, m.square), randn(5, 16)),
    "heads": (lambda m, x: E("bld,dhk->blhk", x, m.heads), randn(2, 5, 16)),
    "heads in front": (lambda m, x: E("bld,dhk->bhlk", x, m.heads), randn(2, 5, 16)),
    "heads joined": (lambda m, x: E("blhk,hkd->bld", x, m.back), randn(2, 5, 3, 8)),
    "one row": (lambda m, x: E("d,od->o", x, m.wide), randn(16)),
    "turned": (lambda m, x: E("bld,od->lbo", x, m.wide), randn(2, 5, 16)),
}


@pytest.mark.parametrize("name", LINEARS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_linears(name: str, dtype: torch.dtype) -> None:
    function, x = LINEARS[name]
    takes = () if name == "inputs first" else ("linear",)  # a copy of a weight is none
    check(Layer(function).to(dtype).eval(), x.to(dtype), takes=takes)


def in_front(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return E("bhij,bhjd->bhid", (E("bhid,bhjd->bhij", q, k) * 0.3).softmax(-1), v)


def behind(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return E("bhqk,bkhd->bqhd", (E("bqhd,bkhd->bhqk", q, k) / 4).softmax(dim=-1), v)


def listed(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    weights = torch.softmax(E("nqhd,nkhd->nhqk", [q, k]) / 4, dim=3)
    return E("nhql,nlhd->nqhd", [weights, v])


def masked(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    scores = E("bqhd,bkhd->bhqk", q, k)
    allowed = torch.ones(scores.shape[-2:], dtype=torch.bool).tril()
    return behind_weights(scores.masked_fill(~allowed, -1e20).softmax(-1), v)


def behind_weights(weights: Tensor, v: Tensor) -> Tensor:
    return E("bhqk,bkhd->bqhd", weights, v).flatten(2)


@pytest.mark.parametrize("function", [in_front, behind, listed, masked])
def test_attention(function: Callable[..., Tensor]) -> None:
    shape = (2, 3, 5, 8) if function is in_front else (2, 5, 3, 8)
    check(function, *(randn(*shape, seed=i) for i in range(3)), takes=["attention"])


@torch.no_grad()
def test_attention_over_lengths_that_change() -> None:
    torch._dynamo.reset()
    compiled = torch.compile(masked, backend="llmopt")
    for length in (5, 7, 1, 12):
        inputs = [randn(2, length, 3, 8, seed=i) for i in range(3)]
        torch.testing.assert_close(compiled(*inputs), masked(*inputs), rtol=1e-4, atol=1e-5)
    assert all("attention" in str(g.plan) for g in alive()[-2:])


@pytest.mark.parametrize("change", [lambda x: x.mul_(2), lambda x: x.zero_()])
def test_an_operand_that_is_written_afterwards(change: Callable[[Tensor], Tensor]) -> None:
    def function(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        scores = E("bhid,bhjd->bhij", q, k)
        change(k)
        return E("bhij,bhjd->bhid", scores.softmax(-1), v) + k

    check(function, *(randn(2, 3, 5, 8, seed=i) for i in range(3)), leaves=["attention"])


TURNED = randn(24, 16)
WINDOWS: dict[str, Callable[[Tensor], tuple[Tensor, ...]]] = {
    "written": lambda x: (y := E("bsd,ed->ebs", x, TURNED), y.view(-1).add_(1)),
    "written in part": lambda x: (y := E("bsd,ed->ebs", x, TURNED), y.view(-1)[1:30].zero_()),
    "a copy that is written": lambda x: (y := E("bsd,ed->ebs", x, TURNED), y.permute(1, 2, 0).reshape(-1).add_(1)),
    "returned": lambda x: (y := E("bsd,ed->ebs", x, TURNED), y.view(-1)),
    "a copy that is returned": lambda x: (y := E("bsd,ed->ebs", x, TURNED), y.permute(1, 2, 0).reshape(-1, 24)),
    "of two inputs": lambda x: (y := E("bqd,bkd->kbq", x, x), y.permute(1, 0, 2).reshape(-1).add_(1)),
}  # fmt: skip


@pytest.mark.parametrize("name", WINDOWS)
def test_windows_on_results(name: str) -> None:
    check_memory(WINDOWS[name], randn(2, 5, 16))


LEFT: dict[str, tuple[Callable[..., Tensor], tuple[Tensor, ...]]] = {
    "a trace": (lambda m, x: E("bii->b", x), (randn(2, 5, 5),)),
    "a diagonal": (lambda m, x, y: E("bii,bij->bj", x, y), (randn(2, 5, 5), randn(2, 5, 3))),
    "a sum of one": (lambda m, x: E("bld,od->lo", x, m.wide), (randn(2, 5, 16),)),
    "three": (lambda m, x: E("ld,od,od->lo", x, m.wide, m.wide), (randn(5, 16),)),
    "an ellipsis": (lambda m, x: E("...d,od->...o", x, m.wide), (randn(2, 5, 16),)),
    "sizes of 1": (lambda m, x, y: E("bij,bjk->bik", x, y), (randn(1, 5, 4), randn(2, 4, 3))),
    "a summed size of 1": (lambda m, x, y: E("ij,jk->ik", x, y), (randn(5, 1), randn(4, 3))),
    "groups": (lambda m, x, y: E("bghid,bhjd->bghij", x, y), (randn(2, 2, 3, 5, 8), randn(2, 3, 4, 8))),
    "what is summed in between": (lambda m, x: E("blhk,hdk->bld", x, m.back.mT.contiguous()), (randn(2, 5, 3, 8),)),
    "elementwise": (lambda m, x, y: E("ij,ij->ij", x, y), (randn(5, 4), randn(5, 4, seed=1))),
    "outer": (lambda m, x, y: E("i,j->ij", x, y), (randn(5), randn(4))),
}  # fmt: skip


@pytest.mark.parametrize("name", LEFT)
def test_what_stays_pytorchs(name: str) -> None:
    function, inputs = LEFT[name]
    check(Layer(function).eval(), *inputs)
