"""pointwise: a chain of elementwise operations and reductions over the last dimension, as one op.

The chain is a tuple of instructions in single-assignment form; each names earlier values by number:
inputs are values 0..n-1, instruction i makes value n + i.

    ("unary", name, a)   ("binary", name, a, b)   ("const", x)   ("where", c, a, b)
    ("reduce", name, a)  over the last dimension, kept as size 1

Truths are 1 and 0: of comparisons, of bool inputs, and as whatever is not 0 where one is asked for.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from llmopt.ops.reference import outside_autocast

LONGEST_ROW = 16384  # elements; what reduces longer rows stays with PyTorch
UNARY: dict[str, Any] = {
    "neg": torch.neg,
    "abs": torch.abs,
    "sqrt": torch.sqrt,
    "rsqrt": torch.rsqrt,
    "reciprocal": torch.reciprocal,
    "exp": torch.exp,
    "exp2": torch.exp2,
    "log": torch.log,
    "log1p": torch.log1p,
    "floor": torch.floor,
    "round": torch.round,
    "tanh": torch.tanh,
    "sigmoid": torch.sigmoid,
    "erf": torch.erf,
    "silu": F.silu,
    "gelu_erf": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "quick_gelu": lambda x: x * torch.sigmoid(1.702 * x),
    "relu": torch.relu,
    "relu2": lambda x: torch.relu(x).square(),
    "square": torch.square,
    "sin": torch.sin,
    "cos": torch.cos,
    "logical_not": lambda x: (x == 0).float(),
    "round_f16": lambda x: x.half().float(),
    "round_bf16": lambda x: x.bfloat16().float(),
}
BINARY: dict[str, Any] = {
    "add": torch.add,
    "sub": torch.sub,
    "mul": torch.mul,
    "div": torch.div,
    "maximum": torch.maximum,
    "minimum": torch.minimum,
    "lt": lambda a, b: (a < b).float(),
    "le": lambda a, b: (a <= b).float(),
    "gt": lambda a, b: (a > b).float(),
    "ge": lambda a, b: (a >= b).float(),
    "eq": lambda a, b: (a == b).float(),
    "ne": lambda a, b: (a != b).float(),
    "logical_and": lambda a, b: torch.logical_and(a, b).float(),
    "logical_or": lambda a, b: torch.logical_or(a, b).float(),
}
REDUCE: dict[str, Any] = {
    "sum": lambda x: x.sum(-1, keepdim=True),
    "mean": lambda x: x.mean(-1, keepdim=True),
    "max": lambda x: x.amax(-1, keepdim=True),
}


@outside_autocast
def pointwise(
    program: tuple, results: tuple[int, ...], dtypes: tuple[torch.dtype, ...], *inputs: Tensor
) -> tuple[Tensor, ...]:
    """Runs the chain on inputs that broadcast together; gives the values named in `results`, in `dtypes`.

    Computed in float32 and rounded where a result is stored, or where an instruction says so.
    """
    values: list[Any] = [t.float() for t in inputs]
    for op, *args in program:
        if op == "const":
            values.append(torch.tensor(float(args[0])))
        elif op == "unary":
            values.append(UNARY[args[0]](values[args[1]]))
        elif op == "binary":
            values.append(BINARY[args[0]](values[args[1]], values[args[2]]))
        elif op == "where":
            condition, a, b = (values[number] for number in args)
            values.append(torch.where(condition != 0, a, b))
        elif op == "reduce":
            values.append(REDUCE[args[0]](values[args[1]]))
        else:
            raise ValueError(f"pointwise: unknown instruction {op!r}")
    shape = torch.broadcast_shapes(*(t.shape for t in inputs))
    return tuple(
        values[r].expand(shape).to(d).contiguous() for r, d in zip(results, dtypes, strict=True)
    )


def _fake(
    program: tuple, results: tuple[int, ...], dtypes: tuple[torch.dtype, ...], *inputs: Tensor
) -> tuple[Tensor, ...]:
    from torch._refs import _broadcast_shapes

    shape = _broadcast_shapes(*(t.shape for t in inputs))
    return tuple(torch.empty(shape, dtype=d, device=inputs[0].device) for d in dtypes)


pointwise.fake = _fake  # type: ignore[attr-defined]
