// How kernels divide their work: what a kernel is compiled for and its launcher must launch.
#pragma once
#include <cstdint>

namespace llmopt::cuda {

constexpr int ceil_div(int a, int b) { return (a + b - 1) / b; }

// A block's tile of linear_w8a8_gemm, block_k inputs at a time, through `stages` buffers in shared memory.
struct GemmTile {
  const char* name;
  int block_m, block_n, block_k, stages;
  int warps_m, warps_n;

  constexpr int threads() const { return 32 * warps_m * warps_n; }
  constexpr int warp_m() const { return block_m / warps_m; }
  constexpr int warp_n() const { return block_n / warps_n; }
  constexpr int stage_bytes() const { return (block_m + block_n) * block_k; }
  // Row of the block's sums in shared memory, in int32: eight more, so that the two rows of a half warp differ in
  // banks.
  constexpr int sums_stride() const { return block_n + 8; }
  constexpr int shared_bytes() const {
    const int sums = block_m * sums_stride() * 4;
    return stages * stage_bytes() > sums ? stages * stage_bytes() : sums;
  }
};

// Largest first; a launch takes the first that gives every multiprocessor a block, else the last.
constexpr GemmTile kGemmTiles[] = {
    {"128x128x64", 128, 128, 64, 4, 2, 4},
    {"64x128x64", 64, 128, 64, 4, 1, 4},
    {"32x64x128", 32, 64, 128, 4, 1, 4},
};
constexpr int kGemmTileCount = 3;

// Linears for few tokens: a warp computes kGemvChannels outputs for all tokens of its block, 1, 2, 4 or 8 of them.
constexpr int kGemvWarps = 4;
constexpr int kGemvChannels = 2;
constexpr int kGemvMaxTokens = 8;

// attention_decode: a block reads one head of the cache for up to 8 query heads.
constexpr int kDecodeWarps = 4;
constexpr int kDecodeMaxHeads = 8;
// Keys a lane has on their way at once.
constexpr int kDecodeUnroll = 4;
// The warps' sums and their (largest score, sum of weights), and a flag.
constexpr int decode_shared_bytes(int heads, int head_dim) { return kDecodeWarps * heads * (head_dim + 2) * 4 + 16; }

}  // namespace llmopt::cuda
