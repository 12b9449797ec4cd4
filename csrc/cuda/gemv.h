// What linears for few tokens share: which outputs a warp computes, and how its lanes' sums become those outputs.
#pragma once
#include "cuda/epilogue.h"
#include "cuda/tiles.h"

namespace llmopt::cuda {

// The first of the kGemvChannels output channels of this thread's warp.
LLMOPT_DEVICE int first_channel() { return (blockIdx.x * kGemvWarps + threadIdx.x / 32) * kGemvChannels; }

// Adds the sums of all lanes up; lane c * kTokens + t calls finish(total of sums[c][t], t, n0 + c).
template <int kTokens, class Sum, class Finish>
LLMOPT_DEVICE void finish_warp(const Sum (&sums)[kGemvChannels][kTokens], int n0, int m, int n, Finish finish) {
  const int lane = threadIdx.x % 32;
  Sum mine = 0;
#pragma unroll
  for (int i = 0; i < kGemvChannels * kTokens; ++i) {
    Sum sum = sums[i / kTokens][i % kTokens];
#pragma unroll
    for (int step = 16; step > 0; step /= 2) sum += __shfl_xor_sync(0xffffffffu, sum, step);
    if (lane == i) mine = sum;
  }
  const int c = lane / kTokens, t = lane % kTokens;
  if (c < kGemvChannels && t < m && n0 + c < n) finish(mine, t, n0 + c);
}

}  // namespace llmopt::cuda
