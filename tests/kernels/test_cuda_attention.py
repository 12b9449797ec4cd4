"""attention_decode of csrc/cuda in the emulator, against float64: groups of heads, splits, fp16 and int8 caches."""

from __future__ import annotations

import pytest
import torch
from cuda_emulator.operands import Decode
from llmopt.native.cuda import AttentionDecode, CudaError
from llmopt.program import DTYPE_CODES
from tolerance import assert_close

# A split of nothing, of one key, of a part of a step; lengths that differ within a batch.
LENGTHS = [(1,), (17, 0), (5, 64, 130), (333,)]


@pytest.mark.parametrize("splits", [1, 2, 5])
@pytest.mark.parametrize("lengths", LENGTHS, ids=lambda v: "-".join(map(str, v)))
@pytest.mark.parametrize("cache", ["f16", "s8"])
@pytest.mark.parametrize("head_dim", [64, 128])
def test_splits_and_lengths(emulator, head_dim, cache, lengths, splits):
    p = Decode(4, 2, head_dim, lengths, splits, cache == "s8")
    for seed in (0, 1):
        emulator.seed(seed)
        assert_close(p.run(emulator), p.want())
        assert not p.finished.any()  # ready for the next launch


@pytest.mark.parametrize("cache", ["f16", "s8"])
@pytest.mark.parametrize(
    ("heads", "kv_heads"), [(3, 3), (6, 2), (8, 1), (7, 1), (12, 1), (32, 2)]
)  # groups of 1, 3, 8, 7; 12 and 16 heads take two blocks
def test_groups_of_heads(emulator, heads, kv_heads, cache):
    p = Decode(heads, kv_heads, 64, (40, 7), 2, cache == "s8")
    assert_close(p.run(emulator), p.want())


def test_large_scores_do_not_overflow(emulator):
    p = Decode(2, 1, 64, (50,), 3)
    p.scale = 40.0
    assert_close(p.run(emulator), p.want())


def test_the_cache_may_be_strided(emulator):
    """Tokens outermost: [B, S, Hkv, D] seen as [B, Hkv, S, D]."""
    p = Decode(4, 2, 64, (33, 20), 2)
    p.k, p.v = (t.transpose(1, 2).contiguous().transpose(1, 2) for t in (p.k, p.v))
    assert_close(p.run(emulator), p.want())


@pytest.mark.parametrize("cache", ["f16", "s8"])
@pytest.mark.parametrize("head_dim", [64, 128])
def test_the_cache_is_read_once_and_densely(emulator, head_dim, cache):
    p = Decode(8, 1, head_dim, (512,), 1, cache == "s8", capacity=512)
    with emulator.counting() as counters:
        assert_close(p.run(emulator), p.want())
    assert counters.shared_wavefronts == counters.shared_ideal
    assert counters.global_ideal / counters.global_sectors > 0.9
    num_bytes = 2 * 512 * (2 * head_dim if cache == "f16" else head_dim + 4)
    assert counters.global_sectors * 32 < 1.3 * num_bytes


def test_splits_fill_the_machine(emulator):
    emulator.device(multiprocessors=108)
    assert emulator.library.decode_splits(1, 32, 8, 4096) == 27
    assert emulator.library.decode_splits(1, 32, 8, 300) == 2  # not less than 128 keys each
    assert emulator.library.decode_splits(64, 32, 8, 4096) == 1
    with pytest.raises(CudaError, match="positive"):
        emulator.library.decode_splits(0, 32, 8, 4096)


def decode_with(**changes) -> AttentionDecode:
    record = Decode(4, 2, 64, (20,), 2).record()
    for name, value in changes.items():
        setattr(record, name, value)
    return record


@pytest.mark.parametrize(
    ("problem", "reason"),
    [
        (decode_with(q=None), "must be given"),
        (decode_with(heads=5), "5 heads over 2 heads"),
        (decode_with(head_dim=96), "64 and 128 are possible"),
        (decode_with(cache_dtype=DTYPE_CODES[torch.float32]), "f16 and s8 are possible"),
        (decode_with(cache_dtype=DTYPE_CODES[torch.int8]), "needs k_scale and v_scale"),
        (decode_with(splits=0), "at least 1"),
        (decode_with(partial=None), "needs partial and finished"),
        (decode_with(row_stride=65), "multiples of 8 elements"),
        (decode_with(batch=70000), "than a grid"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_impossible_problems_are_refused(emulator, problem, reason):
    with pytest.raises(CudaError, match=reason):
        emulator.library.launch(problem)
