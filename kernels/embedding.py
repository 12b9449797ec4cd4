"""embedding on Triton:  y[m] = table[ids[m]] · scale.  An id outside 0..V−1 gives NaN: a GPU cannot raise from inside a launch."""

from __future__ import annotations

import triton
import triton.language as tl
from llmopt.launch import Launch, RowProblem, RowTile
from llmopt.registry import Kernel, register
from llmopt.types import Target


def reject(p: RowProblem, t: Target) -> str:
    return ""


def tiles(p: RowProblem, t: Target) -> tuple[RowTile, ...]:
    return (RowTile(1024, 4), RowTile(512, 2))


@triton.jit
def embedding_kernel(
    ids_ptr, table_ptr, y_ptr, V, K, inner, stride_io, stride_ii, stride_t, stride_y, scale, BLOCK_K: tl.constexpr
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    ks = tl.program_id(1) * BLOCK_K + tl.arange(0, BLOCK_K)
    # The id as a block: the interpreter joins a scalar's comparison with a block's to something that is no mask.
    place = (row // inner) * stride_io + (row % inner) * stride_ii
    token = tl.load(ids_ptr + place + tl.zeros((BLOCK_K,), tl.int32)).to(tl.int64)
    mask = (ks < K) & (token >= 0) & (token < V)
    x = (
        tl.load(table_ptr + token * stride_t + ks, mask=mask, other=float("nan")).to(tl.float32)
        * scale
    )
    tl.store(y_ptr + row * stride_y + ks, x.to(y_ptr.dtype.element_ty), mask=ks < K)


def launch(p: RowProblem, c: RowTile, t: Target, ids, table, y, scale: float = 1.0) -> Launch:
    """ids [outer, inner] int64 or int32 of any strides, table [V, K] and y [outer · inner, K] with dense rows."""
    arguments = {"ids_ptr": ids, "table_ptr": table, "y_ptr": y, "V": table.shape[0], "K": p.k,
                 "inner": ids.shape[1], "stride_io": ids.stride(0), "stride_ii": ids.stride(1),
                 "stride_t": table.stride(0), "stride_y": y.stride(0), "scale": float(scale)}  # fmt: skip
    return Launch(
        "embedding.triton", embedding_kernel, (p.rows, triton.cdiv(p.k, c.block_k)), arguments, c.constexprs(),
        c.num_warps, c.num_stages, reads=("ids_ptr",), writes=("y_ptr",),
    )  # fmt: skip


register(Kernel("embedding.triton", "embedding", 10, reject, tiles, launch))
