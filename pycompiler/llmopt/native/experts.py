"""Mixtures of experts: topk.cpu, pick.cpu, limit_groups.cpu, sort_by_expert.cpu, gather_tokens.cpu, grouped_linear.cpu (or
grouped_linear_quantized.cpu) and combine_experts.cpu."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from llmopt.graph import (
    argument,
    fake,
    is_in_place,
    is_tensor,
    kind,
    numel,
    readers,
    same_size,
)
from llmopt.native.linear_parts import (
    packed_spec,
    problem_floats,
    problem_ints,
    step_record,
    storage_of,
)
from llmopt.native.linear_quantized import PLANES, reject_form, weight_bytes
from llmopt.native.operands import (
    FLOATS,
    NativeKernel,
    are_static,
    as_rows,
    num_bytes,
    reads_as_rows,
)
from llmopt.native.segment import (
    SHORT_DTYPES,
    PackedSpec,
    SegmentBuilder,
    StepRecord,
    describe,
)
from llmopt.ops import activation
from llmopt.ops.grouped_linear import parts
from llmopt.parameters import weight_name
from llmopt.program import DTYPE_CODES, View
from llmopt.quant.schemes import CodeForm, Scheme
from llmopt.sizes import expression
from llmopt.types import Choice

MOST_PLACES = 64  # experts of one token: kMostPlaces in csrc/runtime/tensor.h
TABLE_INTS = 6  # kExpertRowInts in csrc/cpu/linear/tuning.h
_INTEGERS = (torch.int64, torch.int32)


def _part_or_none(node: fx.Node, index: int) -> fx.Node | None:
    return next((u for u in node.users if kind(u) == "getitem" and u.args[1] == index), None)


def _reject_parts(node: fx.Node) -> str:
    """A part has one place in memory, that of the node which reads it."""
    picked = [u.args[1] for u in node.users if kind(u) == "getitem"]
    return "one of its results is read by several nodes" if len(picked) > len(set(picked)) else ""


def _reject_sort(node: fx.Node) -> str:
    ids = fake(node.args[0])
    if ids.dtype not in _INTEGERS or ids.dim() != 1:
        return f"expert ids of {ids.dtype} with {ids.dim()} dimensions: a vector of integers is possible"
    if any(_part_or_none(node, i) is None for i in (0, 1)):
        return "the order or where experts end in it is not used"
    return _reject_parts(node)


def _lower_sort(s: SegmentBuilder, node: fx.Node) -> None:
    ids = node.args[0]
    made = [_part_or_none(node, i) for i in range(4)]
    operands = [s.view(ids), *map(s.view, made)]
    given = [n for n in made if n is not None]
    record = StepRecord(
        "sort_by_expert",
        "sort_by_expert.cpu",
        f"{node.args[1]} experts",
        (describe(ids),),
        tuple(map(describe, given)),
        0,
        num_bytes(ids, *given),
        node,
    )
    s.step("sort_by_expert", operands, [], [], record)


def reject_topk(node: fx.Node) -> str:
    x, k = node.args[0], argument(node, 1, "k")
    if not is_tensor(x) or not reads_as_rows(x) or fake(x).device.type != "cpu":
        return "x is not evenly spaced rows of floats"
    if argument(node, 2, "dim", -1) not in (-1, fake(x).dim() - 1):
        return "looks along another dimension than the last"
    if node.kwargs.get("out") is not None:
        return "writes into out"
    if not argument(node, 3, "largest", True):
        return "asks for the smallest"
    if not isinstance(k, int) or not 1 <= k <= MOST_PLACES:
        return f"k = {k}: 1 to {MOST_PLACES} are possible"
    return _reject_parts(node)


def _lower_topk(s: SegmentBuilder, node: fx.Node) -> None:
    x, k = node.args[0], argument(node, 1, "k")
    made = [_part_or_none(node, i) for i in range(2)]
    given = [n for n in made if n is not None]
    operands = [None if n is None else as_rows(s.view(n), fake(n)) for n in (x, *made)]
    record = StepRecord(
        "topk",
        "topk.cpu",
        f"{k} of {fake(x).shape[-1]}",
        (describe(x),),
        tuple(map(describe, given)),
        numel(fake(x)),
        num_bytes(x, *given),
        node,
    )
    s.step("topk", operands, [k], [], record)


def _reject_limit(node: fx.Node) -> str:
    x, groups, best, kept = node.args[:4]
    if not reads_as_rows(x) or not reads_as_rows(node) or fake(x).device.type != "cpu":
        return "scores are not evenly spaced rows"
    if max(groups, best) > MOST_PLACES:
        return f"{groups} groups that count as their {best} best: up to {MOST_PLACES} are possible"
    return "" if kept <= groups else f"keeps {kept} of {groups} groups"


def _lower_limit(s: SegmentBuilder, node: fx.Node) -> None:
    x, groups, best, kept, fill = node.args
    record = StepRecord(
        "limit_groups",
        "limit_groups.cpu",
        f"{kept} of {groups}",
        (describe(x),),
        (describe(node),),
        numel(fake(x)),
        num_bytes(x, node),
        node,
    )
    s.step("limit_groups", [s.view(x), s.view(node)], [groups, best, kept], [fill], record)


def _reject_pick(node: fx.Node) -> str:
    x, dim, index = (argument(node, i, n) for i, n in enumerate(("input", "dim", "index")))
    if not (is_tensor(x) and is_tensor(index)) or not reads_as_rows(x) or fake(x).dim() != 2:
        return "is not of evenly spaced rows of floats"
    if dim not in (-1, 1) or not same_size(fake(x).shape[0], fake(index).shape[0]):
        return "picks along another dimension than the last, or not in all rows"
    found = index.args[0] if kind(index) == "getitem" and index.args[1] == 1 else None
    if not isinstance(found, fx.Node) or kind(found) != "topk":
        return "its indices are not those of a topk, and would have to be checked"
    if any(map(is_in_place, readers(index))):
        return "its indices are written, and would have to be checked"
    same = same_size(fake(found.args[0]).shape[-1], fake(x).shape[1])
    return "" if same and not reject_topk(found) else "its indices are of wider rows"


def _lower_pick(s: SegmentBuilder, node: fx.Node) -> None:
    x, _, index = (argument(node, i, n) for i, n in enumerate(("input", "dim", "index")))
    record = StepRecord(
        "pick",
        "pick.cpu",
        "",
        (describe(x), describe(index)),
        (describe(node),),
        0,
        2 * num_bytes(node),
        node,
    )
    s.step("pick", [s.view(x), s.view(index), s.view(node)], [], [], record)


def _reject_gather(node: fx.Node) -> str:
    x, order, _ = node.args
    if not reads_as_rows(x) or fake(x).dim() != 2:
        return "tokens are not evenly spaced rows of floats"
    return _reject_places(order)


def _reject_places(places: fx.Node) -> str:
    value = fake(places)
    return "" if value.dtype == torch.int64 and value.dim() == 1 else "places are not int64 [S]"


def _lower_gather(s: SegmentBuilder, node: fx.Node) -> None:
    x, order, k = node.args
    operands = [s.view(x), s.view(order), s.view(node)]
    record = StepRecord(
        "gather_tokens",
        "gather_tokens.cpu",
        "",
        (describe(x), describe(order)),
        (describe(node),),
        0,
        2 * num_bytes(node),
        node,
    )
    s.step("gather_tokens", operands, [k], [], record)


def _reject_combine(node: fx.Node) -> str:
    x, inverse, weights, dtype = node.args
    if not reads_as_rows(x) or fake(x).dim() != 2:
        return "the experts' results are not evenly spaced rows of floats"
    value = fake(weights)
    if value.dtype not in FLOATS or value.dim() != 2 or dtype not in FLOATS:
        return "weights or results are not floats"
    k = expression(value.shape[1])
    if not isinstance(k, int) or k > MOST_PLACES:
        return f"{k} experts for each token: up to {MOST_PLACES} are possible"
    return _reject_places(inverse)


def _lower_combine(s: SegmentBuilder, node: fx.Node) -> None:
    x, inverse, weights, _ = node.args
    operands = [s.view(n) for n in (x, inverse, weights, node)]
    record = StepRecord(
        "combine_experts",
        "combine_experts.cpu",
        "",
        (describe(x), describe(weights)),
        (describe(node),),
        2 * numel(fake(x)),
        num_bytes(x, node),
        node,
    )
    s.step("combine_experts", operands, [], [], record)


def _reject_linear(node: fx.Node) -> str:
    p = parts(node)
    if not all(are_static(*fake(w).shape) for w in p["weights"]):
        return "weight sizes change from call to call"
    if p["scales"] is None and any(fake(w).dtype not in FLOATS for w in p["weights"]):
        return f"weights of {fake(p['weights'][0]).dtype}: f32, f16 and bf16 are possible"
    if not reads_as_rows(p["x"]) or fake(p["x"]).dim() != 2:
        return "input rows are not evenly spaced in memory"
    if p["act"] not in activation.CODES:
        return f"activation {p['act']} is not in the kernel"
    ends = fake(p["ends"])
    if ends.dtype != torch.int32 or ends.dim() != 1:
        return f"ends of {ends.dtype} with {ends.dim()} dimensions: a vector of int32 is possible"
    form = _form_of(p)
    return "" if form is None else reject_form(form, _inputs_of(p))


def _inputs_of(p: dict[str, Any]) -> int:
    width = int(fake(p["weights"][0]).shape[2])
    return width if p["scales"] is None else width * 8 // p["bits"]


def _form_of(p: dict[str, Any]) -> CodeForm | None:
    if not p["bits"]:
        return None
    k = _inputs_of(p)
    if p["scales"] is None:
        return CodeForm(p["bits"], p["group"] or k, p["symmetric"])
    return CodeForm(p["bits"], k // int(fake(p["scales"][0]).shape[2]), p["offsets"] is None)


def _lower_linear(s: SegmentBuilder, node: fx.Node) -> None:
    p = parts(node)
    x, weights, form = p["x"], p["weights"], _form_of(p)
    experts, k = int(fake(weights[0]).shape[0]), _inputs_of(p)
    n = sum(fake(w).shape[1] for w in weights)
    stored = storage_of(s, p) if form is None else None
    is_exact = isinstance(stored, CodeForm)
    if isinstance(stored, CodeForm):
        form, stored = stored, None
    packed, bias = s.packed_operands(_spec_of(s, p, form, stored, is_exact))
    what, op = f"{experts} x {n}x{k}", "grouped_linear"
    if form is None:
        dtype = stored or fake(x).dtype
        ints = problem_ints(p, n, k, DTYPE_CODES[dtype])
        each, multiplies, products = n * k * dtype.itemsize, SHORT_DTYPES[dtype], 1
        if stored is not None:
            what, multiplies = f"{what} {multiplies}, lossless", f"f32·{multiplies}"
    else:
        products = PLANES[p["activations"]]
        ints = problem_ints(p, n, k, DTYPE_CODES[torch.uint8])
        ints += [form.bits, form.group, int(not form.symmetric), products, int(is_exact)]
        each, multiplies = weight_bytes(form, n, k), f"s{form.bits}"
        if is_exact:
            what += f" {form.bits}-bit groups of {form.group}, lossless"
        else:
            what += f" {_scheme_of(p, form).name} groups of {form.group}"
        op += "_quantized"
    places = fake(x).shape[0]
    known = expression(places)
    read = min(experts, known) if isinstance(known, int) else experts  # at most
    size = read * each + num_bytes(x, node)
    flops = 2 * places * n * k
    has_bias = bias is not None
    facts = (node, p, op, what, has_bias, flops, size, Choice())
    record = step_record(*facts, multiplies=multiplies, products=products)
    rows = [as_rows(s.view(x), fake(x)), packed, bias, None, s.view(node), None, None]
    operands = [*rows, s.view(p["ends"]), _table(s, experts)]
    s.step(op, operands, ints, problem_floats(p), record)


def _scheme_of(p: dict[str, Any], form: CodeForm) -> Scheme:
    return Scheme(form.bits, form.group, form.symmetric, p["activations"])


def _spec_of(
    s: SegmentBuilder,
    p: dict[str, Any],
    form: CodeForm | None,
    stored: torch.dtype | None,
    is_exact: bool,
) -> PackedSpec:
    names = ", ".join(map(weight_name, p["weights"]))
    return packed_spec(
        s,
        p,
        form=form,
        scales=tuple(s.weight_view(t) for t in p["scales"] or ()),
        offsets=tuple(s.weight_view(t) for t in p["offsets"] or ()),
        stored=stored,
        is_exact=is_exact,
        what="" if form is None else f"{names} to {_scheme_of(p, form)}",
    )


def _table(s: SegmentBuilder, experts: int) -> View:
    """What a step notes down about its experts; the next one may have the memory."""
    rows = experts + 2
    buffer, _ = s.shared_buffer(("experts", experts), rows * TABLE_INTS * 8)
    return View(buffer, torch.int64, (rows, TABLE_INTS), (TABLE_INTS, 1))


KERNELS = {
    "gather": NativeKernel("pick.cpu", _reject_pick, _lower_pick, is_glue=True),
    "topk": NativeKernel("topk.cpu", reject_topk, _lower_topk, is_glue=True),
    "llmopt.limit_groups": NativeKernel(
        "limit_groups.cpu", _reject_limit, _lower_limit, is_glue=True
    ),
    "llmopt.sort_by_expert": NativeKernel(
        "sort_by_expert.cpu", _reject_sort, _lower_sort, is_glue=True
    ),
    "llmopt.gather_tokens": NativeKernel(
        "gather_tokens.cpu", _reject_gather, _lower_gather, is_glue=True
    ),
    "llmopt.combine_experts": NativeKernel("combine_experts.cpu", _reject_combine, _lower_combine),
    "llmopt.grouped_linear": NativeKernel("grouped_linear.cpu", _reject_linear, _lower_linear),
}
