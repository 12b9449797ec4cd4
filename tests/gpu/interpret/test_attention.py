"""attention: tiles and split keys, every kind of mask and bias, ragged sizes, against float64."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from llmopt import ops
from llmopt.gpu.attentions import codes_and_scales
from llmopt.gpu.run import run
from llmopt.kernels import attention, attention_decode, round_keys
from llmopt.kernels.attention import Scores
from llmopt.kernels.operands import counters, dtype_name
from llmopt.launch import AttentionProblem, AttentionTile, RowProblem
from llmopt.ops.kv_codes import dequantize_rows, quantize_rows
from llmopt.target import gpu_target

from tests.tolerance import INT8_QK, assert_close

HOPPER = gpu_target("cuda:90")
FORMS = {
    "tiles": (attention, AttentionTile(32, 32), 45),
    "split": (attention_decode, AttentionTile(16, 32, splits=4), 3),
    "whole": (attention_decode, AttentionTile(16, 64), 3),
}
B, H, HKV, SKV, D, DV = 2, 4, 2, 77, 24, 40


def wide(q, k, v, scores, slopes=None):
    """The op's own reference in float64, with slopes as a float mask."""
    q, k, v = q.double(), k.double(), v.double()
    i = torch.arange(q.shape[2])[:, None] + scores.offset
    j = torch.arange(k.shape[2])[None, :]
    s = (q @ k.repeat_interleave(H // HKV, 1).transpose(2, 3)) * scores.scale
    if scores.softcap:
        s = scores.softcap * torch.tanh(s / scores.softcap)
    if scores.slopes is not None:
        s = s + scores.slopes.double()[:, None, None] * (j - i)
    seen = torch.ones(s.shape, dtype=torch.bool)
    if scores.causal:
        seen = seen & (j <= i)
    if scores.window:
        seen = seen & (j > i - scores.window)
    if scores.lengths is not None:
        seen = seen & (j < scores.lengths[:, None, None, None])
    if scores.mask is not None:
        seen, s = (
            (seen & scores.mask, s)
            if scores.mask.dtype == torch.bool
            else (seen, s + scores.mask.double())
        )
    s = s.masked_fill(~seen, float("-inf"))
    dead = (s == float("-inf")).all(-1, keepdim=True)
    return s.softmax(-1).masked_fill(dead, 0) @ v.repeat_interleave(H // HKV, 1)


def operands(sq, dtype):
    q = torch.randn(B, sq, H, D).to(dtype).transpose(1, 2)
    k, v = (torch.randn(SKV, B, HKV, n).to(dtype).permute(1, 2, 0, 3) for n in (D, DV))
    return q, k, v, torch.empty(B, sq, H, DV, dtype=dtype).transpose(1, 2)


def problem(q, k, v):
    kv = dtype_name(k.dtype)
    return AttentionProblem(B, H, HKV, q.shape[2], SKV, D, DV, dtype_name(q.dtype), kv)


def check(form, dtype, make):
    module, tile, sq = FORMS[form]
    q, k, v, o = operands(sq, dtype)
    scores = make(sq)
    run(module.launch(problem(q, k, v), tile, HOPPER, q, k, v, o, scores))
    assert_close(o, wide(q, k, v, scores))
    assert not counters(torch.device("cpu"), 1).any()


def bool_mask(sq):
    mask = torch.rand(B, 1, sq, SKV) > 0.5
    mask[1, :, 1] = False  # a query that sees nothing
    return mask.expand(B, H, sq, SKV)


CASES = {
    "full": lambda sq: Scores(scale=0.2),
    "causal": lambda sq: Scores(scale=0.2, causal=True, offset=SKV - sq),
    "causal from the first key": lambda sq: Scores(scale=0.2, causal=True),
    "window": lambda sq: Scores(scale=0.2, causal=True, offset=SKV - sq, window=20),
    "softcap": lambda sq: Scores(scale=0.2, softcap=2.0),
    "alibi": lambda sq: Scores(scale=0.2, causal=True, offset=SKV - sq, slopes=torch.rand(H) * 0.1),
    "lengths": lambda sq: Scores(scale=0.2, lengths=torch.tensor([50, 0])),
    "bool mask": lambda sq: Scores(scale=0.2, mask=bool_mask(sq)),
    "float mask": lambda sq: Scores(
        scale=0.2, mask=torch.randn(1, H, sq, SKV).half().expand(B, H, sq, SKV)
    ),
}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("form", ["tiles", "split"])
def test_scores(form, case):
    check(form, torch.float16, CASES[case])


@pytest.mark.parametrize("form", FORMS)
def test_rows_that_see_nothing_as_softmax_gives_them(form):
    module, tile, sq = FORMS[form]
    q, k, v, o = operands(sq, torch.float16)
    scores = Scores(scale=0.2, mask=bool_mask(sq), nan_rows=True)
    run(module.launch(problem(q, k, v), tile, HOPPER, q, k, v, o, scores))
    sees = scores.mask.any(-1)
    assert not sees.all()
    assert o[~sees].isnan().all()
    assert_close(o[sees], wide(q, k, v, scores)[sees])


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_dtypes(form, dtype):
    check(form, dtype, CASES["causal"])


@pytest.mark.parametrize("form", ["tiles", "split"])
def test_int8_keys_and_values_with_scales_of_their_own(form):
    module, tile, sq = FORMS[form]
    q, *_, o = operands(sq, torch.float16)
    k, v = (torch.randint(-127, 128, (B, HKV, SKV, n), dtype=torch.int8) for n in (D, DV))
    k_scale, v_scale = (torch.rand(B, HKV, SKV) * 0.02 for _ in range(2))
    scores = Scores(scale=0.2, causal=True, offset=SKV - sq, k_scale=k_scale, v_scale=v_scale)
    run(module.launch(problem(q, k, v), tile, HOPPER, q, k, v, o, scores))
    assert_close(o, wide(q, k * k_scale[..., None], v * v_scale[..., None], scores))


@pytest.mark.parametrize("form", ["tiles", "split"])
def test_rows_of_codes_are_read_where_they_lie(form):
    """A cache of ops/kv_codes.py: every row ends with its scale."""
    module, tile, sq = FORMS[form]
    q, k, v, o = operands(sq, torch.float16)
    rows = [quantize_rows(t) for t in (k, v)]
    (k8, k_scale), (v8, v_scale) = map(codes_and_scales, rows)
    scores = Scores(scale=0.2, causal=True, offset=SKV - sq, k_scale=k_scale, v_scale=v_scale)
    run(module.launch(problem(q, k8, v8), tile, HOPPER, q, k8, v8, o, scores))
    assert_close(o, wide(q, *map(dequantize_rows, rows), scores))


def rounded_keys(k):
    """(codes, scales, mean) of keys less their mean, by the kernels."""
    b, h, s, d = k.shape
    p = RowProblem(b * h * s, d, dtype_name(k.dtype))
    sums, mean = torch.empty(b, h, round_keys.parts_of(s), d), torch.empty(b, h, d)
    codes, scale = torch.empty(b, h, s, d, dtype=torch.int8), torch.empty(b, h, s)
    tile = round_keys.tiles(p, HOPPER)[0]
    run(round_keys.launch_sums(p, tile, HOPPER, k, sums))
    run(round_keys.launch(p, tile, HOPPER, k, sums, codes, scale, mean))
    return codes, scale, mean


@pytest.mark.parametrize("length", [1, SKV, 300])
def test_round_keys(length):
    k = torch.randn(length, B, HKV, D).half().permute(1, 2, 0, 3) + 3
    codes, scale, mean = rounded_keys(k)
    assert torch.allclose(mean.double(), k.double().mean(2), atol=1e-5)
    centred = k.double() - k.double().mean(2, keepdim=True)
    assert ((codes * scale[..., None] - centred).abs() <= scale[..., None] * 0.51).all()


INT8_CASES = {name: CASES[name] for name in ("full", "window", "softcap", "float mask")}


@pytest.mark.parametrize("case", INT8_CASES)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_int8_products_of_queries_and_keys(case, dtype):
    """Keys have a mean that is ten times what they differ by, as in real models."""
    sq = 45
    q, k, v, o = operands(sq, dtype)
    k = k + 10 * torch.randn(1, HKV, 1, D).to(dtype)
    scores = INT8_CASES[case](sq)
    codes, scale, mean = rounded_keys(k)
    p = replace(problem(q, codes, v), kv_dtype=dtype_name(v.dtype), qk="i8")

    def error(codes, scale, mean):
        given = replace(scores, k_scale=scale, mean=mean)
        run(attention.launch(p, AttentionTile(32, 32), HOPPER, q, codes, v, o, given))
        want = wide(q, k, v, scores)
        return ((o.double() - want).square().mean() / want.square().mean()).sqrt().item()

    assert error(codes, scale, mean) < INT8_QK
    if (
        scores.softcap
    ):  # saturated scores hide how keys are rounded, but not that their mean is missing
        assert error(codes, scale, None) > 2 * INT8_QK
    else:
        assert error(*codes_and_scales(quantize_rows(k)), None) > 2 * INT8_QK


def test_an_infinite_query_stays_visible():
    q, k, v, o = operands(45, torch.float16)
    q[0, 0, 3, 0], q[0, 0, 5, 0] = float("inf"), float("nan")
    codes, scale, mean = rounded_keys(k)
    p = replace(problem(q, codes, v), kv_dtype="fp16", qk="i8")
    scores = Scores(scale=0.2, k_scale=scale, mean=mean)
    run(attention.launch(p, AttentionTile(32, 32), HOPPER, q, codes, v, o, scores))
    lost = o.isnan().all(-1)
    assert lost[0, 0].nonzero().flatten().tolist() == [3, 5]
    assert lost.sum() == 2


def test_the_lowest_finite_number_as_mask_is_not_a_hole():
    """A row that is masked with finite numbers everywhere still attends, as in PyTorch."""
    q, k, v, o = operands(45, torch.float16)
    mask = torch.full((B, H, 45, SKV), torch.finfo(torch.float32).min)
    scores = Scores(scale=0.2, mask=mask)
    run(attention.launch(problem(q, k, v), AttentionTile(32, 32), HOPPER, q, k, v, o, scores))
    want = ops.attention(q.float(), k.float(), v.float(), mask, 0.2)
    assert_close(o, want.double())
