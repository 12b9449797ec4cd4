"""Weights in the layout of the kernels: how long it is, and writing it.

csrc/cpu/linear/layout.h and csrc/cpu/linear_quantized/layout.h lay it out. The weights of several experts lie one behind the other.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from llmopt import _C
from llmopt.program import ProgramBuilder, View, view_of
from llmopt.quant.rounding import Codes
from llmopt.quant.schemes import CodeForm

_SLACK = 8192  # bytes behind the last panel that a prefetch may touch


def memory_bytes(each: int, experts: int = 1) -> int:
    """Of the memory for the weights of so many experts, `each` bytes long."""
    return each * experts + _SLACK


def float_bytes(n: int, k: int, dtype: torch.dtype, panel_width: int) -> int:
    """Of a float weight [N,K]: whole panels of columns, k rounded up to a pair in bf16."""
    padded = k + k % 2 if dtype == torch.bfloat16 else k
    return -(-n // panel_width) * panel_width * padded * dtype.itemsize


def code_bytes(n: int, groups: int, form: CodeForm, panel_width: int) -> int:
    """Of a quantised weight of N columns, whose form says how many inputs a group has."""
    scales = panel_width * (4 if form.bits == 8 else 2) * (1 if form.symmetric else 2)
    group = -(-form.group // 8) * panel_width * form.bits + scales
    panel = groups * group + (0 if form.bits == 8 else 4 * panel_width)
    return -(-n // panel_width) * panel


def pack(
    weights: Sequence[Tensor], memory: _C.Memory, interleave: bool, tier: str, offset: int = 0
) -> None:
    """Writes the packed form of weights [N_i,K] into memory, so many bytes behind its begin."""
    builder = ProgramBuilder()
    views = [view_of(builder.external(), w) for w in weights]
    views.append(_behind(builder, memory, offset))
    builder.step("pack_linear", views, [int(interleave)])
    addresses = [*(w.data_ptr() for w in weights), memory.address]
    builder.build(tier).run(addresses, [], torch.get_num_threads())


def pack_codes(
    weights: Sequence[Codes],
    form: CodeForm,
    memory: _C.Memory,
    interleave: bool,
    tier: str,
    offset: int = 0,
) -> None:
    """The same for quantised weights."""
    builder = ProgramBuilder()
    tensors = [t for w in weights for t in (w.codes, w.scales, w.offsets)]
    views = [None if t is None else view_of(builder.external(), t) for t in tensors]
    views.append(_behind(builder, memory, offset))
    ints = [form.bits, form.group, int(interleave)]
    builder.step("pack_linear_quantized", views, ints)
    addresses = [*(t.data_ptr() for t in tensors if t is not None), memory.address]
    builder.build(tier).run(addresses, [], torch.get_num_threads())


def _behind(builder: ProgramBuilder, memory: _C.Memory, offset: int) -> View:
    return View(builder.external(), torch.uint8, (memory.bytes - offset,), (1,), offset)
