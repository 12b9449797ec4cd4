// norm: y = n(x + residual) * (offset + weight) + bias over rows, with n = RMS or LayerNorm.
//   operands: 0 x [M,K], 1 residual [M,K] | none, 2 weight [K] | none, 3 bias [K] | none, 4 y [M,K], 5 sum [M,K] | none
//   ints: [kind: 1 RMS, 2 LayerNorm]   floats: [eps, offset]
// Every pass reads x and residual again and adds them in fp32: a row is in L1 after the first pass, and nothing is
// written before the last one, so y and sum may be the same memory as x or residual.
#pragma once
#include "cpu/rows/access.h"

namespace {

enum NormKind : int64_t { kRms = 1, kLayerNorm = 2 };

struct Norm {
  const Tensor &x, &residual, &weight, &bias, &y, &sum;
  int64_t width;
  float eps, offset;
};

inline Norm norm_of(const Step& s) {
  return {s.t[0], s.t[1], s.t[2], s.t[3], s.t[4], s.t[5], s.t[4].size[1], s.f[0], s.f[1]};
}

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
template <class Y, class F>
inline void norm_row(const Norm& a, int64_t kind, char* y, char* sum, F v) {
  const Moments moments = kind == kRms ? rms_moments(a.width, a.eps, v) : layer_moments(a.width, a.eps, v);
  const Vec mean = vset(moments.mean), rest = vset(-moments.rest * moments.scale), scale = vset(moments.scale);
  const Vec offset = vset(a.offset);
  for_lanes(a.width, [&](int64_t i, int n) {
    Vec in = v(i, n);
    Vec out = vfma(vsub(in, mean), scale, rest);
    if (a.weight.data) out = vmul(out, vadd(offset, vload_as(a.weight.dtype, a.weight.data, i, n)));
    if (a.bias.data) out = vadd(out, vload_as(a.bias.dtype, a.bias.data, i, n));
    if (sum) vstore_as(a.sum.dtype, sum, i, in, n);
    store<Y>(y, i, out, n);
  });
}

inline int64_t norm_chunks(const Step& s, int, int threads) {
  return chunk_count(s.t[4].size[0], s.t[4].size[1], threads);
}

inline void norm_run(const Step& s, int, int64_t chunk, int threads, const Scratch&) {
  const Norm a = norm_of(s);
  const RowRange rows = chunk_range(a.y.size[0], a.width, threads, chunk);
  with_float(a.x.dtype, [&](auto x_type) {
    using X = decltype(x_type);
    with_float(a.y.dtype, [&](auto y_type) {
      using Y = decltype(y_type);
      for (int64_t m = rows.begin; m < rows.end; ++m) {
        const char* x = at(a.x, m * a.x.stride[0]);
        char* y = at(a.y, m * a.y.stride[0]);
        char* sum = a.sum.data ? at(a.sum, m * a.sum.stride[0]) : nullptr;
        if (!a.residual.data) {
          norm_row<Y>(a, s.i[0], y, sum, [&](int64_t i, int n) { return load<X>(x, i, n); });
          continue;
        }
        const char* residual = at(a.residual, m * a.residual.stride[0]);
        norm_row<Y>(a, s.i[0], y, sum, [&](int64_t i, int n) {
          return vadd(load<X>(x, i, n), vload_as(a.residual.dtype, residual, i, n));
        });
      }
    });
  });
}

}  // namespace
