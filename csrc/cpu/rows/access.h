// What every row kernel shares: access to float operands and loops over a row.
#pragma once
#include "cpu/chunks.h"

namespace {

// Access to a float operand. Kernels are written once over any of these: Float<d> when all their operands have the
// dtype d, AnyFloat, with a branch or two for each vector, when they differ.
template <DType d>
struct Float {
  static constexpr DType dtype = d;
  explicit Float(DType) {}
  Vec load(const char* p, int64_t i, int n = kLanes) const { return vload_as(d, p, i, n); }
  void store(char* p, int64_t i, Vec a, int n = kLanes) const { vstore_as(d, p, i, a, n); }
};
struct AnyFloat {
  explicit AnyFloat(DType d) : dtype(d) {}
  Vec load(const char* p, int64_t i, int n = kLanes) const { return vload_as(dtype, p, i, n); }
  void store(char* p, int64_t i, Vec a, int n = kLanes) const { vstore_as(dtype, p, i, a, n); }
  DType dtype;
};

// The dtype of every tensor that is given, or b8 when they differ.
inline DType common_dtype(const Tensor* t, int n) {
  for (int k = 1; k < n; ++k)
    if (t[k].data && t[k].dtype != t[0].dtype) return DType::b8;
  return t[0].dtype;
}

// Calls f with an access object for one dtype.
template <class F>
inline void with_float(DType d, F f) {
  if (d == DType::f32) return f(Float<DType::f32>(d));
  if (d == DType::f16) return f(Float<DType::f16>(d));
  f(Float<DType::bf16>(d));
}

// Calls f with an access object (to take the type of) that fits all of the float operands.
template <class F>
inline void with_access(const Tensor* t, int n, F f) {
  const DType common = common_dtype(t, n);
  if (common == DType::b8) return f(AnyFloat(common));
  with_float(common, f);
}

inline char* at(const Tensor& t, int64_t index) { return t.data + index * itemsize(t.dtype); }

// Where row m of the last dimension begins, in elements.
inline int64_t row_offset(const Tensor& t, int64_t m) { return position_offset(t, t.ndim - 1, m); }

// Sum over i < n of term(i, lanes), which returns the terms of lanes i.. as a Vec. Four accumulators hide the latency
// of the additions and keep the rounding error of long rows small.
template <class F>
inline float sum_over(int64_t n, F term) {
  Vec s0 = vzero(), s1 = vzero(), s2 = vzero(), s3 = vzero();
  int64_t i = 0;
  for (; i + 4 * kLanes <= n; i += 4 * kLanes) {
    s0 = vadd(s0, term(i, kLanes));
    s1 = vadd(s1, term(i + kLanes, kLanes));
    s2 = vadd(s2, term(i + 2 * kLanes, kLanes));
    s3 = vadd(s3, term(i + 3 * kLanes, kLanes));
  }
  for (; i + kLanes <= n; i += kLanes) s0 = vadd(s0, term(i, kLanes));
  if (i < n) s1 = vadd(s1, vkeep(term(i, static_cast<int>(n - i)), static_cast<int>(n - i)));
  return vreduce_add(vadd(vadd(s0, s1), vadd(s2, s3)));
}

// Calls body(i, lanes) for all of [0, n) in vectors.
template <class F>
inline void for_lanes(int64_t n, F body) {
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) body(i, kLanes);
  if (i < n) body(i, static_cast<int>(n - i));
}

}  // namespace
