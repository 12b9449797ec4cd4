// linear_w4a16 for up to 8 tokens: 4-bit weights are widened where they are used. One warp: two output channels, all
// tokens; a lane takes 8 codes (4 bytes) and the 8 inputs (16 bytes) they belong to, so that a warp reads both densely.
#include "cuda/gemv.h"
#include "cuda/problems.h"

namespace llmopt::cuda {

// Eight codes as floats, less `zero` (0 or 8). 0x6400 | code is 1024 + code in half precision, two at a time.
LLMOPT_DEVICE void widen(uint32_t codes, float zero, float (&out)[8]) {
  const __half2 bias = __float2half2_rn(1024.0f + zero);
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const uint32_t bits = ((codes >> 4 * i) & 0x000f000fu) | 0x64006400u;
    __half2 two;
    memcpy(&two, &bits, sizeof two);
    const float2 values = __half22float2(__hsub2(two, bias));
    out[i] = values.x;
    out[i + 4] = values.y;
  }
}

template <int kTokens, bool kHasOffset, class T>
LLMOPT_DEVICE void gemv(const LinearW4A16& p) {
  const int lane = threadIdx.x % 32;
  const int n0 = first_channel();
  if (n0 >= p.n) return;
  const Global<const uint8_t> codes(p.codes);
  const auto x = global<T>(p.x);
  const auto scale = global<float>(p.scale), offset = global<float>(p.offset);
  const int words = p.k / 8, groups = p.k / p.group;
  float sums[kGemvChannels][kTokens] = {};
  constexpr int kUnroll = kTokens < 4 ? 2 : 1;  // two at once are more than the registers hold for many tokens
#pragma unroll kUnroll
  for (int word = lane; word < words; word += 32) {
    float weights[kGemvChannels][8], factor[kGemvChannels], shift[kGemvChannels];
#pragma unroll
    for (int c = 0; c < kGemvChannels; ++c) {
      const int64_t n = n0 + c < p.n ? n0 + c : n0;
      const int64_t group = n * groups + word * 8 / p.group;
      widen(load_streamed<uint32_t>(codes + (n * words + word) * 4), kHasOffset ? 0.0f : 8.0f, weights[c]);
      factor[c] = load(scale + group);
      if (kHasOffset) shift[c] = load(offset + group);
    }
#pragma unroll
    for (int t = 0; t < kTokens; ++t) {
      const int m = t < p.m ? t : 0;
      const auto inputs = unpack<T, 8>(load<uint4>(x + m * p.x_stride + word * 8));
      float dots[kGemvChannels] = {}, total = 0.0f;
#pragma unroll
      for (int i = 0; i < 8; ++i) {
        const float input = to_float(inputs.at[i]);
        if (kHasOffset) total += input;
#pragma unroll
        for (int c = 0; c < kGemvChannels; ++c) dots[c] += input * weights[c][i];
      }
#pragma unroll
      for (int c = 0; c < kGemvChannels; ++c) {
        sums[c][t] += factor[c] * dots[c];
        if (kHasOffset) sums[c][t] += shift[c] * total;
      }
    }
  }
  const Epilogue<T> epilogue(p);
  finish_warp(sums, n0, p.m, p.n, [&](float sum, int m, int n) { epilogue.finish(sum, m, n); });
}

}  // namespace llmopt::cuda

#define LLMOPT_GEMV(tokens, form, has_offset, dtype, type)                                                 \
  extern "C" __global__ void __launch_bounds__(32 * llmopt::cuda::kGemvWarps)                              \
      linear_w4a16_gemv_##tokens##_##form##_##dtype(const llmopt::cuda::LinearW4A16 __grid_constant__ p) { \
    llmopt::cuda::gemv<tokens, has_offset, type>(p);                                                       \
  }
#define LLMOPT_GEMV_TOKENS(tokens)                           \
  LLMOPT_GEMV(tokens, symmetric, false, f16, __half)         \
  LLMOPT_GEMV(tokens, asymmetric, true, f16, __half)         \
  LLMOPT_GEMV(tokens, symmetric, false, bf16, __nv_bfloat16) \
  LLMOPT_GEMV(tokens, asymmetric, true, bf16, __nv_bfloat16)
LLMOPT_GEMV_TOKENS(1)
LLMOPT_GEMV_TOKENS(2)
LLMOPT_GEMV_TOKENS(4)
LLMOPT_GEMV_TOKENS(8)
