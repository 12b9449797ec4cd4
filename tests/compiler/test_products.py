"""Products of activations as ops.matmul: the spellings, what stands between them, and what stays PyTorch's."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from llmopt import ops
from llmopt.compiled import alive
from torch import Tensor

from tests.compiler.rewriting import check, check_memory, randn
from tests.e2e.compare import assert_same_output

A, B = randn(2, 3, 5, 8), randn(2, 3, 8, 6, seed=1)
X, Y = A[0], B[0]

SPELLINGS: dict[str, tuple[Callable[..., Tensor], tuple[Tensor, ...]]] = {
    "@": (lambda a, b: a @ b, (A, B)),
    "matmul": (lambda a, b: torch.matmul(a, other=b), (A, B)),
    "a method": (lambda a, b: a.matmul(b), (A, B)),
    "bmm": (lambda a, b: torch.bmm(a, b), (X, Y)),
    "mm": (lambda a, b: a[0].mm(b[0]), (X, Y)),
    "addmm": (lambda a, b: torch.addmm(b[0, 0], a[0], b[0]), (X, Y)),
    "einsum": (lambda a, b: torch.einsum("bhik,bhkj->bhij", a, b), (A, B)),
    "a computed weight": (lambda a, b: F.linear(a, (b[0].mT * 2).exp(), b[1, 0]), (X, Y)),
    "one for all": (lambda a, b: a @ b[0, 0], (A, B)),
    "one of the second for all": (lambda a, b: a @ b[:1], (A, B)),
    "one of the first for all": (lambda a, b: a[:, :1] @ b, (A, B)),
    "fewer dimensions": (lambda a, b: a @ b[0], (A, B)),
    "fewer dimensions first": (lambda a, b: a[0] @ b, (A, B)),
    "transposed": (lambda a, b: a @ b.mT.contiguous().mT, (A, B)),
    "columns first": (lambda a, b: b.mT @ a.mT, (A, B)),
    "every other row": (lambda a, b: a[..., ::2, :] @ b, (A, B)),
    "every other value": (lambda a, b: a[..., ::2] @ b[..., ::2, :], (A, B)),
    "six dimensions": (lambda a, b: a[:, None, None] @ b[:, None, None], (A, B)),
    "no values to add up": (lambda a, b: a[..., :0] @ b[..., :0, :], (A, B)),
    "nothing": (lambda a, b: a[:0] @ b[:0], (A, B)),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", SPELLINGS)
def test_spellings(name: str, dtype: torch.dtype) -> None:
    function, inputs = SPELLINGS[name]
    check(function, *(i.to(dtype) for i in inputs), takes={"matmul"}, in_pytorch=())


@pytest.mark.parametrize("name", SPELLINGS)
def test_the_op_is_what_it_stands_for(name: str) -> None:
    """Memory too: results are laid out as PyTorch's."""
    function, (a, b) = SPELLINGS[name]
    check_memory(lambda x: (function(x, b * 1.5), x.mT), a)


@torch.no_grad()
def test_sizes_that_change() -> None:
    torch._dynamo.reset()
    known = {id(g) for g in alive()}

    def function(a: Tensor, b: Tensor) -> Tensor:
        return torch.softmax(a * 0.5 @ b.mT + a[..., :1], -1) @ b

    compiled = torch.compile(function, backend="llmopt")
    for batch, rows, keys in ((2, 5, 7), (3, 5, 9), (1, 1, 20), (4, 40, 33), (2, 3, 1)):
        a, b = randn(batch, 2, rows, 8), randn(batch, 2, keys, 8, seed=1)
        assert_same_output(compiled(a, b), function(a, b))
    plans = [g.plan for g in alive() if id(g) not in known]
    assert all(len(p.segments) == 1 and not p.fallbacks for p in plans), str(plans[-1])


def test_attention_that_gives_its_weights() -> None:
    """What no attention kernel takes is one segment still."""

    def function(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        weights = (q @ k.mT / 8**0.5 + q[..., :1]).softmax(-1)
        return weights @ v, weights

    q, k, v = (randn(2, 3, 5, 8, seed=i) for i in range(3))
    check(function, q, k, v, takes={"matmul", "softmax", "pointwise"}, in_pytorch=())


LEFT: dict[str, tuple[Callable[..., Tensor], tuple[Tensor, ...], str]] = {
    "doubles": (lambda a, b: a @ b, (A.double(), B.double()), "matmul"),
    "integers": (lambda a, b: a @ b, (A.long(), B.long()), "matmul"),
    "vectors": (lambda a, b: a @ b[0, 0, :, 0], (A, B), "matmul"),
    "scaled": (lambda a, b: torch.addmm(b[0, 0], a[0], b[0], beta=0.5), (X, Y), "addmm"),
    "seven dimensions": (lambda a, b: a[(None,) * 3] @ b[(None,) * 3], (A, B), "llmopt.matmul"),
}


@pytest.mark.parametrize("name", LEFT)
def test_what_stays(name: str) -> None:
    function, inputs, kind = LEFT[name]
    check(function, *inputs, leaves={"matmul"}, in_pytorch={kind})


def test_the_reference() -> None:
    bias = randn(6)
    assert_same_output(ops.matmul(A, B, bias), A @ B + bias)
    for a, b in ((A, B), (A[0], B), (A, B[0, 0])):
        made = ops.matmul.fake(a, b)
        assert made.shape == (a @ b).shape
        assert made.stride() == ops.matmul(a, b).stride()
