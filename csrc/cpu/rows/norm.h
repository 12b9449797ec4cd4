// norm: y = n(x + residual) * (offset + weight) + bias over rows, with n = RMS or LayerNorm.
//   operands: 0 x [...,K], 1 residual [...,K] | none, 2 weight [K] | none, 3 bias [K] | none, 4 y [M,K],
//   5 sum [M,K] | none. The dimensions in front of x and residual hold M rows together, at any strides.
//   ints: [kind: 1 RMS, 2 LayerNorm]   floats: [eps, offset]
// Every pass reads x and residual again and adds them in fp32: a row is in L1 after the first pass, and nothing is
// written before the last one, so y and sum may be the same memory as x or residual.
#pragma once
#include "cpu/rows/access.h"

namespace {

// What a row is normalised with: y = ((v - mean) - rest) * scale.
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

// One pass over the distances from a pilot mean, that of the row's first eighth. Subtracting it loses nothing where it
// matters, `rest` keeps what fp32 could not hold of a large mean, and since the pilot's elements are an eighth of the
// row, rest^2 <= 8 * variance whatever the data: the variance keeps all but three bits of its sum of squares.
template <class F>
inline Moments layer_moments(int64_t width, float eps, F v) {
  const float count = static_cast<float>(width);
  const int64_t pilot = min64(width, max64(kLanes, width / 8));
  const float mean = sum_over(pilot, v) / static_cast<float>(pilot);
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

// Weight and bias as fp32: in place where they are, else widened (with the offset added) into the thread's scratch, a
// tile of columns at a time.
constexpr int64_t kTile = static_cast<int64_t>(kLocalBytes / (2 * sizeof(float)));

struct Affine {
  const float *weight, *bias;  // of the tile's first column; nullptr when not given
};

inline const float* widened(const Tensor& t, int64_t first, int64_t n, float offset, float* to) {
  if (!t.data) return nullptr;
  if (t.dtype == DType::f32 && offset == 0.0f) return reinterpret_cast<const float*>(t.data) + first;
  const AnyFloat as(t.dtype);
  const Vec add = vset(offset);
  for_lanes(n, [&](int64_t i, int lanes) { vstore_n(to + i, vadd(as.load(at(t, first), i, lanes), add), lanes); });
  return to;
}

// Writes n columns of one row; v(i, lanes) gives the input.
template <class A, class F>
inline void norm_write(const Step& s, const Moments& moments, Affine affine, char* y, char* sum, int64_t n, F v) {
  const A y_as(s.t[4].dtype), sum_as(s.t[5].dtype);
  const Vec mean = vset(moments.mean), rest = vset(-moments.rest * moments.scale), scale = vset(moments.scale);
  for_lanes(n, [&](int64_t i, int lanes) {
    Vec in = v(i, lanes);
    Vec out = vfma(vsub(in, mean), scale, rest);
    if (affine.weight) out = vmul(out, vload_as(DType::f32, reinterpret_cast<const char*>(affine.weight), i, lanes));
    if (affine.bias) out = vadd(out, vload_as(DType::f32, reinterpret_cast<const char*>(affine.bias), i, lanes));
    if (sum) sum_as.store(sum, i, in, lanes);
    y_as.store(y, i, out, lanes);
  });
}

// row(m, first) returns the function that gives the input of row m from column `first` on. The statistics of the next
// row are asked for before a row is written, so that the latency of their last additions, root and division is hidden.
template <class A, class R>
inline void norm_rows(const Step& s, const RowRange& rows, float* scratch, R row) {
  const Tensor &y = s.t[4], &sum = s.t[5];
  const int64_t width = y.size[1];
  auto moments_of = [&](int64_t m) {
    return s.i[0] == kNormRms ? rms_moments(width, s.f[0], row(m, 0)) : layer_moments(width, s.f[0], row(m, 0));
  };
  Affine affine{};
  Moments moments = moments_of(rows.begin);
  for (int64_t m = rows.begin; m < rows.end; ++m) {
    const Moments next = m + 1 < rows.end ? moments_of(m + 1) : moments;
    for (int64_t first = 0; first < width; first += kTile) {
      const int64_t n = min64(kTile, width - first);
      if (m == rows.begin || width > kTile)
        affine = {widened(s.t[2], first, n, s.f[1], scratch), widened(s.t[3], first, n, 0.0f, scratch + kTile)};
      char* sum_to = sum.data ? at(sum, m * sum.stride[0] + first) : nullptr;
      norm_write<A>(s, moments, affine, at(y, m * y.stride[0] + first), sum_to, n, row(m, first));
    }
    moments = next;
  }
}

template <class A>
inline void norm_inputs(const Step& s, const RowRange& rows, float* scratch) {
  const Tensor &x = s.t[0], &residual = s.t[1];
  const A x_as(x.dtype), residual_as(residual.dtype);
  if (!residual.data) {
    return norm_rows<A>(s, rows, scratch, [&](int64_t m, int64_t first) {
      const char* p = at(x, row_offset(x, m) + first);
      return [=](int64_t i, int n) { return x_as.load(p, i, n); };
    });
  }
  norm_rows<A>(s, rows, scratch, [&](int64_t m, int64_t first) {
    const char *p = at(x, row_offset(x, m) + first), *q = at(residual, row_offset(residual, m) + first);
    return [=](int64_t i, int n) { return vadd(x_as.load(p, i, n), residual_as.load(q, i, n)); };
  });
}

inline int64_t norm_chunks(const Step& s, int, int threads) {
  return chunk_count(s.t[4].size[0], s.t[4].size[1], threads);
}

inline void norm_run(const Step& s, int, int64_t chunk, int threads, const Scratch& scratch) {
  const RowRange rows = chunk_range(s.t[4].size[0], s.t[4].size[1], threads, chunk);
  float* local = reinterpret_cast<float*>(scratch.local);
  // Weight and bias are read as fp32 whatever they are, so the common dtype is that of the others.
  const Tensor others[] = {s.t[0], s.t[1], s.t[4], s.t[5]};
  with_access(others, 4, [&](auto access) { norm_inputs<decltype(access)>(s, rows, local); });
}

}  // namespace
