"""What linears share, whatever their weights are: reasons to refuse, operands, ints, what the tuner is asked, and the record."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from llmopt.graph import fake, is_dense
from llmopt.native.operands import FLOATS, as_rows, reads_as_rows, rows
from llmopt.native.segment import (
    SHORT_DTYPES,
    PackedSpec,
    SegmentBuilder,
    StepRecord,
    Storage,
    describe,
)
from llmopt.ops import activation
from llmopt.ops.norm import KINDS as NORM_KINDS
from llmopt.program import View
from llmopt.sizes import Size, expression, size_hint
from llmopt.types import Choice, LinearProblem


def reject_around(node: fx.Node, p: dict[str, Any]) -> str:
    """The reasons that are not in the weights."""
    if not reads_as_rows(p["x"]) or not reads_as_rows(p["residual"]):
        return "input rows are not evenly spaced in memory"
    if not reads_as_rows(node):
        return "output rows are not known to be evenly spaced in memory"
    if p["act"] not in activation.CODES:
        return f"activation {p['act']} is not in the kernel"
    vectors = [v for v in (*(p["biases"] or ()), p["norm_weight"], p["norm_bias"]) if v is not None]
    if any(fake(v).dtype not in FLOATS or not is_dense(fake(v)) for v in vectors):
        return "bias or norm weight is not a dense float vector"
    return ""


def storage_of(s: SegmentBuilder, p: dict[str, Any]) -> Storage | None:
    """What float32 weights beside float32 rows are packed in, where that is not as they are."""
    dtypes = {fake(value).dtype for value in (p["x"], *p["weights"])}
    return s.storage(p["weights"]) if dtypes == {torch.float32} else None


def packed_spec(s: SegmentBuilder, p: dict[str, Any], **how: Any) -> PackedSpec:
    """Float weights and biases side by side, biases in the dtype of the rows; how: the fields of other forms."""
    biases = p["biases"] or (None,) * len(p["weights"])
    return PackedSpec(
        tuple(s.weight_view(w) for w in p["weights"]),
        tuple(None if b is None else s.weight_view(b) for b in biases),
        p["gated"],
        fake(p["x"]).dtype,
        **how,
    )


def problem(
    op: str,
    node: fx.Node,
    p: dict[str, Any],
    n: int,
    k: int,
    weight: str,
    has_bias: bool,
    **form: Any,
) -> LinearProblem:
    """What the tuner is asked about; form: the fields of quantised weights."""
    rows = rows_of(p)
    m = expression(rows)
    return LinearProblem(
        op,
        m if isinstance(m, int) else None,
        n,
        k,
        SHORT_DTYPES[fake(p["x"]).dtype],
        weight,
        SHORT_DTYPES[fake(node).dtype],
        p["gated"],
        p["norm_kind"],
        p["act"],
        has_bias,
        p["residual"] is not None,
        hint=size_hint(rows),
        **form,
    )


def rows_of(p: dict[str, Any]) -> Size:
    return rows(fake(p["x"]))[0]  # type: ignore[index]


def operands(
    s: SegmentBuilder, node: fx.Node, p: dict[str, Any], packed: View, bias: View | None
) -> list[View | None]:
    """The operands of a linear, whatever its weights are, in the order of csrc/cpu/linear.cpp."""
    residual = p["residual"]
    return [
        as_rows(s.view(p["x"]), fake(p["x"])),
        packed,
        bias,
        None if residual is None else as_rows(s.view(residual), fake(residual)),
        as_rows(s.view(node), fake(node)),
        s.view(p["norm_weight"]),
        s.view(p["norm_bias"]),
    ]


def problem_ints(p: dict[str, Any], n: int, k: int, dtype_code: int) -> list[Size]:
    act, norm = activation.CODES[p["act"]], NORM_KINDS.index(p["norm_kind"])
    return [n, k, dtype_code, act, int(p["gated"]), norm]


def problem_floats(p: dict[str, Any]) -> list[float]:
    return [p["norm_eps"], p["alpha"], p["norm_offset"]]


def step_record(
    node: fx.Node,
    p: dict[str, Any],
    op: str,
    what: str,
    has_bias: bool,
    flops: Size,
    size: Size,
    choice: Choice,
    note: str = "",
    multiplies: str = "",
    products: int = 1,
    impl: str = "cpu",
) -> StepRecord:
    """The record of a linear: what it multiplies, in which dtype, what is fused into it, and a remark."""
    fused = [p["norm_kind"] + "_norm"] if p["norm_kind"] != "none" else []
    fused += ["bias"] if has_bias else []
    fused += [p["act"]] if p["act"] != "none" else []
    fused += ["gated"] if p["gated"] else []
    fused += ["residual"] if p["residual"] is not None else []
    detail = what + (" " + "+".join(fused) if fused else "") + (f" ({note})" if note else "")
    inputs = tuple(describe(v) for v in (p["x"], p["residual"]) if v is not None)
    return StepRecord(
        op,
        f"{op}.{impl}",
        detail,
        inputs,
        (describe(node),),
        flops,
        size,
        node,
        str(choice),
        choice.source,
        multiplies,
        products,
    )
