// linear_w8a8 on the tensor cores: x and w go through a ring of buffers in shared memory (cp.async), from there into
// fragments (ldmatrix) and int8 products (mma.sync), whose exact sums pass through shared memory to the epilogue.
#include "cuda/epilogue.h"
#include "cuda/problems.h"
#include "cuda/tiles.h"

namespace llmopt::cuda {

// Where chunk c (16 bytes) of row r lies in a tile of rows of kBlockK bytes. The chunks of a row are exchanged by the
// row's place among the rows that share their banks, so that eight rows' chunks c lie in different banks.
template <int kBlockK>
LLMOPT_DEVICE int swizzled(int r, int c) {
  constexpr int kChunks = kBlockK / 16, kRowsPerBanks = 8 / kChunks;
  return r * kBlockK + ((c ^ (r / kRowsPerBanks % kChunks)) << 4);
}

// Rows row0 .. row0 + kRows - 1 and inputs k0 .. k0 + kBlockK - 1 of a matrix; what lies outside it becomes zero.
template <int kRows, int kBlockK, int kThreads>
LLMOPT_DEVICE void fetch(Shared<int8_t> tile, Global<const int8_t> from, int64_t stride, int row0, int rows, int k0,
                         int k) {
  constexpr int kChunks = kBlockK / 16;
  static_assert(kRows * kChunks % kThreads == 0);
#pragma unroll
  for (int i = 0; i < kRows * kChunks / kThreads; ++i) {
    const int at = i * kThreads + threadIdx.x, r = at / kChunks, c = at % kChunks;
    const int left = k - k0 - c * 16;
    const int bytes = row0 + r >= rows || left <= 0 ? 0 : left < 16 ? left : 16;
    copy_async(tile + swizzled<kBlockK>(r, c), bytes ? from + (row0 + r) * stride + k0 + c * 16 : from, bytes);
  }
}

template <int kTile, class T>
LLMOPT_DEVICE void gemm(const LinearW8A8& p) {
  constexpr GemmTile tile = kGemmTiles[kTile];
  constexpr int kBlockM = tile.block_m, kBlockN = tile.block_n, kBlockK = tile.block_k, kStages = tile.stages;
  constexpr int kThreads = tile.threads(), kWarpM = tile.warp_m(), kWarpN = tile.warp_n();
  constexpr int kTilesM = kWarpM / 16, kTilesN = kWarpN / 8, kStageBytes = tile.stage_bytes();
  static_assert(kWarpM % 16 == 0 && kWarpN % 16 == 0 && (kBlockK == 64 || kBlockK == 128));
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const int warp_m = warp / tile.warps_n * kWarpM, warp_n = warp % tile.warps_n * kWarpN;
  const int m0 = blockIdx.x * kBlockM, n0 = blockIdx.y * kBlockN;

  const Global<const int8_t> x(p.x), w(p.w);
  const auto stage = [](int i) { return shared<int8_t>(i % kStages * kStageBytes); };
  const auto fetch_stage = [&](int i) {
    const Shared<int8_t> to = stage(i);
    fetch<kBlockM, kBlockK, kThreads>(to, x, p.x_stride, m0, p.m, i * kBlockK, p.k);
    fetch<kBlockN, kBlockK, kThreads>(to + kBlockM * kBlockK, w, p.w_stride, n0, p.n, i * kBlockK, p.k);
  };

  // 1 fill all buffers but one
  const int steps = ceil_div(p.k, kBlockK);
#pragma unroll
  for (int i = 0; i < kStages - 1; ++i) {
    if (i < steps) fetch_stage(i);
    ptx::cp_async_commit();
  }

  // 2 multiply the oldest buffer while the next ones fill
  int sums[kTilesM][kTilesN][4] = {};
  for (int i = 0; i < steps; ++i) {
    ptx::cp_async_wait<kStages - 2>();
    __syncthreads();  // buffer i is there for all, and all are done with buffer i - 1, which is filled next
    if (i + kStages - 1 < steps) fetch_stage(i + kStages - 1);
    ptx::cp_async_commit();
    const Shared<int8_t> x_tile = stage(i), w_tile = stage(i) + kBlockM * kBlockK;
#pragma unroll
    for (int c = 0; c < kBlockK / 16; c += 2) {
      uint32_t a[kTilesM][4], b[kTilesN][2];
#pragma unroll
      for (int tm = 0; tm < kTilesM; ++tm)
        load_matrices(a[tm], x_tile + swizzled<kBlockK>(warp_m + tm * 16 + lane % 16, c + lane / 16));
#pragma unroll
      for (int tn = 0; tn < kTilesN; tn += 2) {
        uint32_t r[4];
        const int row = warp_n + tn * 8 + lane / 16 * 8 + lane % 8;
        load_matrices(r, w_tile + swizzled<kBlockK>(row, c + lane / 8 % 2));
        b[tn][0] = r[0], b[tn][1] = r[1], b[tn + 1][0] = r[2], b[tn + 1][1] = r[3];
      }
#pragma unroll
      for (int tm = 0; tm < kTilesM; ++tm)
#pragma unroll
        for (int tn = 0; tn < kTilesN; ++tn) ptx::mma_m16n8k32_s8(sums[tm][tn], a[tm], b[tn]);
    }
  }
  ptx::cp_async_wait<0>();
  __syncthreads();  // the buffers become the place of the sums

  // 3 the block's sums, row after row
  constexpr int kStride = tile.sums_stride();
  const Shared<int> block_sums = shared<int>();
#pragma unroll
  for (int tm = 0; tm < kTilesM; ++tm)
#pragma unroll
    for (int tn = 0; tn < kTilesN; ++tn) {
      const int row = warp_m + tm * 16 + lane / 4, column = warp_n + tn * 8 + lane % 4 * 2;
      const auto& s = sums[tm][tn];
      store(block_sums + row * kStride + column, int2{s[0], s[1]});
      store(block_sums + (row + 8) * kStride + column, int2{s[2], s[3]});
    }
  __syncthreads();

  // 4 four columns a thread: neighbours write neighbouring outputs
  const Epilogue<T> epilogue(p);
  const Global<const float> x_scale(p.x_scale), w_scale(p.w_scale);
  const bool wide = epilogue.wide() && w_scale.aligned(16);
  for (int i = threadIdx.x; i < kBlockM * kBlockN / 4; i += kThreads) {
    const int row = i / (kBlockN / 4), column = i % (kBlockN / 4) * 4, m = m0 + row, n = n0 + column;
    if (m >= p.m || n >= p.n) continue;
    const int4 s = load<int4>(block_sums + row * kStride + column);
    const float token = load(x_scale + m);
    const int four[4] = {s.x, s.y, s.z, s.w};
    if (wide && n + 4 <= p.n) {
      const float4 channel = load<float4>(w_scale + n);
      epilogue.finish4({token * channel.x * four[0], token * channel.y * four[1], token * channel.z * four[2],
                        token * channel.w * four[3]},
                       m, n);
      continue;
    }
#pragma unroll
    for (int j = 0; j < 4; ++j)
      if (n + j < p.n) epilogue.finish(token * load(w_scale + n + j) * four[j], m, n + j);
  }
}

}  // namespace llmopt::cuda

#define LLMOPT_GEMM(tile, name, dtype, type)                                                  \
  extern "C" __global__ void __launch_bounds__(llmopt::cuda::kGemmTiles[tile].threads())      \
      linear_w8a8_gemm_##name##_##dtype(const llmopt::cuda::LinearW8A8 __grid_constant__ p) { \
    llmopt::cuda::gemm<tile, type>(p);                                                        \
  }
LLMOPT_GEMM(0, 128x128x64, f16, __half)
LLMOPT_GEMM(1, 64x128x64, f16, __half)
LLMOPT_GEMM(2, 32x64x128, f16, __half)
LLMOPT_GEMM(0, 128x128x64, bf16, __nv_bfloat16)
LLMOPT_GEMM(1, 64x128x64, bf16, __nv_bfloat16)
LLMOPT_GEMM(2, 32x64x128, bf16, __nv_bfloat16)
