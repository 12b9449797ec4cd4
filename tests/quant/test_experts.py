"""The weights of a mixture's experts as codes: in eager, compiled, saved, and asked for in ways that cannot be."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Iterator
from pathlib import Path

import llmopt
import pytest
import torch
from llmopt.compiled import alive
from llmopt.quant.experts import projections_of
from llmopt.quant.module import QuantizedExperts, QuantizedLinear
from llmopt.quant.rounding import round_weight
from llmopt.quant.schemes import SCHEMES, scheme_of
from llmopt.quant.storage import StorageError
from torch import Tensor, nn
from transformers import Ernie4_5_MoeConfig, Ernie4_5_MoeForCausalLM

from tests.compiler.rewriting import randn
from tests.compiler.test_rewrites_of_experts import EXPERTS, INNER, TOKENS, WIDTH, Experts
from tests.e2e import zoo

DIVIDES = {"hidden_size": 96, "intermediate_size": 64}


class Model(nn.Module):
    """Experts between two linears, as quantize wants a model around its layers."""

    def __init__(self, **options) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)
        self.mlp = nn.Sequential(Experts(**options))

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.mlp(self.first(x)))


@pytest.fixture(params=["plain", "transposed", "without a gate"])
def model(request) -> Iterator[nn.Module]:
    torch._dynamo.reset()
    torch.manual_seed(0)
    options = {
        "transposed": {"transposed": True, "biased": True},
        "without a gate": {"gated": False},
    }
    return Model(**options.get(request.param, {})).eval()


def quantized(model: nn.Module) -> dict[str, QuantizedExperts]:
    return {n: m for n, m in model.named_modules() if isinstance(m, QuantizedExperts)}


@pytest.mark.parametrize("scheme", SCHEMES)
@torch.no_grad()
def test_codes_are_those_of_each_experts_weight(model: nn.Module, scheme: str) -> None:
    twin = llmopt.quantize(model, scheme, group="channel")
    found = quantized(twin)
    assert list(found) == list(projections_of(model))
    assert not projections_of(twin)
    for name, layer in found.items():
        parent, _, leaf = name.rpartition(".")
        experts = model.get_submodule(parent)
        for expert, w in enumerate(getattr(experts, leaf)):
            want = round_weight(w.T if experts.is_transposed else w, layer.scheme)
            assert torch.equal(layer.codes[expert], want.codes)
            assert torch.equal(layer.scales[expert], want.scales)
            dense = want.weight(layer.scheme.bits)
            got = getattr(twin.get_submodule(parent), leaf)[expert]
            assert torch.equal(got.T if experts.is_transposed else got, dense)


@pytest.mark.parametrize(
    ("scheme", "bound"), [("w8a16", 1e-5), ("w4a16", 1e-5), ("w8a8", 0.02), ("w4a8", 0.02)]
)
@torch.no_grad()
def test_compiled_as_in_eager(model: nn.Module, scheme: str, bound: float) -> None:
    """But for inputs, which only kernels round; nothing is left to PyTorch."""
    twin = llmopt.quantize(model, scheme, group="channel")
    x = randn(TOKENS, WIDTH)
    want = twin(x)
    assert 1e-4 < (want - model(x)).norm() / want.norm() < 0.3
    known = {id(g) for g in alive()}
    got = torch.compile(twin, backend="llmopt")(x)
    assert (got - want).norm() / want.norm() < bound
    (graph,) = [g for g in alive() if id(g) not in known]
    assert not graph.plan.fallbacks
    products = [r for r in graph.plan.records() if r.op.startswith("grouped_linear")]
    assert [r.op for r in products] == ["grouped_linear_quantized"] * 2


@torch.no_grad()
def test_experts_follow_the_dtype(model: nn.Module) -> None:
    twin = llmopt.quantize(model, "w8a16", group="channel").to(torch.bfloat16)
    for layer in quantized(twin).values():
        assert layer().dtype == torch.bfloat16
        assert layer.scales.dtype == torch.float32
    x = randn(TOKENS, WIDTH).bfloat16()
    got = torch.compile(twin, backend="llmopt")(x)
    assert (got - twin(x)).float().norm() / twin(x).float().norm() < 0.02


def test_gradients_go_through_in_eager() -> None:
    twin = llmopt.quantize(Model(), "w8a16", group="channel")
    x = randn(TOKENS, WIDTH).requires_grad_()
    twin(x).sum().backward()
    assert x.grad is not None
    assert x.grad.abs().sum() > 0


def test_a_copy_has_codes_of_its_own(model: nn.Module) -> None:
    twin = llmopt.quantize(model, "w8a16", group="channel")
    other = copy.deepcopy(twin)
    first, second = (next(iter(quantized(m).values())) for m in (twin, other))
    with torch.no_grad():
        second.codes.zero_()
        assert first.codes.any()
        x = randn(TOKENS, WIDTH)
        assert not torch.equal(twin(x), other(x))
        other.load_state_dict(twin.state_dict())
        assert torch.equal(twin(x), other(x))


@torch.no_grad()
def test_written_codes_are_noticed(model: nn.Module) -> None:
    twin, x = llmopt.quantize(model, "w8a16", group="channel"), randn(TOKENS, WIDTH)
    compiled = torch.compile(twin, backend="llmopt")
    before = compiled(x)
    for layer in quantized(twin).values():
        layer.scales.mul_(2)
    after = compiled(x)
    assert (after - before).norm() / before.norm() > 0.1
    torch.testing.assert_close(after, twin(x), rtol=1e-4, atol=1e-4)


def test_layers_name_projections() -> None:
    model = Model()
    twin = llmopt.quantize(model, "w8a16", group="channel", layers={"*.down_proj": None})
    assert list(quantized(twin)) == ["mlp.0.gate_up_proj"]
    only = llmopt.quantize(
        model,
        "w8a16",
        layers={
            "first": None,
            "last": None,
            "*up_proj": scheme_of("w8a8", "channel"),
            "*down*": None,
        },
    )
    (layer,) = quantized(only).values()
    assert layer.scheme.name == "w8a8"
    with pytest.raises(ValueError, match=r"no linear is named 'nothing'.*mlp\.0\.gate_up_proj"):
        llmopt.quantize(model, "w8a16", layers={"nothing": None})


def test_what_cannot_be_rounded_is_named() -> None:
    with pytest.raises(
        ValueError,
        match=f"mlp.0.down_proj cannot be .*groups of 64 do not divide its {INNER} inputs",
    ):
        llmopt.quantize(Model(), "w8a8", layers={"first": None, "last": None, "*gate*": None})
    model = Model()
    with torch.no_grad():
        model.mlp[0].down_proj[EXPERTS - 1, 0, 3] = float("nan")
    with pytest.raises(
        ValueError, match=r"mlp\.0\.down_proj cannot be .*1 of its .* NaN or infinite"
    ):
        llmopt.quantize(model, "w8a16", group="channel")


@torch.no_grad()
def test_calibration_leaves_experts_to_plain_rounding() -> None:
    model, x = Model().eval(), randn(TOKENS, WIDTH)
    plain = llmopt.quantize(model, "w4a16", group="channel")
    for algorithm in ("gptq", "awq"):
        twin = llmopt.quantize(model, "w4a16", [x], group="channel", algorithm=algorithm)
        for name, layer in quantized(twin).items():
            assert torch.equal(layer.codes, quantized(plain)[name].codes)


@pytest.mark.parametrize("row", ["mixtral", "gpt-oss-sinks"])
@torch.no_grad()
def test_saved_and_loaded(row: str, tmp_path: Path) -> None:
    model = zoo.make(row, **DIVIDES)
    twin = llmopt.quantize(model, "w4a16")
    llmopt.save_quantized(twin, tmp_path)
    loaded = llmopt.load_quantized(tmp_path)
    assert list(quantized(loaded)) == list(quantized(twin)) != []
    inputs = zoo.inputs(row, 9)
    assert torch.equal(loaded(**inputs).logits, twin(**inputs).logits)
    torch._dynamo.reset()
    a, b = (torch.compile(m, backend="llmopt")(**inputs).logits for m in (twin, loaded))
    assert torch.equal(a, b)
    with pytest.raises(StorageError, match="of another model"):
        llmopt.load_quantized(tmp_path, zoo.make(row, **DIVIDES, num_local_experts=3))


@torch.no_grad()
def test_routers_stay_exact() -> None:
    """Asked for by precision: every linear has the scheme but those that choose."""
    model, inputs = zoo.make("mixtral", **DIVIDES), zoo.inputs("mixtral", 9)
    torch._dynamo.reset()
    known = {id(g) for g in alive()}
    torch.compile(model, backend="llmopt", options={"precision": "w8a8", "group": "channel"})(
        **inputs
    )
    (graph,) = [g for g in alive() if id(g) not in known]
    exact = [r.detail for r in graph.plan.records() if r.op == "linear"]
    assert len(exact) == model.config.num_hidden_layers
    assert all("are picked" in detail for detail in exact)
    assert sum(r.op == "grouped_linear_quantized" for r in graph.plan.records()) == 2 * len(exact)


@torch.no_grad()
def test_pickled_and_assigned() -> None:
    twin, x = llmopt.quantize(Model().eval(), "w8a16", group="channel"), randn(TOKENS, WIDTH)
    again = pickle.loads(pickle.dumps(twin))
    assert torch.equal(again(x), twin(x))
    assert [type(m) for m in again.modules()] == [type(m) for m in twin.modules()]
    experts = again.mlp[0]
    experts.down_proj = nn.Parameter(torch.zeros_like(experts.down_proj))
    assert list(quantized(again)) == ["mlp.0.gate_up_proj"]
    assert not torch.equal(again(x), twin(x))


def test_what_is_no_weight_of_experts() -> None:
    class Other(nn.Module):
        def __init__(self, down: nn.Parameter, transposed: object = False) -> None:
            super().__init__()
            self.down_proj, self.is_transposed = down, transposed

    floats = nn.Parameter(torch.randn(2, 4, 4))
    integers = nn.Parameter(torch.ones(2, 4, 4, dtype=torch.uint8), requires_grad=False)
    others = (Other(integers), Other(floats, "no"), Other(nn.Parameter(torch.zeros(0, 4, 4))))
    assert not projections_of(nn.Sequential(*others))
    assert list(projections_of(nn.Sequential(Other(floats), Other(floats)))) == ["0.down_proj"]


def test_linears_that_choose_experts_are_left_unless_named() -> None:
    class Routed(Model):
        def __init__(self) -> None:
            super().__init__()
            self.block = nn.ModuleDict({"experts": Experts(), "gate": nn.Linear(WIDTH, EXPERTS)})

    names = [
        n
        for n, m in llmopt.quantize(Routed(), "w8a16", group="channel").named_modules()
        if isinstance(m, QuantizedLinear)
    ]
    assert names == ["first", "last"]
    named = llmopt.quantize(
        Routed(), "w8a16", group="channel", layers={"*gate": scheme_of("w8a16", "channel")}
    )
    assert isinstance(named.block["gate"], QuantizedLinear)


def test_twice_says_so() -> None:
    twin = llmopt.quantize(Model(), "w8a16", group="channel")
    with pytest.raises(ValueError, match="is quantised already"):
        llmopt.quantize(twin, "w8a16")


@torch.no_grad()
def test_routers_behind_a_correction_stay_exact() -> None:
    config = Ernie4_5_MoeConfig(
        vocab_size=131, hidden_size=64, intermediate_size=64, num_hidden_layers=1, num_attention_heads=4, num_key_value_heads=2,
        moe_num_experts=5, moe_k=2, moe_intermediate_size=64, moe_layer_start_index=0,
    )  # fmt: skip
    model = Ernie4_5_MoeForCausalLM(config).eval()
    torch._dynamo.reset()
    known = {id(g) for g in alive()}
    torch.compile(model, backend="llmopt", options={"precision": "w8a8"})(
        torch.randint(0, 131, (1, 7))
    )
    (graph,) = [g for g in alive() if id(g) not in known]
    exact = [r.detail for r in graph.plan.records() if r.op == "linear"]
    assert [("are picked" in d) for d in exact] == [True]


@torch.no_grad()
def test_pooling_by_the_largest_is_no_choice() -> None:
    """Over positions, not over outputs."""
    linear = nn.Linear(64, 64)
    known = {id(g) for g in alive()}
    torch._dynamo.reset()
    options = {"precision": "w8a8"}
    torch.compile(lambda x: linear(x).max(1)[0], backend="llmopt", options=options)(randn(2, 5, 64))
    (graph,) = [g for g in alive() if id(g) not in known]
    assert [r.op for r in graph.plan.records() if "linear" in r.op] == ["linear_quantized"]
