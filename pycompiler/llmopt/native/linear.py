"""linear.cpu: ops.linear → pack once, one GEMM or GEMV step with everything fused."""

from __future__ import annotations

from torch import fx

from llmopt.graph import fake, is_dense
from llmopt.native.operands import (
    FLOATS,
    NativeKernel,
    are_static,
    as_rows,
    itemsize,
    num_bytes,
    reads_as_rows,
    rows,
)
from llmopt.native.program import DTYPE_CODES
from llmopt.native.segment import SegmentBuilder, StepRecord, describe
from llmopt.ops import activation
from llmopt.ops.linear import parts
from llmopt.ops.norm import KINDS as NORM_KINDS


def reject(node: fx.Node) -> str:
    p = parts(node)
    if not reads_as_rows(p["x"]) or not reads_as_rows(p["residual"]):
        return "input rows are not evenly spaced in memory"
    if not all(are_static(*fake(w).shape) for w in p["weights"]):
        return "weight sizes change from call to call"
    if any(w.dtype not in FLOATS or w.device.type != "cpu" for w in map(fake, p["weights"])):
        return f"weights of {fake(p['weights'][0]).dtype}: f32, f16 and bf16 are possible"
    if p["act"] not in activation.CODES:
        return f"activation {p['act']} is not in the kernel"
    vectors = [v for v in (*(p["biases"] or ()), p["norm_weight"], p["norm_bias"]) if v is not None]
    if any(fake(v).dtype not in FLOATS or not is_dense(fake(v)) for v in vectors):
        return "bias or norm weight is not a dense float vector"
    biases = [b for b in p["biases"] or () if b is not None]
    if any(fake(b).dtype != fake(p["weights"][0]).dtype for b in biases):
        return "bias and weight differ in dtype"
    return ""


def lower(s: SegmentBuilder, node: fx.Node) -> None:
    p = parts(node)
    weights = p["weights"]
    biases = p["biases"] or (None,) * len(weights)
    packed, bias = s.packed_weight(weights, biases, p["gated"])
    n, k = sum(fake(w).shape[0] for w in weights), fake(weights[0]).shape[1]
    x, y = p["x"], node
    m, _ = rows(fake(x))  # type: ignore[misc]
    residual = (
        None if p["residual"] is None else as_rows(s.view(p["residual"]), fake(p["residual"]))
    )
    operands = [
        as_rows(s.view(x), fake(x)),
        packed,
        bias,
        residual,
        as_rows(s.view(y), fake(y)),
        s.view(p["norm_weight"]),
        s.view(p["norm_bias"]),
    ]
    ints = [
        n,
        k,
        DTYPE_CODES[fake(weights[0]).dtype],
        activation.CODES[p["act"]],
        int(p["gated"]),
        NORM_KINDS.index(p["norm_kind"]),
    ]
    floats = [p["norm_eps"], p["alpha"], p["norm_offset"]]
    fused = [p["norm_kind"] + "_norm"] if p["norm_kind"] != "none" else []
    fused += ["bias"] if bias is not None else []
    fused += [p["act"]] if p["act"] != "none" else []
    fused += ["gated"] if p["gated"] else []
    fused += ["residual"] if residual is not None else []
    detail = f"{n}x{k}" + (" " + "+".join(fused) if fused else "")
    size = n * k * itemsize(weights[0]) + num_bytes(x, y, p["residual"])
    inputs = (describe(x),) + ((describe(p["residual"]),) if residual is not None else ())
    record = StepRecord(
        "linear", "linear.cpu", detail, inputs, (describe(y),), 2 * m * n * k, size, node
    )
    s.step("linear", operands, ints, floats, record)


KERNELS = {"llmopt.linear": NativeKernel("linear.cpu", reject, lower)}
