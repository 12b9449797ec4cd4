// What every row kernel shares: access to float operands and loops over a row.
#pragma once
#include "cpu/chunks.h"

namespace {

using llmopt::DType;
using llmopt::Scratch;
using llmopt::Step;
using llmopt::Tensor;

// Access to a float operand. Kernels are written once over either: F32 when all their operands are fp32, AnyFloat with
// a well predicted branch a vector otherwise.
struct F32 {
  explicit F32(DType) {}
  Vec load(const char* p, int64_t i, int n = kLanes) const { return vload_as(DType::f32, p, i, n); }
  void store(char* p, int64_t i, Vec a, int n = kLanes) const { vstore_as(DType::f32, p, i, a, n); }
};
struct AnyFloat {
  explicit AnyFloat(DType d) : dtype(d) {}
  Vec load(const char* p, int64_t i, int n = kLanes) const { return vload_as(dtype, p, i, n); }
  void store(char* p, int64_t i, Vec a, int n = kLanes) const { vstore_as(dtype, p, i, a, n); }
  DType dtype;
};

// Whether every operand that is given, from `first` on, is fp32.
inline bool all_f32(const Step& s, int first = 0) {
  for (int k = first; k < s.num_tensors; ++k)
    if (s.t[k].data && s.t[k].dtype != DType::f32) return false;
  return true;
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
