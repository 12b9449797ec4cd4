// Rows of x on their way in: widened to f32 and normalised.
#pragma once
#include "cpu/linear/problem.h"

namespace {

// A normalised element is ((x - shift) - mean) * scale: x - shift is exact near the mean, so a mean of 1e3 costs no
// digits of the result.
struct RowNorm {
  float shift, mean, scale;
};

struct RowSums {
  float sum, squares;
};

// Sums of (x - shift) and its squares over a row, in four independent chains.
RowSums row_sums(const Problem& p, int64_t m, float shift) {
  Vec sum[4] = {vzero(), vzero(), vzero(), vzero()}, squares[4] = {vzero(), vzero(), vzero(), vzero()};
  const Vec s = vset(shift);
  const int64_t row = m * p.x.stride[0];
  int64_t k = 0;
  for (; k + 4 * kLanes <= p.K; k += 4 * kLanes)
    for (int i = 0; i < 4; ++i) {
      Vec d = vsub(vload_as(p.x.dtype, p.x.data, row + k + i * kLanes, kLanes), s);
      sum[i] = vadd(sum[i], d);
      squares[i] = vfma(d, d, squares[i]);
    }
  float tail[kLanes];
  for (; k < p.K; k += kLanes) {
    const int n = static_cast<int>(min64(kLanes, p.K - k));
    vstore(tail, vsub(vload_as(p.x.dtype, p.x.data, row + k, n), s));
    Vec d = vload_n(tail, n);
    sum[0] = vadd(sum[0], d);
    squares[0] = vfma(d, d, squares[0]);
  }
  return {vreduce_add(vadd(vadd(sum[0], sum[1]), vadd(sum[2], sum[3]))),
          vreduce_add(vadd(vadd(squares[0], squares[1]), vadd(squares[2], squares[3])))};
}

RowNorm row_norm(const Problem& p, int64_t m) {
  if (p.norm == kNormNone) return {0.0f, 0.0f, 1.0f};
  const float inverse = 1.0f / static_cast<float>(p.K);
  if (p.norm == kNormRms) {
    const float mean_square = row_sums(p, m, 0.0f).squares * inverse;
    return {0.0f, 0.0f, 1.0f / __builtin_sqrtf(mean_square + p.eps)};
  }
  const float shift = row_sums(p, m, 0.0f).sum * inverse;
  const RowSums s = row_sums(p, m, shift);
  const float mean = s.sum * inverse;
  const float variance = s.squares * inverse - mean * mean;
  return {shift, mean, 1.0f / __builtin_sqrtf((variance > 0 || variance != variance ? variance : 0.0f) + p.eps)};
}

inline Vec load_optional(const Tensor& t, int64_t k, int n) {
  return t.data ? vload_as(t.dtype, t.data, k, n) : vzero();
}

// block[r]: kLanes elements of one of `rows` rows from k on, `n` of them in the row, becomes normalised.
inline void normalize(const Problem& p, const RowNorm* norms, int rows, int64_t k, int n, Vec* block) {
  const Vec weight = p.norm_weight.data ? vadd(vset(p.norm_offset), load_optional(p.norm_weight, k, n)) : vset(1.0f);
  const Vec bias = load_optional(p.norm_bias, k, n);
  for (int r = 0; r < rows; ++r) {
    const Vec d = vsub(vsub(block[r], vset(norms[r].shift)), vset(norms[r].mean));
    block[r] = vfma(vmul(d, vset(norms[r].scale)), weight, bias);
    if (n == kLanes) continue;
    float whole[kLanes];  // what the norm made of the pad is cut off again
    vstore(whole, block[r]);
    block[r] = vload_n(whole, n);
  }
}

template <DType kIn>
inline __attribute__((always_inline)) void load_rows(const Tensor& x, int64_t row0, int rows, int64_t k, int n,
                                                     Vec* block) {
  const int64_t stride = x.stride[0];
  int64_t at = row0 * stride + k;
  if (n == kLanes)
    for (int r = 0; r < rows; ++r, at += stride) block[r] = vload_as(kIn, x.data, at, kLanes);
  else
    for (int r = 0; r < rows; ++r, at += stride) block[r] = vload_as(kIn, x.data, at, n);
}

// block[r] = kLanes elements of row row0 + r from k on, normalised, zero past K.
inline __attribute__((always_inline)) void load_block(const Problem& p, const RowNorm* norms, int64_t row0, int rows,
                                                      int64_t k, Vec* block) {
  const int n = static_cast<int>(max64(0, min64(kLanes, p.K - k)));
  if (p.x.dtype == DType::f32)
    load_rows<DType::f32>(p.x, row0, rows, k, n, block);
  else if (p.x.dtype == DType::f16)
    load_rows<DType::f16>(p.x, row0, rows, k, n, block);
  else
    load_rows<DType::bf16>(p.x, row0, rows, k, n, block);
  if (p.norm != kNormNone) normalize(p, norms, rows, k, n, block);
}

}  // namespace
