"""linear_quantized.cpu: ops.linear_quantized → weights packed as codes, one integer GEMM or GEMV step with everything fused."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from llmopt.graph import fake
from llmopt.native.linear_parts import (
    operands,
    packed_spec,
    problem,
    problem_floats,
    problem_ints,
    reject_around,
    rows_of,
    step_record,
)
from llmopt.native.operands import FLOATS, NativeKernel, are_static, num_bytes
from llmopt.native.segment import PackedSpec, SegmentBuilder
from llmopt.ops.linear_quantized import parts
from llmopt.parameters import weight_name
from llmopt.program import DTYPE_CODES
from llmopt.quant.schemes import CodeForm, Scheme

# Signed bytes an activation is as exact as the sum of: one is 8 bits, three keep 23 bits of the largest in a group, as many as float32
# has. Of many rows kernels may keep fewer than three do: docs/quantization.md.
PLANES = {"int8": 1, "same": 3}
MAX_GROUP = 1 << 16  # products that an int32 sum holds


def reject(node: fx.Node) -> str:
    p = parts(node)
    tensors = [t for name in ("codes", "scales", "offsets") for t in p[name] if t is not None]
    if not all(are_static(*fake(t).shape) for t in tensors):
        return "weight sizes change from call to call"
    form, k = form_of(p), inputs_of(p)
    if reason := reject_form(form, k):
        return reason
    if p["scales"][0] is None:
        if any(fake(w).dtype not in FLOATS for w in p["codes"]):
            return f"weights of {fake(p['codes'][0]).dtype}: f32, f16 and bf16 are possible"
    elif reason := _reject_codes(p, form, k):
        return reason
    return reject_around(node, p)


def reject_form(form: CodeForm, k: int) -> str:
    """Why kernels do not take weights of k inputs in a form, whose groups say how many inputs they have."""
    if form.group < 1 or k % form.group:
        return f"groups of {form.group} do not divide its {k} inputs"
    if form.group > MAX_GROUP or (form.bits == 4 and form.group % 2):
        return f"groups of {form.group}: even ones up to {MAX_GROUP} are possible"
    return ""


def _reject_codes(p: dict[str, Any], form: CodeForm, k: int) -> str:
    wanted = torch.int8 if form.bits == 8 else torch.uint8
    if any(fake(c).dtype != wanted for c in p["codes"]):
        return f"codes of {fake(p['codes'][0]).dtype}: {wanted} is possible"
    if len({o is None for o in p["offsets"]}) > 1:
        return "some of its weights have offsets"
    factors = [fake(t) for t in (*p["scales"], *p["offsets"]) if t is not None]
    if any(t.dtype != torch.float32 or t.shape[-1] != k // form.group for t in factors):
        return "its weights differ in groups, or scales are not float32"
    return ""


def inputs_of(p: dict[str, Any]) -> int:
    width = fake(p["codes"][0]).shape[1]
    return width if p["scales"][0] is None else width * 8 // p["bits"]


def form_of(p: dict[str, Any]) -> CodeForm:
    if p["scales"][0] is None:
        return CodeForm(p["bits"], p["group"] or inputs_of(p), p["symmetric"])
    return CodeForm(
        p["bits"], inputs_of(p) // fake(p["scales"][0]).shape[1], p["offsets"][0] is None
    )


def scheme_of(p: dict[str, Any], form: CodeForm) -> Scheme:
    return Scheme(form.bits, form.group, form.symmetric, p["activations"])


def spec_of(
    s: SegmentBuilder, p: dict[str, Any], form: CodeForm, result: torch.dtype
) -> PackedSpec:
    """The weight of a quantised linear, as codes or to be rounded; biases in the wider of the dtypes that come in and go out."""
    biases = p["biases"] or (None,) * len(p["codes"])
    return PackedSpec(
        tuple(s.weight_view(c) for c in p["codes"]),
        tuple(None if b is None else s.weight_view(b) for b in biases),
        p["gated"],
        torch.promote_types(fake(p["x"]).dtype, result),
        form,
        tuple(s.weight_view(t) for t in p["scales"] if t is not None),
        tuple(s.weight_view(t) for t in p["offsets"] if t is not None),
        what=f"{', '.join(map(weight_name, p['codes']))} to {scheme_of(p, form)}",
    )


def weight_bytes(form: CodeForm, n: int, k: int) -> int:
    """Of a weight [N,K] as codes with their scales and offsets."""
    factors = n * (k // form.group) * (4 if form.bits == 8 else 2) * (1 if form.symmetric else 2)
    return n * k * form.bits // 8 + factors


def lower(s: SegmentBuilder, node: fx.Node) -> None:
    p = parts(node)
    form = form_of(p)
    scheme = scheme_of(p, form)
    spec = spec_of(s, p, form, fake(node).dtype)
    what = f"{scheme.name} groups of {form.group}"
    _lower(s, node, p, spec, form, inputs_of(p), PLANES[p["activations"]], what)


def lower_exact(s: SegmentBuilder, node: fx.Node, p: dict[str, Any], form: CodeForm) -> None:
    """An ops.linear whose float32 weights codes of this form stand for as they are."""
    spec = packed_spec(s, p, form=form, is_exact=True)
    what = f"{form.bits}-bit groups of {form.group}, lossless"
    _lower(s, node, p, spec, form, fake(p["weights"][0]).shape[1], PLANES["same"], what)


def _lower(
    s: SegmentBuilder,
    node: fx.Node,
    p: dict[str, Any],
    spec: PackedSpec,
    form: CodeForm,
    k: int,
    planes: int,
    what: str,
) -> None:
    n = sum(v.size[0] for v in spec.sources)
    packed, bias = s.packed_operands(spec)
    ints = problem_ints(p, n, k, DTYPE_CODES[torch.uint8])
    ints += [form.bits, form.group, int(not form.symmetric), planes, int(spec.is_exact)]
    size = weight_bytes(form, n, k) + num_bytes(p["x"], node, p["residual"])
    flops = 2 * rows_of(p) * n * k
    has_bias = bias is not None
    own = problem(
        "linear_quantized",
        node,
        p,
        n,
        k,
        f"q{form.bits}",
        has_bias,
        group=form.group,
        offsets=not form.symmetric,
        planes=planes,
        exact=spec.is_exact,
    )
    choice = s.tuner(own)
    ints += choice.ints()
    record = step_record(
        node,
        p,
        "linear_quantized",
        f"{n}x{k} {what}",
        has_bias,
        flops,
        size,
        choice,
        multiplies=f"s{form.bits}",
        products=planes,
    )
    s.step("linear_quantized", operands(s, node, p, packed, bias), ints, problem_floats(p), record)


KERNELS = {"llmopt.linear_quantized": NativeKernel("linear_quantized.cpu", reject, lower)}
