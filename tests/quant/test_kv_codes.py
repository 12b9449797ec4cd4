"""Rows of int8 keys and values: codes worked out by hand, scales, what cannot be a number, and the cache's own operations."""

from __future__ import annotations

import math

import llmopt
import pytest
import torch
from llmopt.ops.kv_codes import dequantize_rows, quantize_rows
from transformers import LlamaConfig, MambaConfig, MistralConfig

SIZES = {"num_hidden_layers": 2, "hidden_size": 32, "num_attention_heads": 4,
         "num_key_value_heads": 2, "vocab_size": 50}  # fmt: skip


def parts(rows: torch.Tensor) -> tuple[list, list]:
    return rows[..., :-4].tolist(), rows[..., -4:].clone().view(torch.float32).flatten().tolist()


def test_codes_by_hand() -> None:
    x = torch.tensor([[254.0, -254.0, 1.0, 3.0, 5.0, -7.0], [0.0, 0.0, 0.0, 0.0, 0.0, 0.0]])
    codes, scales = parts(quantize_rows(x))
    assert scales == [2.0, 0.0]
    assert codes == [[127, -127, 0, 2, 2, -4], [0] * 6]  # 0.5, 1.5, 2.5 and −3.5 go to even
    assert dequantize_rows(quantize_rows(x))[0].tolist() == [254, -254, 0, 4, 4, -8]


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_row_with_nan_or_inf_is_nan(bad: float) -> None:
    x = torch.ones(3, 5)
    x[1, 2] = bad
    back = dequantize_rows(quantize_rows(x))
    assert back[1].isnan().all()
    torch.testing.assert_close(back[[0, 2]], torch.ones(2, 5))


def test_the_error_is_at_most_half_a_step() -> None:
    x = torch.randn(4, 3, 100, 67) * torch.logspace(-6, 6, 100)[:, None]
    step = x.abs().amax(-1, keepdim=True).double() / 127
    error = (dequantize_rows(quantize_rows(x), torch.float64) - x.double()).abs()
    assert (error <= step / 2 * (1 + 1e-5)).all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_any_layout_and_half_precision(dtype: torch.dtype) -> None:
    x = torch.randn(2, 5, 3, 7).to(dtype).transpose(1, 2)
    rows = quantize_rows(x)
    assert rows.shape == (2, 3, 5, 11)
    assert torch.equal(rows, quantize_rows(x.contiguous()))
    odd = torch.cat((torch.zeros(1, dtype=torch.int8), rows.flatten()))[1:].view_as(rows)
    assert torch.equal(dequantize_rows(odd, dtype), dequantize_rows(rows, dtype))
    assert dequantize_rows(rows, dtype).dtype == dtype


def filled(cache: llmopt.KVCache, batch: int, length: int, seed: int) -> list[torch.Tensor]:
    g = torch.Generator().manual_seed(seed)
    new = [torch.randn(batch, 2, length, 8, generator=g) for _ in range(4)]
    for layer in range(2):
        cache.update(new[2 * layer], new[2 * layer + 1], layer)
    return new


def test_operations_of_a_cache() -> None:
    """Each does to the rows what it does to the values they stand for."""
    cache = llmopt.KVCache(LlamaConfig(**SIZES))
    assert cache.get_seq_length() == 0
    first, second = filled(cache, 3, 5, 0), filled(cache, 3, 2, 1)
    whole = [
        dequantize_rows(quantize_rows(torch.cat(p, 2))) for p in zip(first, second, strict=True)
    ]

    def same(change) -> None:
        for layer in range(2):
            for got, want in zip(cache.dequantized(layer), whole[2 * layer :], strict=False):
                assert torch.equal(got, change(want))

    same(lambda x: x)
    assert cache.get_seq_length() == 7
    keys, _ = cache.update(first[0][:, :, :1], first[1][:, :, :1], 0)
    assert keys.shape == (3, 2, 8, 8)
    assert torch.equal(keys, cache.dequantized(0)[0])
    cache.layers[0].crop(-1)
    cache.reorder_cache(torch.tensor([2, 0, 0]))
    same(lambda x: x[[2, 0, 0]])
    cache.crop(-3)
    same(lambda x: x[[2, 0, 0], :, :4])
    cache.batch_repeat_interleave(2)
    same(lambda x: x[[2, 2, 0, 0, 0, 0], :, :4])
    cache.batch_select_indices(torch.tensor([1, 5]))
    same(lambda x: x[[2, 0], :, :4])
    assert all(t.dtype == torch.int8 for layer in cache.layers for t in (layer.keys, layer.values))
    cache.reset()
    assert cache.get_seq_length() == 0
    with pytest.raises(ValueError, match="layer 1 of this cache is empty"):
        cache.dequantized(1)
    again = filled(cache, 1, 3, 2)
    assert torch.equal(cache.dequantized(1)[0], dequantize_rows(quantize_rows(again[2])))


def test_a_window_holds_its_length() -> None:
    cache = llmopt.KVCache(MistralConfig(**SIZES, sliding_window=4))
    filled(cache, 1, 6, 0)
    assert cache.layers[0].keys.shape == (1, 2, 3, 12)
    assert cache.get_seq_length() == 6
    assert cache.get_mask_sizes(1, 0) == (4, 3)


@pytest.mark.parametrize(
    ("make", "error", "words"),
    [
        (lambda: llmopt.KVCache(LlamaConfig(**SIZES), dtype="int3"), ValueError, "'int3'.*possible: int8"),
        (lambda: llmopt.KVCache(torch.nn.Linear(2, 2)), TypeError, "config, not Linear"),
        (lambda: llmopt.KVCache(MambaConfig(num_hidden_layers=1)), ValueError, "no form of .*possible"),
    ],
    ids=["dtype", "model", "layers"],
)  # fmt: skip
def test_what_has_no_such_cache(make, error, words) -> None:
    with pytest.raises(error, match=words):
        make()
