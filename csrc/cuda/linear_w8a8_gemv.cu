// linear_w8a8 for up to 8 tokens: every weight is read once, with dp4a. One warp: two output channels, all tokens.
#include "cuda/gemv.h"
#include "cuda/problems.h"

namespace llmopt::cuda {

LLMOPT_DEVICE int dot16(const uint4& a, const uint4& b, int sum) {
  sum = __dp4a(static_cast<int>(a.x), static_cast<int>(b.x), sum);
  sum = __dp4a(static_cast<int>(a.y), static_cast<int>(b.y), sum);
  sum = __dp4a(static_cast<int>(a.z), static_cast<int>(b.z), sum);
  return __dp4a(static_cast<int>(a.w), static_cast<int>(b.w), sum);
}

// The first `count` of 4 bytes, the others zero.
LLMOPT_DEVICE uint32_t first_bytes(uint32_t word, int count) {
  return count >= 4 ? word : count <= 0 ? 0u : word & ((1u << 8 * count) - 1);
}

template <int kTokens, class T>
LLMOPT_DEVICE void gemv(const LinearW8A8& p) {
  const int lane = threadIdx.x % 32;
  const int n0 = first_channel();
  if (n0 >= p.n) return;
  const Global<const int8_t> x(p.x), w(p.w);
  int sums[kGemvChannels][kTokens] = {};
  const int chunks = ceil_div(p.k, 16);
#pragma unroll 4
  for (int chunk = lane; chunk < chunks; chunk += 32) {
    uint4 weights[kGemvChannels];
#pragma unroll
    for (int c = 0; c < kGemvChannels; ++c) {
      const int n = n0 + c < p.n ? n0 + c : n0;
      weights[c] = load_streamed<uint4>(w + n * p.w_stride + chunk * 16);
    }
#pragma unroll
    for (int t = 0; t < kTokens; ++t) {
      const int m = t < p.m ? t : 0;
      uint4 inputs = load<uint4>(x + m * p.x_stride + chunk * 16);
      const int left = p.k - chunk * 16;
      if (left < 16) {  // what follows a row is not part of it
        inputs.x = first_bytes(inputs.x, left);
        inputs.y = first_bytes(inputs.y, left - 4);
        inputs.z = first_bytes(inputs.z, left - 8);
        inputs.w = first_bytes(inputs.w, left - 12);
      }
#pragma unroll
      for (int c = 0; c < kGemvChannels; ++c) sums[c][t] = dot16(weights[c], inputs, sums[c][t]);
    }
  }
  const Epilogue<T> epilogue(p);
  finish_warp(sums, n0, p.m, p.n, [&](int sum, int m, int n) {
    const float scale = load(global<float>(p.x_scale) + m) * load(global<float>(p.w_scale) + n);
    epilogue.finish(scale * static_cast<float>(sum), m, n);
  });
}

}  // namespace llmopt::cuda

#define LLMOPT_GEMV(tokens, dtype, type)                                                        \
  extern "C" __global__ void __launch_bounds__(32 * llmopt::cuda::kGemvWarps)                   \
      linear_w8a8_gemv_##tokens##_##dtype(const llmopt::cuda::LinearW8A8 __grid_constant__ p) { \
    llmopt::cuda::gemv<tokens, type>(p);                                                        \
  }
LLMOPT_GEMV(1, f16, __half)
LLMOPT_GEMV(2, f16, __half)
LLMOPT_GEMV(4, f16, __half)
LLMOPT_GEMV(8, f16, __half)
LLMOPT_GEMV(1, bf16, __nv_bfloat16)
LLMOPT_GEMV(2, bf16, __nv_bfloat16)
LLMOPT_GEMV(4, bf16, __nv_bfloat16)
LLMOPT_GEMV(8, bf16, __nv_bfloat16)
