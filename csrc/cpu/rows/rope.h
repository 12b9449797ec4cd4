// rope: rotary embedding of the first R dims of each head; the others pass through.
//   operands: 0 x [B,H,S,D], 1 cos, 2 sin [B,1,S,R], 3 y [B,H,S,D] (may be x)   ints: [kind: 1 half, 2 interleaved]
// half:        y[i] = x[i] cos[i] - x[i+R/2] sin[i];   y[i+R/2] = x[i+R/2] cos[i+R/2] + x[i] sin[i+R/2]
// interleaved: y[2i] = x[2i] cos[2i] - x[2i+1] sin[2i]; y[2i+1] = x[2i+1] cos[2i+1] + x[2i] sin[2i+1]
#pragma once
#include "cpu/rows/gather.h"

namespace {

template <class A>
struct RopeAccess {
  A x, cos, sin, y;
};

template <class A>
inline void rope_half(RopeAccess<A> as, const char* x, const char* cos, const char* sin, char* y, int64_t half) {
  for_lanes(half, [&](int64_t i, int n) {
    Vec low = as.x.load(x, i, n), high = as.x.load(x, i + half, n);
    Vec a = vfma(low, as.cos.load(cos, i, n), vneg(vmul(high, as.sin.load(sin, i, n))));
    Vec b = vfma(high, as.cos.load(cos, i + half, n), vmul(low, as.sin.load(sin, i + half, n)));
    as.y.store(y, i, a, n);
    as.y.store(y, i + half, b, n);
  });
}

template <class A>
inline void rope_interleaved(RopeAccess<A> as, const char* x, const char* cos, const char* sin, char* y, int64_t dims) {
  float signs[kLanes];
  for (int i = 0; i < kLanes; ++i) signs[i] = i % 2 ? 1.0f : -1.0f;
  const Vec sign = vload(signs);
  for_lanes(dims, [&](int64_t i, int n) {
    Vec v = as.x.load(x, i, n);
    Vec turned = vmul(vmul(vswap_pairs(v), sign), as.sin.load(sin, i, n));
    as.y.store(y, i, vfma(v, as.cos.load(cos, i, n), turned), n);
  });
}

// A row of work is one position of one sequence: its heads share one row of cos and sin, and lie side by side in the
// layout that projections write.
inline RowRange rope_range(const Tensor& x, int threads, int64_t chunk) {
  return chunk_range(x.size[0] * x.size[2], x.size[1] * x.size[3], threads, chunk);
}
inline int64_t rope_chunks(const Step& s, int, int threads) {
  const Tensor& x = s.t[0];
  return chunk_count(x.size[0] * x.size[2], x.size[1] * x.size[3], threads);
}

template <class A>
inline void rope_rows(const Step& s, const RowRange& rows) {
  const Tensor &x = s.t[0], &cos = s.t[1], &sin = s.t[2], &y = s.t[3];
  const int64_t dims = cos.size[3], rest = x.size[3] - dims;
  const int x_item = itemsize(x.dtype), y_item = itemsize(y.dtype);
  const RopeAccess<A> as{A(x.dtype), A(cos.dtype), A(sin.dtype), A(y.dtype)};
  auto angle = [](const Tensor& t, int64_t b, int64_t p) {
    return at(t, (t.size[0] == 1 ? 0 : b * t.stride[0]) + (t.size[2] == 1 ? 0 : p * t.stride[2]));
  };
  for (int64_t r = rows.begin; r < rows.end; ++r) {
    const int64_t b = r / x.size[2], p = r % x.size[2];
    const char *c = angle(cos, b, p), *d = angle(sin, b, p);
    const char* from = at(x, b * x.stride[0] + p * x.stride[2]);
    char* to = at(y, b * y.stride[0] + p * y.stride[2]);
    for (int64_t h = 0; h < x.size[1]; ++h) {
      if (s.i[0] == kRopeHalf)
        rope_half(as, from, c, d, to, dims / 2);
      else
        rope_interleaved(as, from, c, d, to, dims);
      if (rest && from != to) copy_row(x.dtype, from + dims * x_item, y.dtype, to + dims * y_item, rest);
      from += x.stride[1] * x_item;
      to += y.stride[1] * y_item;
    }
  }
}

inline void rope_run(const Step& s, int, int64_t chunk, int threads, const Scratch&) {
  const RowRange rows = rope_range(s.t[0], threads, chunk);
  with_access(s.t, s.num_tensors, [&](auto access) { rope_rows<decltype(access)>(s, rows); });
}

}  // namespace
