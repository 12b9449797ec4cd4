"""index_copy on Triton:  cache[b, h, index[s]] = new[b, h, s], rows of D: how a static cache takes new keys.

An index outside 0..S−1 writes nothing: a GPU cannot raise from inside a launch.
"""

from __future__ import annotations

import triton
import triton.language as tl
from llmopt.kernels.rope import HEADS, copy_heads
from llmopt.launch import Launch, RowProblem, RowTile
from llmopt.registry import Kernel, register
from llmopt.types import Target


def reject(p: RowProblem, t: Target) -> str:
    return ""


def tiles(p: RowProblem, t: Target) -> tuple[RowTile, ...]:
    return (RowTile(HEADS, 4), RowTile(4, 2))


@triton.jit
def index_copy_kernel(
    new_ptr, index_ptr, cache_ptr, H, Sn, S, stride_nb, stride_nh, stride_ns, stride_cb, stride_ch, stride_cs, stride_i,
    D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_H: tl.constexpr,
):  # fmt: skip
    b, s = (tl.program_id(0) // Sn).to(tl.int64), (tl.program_id(0) % Sn).to(tl.int64)
    h = tl.program_id(1) * BLOCK_H + tl.arange(0, BLOCK_H)
    to = tl.load(index_ptr + s * stride_i).to(tl.int64)
    heads = tl.where((to >= 0) & (to < S), H, 0)
    new = new_ptr + b * stride_nb + s * stride_ns
    cache = cache_ptr + b * stride_cb + to * stride_cs
    copy_heads(new, cache, h, heads, stride_nh, stride_ch, 0, D, BLOCK_D)


def launch(p: RowProblem, c: RowTile, t: Target, cache, index, new) -> Launch:
    """cache [B,H,S,D], index [Sn] int64, new [B,H,Sn,D], last dimensions dense."""
    batch, heads, length, d = new.shape
    arguments = {
        "new_ptr": new, "index_ptr": index,
        "cache_ptr": cache[:, :, :length],  # as many rows as it writes, for who counts bytes
        "H": heads, "Sn": length, "S": cache.shape[2], "stride_i": index.stride(0),
    }  # fmt: skip
    for name, tensor in (("n", new), ("c", cache)):
        arguments |= {f"stride_{name}{axis}": tensor.stride(d) for d, axis in enumerate("bhs")}
    constants = {"D": d, "BLOCK_D": triton.next_power_of_2(d), "BLOCK_H": c.block_k}
    grid = (batch * length, triton.cdiv(heads, c.block_k))
    return Launch(
        "index_copy.triton", index_copy_kernel, grid, arguments, constants, c.num_warps, c.num_stages,
        reads=("new_ptr", "index_ptr"), writes=("cache_ptr",),
    )  # fmt: skip


register(Kernel("index_copy.triton", "index_copy", 10, reject, tiles, launch))
