"""F.embedding through the native kernel: spellings, and ids outside the table."""

from __future__ import annotations

import pytest
import torch
from llmopt.compiled import alive
from torch import nn

from tests.tolerance import assert_close


class Embedder(nn.Module):
    """Three summed embeddings and a LayerNorm, as BERT has them; the first is scaled by a number or a tensor."""

    def __init__(self, scale: float | torch.Tensor) -> None:
        super().__init__()
        self.words, self.places, self.kinds = (
            nn.Embedding(50, 24, padding_idx=0),
            nn.Embedding(20, 24),
            nn.Embedding(2, 24),
        )
        self.norm, self.head = nn.LayerNorm(24), nn.Linear(24, 50)
        self.scale = nn.Buffer(scale) if isinstance(scale, torch.Tensor) else scale

    def forward(self, ids: torch.Tensor, kinds: torch.Tensor) -> torch.Tensor:
        places = torch.arange(ids.shape[1])
        h = self.words(ids) * self.scale + self.places(places) + self.kinds(kinds)
        return self.head(self.norm(h))


def build(scale: float | torch.Tensor, dtype: torch.dtype = torch.float32) -> Embedder:
    torch.manual_seed(0)
    return Embedder(scale).eval().to(dtype)


def steps() -> list[str]:
    plan = alive()[-1].plan
    assert plan is not None
    assert len(plan.segments) == 1
    return [r.op for r in plan.records()]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("ids_dtype", [torch.int64, torch.int32], ids=str)
@pytest.mark.parametrize("scale", [1.0, 4.5, torch.tensor(4.5)], ids=str)
@torch.no_grad()
def test_summed_embeddings(
    scale: float | torch.Tensor, ids_dtype: torch.dtype, dtype: torch.dtype
) -> None:
    model = build(scale, dtype)
    ids = torch.randint(0, 50, (3, 7), dtype=ids_dtype)
    kinds = (ids % 2)[:, :1].expand(3, 7)
    got = torch.compile(model, backend="llmopt")(ids, kinds)
    assert_close(got, build(scale, dtype).double()(ids, kinds), dtype)
    assert steps().count("embedding") == 3


@pytest.mark.parametrize("bad", [-1, 50, 1 << 40])
@torch.no_grad()
def test_an_id_outside_the_table_is_pytorchs_error(bad: int) -> None:
    model = build(1.0)
    compiled = torch.compile(model, backend="llmopt")
    good = torch.randint(0, 50, (3, 7))
    kinds = torch.zeros(3, 7, dtype=torch.int64)
    want = compiled(good, kinds)
    ids = good.clone()
    ids[1, 3] = bad
    with pytest.raises(IndexError, match="out of range"):
        model(ids, kinds)
    with pytest.raises(IndexError, match="out of range"):
        compiled(ids, kinds)
    assert torch.equal(compiled(good, kinds), want)
    assert steps().count("embedding") == 3
