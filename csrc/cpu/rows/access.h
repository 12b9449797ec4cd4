// What every row kernel shares: float dtypes as types, dispatch from DType to them, and loops over a row.
#pragma once
#include "cpu/chunks.h"

namespace {

using llmopt::DType;
using llmopt::Scratch;
using llmopt::Step;
using llmopt::Tensor;

struct F32 {
  static constexpr DType dtype = DType::f32;
};
struct F16 {
  static constexpr DType dtype = DType::f16;
};
struct BF16 {
  static constexpr DType dtype = DType::bf16;
};

// Calls f with the type that stands for d.
template <class F>
inline void with_float(DType d, F f) {
  if (d == DType::f32) return f(F32{});
  if (d == DType::f16) return f(F16{});
  f(BF16{});
}

template <class T>
inline Vec load(const char* p, int64_t i, int n = kLanes) {
  return vload_as(T::dtype, p, i, n);
}
template <class T>
inline void store(char* p, int64_t i, Vec a, int n = kLanes) {
  vstore_as(T::dtype, p, i, a, n);
}

inline char* at(const Tensor& t, int64_t index) { return t.data + index * itemsize(t.dtype); }

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
