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

// y = (v - mean) * scale * (offset + weight) + bias for one row; v(i, lanes) gives the input.
template <class Y, class F>
inline void norm_write(const Norm& a, char* y, char* sum, float mean, float scale, F v) {
  const Vec m = vset(mean), r = vset(scale), offset = vset(a.offset);
  for_lanes(a.width, [&](int64_t i, int n) {
    Vec in = v(i, n);
    Vec out = vmul(vsub(in, m), r);
    if (a.weight.data) out = vmul(out, vadd(offset, vload_as(a.weight.dtype, a.weight.data, i, n)));
    if (a.bias.data) out = vadd(out, vload_as(a.bias.dtype, a.bias.data, i, n));
    if (sum) vstore_as(a.sum.dtype, sum, i, in, n);
    store<Y>(y, i, out, n);
  });
}

template <class Y, class F>
inline void norm_row(const Norm& a, int64_t kind, char* y, char* sum, F v) {
  const float width = static_cast<float>(a.width);
  float mean = 0.0f;
  if (kind == kLayerNorm) mean = sum_over(a.width, v) / width;
  const Vec m = vset(mean);
  const float squares = sum_over(a.width, [&](int64_t i, int n) {
    Vec d = vsub(v(i, n), m);
    return vmul(d, d);
  });
  norm_write<Y>(a, y, sum, mean, 1.0f / __builtin_sqrtf(squares / width + a.eps), v);
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
