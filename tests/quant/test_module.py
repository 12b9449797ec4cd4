"""QuantizedLinear: its numbers, its place in a Dynamo graph, gradients, and changes of dtype."""

from __future__ import annotations

import pytest
import torch
from llmopt.ops.linear_quantized import linear_quantized
from llmopt.quant.module import QuantizedLinear
from llmopt.quant.rounding import round_weight
from llmopt.quant.schemes import SCHEMES


def make(name: str, bias: bool = True) -> QuantizedLinear:
    g = torch.Generator().manual_seed(0)
    codes = round_weight(torch.randn(24, 128, generator=g), SCHEMES[name])
    return QuantizedLinear(codes, torch.randn(24, generator=g) if bias else None, SCHEMES[name])


@pytest.mark.parametrize("name", SCHEMES)
@pytest.mark.parametrize("shape", [(128,), (1, 128), (3, 5, 128), (0, 128)], ids=str)
def test_forward_is_the_op(name: str, shape: tuple[int, ...]) -> None:
    linear, x = make(name), torch.randn(shape)
    want = linear_quantized(
        x, (linear.codes,), (linear.scales,), (linear.offsets,),
        linear.scheme.bits, linear.scheme.activations, biases=(linear.bias,),
    )  # fmt: skip
    assert torch.equal(linear(x), want)
    if name.endswith("a16"):
        plain = torch.nn.functional.linear(x, linear.weight, linear.bias)
        torch.testing.assert_close(linear(x), plain)


def test_it_is_called_as_a_linear_is() -> None:
    linear, x = make("w8a8"), torch.randn(3, 128)
    assert torch.equal(linear(input=x), linear(x))


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_bad_activations_are_never_a_silent_zero(bad: float) -> None:
    linear, x = make("w8a8"), torch.randn(3, 128)
    x[1, 70] = bad
    y = linear(x)
    assert y[1].isnan().all()
    assert y[[0, 2]].isfinite().all()


def test_dynamo_keeps_it_as_one_node() -> None:
    graphs = []

    def backend(graph, _):
        graphs.append(graph)
        return graph.forward

    model = torch.nn.Sequential(make("w8a8"), torch.nn.ReLU()).eval()
    x = torch.randn(5, 128)
    compiled = torch.compile(model, backend=backend, fullgraph=True)
    with torch.no_grad():
        assert torch.equal(compiled(x), model(x))
    (graph,) = graphs
    called = [n.target for n in graph.graph.nodes if n.op == "call_function"]
    assert torch.ops.llmopt.linear_quantized_module.default in called
    assert len(called) == 2


def test_the_op_keeps_torchs_contract() -> None:
    linear = make("w4a16")
    args = (torch.randn(3, 128, requires_grad=True), linear.codes, linear.scales, linear.offsets)
    torch.library.opcheck(
        torch.ops.llmopt.linear_quantized_module.default, (*args, linear.bias, 4, "same")
    )


@pytest.mark.parametrize("name", SCHEMES)
def test_gradients_flow_to_the_inputs(name: str) -> None:
    linear, x = make(name), torch.randn(4, 128, requires_grad=True)
    linear(x).square().sum().backward()
    want = 2 * linear(x).detach() @ linear.weight
    torch.testing.assert_close(x.grad, want)


def test_half_precision_keeps_the_scales() -> None:
    linear = make("w4a16")
    scales = linear.scales.clone()
    half = linear.to(torch.bfloat16)
    assert half.scales.dtype == half.offsets.dtype == torch.float32
    assert torch.equal(half.scales, scales)
    assert half.bias.dtype == half.weight.dtype == torch.bfloat16
    assert make("w8a8", bias=False).half().weight.dtype == torch.float16
    assert half(torch.randn(2, 128, dtype=torch.bfloat16)).dtype == torch.bfloat16


def test_state_dict_round_trip() -> None:
    linear = make("w4a16")
    other = QuantizedLinear.empty(24, 128, linear.scheme, torch.float32)
    assert list(linear.state_dict()) == ["codes", "scales", "offsets", "bias"]
    other.load_state_dict(linear.state_dict())
    x = torch.randn(3, 128)
    assert torch.equal(other(x), linear(x))
