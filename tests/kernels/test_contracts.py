"""Operands that do not fit together are refused before anything runs: an error, never memory corruption."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from llmopt import _C
from llmopt.program import DTYPE_CODES, ProgramBuilder, View, run_op

TIER = _C.tiers()[0]
F32, BF16, U8 = (DTYPE_CODES[d] for d in (torch.float32, torch.bfloat16, torch.uint8))
ONES = torch.ones


def attention(**change: Any) -> tuple[str, list, list, list]:
    names = ["q", "k", "v", "out", "mask", "bounds", "cos", "sin", "k_new", "v_new", "positions"]
    names += ["k codes", "their state", "v codes", "theirs", "sinks"]
    operands = dict.fromkeys(names)
    operands |= {"q": ONES(2, 4, 3, 8), "k": ONES(2, 2, 5, 8), "v": ONES(2, 2, 5, 6)}
    operands |= {"out": ONES(2, 4, 3, 6)} | change
    ints = [0, 0, 0, 1 if operands["cos"] is not None else 0]
    ints += [int(operands["k_new"] is not None), 0, 0]
    return "attention", list(operands.values()), ints, [1.0, 0.0]


def linear(
    n: int = 6, k: int = 4, weight: int = F32, **change: Any
) -> tuple[str, list, list, list]:
    names = ["x", "w", "bias", "residual", "y", "norm_weight", "norm_bias"]
    operands = dict.fromkeys(names)
    operands |= {"x": ONES(3, 4), "w": ONES(8192), "y": ONES(3, 6)} | change
    return "linear", list(operands.values()), [n, k, weight, 0, 0, 0], [1e-5, 1.0, 0.0]


def quantized(
    bits: int = 8,
    group: int = 4,
    weight: int = U8,
    planes: int = 1,
    exact: bool = False,
    **change: Any,
) -> tuple[str, list, list, list]:
    op, operands, ints, floats = linear(weight=weight, **change)
    return f"{op}_quantized", operands, [*ints, bits, group, 0, planes, int(exact)], floats


def pack_quantized(
    bits: int = 8, group: int = 4, room: int = 8192, **change: Any
) -> tuple[str, list, list, list]:
    operands: dict[str, Any] = {"codes": ONES(6, 8, dtype=torch.int8), "scales": ONES(6, 2)}
    operands |= {"offsets": None, "packed": ONES(room, dtype=torch.uint8)} | change
    return "pack_linear_quantized", list(operands.values()), [bits, group, 0], []


def round_weight(bits: int = 8, group: int = 4, **change: Any) -> tuple[str, list, list, list]:
    operands: dict[str, Any] = {"w": ONES(6, 8), "codes": ONES(6, 8, dtype=torch.int8)}
    operands |= {"scales": ONES(6, 2), "offsets": None, "exact": None} | change
    return "round_weight", list(operands.values()), [bits, group], []


def grouped(op: str = "grouped_linear", **change: Any) -> tuple[str, list, list, list]:
    _, [x, w, bias, residual, y, *norms], ints, floats = linear()
    operands = {"x": x, "w": w, "bias": bias, "residual": residual, "y": y}
    operands |= dict(zip(("norm_weight", "norm_bias"), norms, strict=True))
    operands |= {"ends": ENDS, "table": torch.zeros(4, 6, dtype=torch.int64)} | change
    form = [8, 4, 0, 1] if "quantized" in op else []
    ints[2] = U8 if form else F32
    return op, list(operands.values()), [*ints, *form], floats


def matmul(**change: Any) -> tuple[str, list, list, list]:
    operands = {"x": ONES(2, 3, 4), "w": ONES(2, 6, 4), "bias": None, "y": ONES(2, 3, 6)} | change
    return "matmul", list(operands.values()), [], []


ENDS = torch.tensor([1, 3], dtype=torch.int32)
IDS, PLACES = torch.zeros(6, dtype=torch.int64), torch.arange(6)


def sort_by_expert(**change: Any) -> tuple[str, list, list, list]:
    operands = {"ids": IDS, "order": PLACES, "ends": ENDS, "sorted": None, "inverse": None} | change
    return "sort_by_expert", list(operands.values()), [], []


def combine(**change: Any) -> tuple[str, list, list, list]:
    operands = {"x": ONES(6, 4), "inverse": PLACES, "weights": ONES(3, 2), "y": ONES(3, 4)} | change
    return "combine_experts", list(operands.values()), [], []


def topk(*operands: torch.Tensor | None, k: int = 2) -> tuple[str, list, list, list]:
    return "topk", list(operands), [k], []


def heads(batch: int, number: int, positions: int, width: int) -> torch.Tensor:
    return ONES(batch, number, positions, width)


LONG = {name: heads(1, 1, 2, 513) for name in ("q", "k", "v", "out")}
CODES = torch.zeros(2, 2, 5, 12, dtype=torch.int8)  # heads of 8
NEW = {"k_new": heads(2, 2, 1, 8), "v_new": heads(2, 2, 1, 6)}
WORD_LOAD, WORD_STORE = 0, 1

# name → (op, operands, ints, floats), words of the error
WRONG = {
    "sinks of other heads": (attention(sinks=heads(1, 3, 1, 1)), "sinks are not"),
    "sinks of integers": (attention(sinks=heads(1, 4, 1, 1).int()), "sinks are not"),
    "several sinks a row": (attention(sinks=heads(1, 4, 1, 2)), "sinks are not"),
    "sinks without a batch": (attention(sinks=ONES(4, 3, 1)), "sinks are not"),
    "head size": (attention(**LONG), "longer than 512"),
    "v head size": (attention(v=heads(2, 2, 5, 513), out=heads(2, 4, 3, 513)), "longer than 512"),
    "codes of another head size": (attention(k=CODES[..., :11].contiguous()), "differ in batch or head size"),
    "codes of values that are not out's": (attention(v=CODES), "out is not"),
    "codes without a code": (attention(k=CODES[..., :4].contiguous()), "q, k, v and out"),
    "codes that are not dense": (attention(k=CODES.transpose(2, 3).contiguous().transpose(2, 3)), "q, k, v and out"),
    "a query of codes": (attention(q=torch.zeros(2, 4, 3, 12, dtype=torch.int8)), "q, k, v and out"),
    "codes longer than 256": (
        attention(q=heads(2, 4, 3, 513), k=torch.zeros(2, 2, 5, 517, dtype=torch.int8)), "longer than 512"
    ),
    "new keys as long as rows of codes": (
        attention(k=CODES, k_new=heads(2, 2, 1, 12)), "not like those of the cache"
    ),
    "q missing": (attention(q=None), "q, k, v and out"),
    "q of integers": (attention(q=heads(2, 4, 3, 8).long()), "q, k, v and out"),
    "rows not dense": (attention(q=heads(2, 4, 8, 3).transpose(2, 3)), "q, k, v and out"),
    "batches": (attention(k=heads(1, 2, 5, 8)), "batch or head size"),
    "head sizes of q and k": (attention(q=heads(2, 4, 3, 7)), "batch or head size"),
    "values shorter than keys": (attention(v=heads(2, 2, 4, 6)), "k and v differ"),
    "head groups": (attention(q=heads(2, 3, 3, 8), out=heads(2, 3, 3, 6)), "multiple"),
    "out": (attention(out=heads(2, 4, 2, 6)), "out is not"),
    "mask without bounds": (attention(mask=heads(2, 1, 3, 5)), "come together"),
    "mask of too few keys": (
        attention(mask=heads(2, 1, 3, 4), bounds=ONES(2, 1, 3, 4, dtype=torch.int32)),
        "number of keys",
    ),
    "bounds of another dtype": (attention(mask=heads(2, 1, 3, 5), bounds=ONES(2, 1, 3, 4)), "bounds"),
    "cos too wide": (attention(cos=heads(1, 1, 3, 10), sin=heads(1, 1, 3, 10)), "cos or sin"),
    "cos too short": (attention(cos=heads(1, 1, 2, 8), sin=heads(1, 1, 2, 8)), "cos or sin"),
    "new keys of other heads": (attention(**NEW | {"k_new": heads(2, 1, 1, 8)}), "like those of"),
    "more new keys than slots": (attention(k_new=heads(2, 2, 6, 8)), "more new keys"),
    "a position past the cache": (attention(**NEW, positions=torch.tensor([5])), "out of range"),
    "a position before the cache": (attention(**NEW, positions=torch.tensor([-1])), "out of range"),
    "x of another width": (linear(x=ONES(3, 5)), "x is not float"),
    "y of another height": (linear(y=ONES(2, 6)), "y is not float"),
    "y of another width": (linear(y=ONES(3, 5)), "y is not float"),
    "bias too short": (linear(bias=ONES(5)), "bias is not"),
    "residual too small": (linear(residual=ONES(1, 6)), "residual is not"),
    "norm weight too short": (linear(norm_weight=ONES(3)), "norm weight"),
    "no weight": (linear(w=None), "no packed float weight"),
    "weight of integers": (linear(weight=DTYPE_CODES[torch.int64]), "no packed float weight"),
    "a weight of integers to round": (round_weight(w=torch.ones(6, 8).int()), "w is not"),
    "codes that are too short": (round_weight(codes=torch.zeros(6, 7, dtype=torch.int8)), "codes are not"),
    "codes with gaps": (round_weight(codes=torch.zeros(6, 9, dtype=torch.int8)[:, :8]), "codes are not"),
    "scales of other rows": (round_weight(scales=ONES(5, 2)), "scales or offsets"),
    "offsets in halves": (round_weight(offsets=ONES(6, 2).half()), "scales or offsets"),
    "a verdict of two bytes": (round_weight(exact=torch.ones(2, dtype=torch.uint8)), "is no byte"),
    "groups that do not divide a weight": (round_weight(group=3), "do not divide K"),
    "a weight of three bits": (round_weight(bits=3), "8 or 4 bits"),
    "experts without ends": (grouped(ends=None), "ends are not"),
    "ends as int64": (grouped(ends=ENDS.long()), "ends are not"),
    "a short table": (grouped(table=torch.zeros(3, 6, dtype=torch.int64)), "table is not"),
    "a table of others": (grouped(table=torch.zeros(4, 5, dtype=torch.int64)), "table is not"),
    "experts with a residual": (grouped(residual=ONES(3, 6)), "no residual"),
    "experts behind a norm": (grouped(norm_weight=ONES(4)), "no residual"),
    "one bias for all experts": (grouped(bias=ONES(6)), "bias is not float .E, N"),
    "biases of other experts": (grouped(bias=ONES(3, 6)), "bias is not float .E, N"),
    "biases of other outputs": (grouped(bias=ONES(2, 5)), "bias is not float .N"),
    "rows of other experts": (grouped(x=ONES(3, 5)), "x is not float"),
    "rows of a product": (matmul(x=ONES(2, 5, 4)), "x is not float"),
    "rows of a product apart": (matmul(x=ONES(2, 3, 8)[..., ::2]), "x is not float"),
    "K of a product": (matmul(w=ONES(2, 6, 5)), "w is not float"),
    "columns of a product": (matmul(w=ONES(2, 5, 4)), "w is not float"),
    "batches of a product": (matmul(w=ONES(1, 6, 4)), "the batches differ"),
    "dimensions of a product": (matmul(w=ONES(6, 4)), "w is not float"),
    "result of a product": (matmul(y=ONES(18)), "y is not float"),
    "bias of a product": (matmul(bias=ONES(5)), "bias is not float"),
    "experts as a linear": (("grouped_linear", *linear()[1:]), "another number"),
    "codes of experts in floats": (
        ("grouped_linear_quantized", grouped()[1], [6, 4, F32, 0, 0, 0, 8, 4, 0, 1, 0], [0, 1, 0]), "packed codes are u8"
    ),
    "groups that do not divide K of experts": (
        ("grouped_linear_quantized", grouped()[1], [6, 4, U8, 0, 0, 0, 8, 3, 0, 1, 0], [0, 1, 0]), "do not divide K"
    ),
    "ids in floats": (sort_by_expert(ids=ONES(6)), "ids are not"),
    "an order that is too short": (sort_by_expert(order=PLACES[:5]), "order and inverse"),
    "an inverse with gaps": (sort_by_expert(inverse=torch.zeros(12, dtype=torch.int64)[::2]), "order and inverse"),
    "sorted ids of another dtype": (sort_by_expert(sorted=IDS.int()), "sorted ids"),
    "tokens without a place": (("gather_tokens", [ONES(3, 4), PLACES, ONES(6, 4)], [0], []), "no place"),
    "places of other rows": (("gather_tokens", [ONES(3, 4), PLACES, ONES(5, 4)], [2], []), "order is not"),
    "no tokens": (("gather_tokens", [ONES(0, 4), PLACES, ONES(6, 4)], [2], []), "no tokens"),
    "weights of other tokens": (combine(weights=ONES(2, 2)), "weights are not"),
    "places of other tokens": (combine(weights=ONES(3, 1)), "inverse is not"),
    "too many experts for a token": (combine(weights=ONES(3, 65)), "more than 64"),
    "no rows": (combine(x=ONES(0, 4)), "no rows"),
    "more of the largest than there are": (topk(ONES(2, 3), ONES(2, 4), None, k=4), "k is not"),
    "none of the largest": (topk(ONES(2, 3), ONES(2, 0), None, k=0), "k is not"),
    "indices of the largest as floats": (topk(ONES(2, 3), ONES(2, 2), ONES(2, 2)), "indices are not"),
    "the largest in another dtype": (topk(ONES(2, 3), ONES(2, 2).half(), None), "values are not"),
    "the largest of other rows": (topk(ONES(2, 3), ONES(3, 2), None), "values are not"),
    "picks from no column": (("pick", [ONES(2, 0), torch.zeros(2, 2).long(), ONES(2, 2)], [], []), "no columns"),
    "picks in other rows": (("pick", [ONES(2, 3), torch.zeros(3, 2).long(), ONES(2, 2)], [], []), "indices are not"),
    "picks into another dtype": (("pick", [ONES(2, 3), torch.zeros(2, 2).long(), ONES(2, 2).half()], [], []), "x and y"),
    "groups that do not divide K": (quantized(group=3), "do not divide K"),
    "codes as bf16": (quantized(weight=BF16), "packed codes are u8"),
    "codes of three bits": (quantized(bits=3), "8 or 4 bits"),
    "four planes": (quantized(planes=4), "1 to 3 planes"),
    "exact products of one plane": (quantized(group=2, exact=True), "of three planes"),
    "exact products in groups of half a step": (quantized(planes=3, exact=True), "multiple of 8"),
    "odd groups of 4-bit codes": (quantized(bits=4, group=1), "is odd"),
    "quantised x of another width": (quantized(x=ONES(3, 5)), "x is not float"),
    "codes in floats": (pack_quantized(codes=ONES(6, 8)), "codes are not bytes"),
    "scales of other groups": (pack_quantized(scales=ONES(6, 3)), "scales or offsets"),
    "scales in halves": (pack_quantized(scales=ONES(6, 2).half()), "scales or offsets"),
    "codes and groups": (pack_quantized(group=5), "do not divide K"),
    "no room for codes": (pack_quantized(room=100), "does not fit"),
    "negative N": (linear(n=-1), "not sizes"),
    "packed too small": (
        ("pack_linear", [ONES(8, 8), torch.zeros(64, dtype=torch.uint8)], [0], []),
        "does not fit",
    ),
    "weights of other K": (
        ("pack_linear", [ONES(8, 8), ONES(8, 7), torch.zeros(4096, dtype=torch.uint8)], [0], []),
        "differ in K",
    ),
    "gate and up of other N": (
        ("pack_linear", [ONES(8, 8), ONES(7, 8), torch.zeros(4096, dtype=torch.uint8)], [1], []),
        "interleave",
    ),
    "norm of other rows": (("norm", [ONES(3, 4), None, None, None, ONES(2, 4), None], [1], [0, 0]), "x and y"),
    "norm weight": (("norm", [ONES(3, 4), None, ONES(3), None, ONES(3, 4), None], [1], [0, 0]), "weight"),
    "softmax": (("softmax", [ONES(3, 4), ONES(3, 5)], [], []), "one size"),
    "embedding of no rows": (
        ("embedding", [torch.zeros(2, dtype=torch.int64), ONES(0, 4), ONES(2, 4)], [], [1.0]),
        "table is empty",
    ),
    "embedding ids": (("embedding", [ONES(2), ONES(5, 4), ONES(2, 4)], [], [1.0]), "indices are not integers"),
    "slot past the cache": (
        ("index_copy", [heads(1, 2, 5, 4), torch.tensor([5]), heads(1, 2, 1, 4)], [], []),
        "out of range",
    ),
    "rows that are not indexed": (
        ("index_copy", [heads(1, 2, 5, 4), torch.tensor([1]), heads(1, 2, 2, 4)], [], []),
        "index is not",
    ),
    "more positions than the cache has": (("slide", [heads(1, 2, 5, 4), heads(1, 2, 6, 4)], [], []), "more than y"),
    "no position": (("slide", [heads(1, 2, 5, 4), heads(1, 2, 0, 4)], [], []), "no position"),
    "positions of other heads": (("slide", [heads(1, 2, 5, 4), heads(1, 3, 1, 4)], [], []), "differ in size"),
    "copy of other sizes": (("copy", [ONES(3, 4), ONES(4, 3)], [], []), "differ in size"),
    "copy to integers": (("copy", [ONES(3), torch.zeros(3, dtype=torch.int64)], [], []), "dtype"),
    "rope wider than the head": (
        ("rope", [heads(1, 2, 3, 4), heads(1, 1, 3, 6), heads(1, 1, 3, 6), heads(1, 2, 3, 4)], [1], []),
        "cos or sin",
    ),
    "vm operands": (("vm", [ONES(3), ONES(4)], [1, 1, 1, 0], []), "differ in size"),
    "vm register": (("vm", [ONES(3), ONES(3)], [1, 1, 1, 0, WORD_LOAD | 9 << 8], []), "a load"),
    "vm input": (("vm", [ONES(3), ONES(3)], [1, 1, 1, 0, WORD_LOAD | 4 << 16], []), "a load"),
    "vm register that nothing wrote": (
        ("vm", [ONES(3), ONES(3)], [1, 1, 2, 0, WORD_LOAD, WORD_STORE | 1 << 16], []), "a store"
    ),
    "activation": (("linear", linear()[1], [6, 4, F32, 99, 0, 0], [1e-5, 1.0, 0.0]), "no such activation"),
    "norm in front": (("linear", linear()[1], [6, 4, F32, 0, 0, 9], [1e-5, 1.0, 0.0]), "no such norm"),
    "norm": (("norm", [ONES(2, 3), None, None, None, ONES(2, 3), None], [0], [1e-5, 0.0]), "no such norm"),
    "rotary form": (("rope", [heads(1, 1, 3, 4)] * 4, [7], []), "no such rotary form"),
    "bounds of another mask": (
        ("mask_bounds", [heads(2, 1, 3, 5), ONES(3, 1, 3, 4, dtype=torch.int32)], [], []), "differ in size"
    ),
    "bounds that are not four": (
        ("mask_bounds", [heads(2, 1, 3, 5), ONES(2, 1, 3, 3, dtype=torch.int32)], [], []), "bounds are not"
    ),
    "mask of integers": (
        ("mask_bounds", [heads(2, 1, 3, 5).long(), ONES(2, 1, 3, 4, dtype=torch.int32)], [], []), "not bool"
    ),
    "vm output": (("vm", [ONES(3), ONES(3)], [1, 1, 1, 0, WORD_STORE | 7 << 24], []), "a store"),
    "vm instruction": (("vm", [ONES(3), ONES(3)], [1, 1, 1, 0, 250], []), "no such instruction"),
    "too few operands": (("linear", [ONES(3, 4)], [6, 4, F32, 0, 0, 0], [0, 1, 0]), "another number"),
    "too few attributes": (("rope", [heads(1, 1, 1, 4)] * 4, [], []), "another number"),
}  # fmt: skip


@pytest.mark.parametrize("name", WRONG)
def test_operands_that_do_not_agree_are_refused(name: str) -> None:
    (op, operands, ints, floats), words = WRONG[name]
    with pytest.raises((ValueError, IndexError), match=f"^{op}: .*{words}"):
        run_op(op, operands, ints, floats, tier=TIER)


def test_an_error_names_the_operands() -> None:
    op, operands, ints, floats = linear(x=ONES(3, 5))
    with pytest.raises(
        ValueError, match=r"operands: \[3,5\]f32, \[8192\]f32, -, -, \[3,6\]f32, -, -$"
    ):
        run_op(op, operands, ints, floats, tier=TIER)


@pytest.mark.parametrize("index", [5, -1])
def test_an_error_names_the_index_and_what_is_possible(index: int) -> None:
    with pytest.raises(IndexError, match=f"index {index} is out of range: 0 to 4 are possible"):
        run_op(
            "embedding", [torch.tensor([1, index]), ONES(5, 4), ONES(2, 4)], [], [1.0], tier=TIER
        )


@pytest.mark.parametrize("make", [attention, linear, quantized, pack_quantized])
def test_what_the_wrong_ones_derive_from_runs(make: Any) -> None:
    run_op(*make(), tier=TIER)


def test_attention_of_ones_is_one() -> None:
    out = torch.full((2, 4, 3, 6), torch.nan)
    run_op(*attention(out=out), tier=TIER)
    assert torch.allclose(out, ONES(2, 4, 3, 6))


def test_the_longest_head_that_fits_runs() -> None:
    q = torch.randn(1, 1, 2, 256)
    out = torch.full_like(q, 7.0)
    run_op(*attention(q=q, k=q, v=q, out=out), tier=TIER)
    want = torch.softmax(q.double() @ q.double().transpose(2, 3), -1) @ q.double()
    torch.testing.assert_close(out, want.float())


def test_a_null_pointer_is_an_operand_that_is_missing() -> None:
    builder = ProgramBuilder()
    views = [View(builder.external(), torch.float32, (4,), (1,)) for _ in range(2)]
    builder.step("copy", views)
    program, x = builder.build(TIER), torch.zeros(4)
    for addresses in ([0, x.data_ptr()], [x.data_ptr(), 0]):
        with pytest.raises(ValueError, match="copy: "):
            program.run(addresses, [], 1)
    program.run([x.data_ptr(), x.data_ptr()], [], 1)  # an error leaves the program usable


def test_a_negative_size_is_refused() -> None:
    builder = ProgramBuilder()
    views = [View(builder.external(), torch.float32, (-4,), (1,)) for _ in range(2)]
    builder.step("copy", views)
    program = builder.build(TIER)
    with pytest.raises(ValueError, match="a size is negative"):
        program.run([64, 64], [], 1)


def test_every_op_has_a_contract() -> None:
    """Without operands each one is refused; an op without a contract would read past them."""
    ops = [op for op in _C.tier_ops(TIER) if not op.startswith("probe")]
    assert len(ops) >= 12
    for op in ops:
        with pytest.raises(ValueError, match=f"^{op}: "):
            run_op(op, [], [], [], tier=TIER)
