"""quantize(…, "auto") with made-up times: one layer whose outliers rounding cannot bear is spared, and no other."""

from __future__ import annotations

import llmopt
import pytest
import torch
from llmopt.auto import module
from llmopt.auto.plans import LayerShape
from llmopt.quant.budget import DEFAULT_BUDGET
from llmopt.quant.evaluate import divergence
from llmopt.quant.module import QuantizedLinear
from llmopt.quant.schemes import Scheme
from torch import nn

X = torch.randn(40, 64, generator=torch.Generator().manual_seed(0))
COST = {"exact": 4.0, "w8a16": 3.0, "w8a8": 2.0, "w4a16": 1.5, "w4a8": 1.0}


def fake_seconds(shape: LayerShape, scheme: Scheme | None) -> float:
    """Fewer bits are faster."""
    return 1e-6 * COST["exact" if scheme is None else scheme.name]


def model() -> nn.Sequential:
    """Norms and linears in turn; what is linear is layer 1, 3 and 5."""
    torch.manual_seed(0)
    norms = (nn.LayerNorm(64) for _ in range(3))
    linears = (nn.Linear(64, 64), nn.Linear(64, 64), nn.Linear(64, 8))
    return nn.Sequential(*(m for pair in zip(norms, linears, strict=True) for m in pair)).eval()


def weight_outliers(given: nn.Sequential) -> None:
    """Weights of an input that is always zero, so large that their groups' codes say nothing of the others."""
    given[2].weight[0], given[2].bias[0] = 0, 0
    given[3].weight[:, 0] = 20


def activation_outliers(given: nn.Sequential) -> None:
    """An input so large that its group's codes say nothing of the others; its weights are zero."""
    given[2].bias[0] = 500
    given[3].weight[:, 0] = 0


@pytest.mark.parametrize(
    ("outliers", "chosen"),
    [(None, "w4a8"), (weight_outliers, "exact"), (activation_outliers, "w8a16")],
    ids=["none", "weights", "activations"],
)
@torch.no_grad()
def test_only_the_layer_with_outliers_is_spared(outliers, chosen, monkeypatch) -> None:
    monkeypatch.setattr(module, "LayerClock", lambda: fake_seconds)
    given = model()
    if outliers:
        outliers(given)
    small = llmopt.quantize(given, "auto", calibration=X)
    assert small.llmopt_decision.choice == {"1": "w4a8", "3": chosen, "5": "w4a8"}
    schemes = [m.scheme.name if isinstance(m, QuantizedLinear) else "exact" for m in small[1::2]]
    assert schemes == ["w4a8", chosen, "w4a8"]
    assert divergence(given(X), small(X)) <= DEFAULT_BUDGET
    if outliers:  # as coarse as the others it would spoil the model
        assert divergence(given(X), llmopt.quantize(given, "w4a8")(X)) > 2 * DEFAULT_BUDGET
