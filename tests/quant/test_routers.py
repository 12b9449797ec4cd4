"""Which linears choose experts, under precision= and by quantize: those stay exact, others do not."""

from __future__ import annotations

from collections.abc import Callable

import llmopt
import pytest
import torch
from llmopt.compiled import alive
from llmopt.quant.module import QuantizedLinear
from torch import Tensor, nn

from tests.compiler.rewriting import randn
from tests.compiler.test_rewrites_of_experts import EXPERTS, WIDTH, Experts

LINEAR = nn.Linear(64, 64)
X = randn(2, 5, 64)


@torch.no_grad()
def is_rounded(function: Callable[[Tensor], object], x: Tensor = X) -> bool:
    torch._dynamo.reset()
    known = {id(g) for g in alive()}
    linear = LINEAR.to(x.dtype)
    compiled = torch.compile(
        lambda x: function(linear(x)), backend="llmopt", options={"precision": "w8a8"}
    )
    compiled(x)
    (graph,) = [g for g in alive() if id(g) not in known]
    ops = {r.op for r in graph.plan.records()} & {"linear", "linear_quantized"}
    return ops == {"linear_quantized"}


CHOOSING: dict[str, Callable[[Tensor], object]] = {
    "topk": lambda h: h.topk(2)[1],
    "argmax": lambda h: h.argmax(-1),
    "max": lambda h: h.max(-1)[1],
    "sort": lambda h: h.sort(descending=True)[1],
    "argsort": lambda h: h.argsort(-1),
    "softmax first": lambda h: h.softmax(-1).topk(2)[1],
    "log_softmax first": lambda h: h.log_softmax(-1).topk(2)[1],
    "widened first": lambda h: h.float().softmax(-1).topk(2)[1],
    "masked first": lambda h: torch.where(h > 0, h, -1.0).topk(2)[1],
    "rows in a view": lambda h: h.view(-1, 64).topk(2, dim=1)[1],
    "columns of what is turned": lambda h: h.view(-1, 64).t().topk(2, dim=0)[1],
    "of groups": lambda h: h.view(10, 4, 16).topk(2)[0].sum(-1).topk(2)[1],
}


@pytest.mark.parametrize("name", CHOOSING)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_what_chooses_stays_exact(name: str, dtype: torch.dtype) -> None:
    assert not is_rounded(CHOOSING[name], X.to(dtype))


OTHERS: dict[str, Callable[[Tensor], object]] = {
    "pooled over positions": lambda h: h.transpose(1, 2).max(2)[0],
    "pooled over groups": lambda h: h.view(2, 5, 4, 16).max(2)[0],
    "sorted by position": lambda h: h.sort(1)[0],
    "picked as others choose": lambda h: h.gather(-1, X.topk(2)[1]),
}


@pytest.mark.parametrize("name", OTHERS)
def test_what_chooses_among_others_is_rounded(name: str) -> None:
    assert is_rounded(OTHERS[name])


class Layer(nn.Module):
    """Experts and a gate beside them, at the top or inside a block."""

    def __init__(self, **others: nn.Module) -> None:
        super().__init__()
        self.gate, self.experts = nn.Linear(WIDTH, EXPERTS), Experts()
        self.back = nn.Linear(EXPERTS + 1, WIDTH)
        for name, module in others.items():
            self.add_module(name, module)


def rounded(model: nn.Module) -> set[str]:
    twin = llmopt.quantize(model, "w8a16", group="channel")
    return {n for n, m in twin.named_modules() if isinstance(m, QuantizedLinear)}


def test_routers_at_the_top_of_a_model() -> None:
    assert rounded(Layer()) == {"back"}
    assert rounded(nn.ModuleDict({"mlp": Layer()})) == {"mlp.back"}


def test_a_linear_that_happens_to_have_as_many_outputs() -> None:
    """A gate is called one; where none is, each that fits may be."""
    assert rounded(Layer(shared=nn.Linear(WIDTH, EXPERTS))) == {"back", "shared"}
    unnamed = nn.ModuleDict({"experts": Experts(), "choice": nn.Linear(WIDTH, EXPERTS)})
    assert rounded(nn.ModuleDict({"mlp": unnamed, "last": nn.Linear(8, 8)})) == {"last"}


def test_routers_of_a_model_whose_experts_are_codes() -> None:
    model = nn.ModuleDict({"mlp": Layer()})
    once = llmopt.quantize(model, "w8a16", group="channel", layers={"*back": None})
    assert rounded(once) == {"mlp.back"}


def test_a_module_of_experts_alone_says_what_to_give() -> None:
    with pytest.raises(ValueError, match=r"is the model itself.*nn.Sequential"):
        llmopt.quantize(Experts(), "w8a16", group="channel")


class Each(nn.Module):
    """Every expert a module of its own, as older models have them, with something that is none among them."""

    def __init__(self) -> None:
        super().__init__()
        self.router = nn.ModuleDict({"classifier": nn.Linear(64, 3)})
        experts = {f"expert_{i}": nn.Linear(64, 64) for i in range(3)}
        self.experts = nn.ModuleDict({**experts, "dropout": nn.Dropout()})


def test_routers_beside_experts_that_are_modules() -> None:
    assert rounded(nn.ModuleDict({"ffn": Each()})) == {f"ffn.experts.expert_{i}" for i in range(3)}


def test_a_classifier_of_as_many_labels_as_experts() -> None:
    model = nn.ModuleDict({"experts": Experts(), "gate": nn.Linear(WIDTH, EXPERTS)})
    model["head"] = nn.ModuleDict({"labels": nn.Linear(WIDTH, EXPERTS)})
    assert rounded(model) == {"head.labels"}


def test_experts_that_say_only_how_many_they_are() -> None:
    """As transformers kept them before they said how they lie."""
    experts = Experts()
    del experts.is_transposed
    experts.num_experts = EXPERTS
    model = nn.ModuleDict({"experts": experts, "choice": nn.Linear(WIDTH, EXPERTS)})
    assert rounded(nn.ModuleDict({"mlp": model, "last": nn.Linear(8, 8)})) == {"last"}


def test_a_list_of_what_nobody_chooses_from() -> None:
    three = [nn.Linear(64, 64) for _ in range(3)]
    for name, modules in {"shared_experts": three, "experts": []}.items():
        block = nn.ModuleDict({"gate": nn.Linear(64, 3), name: nn.ModuleList(modules)})
        assert "mlp.gate" in rounded(nn.ModuleDict({"mlp": block}))


def test_parameters_of_three_dimensions_that_are_no_experts() -> None:
    """Of a convolution; of a module that holds none; of one that says another number."""
    odd, other = nn.Identity(), Experts()
    odd.is_transposed = True
    del other.is_transposed
    other.num_experts = 3
    for module in (nn.Conv1d(3, 3, 1), odd, other):
        block = nn.ModuleDict({"gate": nn.Linear(64, 3), "module": module})
        assert "mlp.gate" in rounded(nn.ModuleDict({"mlp": block}))
