"""rotary_table against float64, in every tier, for positions short and long."""

import pytest
import torch
from llmopt import _C
from llmopt.program import run_op


@pytest.mark.parametrize("tier", _C.tiers())
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("batch", "length", "half"), [(1, 1, 32), (2, 17, 3), (1, 129, 48)])
def test_cosine_and_sine_fill_both_halves(tier, dtype, batch, length, half):
    frequency = 1.0 / 10000 ** (torch.arange(half) / half)
    position = torch.randint(
        0, 100_000, (batch, length), generator=torch.Generator().manual_seed(0)
    )
    cos, sin = (torch.full((batch, length, 2 * half), torch.nan).to(dtype) for _ in range(2))
    size = (batch, length, half)
    operands = [frequency.expand(size), position[..., None].expand(size), cos, sin]
    run_op("rotary_table", operands, [], [0.5], tier, 2)
    angle = (frequency * position[..., None].float()).double().repeat(1, 1, 2)
    tolerance = {torch.float32: 2e-7, torch.float16: 3e-4, torch.bfloat16: 2e-3}[dtype]
    torch.testing.assert_close(cos.double(), angle.cos() / 2, atol=tolerance, rtol=0)
    torch.testing.assert_close(sin.double(), angle.sin() / 2, atol=tolerance, rtol=0)


def test_positions_that_differ_along_a_row_are_refused():
    frequency, position = torch.ones(1, 2, 4), torch.zeros(1, 2, 4, dtype=torch.int64)
    cos = torch.empty(1, 2, 8)
    with pytest.raises(ValueError, match="the same along a row"):
        run_op("rotary_table", [frequency, position, cos, cos.clone()], [], [1.0])
