// norm: y = n(x + residual) * (offset + weight) + bias over rows, with n = RMS or LayerNorm.
//   operands: 0 x [M,K], 1 residual [M,K] | none, 2 weight [K] | none, 3 bias [K] | none, 4 y [M,K], 5 sum [M,K] | none
//   ints: [kind: 1 RMS, 2 LayerNorm]   floats: [eps, offset]
// Every pass reads x and residual again and adds them in fp32: a row is in L1 after the first pass, and nothing is
// written before the last one, so y and sum may be the same memory as x or residual.
#pragma once
#include "cpu/rows/access.h"

namespace {

enum NormKind : int64_t { kRms = 1, kLayerNorm = 2 };

// What a row is normalised with: y = ((v - mean) - rest) * scale. `rest` is what fp32 could not hold of the mean: with
// a mean of 1000 it is 3e-5, which would otherwise be the error of every output.
struct Moments {
  float mean, rest, scale;
};

template <class F>
inline Moments rms_moments(int64_t width, float eps, F v) {
  const float squares = sum_over(width, [&](int64_t i, int n) {
    Vec a = v(i, n);
    return vmul(a, a);
  });
  return {0.0f, 0.0f, 1.0f / __builtin_sqrtf(squares / static_cast<float>(width) + eps)};
}

template <class F>
inline Moments layer_moments(int64_t width, float eps, F v) {
  const float count = static_cast<float>(width);
  const float mean = sum_over(width, v) / count;
  const Vec m = vset(mean);
  Vec d0 = vzero(), d1 = vzero(), s0 = vzero(), s1 = vzero();
  int64_t i = 0;
  for (; i + 2 * kLanes <= width; i += 2 * kLanes) {
    Vec a = vsub(v(i, kLanes), m), b = vsub(v(i + kLanes, kLanes), m);
    d0 = vadd(d0, a);
    d1 = vadd(d1, b);
    s0 = vfma(a, a, s0);
    s1 = vfma(b, b, s1);
  }
  for (; i < width; i += kLanes) {
    const int n = static_cast<int>(min64(kLanes, width - i));
    Vec a = vkeep(vsub(v(i, n), m), n);
    d0 = vadd(d0, a);
    s0 = vfma(a, a, s0);
  }
  const float rest = vreduce_add(vadd(d0, d1)) / count;
  float variance = vreduce_add(vadd(s0, s1)) / count - rest * rest;
  if (variance < 0.0f) variance = 0.0f;
  return {mean, rest, 1.0f / __builtin_sqrtf(variance + eps)};
}

// One row; v(i, lanes) gives the input.
template <class A, class F>
inline void norm_row(const Step& s, char* y, char* sum, F v) {
  const Tensor &weight = s.t[2], &bias = s.t[3];
  const A weight_as(weight.dtype), bias_as(bias.dtype), y_as(s.t[4].dtype), sum_as(s.t[5].dtype);
  const int64_t width = s.t[4].size[1];
  const float eps = s.f[0];
  const Moments moments = s.i[0] == kRms ? rms_moments(width, eps, v) : layer_moments(width, eps, v);
  const Vec mean = vset(moments.mean), rest = vset(-moments.rest * moments.scale), scale = vset(moments.scale);
  const Vec offset = vset(s.f[1]);
  for_lanes(width, [&](int64_t i, int n) {
    Vec in = v(i, n);
    Vec out = vfma(vsub(in, mean), scale, rest);
    if (weight.data) out = vmul(out, vadd(offset, weight_as.load(weight.data, i, n)));
    if (bias.data) out = vadd(out, bias_as.load(bias.data, i, n));
    if (sum) sum_as.store(sum, i, in, n);
    y_as.store(y, i, out, n);
  });
}

template <class A>
inline void norm_rows(const Step& s, const RowRange& rows) {
  const Tensor &x = s.t[0], &residual = s.t[1], &y = s.t[4], &sum = s.t[5];
  const A x_as(x.dtype), residual_as(residual.dtype);
  for (int64_t m = rows.begin; m < rows.end; ++m) {
    const char* from = at(x, m * x.stride[0]);
    char* to = at(y, m * y.stride[0]);
    char* sum_to = sum.data ? at(sum, m * sum.stride[0]) : nullptr;
    if (!residual.data) {
      norm_row<A>(s, to, sum_to, [&](int64_t i, int n) { return x_as.load(from, i, n); });
      continue;
    }
    const char* other = at(residual, m * residual.stride[0]);
    norm_row<A>(s, to, sum_to, [&](int64_t i, int n) {
      return vadd(x_as.load(from, i, n), residual_as.load(other, i, n));
    });
  }
}

inline int64_t norm_chunks(const Step& s, int, int threads) {
  return chunk_count(s.t[4].size[0], s.t[4].size[1], threads);
}

inline void norm_run(const Step& s, int, int64_t chunk, int threads, const Scratch&) {
  const RowRange rows = chunk_range(s.t[4].size[0], s.t[4].size[1], threads, chunk);
  if (all_f32(s)) norm_rows<F32>(s, rows);
  else norm_rows<AnyFloat>(s, rows);
}

}  // namespace
