"""linear.cpu: ops.linear → pack once, one GEMM or GEMV step with everything fused.

Weights of float32 that fewer bits hold as they are (llmopt.lossless) are packed in those.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from llmopt.graph import NOTE, fake, kind
from llmopt.native.linear_parts import (
    operands,
    packed_spec,
    problem,
    problem_floats,
    problem_ints,
    reject_around,
    rows_of,
    step_record,
    storage_of,
)
from llmopt.native.linear_quantized import lower_exact
from llmopt.native.operands import FLOATS, NativeKernel, are_static, num_bytes
from llmopt.native.segment import SHORT_DTYPES, SegmentBuilder
from llmopt.ops.linear import parts
from llmopt.program import DTYPE_CODES


def reject(node: fx.Node) -> str:
    p = parts(node)
    if not all(are_static(*fake(w).shape) for w in p["weights"]):
        return "weight sizes change from call to call"
    if any(w.dtype not in FLOATS for w in map(fake, p["weights"])):
        return f"weights of {fake(p['weights'][0]).dtype}: f32, f16 and bf16 are possible"
    if any(kind(w) == "llmopt.dequantize" for w in p["weights"]):
        return "its weights are quantised in different ways"
    return reject_around(node, p)


def lower(s: SegmentBuilder, node: fx.Node) -> None:
    p = parts(node)
    stored = storage_of(s, p)
    if stored is None or isinstance(stored, torch.dtype):
        _lower_floats(s, node, p, stored)
    else:
        lower_exact(s, node, p, stored)


def _lower_floats(
    s: SegmentBuilder, node: fx.Node, p: dict[str, Any], stored: torch.dtype | None
) -> None:
    """stored: what the weights are packed in, where that is not the dtype of the rows."""
    weights, dtype = p["weights"], fake(p["x"]).dtype
    packed, bias = s.packed_operands(packed_spec(s, p, stored=stored))
    n, k = sum(fake(w).shape[0] for w in weights), fake(weights[0]).shape[1]
    in_memory = stored or dtype
    ints = problem_ints(p, n, k, DTYPE_CODES[in_memory])
    size = n * k * in_memory.itemsize + num_bytes(p["x"], node, p["residual"])
    weight = SHORT_DTYPES[in_memory]
    choice = s.tuner(problem("linear", node, p, n, k, weight, bias is not None))
    note = node.meta.get(NOTE, "") if stored is None else f"{weight}, lossless"
    multiplies = weight if stored is None else f"f32·{weight}"
    flops = 2 * rows_of(p) * n * k
    what, has_bias = f"{n}x{k}", bias is not None
    record = step_record(node, p, "linear", what, has_bias, flops, size, choice, note, multiplies)
    ints += choice.ints()
    s.step("linear", operands(s, node, p, packed, bias), ints, problem_floats(p), record)


KERNELS = {"llmopt.linear": NativeKernel("linear.cpu", reject, lower)}
