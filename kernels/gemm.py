"""What kernels share: rounding, activations; of matrix products the order of tiles, a norm in front, split-K and the epilogue."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def tanh(x):
    # Through the smaller exponential, so that nothing overflows; near 0, where 1 - e loses digits, the series.
    e = tl.exp(-2.0 * tl.abs(x))
    t = (1.0 - e) / (1.0 + e)
    squared = x * x
    series = x * (1.0 - squared * (0.3333333333333333 - squared * 0.13333333333333333))
    return tl.where(tl.abs(x) < 0.1, series, tl.where(x < 0, -t, t))


@triton.jit
def round_even(x):
    """The nearest integer of |x| < 2²², ties to even: beyond 1.5 · 2²³ fp32 has no fractions left."""
    return (x + 12582912.0) - 12582912.0


@triton.jit
def round_rows(x):
    """Rows x [M, K] in fp32 → codes −127 … 127 [M, K] s8 and their scales [M]: largest magnitude / 127, ties to even.

    A row whose scale has no finite reciprocal gets zeros. One with a NaN or an infinity gets the scale NaN, so that it stays visible.
    """
    scale = tl.max(tl.abs(x), 1) / 127.0
    inverse = tl.where(scale >= 1.1754943508222875e-38, 1.0 / scale, 0.0)
    is_number = tl.sum(x * 0.0, 1) == 0.0
    codes = tl.where(is_number[:, None], round_even(x * inverse[:, None]), 0.0)
    return codes.to(tl.int8), tl.where(is_number, scale, float("nan"))


@triton.jit
def activate(x, ACT: tl.constexpr):
    """An activation of ops/activation.py on fp32."""
    y = x
    if ACT == "relu":
        y = tl.maximum(x, 0.0, propagate_nan=tl.PropagateNan.ALL)
    elif ACT == "silu":
        y = x * tl.sigmoid(x)
    elif ACT == "gelu_erf":
        y = 0.5 * x * (1.0 + tl.erf(x * 0.7071067811865476))
    elif ACT == "gelu_tanh":
        y = 0.5 * x * (1.0 + tanh(0.7978845608028654 * (x + 0.044715 * x * x * x)))
    elif ACT == "sigmoid":
        y = tl.sigmoid(x)
    elif ACT == "tanh":
        y = tanh(x)
    elif ACT == "quick_gelu":
        y = x * tl.sigmoid(1.702 * x)
    elif ACT == "relu2":
        y = tl.maximum(x, 0.0, propagate_nan=tl.PropagateNan.ALL)
        y = y * y
    else:
        tl.static_assert(ACT == "none", "unknown activation")
    return y


@triton.jit
def tile_of(tile, tiles_m, tiles_n, GROUP_M: tl.constexpr):
    """Row and column of a tile: GROUP_M rows of tiles run together, so that they find each other's columns in the L2 cache."""
    width = GROUP_M * tiles_n
    first = (tile // width) * GROUP_M
    height = min(tiles_m - first, GROUP_M)
    return first + (tile % width) % height, (tile % width) // height


@triton.jit
def share_of(
    M, N, K, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, SPLIT_K: tl.constexpr, GROUP_M: tl.constexpr,
):  # fmt: skip
    """What this block computes: (tile, split, number of tiles, rows [BLOCK_M], cols [BLOCK_N], first k, end of k)."""
    tile, split = tl.program_id(0), tl.program_id(1)
    tiles_m, tiles_n = tl.cdiv(M, BLOCK_M), tl.cdiv(N, BLOCK_N)
    tile_m, tile_n = tile_of(tile, tiles_m, tiles_n, GROUP_M)
    rows = tile_m * BLOCK_M + tl.arange(0, BLOCK_M)
    cols = tile_n * BLOCK_N + tl.arange(0, BLOCK_N)
    share = tl.cdiv(tl.cdiv(K, BLOCK_K), SPLIT_K) * BLOCK_K
    first = split * share
    return tile, split, tiles_m * tiles_n, rows, cols, first, min(first + share, K)


@triton.jit
def row_statistics(
    x_rows, row_mask, K, eps, NORM: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr
):
    """(mean, 1/deviation) [BLOCK_M] of the rows at pointers x_rows [BLOCK_M]; the mean of "rms" is 0."""
    mean = tl.zeros((BLOCK_M,), tl.float32)
    if NORM == "layer":
        total = tl.zeros((BLOCK_M,), tl.float32)
        for k in range(0, K, BLOCK_K):
            ks = k + tl.arange(0, BLOCK_K)
            x = tl.load(
                x_rows[:, None] + ks[None, :], mask=row_mask[:, None] & (ks[None, :] < K), other=0.0
            )
            total += tl.sum(x.to(tl.float32), 1)
        mean = total / K
    squares = tl.zeros((BLOCK_M,), tl.float32)
    for k in range(0, K, BLOCK_K):
        ks = k + tl.arange(0, BLOCK_K)
        inside = ks[None, :] < K
        x = tl.load(x_rows[:, None] + ks[None, :], mask=row_mask[:, None] & inside, other=0.0)
        centred = tl.where(inside, x.to(tl.float32) - mean[:, None], 0.0)
        squares += tl.sum(centred * centred, 1)
    return mean, 1.0 / tl.sqrt(squares / K + eps)


@triton.jit
def normalise(x, mean, rstd, weight_ptr, bias_ptr, ks, K, offset):
    """A block x [BLOCK_M, BLOCK_K] in fp32 behind its norm; columns past K must be masked by the caller's weights."""
    h = (x.to(tl.float32) - mean[:, None]) * rstd[:, None]
    if weight_ptr is not None:
        h *= (tl.load(weight_ptr + ks, mask=ks < K, other=0.0).to(tl.float32) + offset)[None, :]
    if bias_ptr is not None:
        h += tl.load(bias_ptr + ks, mask=ks < K, other=0.0).to(tl.float32)[None, :]
    return h


@triton.jit
def store_partial(acc, partial_ptr, slot, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """Writes one split's share of a tile to its slot of the workspace."""
    inside = tl.arange(0, BLOCK_M)[:, None] * BLOCK_N + tl.arange(0, BLOCK_N)[None, :]
    tl.store(partial_ptr + slot.to(tl.int64) * (BLOCK_M * BLOCK_N) + inside, acc)


@triton.jit
def sum_partials(
    partial_ptr, first, step, SPLIT_K: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr
):
    """Adds the shares of all splits in their order, so that the result does not depend on who finished last."""
    inside = tl.arange(0, BLOCK_M)[:, None] * BLOCK_N + tl.arange(0, BLOCK_N)[None, :]
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for split in range(SPLIT_K):
        slot = (first + split * step).to(tl.int64) * (BLOCK_M * BLOCK_N)
        # .cg reads the L2 cache: other multiprocessors wrote these, and L1 may hold older bytes.
        acc += tl.load(partial_ptr + slot + inside, cache_modifier=".cg")
    return acc


@triton.jit
def arrive(counter_ptr, tile):
    """How many blocks finished this tile before; what they stored is visible when the answer says they all did."""
    tl.debug_barrier()  # every thread's stores come before the one thread's release
    return tl.atomic_add(counter_ptr + tile, 1, sem="acq_rel")


@triton.jit
def epilogue(
    acc, up, bias_ptr, up_bias_ptr, residual_ptr, y_ptr, rows, cols, M, N,
    stride_rm, stride_ym, alpha, ACT: tl.constexpr,
):  # fmt: skip
    """y = act(alpha · acc + bias) [· (alpha · up + up_bias)] + residual, in fp32, rounded once."""
    col_mask = cols < N
    mask = (rows < M)[:, None] & col_mask[None, :]
    acc *= alpha
    if bias_ptr is not None:
        acc += tl.load(bias_ptr + cols, mask=col_mask, other=0.0).to(tl.float32)[None, :]
    acc = activate(acc, ACT)
    if up is not None:
        up *= alpha
        if up_bias_ptr is not None:
            up += tl.load(up_bias_ptr + cols, mask=col_mask, other=0.0).to(tl.float32)[None, :]
        acc *= up
    far = rows.to(tl.int64)[:, None]
    if residual_ptr is not None:
        acc += tl.load(residual_ptr + far * stride_rm + cols[None, :], mask=mask, other=0.0).to(
            tl.float32
        )
    tl.store(y_ptr + far * stride_ym + cols[None, :], acc.to(y_ptr.dtype.element_ty), mask=mask)


@triton.jit
def finish(
    acc, up, partial_ptr, counter_ptr, tile, split, tiles, bias_ptr, up_bias_ptr, residual_ptr, y_ptr, rows, cols, M, N,
    stride_rm, stride_ym, alpha, ACT: tl.constexpr, SPLIT_K: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """The epilogue of a tile, run by the last of the SPLIT_K blocks that share it. Nobody waits for anybody."""
    is_last = True
    if SPLIT_K > 1:
        store_partial(acc, partial_ptr, split * tiles + tile, BLOCK_M, BLOCK_N)
        if up is not None:
            store_partial(up, partial_ptr, (SPLIT_K + split) * tiles + tile, BLOCK_M, BLOCK_N)
        is_last = arrive(counter_ptr, tile) == SPLIT_K - 1
    if is_last:
        if SPLIT_K > 1:
            acc = sum_partials(partial_ptr, tile, tiles, SPLIT_K, BLOCK_M, BLOCK_N)
            if up is not None:
                up = sum_partials(
                    partial_ptr, SPLIT_K * tiles + tile, tiles, SPLIT_K, BLOCK_M, BLOCK_N
                )
            tl.store(counter_ptr + tile, 0)  # ready for the next launch
        epilogue(acc, up, bias_ptr, up_bias_ptr, residual_ptr, y_ptr, rows, cols, M, N,
                 stride_rm, stride_ym, alpha, ACT)  # fmt: skip


@triton.jit
def times_weight(x, weight_ptr, ks, K, offset):
    """A row's block x [BLOCK_K] in fp32 times the weight of its norm, whose deviation is yet to come."""
    if weight_ptr is not None:
        x *= tl.load(weight_ptr + ks, mask=ks < K, other=0.0).to(tl.float32) + offset
    return x
