// What a launch is told: plain records that Python (native/cuda.py), the launchers and the kernels share byte for byte.
// Strides are in elements. Pointers are device addresses; those marked "or null" may be left out.
#pragma once
#include "runtime/tensor.h"

namespace llmopt::cuda {

// y = act(x_scale[m] * w_scale[n] * sum_k x[m,k] w[n,k] + bias[n]) + residual[m,n]
// Rows of x and w begin at multiples of 16 bytes and are readable up to the next one; K itself may be any number.
struct LinearW8A8 {
  const int8_t* x;       // [M, K]
  const int8_t* w;       // [N, K]
  const float* x_scale;  // [M]
  const float* w_scale;  // [N]
  const void* bias;      // [N] dtype, or null
  const void* residual;  // [M, N] dtype, or null
  void* y;               // [M, N] dtype
  int64_t x_stride, w_stride, residual_stride, y_stride;
  int32_t m, n, k;
  int32_t dtype;  // DType: f16 or bf16
  int32_t act;    // Activation
  int32_t reserved;
};

// y = act(sum_k x[m,k] w[n,k] + bias[n]) + residual[m,n], w = scale * code + offset; without offsets scale * (code -
// 8). Two codes 0..15 a byte, the even input in the low half. Rows of x begin at multiples of 16 bytes.
struct LinearW4A16 {
  const void* x;         // [M, K] dtype
  const uint8_t* codes;  // [N, K/2]
  const float* scale;    // [N, K/group]
  const float* offset;   // [N, K/group], or null
  const void* bias;      // [N] dtype, or null
  const void* residual;  // [M, N] dtype, or null
  void* y;               // [M, N] dtype
  int64_t x_stride, residual_stride, y_stride;
  int32_t m, n, k;
  int32_t group;  // 32, 64 or 128
  int32_t dtype;  // DType: f16 or bf16
  int32_t act;    // Activation
};

// o = softmax(scale * q k^T) v for one query position a sequence, over the first lengths[b] keys, or `keys` of each.
// Heads h of q read head h / (H / Hkv) of the cache. A sequence without keys gives zeros.
struct AttentionDecode {
  const void* q;         // [B, H, D] f16, dense
  const void* k;         // [B, Hkv, S, D] f16 or s8, rows dense
  const void* v;         // as k
  const float* k_scale;  // [B, Hkv, S] where the cache is s8: a key is its codes times its scale
  const float* v_scale;
  const int32_t* lengths;  // [B], at most S; or null
  void* o;                 // [B, H, D] f16, dense
  float* partial;          // B * H * splits * (D + 2) floats of scratch; null where splits is 1
  int32_t* finished;       // B * Hkv * ceil(H / Hkv / 8) counters, zero before the first launch; left at zero
  int64_t batch_stride, head_stride, row_stride;                    // of k and v
  int64_t scale_batch_stride, scale_head_stride, scale_row_stride;  // of k_scale and v_scale
  float scale;
  int32_t batch, heads, kv_heads, head_dim, splits;
  int32_t cache_dtype;  // DType: f16 or s8
  int32_t keys;         // of every sequence, where there are no lengths
};

}  // namespace llmopt::cuda
