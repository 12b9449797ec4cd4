"""vm.cpu: ops.pointwise → one program of the elementwise VM."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import fx

from llmopt.graph import fake, numel
from llmopt.native.operands import FLOATS, NativeKernel, broadcast, num_bytes
from llmopt.native.segment import SegmentBuilder, StepRecord, describe
from llmopt.native.vm import Unsupported, VmProgram
from llmopt.ops.pointwise import LONGEST_ROW


def _encode(node: fx.Node) -> tuple[list[int], list[float]]:
    program, results, _, *inputs = node.args
    vm = VmProgram(len(inputs), len(results))
    values = [vm.load(i) for i in range(len(inputs))]
    for op, *args in program:
        if op == "const":
            values.append(vm.const(args[0]))
        elif op == "unary":
            values.append(vm.unary(args[0], values[args[1]]))
        elif op == "binary":
            values.append(vm.binary(args[0], values[args[1]], values[args[2]]))
        elif op == "where":
            values.append(vm.where(*(values[a] for a in args)))
        else:
            values.append(vm.reduce(args[0], values[args[1]]))
    for i, result in enumerate(results):
        vm.store(i, values[result])
    return vm.encode()


def reject(node: fx.Node) -> str:
    inputs = [fake(n) for n in node.args[3:]]
    shape = fake(node)[0].shape
    if any(i.dtype not in (*FLOATS, torch.bool) for i in inputs):
        return "inputs are not all f32, f16, bf16 or bool"
    if any(op == "reduce" for op, *_ in node.args[0]):
        width = shape[-1]
        if not isinstance(width, int) or width > LONGEST_ROW:
            return f"reduces rows of {width}: up to {LONGEST_ROW} is possible"
    if not all(any(u.args[1] == i for u in node.users) for i in range(len(fake(node)))):
        return "a result is not used"
    try:
        _encode(node)
    except Unsupported as error:
        return str(error)
    return ""


def _lower(s: SegmentBuilder, node: fx.Node) -> None:
    inputs = node.args[3:]
    shape = tuple(fake(node)[0].shape)
    ints, floats = _encode(node)
    operands = [broadcast(s.view(n), tuple(fake(n).shape), shape) for n in inputs]
    outputs = [s.part(node, i) for i in range(len(fake(node)))]
    operands += [s.view(o) for o in outputs]
    s.step("vm", operands, ints, floats, chain_record(node, outputs, "vm.cpu"))


def chain_record(node: fx.Node, outputs: Sequence[fx.Node], kernel: str) -> StepRecord:
    program, _, _, *inputs = node.args
    names = ["where" if op == "where" else args[0] for op, *args in program if op != "const"]
    return StepRecord(
        "pointwise",
        kernel,
        "+".join(names[:4]) + ("+…" if len(names) > 4 else ""),
        tuple(describe(n) for n in inputs),
        tuple(describe(o) for o in outputs),
        numel(fake(outputs[0])) * len(names),
        num_bytes(*inputs, *outputs),
        node,
    )


KERNELS = {"llmopt.pointwise": NativeKernel("vm.cpu", reject, _lower, is_glue=True)}
