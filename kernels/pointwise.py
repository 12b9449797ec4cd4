"""pointwise on Triton: source generated from a chain of ops/pointwise.py, one function per chain and layout.

Inputs and results are presented with one shape (a broadcast dimension has stride 0), whose dimensions are merged where memory allows.
Without reductions elements are numbered through and cut into blocks; with a reduction of the last dimension a block is a row.
"""

from __future__ import annotations

import functools
import hashlib
import linecache
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from llmopt import settings
from llmopt.kernels.gemm import activate, tanh
from llmopt.launch import ChainProblem, Launch, RowTile
from llmopt.registry import Kernel, register
from llmopt.types import Target

WIDEST = 16384  # of a row that is reduced: all of it is in registers

_UNARY = {
    "neg": "-{}",
    "abs": "tl.abs({})",
    "sqrt": "tl.sqrt({})",
    "rsqrt": "1.0 / tl.sqrt({})",
    "reciprocal": "1.0 / {}",
    "exp": "tl.exp({})",
    "exp2": "tl.exp2({})",
    "log": "tl.log({})",
    "log1p": "log1p({})",
    "floor": "tl.floor({})",
    "round": "round_even({})",
    "logical_not": "({} == 0).to(tl.float32)",
    "tanh": "tanh({})",
    "erf": "tl.erf({})",
    "square": "{0} * {0}",
    "sin": "tl.sin({})",
    "cos": "tl.cos({})",
    "round_f16": "({}).to(tl.float16).to(tl.float32)",
    "round_bf16": "({}).to(tl.bfloat16).to(tl.float32)",
} | {
    name: f'activate({{}}, "{name}")'
    for name in ("sigmoid", "silu", "gelu_erf", "gelu_tanh", "quick_gelu", "relu", "relu2")
}
_BINARY = {
    "add": "{} + {}",
    "sub": "{} - {}",
    "mul": "{} * {}",
    "div": "{} / {}",
    "maximum": "tl.maximum({}, {}, propagate_nan=tl.PropagateNan.ALL)",
    "minimum": "tl.minimum({}, {}, propagate_nan=tl.PropagateNan.ALL)",
}
_BINARY |= {
    name: f"({{}} {sign} {{}}).to(tl.float32)"
    for name, sign in {"lt": "<", "le": "<=", "gt": ">", "ge": ">=", "eq": "==", "ne": "!="}.items()
} | {
    name: f"(({{}} != 0) {sign} ({{}} != 0)).to(tl.float32)"
    for name, sign in {"logical_and": "&", "logical_or": "|"}.items()
}
_WHERE = "tl.where({} != 0, {}, {})"
_REDUCE = {
    "sum": "tl.sum(tl.where(mask, {}, 0.0), 0)",
    "mean": "tl.sum(tl.where(mask, {}, 0.0), 0) / {columns}",
    "max": "row_max({}, mask)",
}
_TABLES = {"unary": _UNARY, "binary": _BINARY, "reduce": _REDUCE}


@triton.jit
def row_max(x, mask):
    """The largest of a row, NaN where one of it is."""
    # A row even where x is one number, itself a reduction's result.
    x = tl.where(mask, x, float("-inf"))
    is_nan = tl.sum((x != x).to(tl.int32), 0) > 0
    return tl.where(is_nan, float("nan"), tl.max(x, 0))


@triton.jit
def log1p(x):
    """ln(1 + x): what 1 + x loses is given back by the quotient, which is 1 but for that."""
    u = 1.0 + x
    exact = (u == 1.0) | (u == float("inf"))
    return tl.where(exact, x, tl.log(u) * (x / tl.where(exact, 1.0, u - 1.0)))


@triton.jit
def round_even(x):
    """To the nearest whole number, halves to even: beside 2^23 floats have no fractions."""
    size = tl.abs(x)
    whole = (size + 8388608.0) - 8388608.0
    return tl.where(size < 8388608.0, tl.where(x < 0, -whole, whole), x)


def reject(p: ChainProblem, t: Target) -> str:
    for op, name, *_ in p.program:
        if op in ("const", "where"):
            continue
        if op not in _TABLES:
            return f"instruction {op!r}: const, where, {', '.join(_TABLES)} are possible"
        if name not in _TABLES[op]:
            return f"operation {name!r}: {', '.join(_TABLES[op])} are possible"
    if p.reduces and p.k > WIDEST:
        return f"reduces rows of {p.k}: up to {WIDEST} are possible"
    return ""


def tiles(p: ChainProblem, t: Target) -> tuple[RowTile, ...]:
    if not p.reduces:
        return (RowTile(1024, 4), RowTile(2048, 8))
    block = max(triton.next_power_of_2(p.k), 32)
    return (RowTile(block, 16 if block > 4096 else 8 if block > 1024 else 4 if block > 256 else 1),)


@dataclass(frozen=True)
class _Layout:
    """The merged shape, and the strides of every tensor in it."""

    size: tuple[int, ...]
    strides: tuple[tuple[int, ...], ...]

    def kinds(self) -> tuple[tuple[str, ...], ...]:
        """What the source depends on: strides of 0 and 1 are written into it, "s" is a parameter."""
        return tuple(
            tuple(str(s) if s in (0, 1) else "s" for s in strides) for strides in self.strides
        )

    def reaches_far(self) -> bool:
        """Whether an element's number needs 64 bits."""
        last = [sum((n - 1) * s for n, s in zip(self.size, t, strict=True)) for t in self.strides]
        return max(*last, torch.Size(self.size).numel()) >= 2**31


def layout(shape: Sequence[int], tensors: Sequence[Any], keep_last: bool) -> _Layout:
    """Merges dimensions that every tensor strides through evenly; keep_last: the last one stays by itself."""
    merged: list[tuple[int, tuple[int, ...]]] = []
    dims = [(n, tuple(t.stride(d) for t in tensors)) for d, n in enumerate(shape)]
    last = dims[-1:] if keep_last else []
    for n, strides in dims[: len(dims) - len(last)]:
        if n == 1:
            continue
        if merged and all(a == b * n for a, b in zip(merged[-1][1], strides, strict=True)):
            merged[-1] = (merged[-1][0] * n, strides)
        else:
            merged.append((n, strides))
    merged += last or ([] if merged else [(1, (1,) * len(tensors))])
    return _Layout(tuple(n for n, _ in merged), tuple(zip(*(s for _, s in merged), strict=True)))


def source(p: ChainProblem, kinds: tuple[tuple[str, ...], ...]) -> str:
    """The function's text: equal chains over equal layouts give equal text."""
    lines = (
        *_indices(p.reduces, len(kinds[0])),
        *_loads(p, kinds),
        *_values(p, f"n{len(kinds[0]) - 1}"),
        *_stores(p, kinds),
    )
    parameters = ", ".join((*_parameters(p, kinds), "BLOCK_K: tl.constexpr", "FAR: tl.constexpr"))
    body = "\n".join(f"    {line}" for line in lines)
    return f"@triton.jit\ndef {_name(p)}({parameters}):\n{body}\n"


def _name(p: ChainProblem) -> str:
    names = ["where" if op == "where" else args[0] for op, *args in p.program if op != "const"]
    return "_".join(["pointwise", *names[:6]])


def _tensors(p: ChainProblem) -> list[str]:
    return [f"x{i}" for i in range(p.inputs)] + [f"y{i}" for i in range(len(p.results))]


def _parameters(p: ChainProblem, kinds: tuple[tuple[str, ...], ...]) -> Iterator[str]:
    tensors = _tensors(p)
    yield from (f"{name}_ptr" for name in tensors)
    yield from (f"n{d}" for d in range(len(kinds[0])))
    for name, strides in zip(tensors, kinds, strict=True):
        yield from (f"{name}_stride{d}" for d, kind in enumerate(strides) if kind == "s")


def _indices(reduces: bool, dims: int) -> Iterator[str]:
    """i0, i1 …: where in every dimension an element is."""
    yield "i = tl.program_id(0)"
    yield "if FAR:"
    yield "    i = i.to(tl.int64)"
    last = dims - 1
    if reduces:
        yield f"i{last} = tl.arange(0, BLOCK_K)"
        yield f"mask = i{last} < n{last}"
        last -= 1
    else:
        yield "i = i * BLOCK_K + tl.arange(0, BLOCK_K)"
        yield f"mask = i < {' * '.join(f'n{d}' for d in range(dims))}"
    for d in range(last, 0, -1):
        yield f"i{d} = i % n{d}"
        yield f"i = i // n{d}"
    if last >= 0:
        yield "i0 = i"


def _address(name: str, kinds: tuple[str, ...]) -> str:
    terms = {"0": "", "1": " + i{d}", "s": " + i{d} * {name}_stride{d}"}
    return f"{name}_ptr" + "".join(terms[k].format(d=d, name=name) for d, k in enumerate(kinds))


def _loads(p: ChainProblem, kinds: tuple[tuple[str, ...], ...]) -> Iterator[str]:
    for i, strides in enumerate(kinds[: p.inputs]):
        # An address that is the same for all of a block is a single one: Triton wants no mask there.
        is_block = strides[-1] != "0" if p.reduces else any(k != "0" for k in strides)
        mask = ", mask=mask, other=0.0" if is_block else ""
        yield f"v{i} = tl.load({_address(f'x{i}', strides)}{mask}).to(tl.float32)"


def _values(p: ChainProblem, columns: str) -> Iterator[str]:
    for number, (op, *args) in enumerate(p.program, p.inputs):
        yield f"v{number} = {_expression(op, args, columns)}"


def _expression(op: str, args: list[Any], columns: str) -> str:
    if op == "const":
        value = repr(args[0]) if math.isfinite(args[0]) else f'float("{args[0]}")'
        return f"tl.full((BLOCK_K,), {value}, tl.float32)"
    if op == "where":
        return _WHERE.format(*(f"v{a}" for a in args))
    return _TABLES[op][args[0]].format(*(f"v{a}" for a in args[1:]), columns=columns)


def _stores(p: ChainProblem, kinds: tuple[tuple[str, ...], ...]) -> Iterator[str]:
    for i, (result, strides) in enumerate(zip(p.results, kinds[p.inputs :], strict=True)):
        yield f"tl.store({_address(f'y{i}', strides)}, v{result}.to(y{i}_ptr.dtype.element_ty), mask=mask)"


@functools.cache
def _function(text: str) -> Any:
    """The kernel of a text. Its file has no bytes on disk: inspect, which triton asks, finds the text in linecache."""
    name = f"<llmopt pointwise {hashlib.sha256(text.encode()).hexdigest()[:12]}>"
    if settings.debug_level() >= 4:
        print(f"llmopt: generated {name}\n{text}", flush=True)
    linecache.cache[name] = (len(text), None, text.splitlines(keepends=True), name)
    names = {
        "__name__": __name__,
        "triton": triton,
        "tl": tl,
        "tanh": tanh,
        "activate": activate,
        "row_max": row_max,
        "log1p": log1p,
        "round_even": round_even,
    }
    exec(compile(text, name, "exec"), names)
    return next(v for k, v in names.items() if k.startswith("pointwise"))


def launch(p: ChainProblem, c: RowTile, t: Target, shape, inputs, outputs) -> Launch:
    """inputs and outputs: tensors of this shape, of any strides."""
    tensors = (*inputs, *outputs)
    where = layout(shape, tensors, p.reduces)
    kinds = where.kinds()
    arguments = {f"{name}_ptr": tensor for name, tensor in zip(_tensors(p), tensors, strict=True)}
    arguments |= {f"n{d}": n for d, n in enumerate(where.size)}
    for name, strides, kind in zip(_tensors(p), where.strides, kinds, strict=True):
        arguments |= {f"{name}_stride{d}": s for d, s in enumerate(strides) if kind[d] == "s"}
    elements = math.prod(where.size)
    blocks = elements // where.size[-1] if p.reduces else triton.cdiv(elements, c.block_k)
    constants = {**c.constexprs(), "FAR": where.reaches_far()}
    return Launch(
        "pointwise.triton", _function(source(p, kinds)), (blocks,), arguments, constants, c.num_warps, c.num_stages,
        reads=tuple(f"x{i}_ptr" for i in range(p.inputs)), writes=tuple(f"y{i}_ptr" for i in range(len(p.results))),
    )  # fmt: skip


register(Kernel("pointwise.triton", "pointwise", 10, reject, tiles, launch))
