// Products of few rows with a matrix of activations, which is read once from where it lies: packing would read, write
// and read it again. Columns that lie along K are dot products; those that lie side by side add up row by row of K.
#pragma once
#include "cpu/family.h"

namespace {

constexpr int64_t kFewRows = 4;

struct FewRows {
  const float* x;  // [rows][K]
  int64_t rows, K;
  const Tensor &w, &bias, &y;  // w [N, K], bias [N] | none, y [rows, N]

  bool has_dots() const { return w.stride[1] == 1; }
  void finish(int64_t m, int64_t n, int lanes, Vec sum) const {
    if (bias.data) sum = vadd(sum, vload_as(bias.dtype, bias.data, n, lanes));
    vstore_as(y.dtype, y.data, m * y.stride[0] + n, sum, lanes);
  }
};

// Columns n to n + lanes of w, along K; those that are not there repeat the last.
template <DType kWeight>
void dot_columns(const FewRows& p, int64_t n, int lanes) {
  const char* columns[kLanes];
  for (int c = 0; c < kLanes; ++c)
    columns[c] = p.w.data + (n + (c < lanes ? c : lanes - 1)) * p.w.stride[0] * itemsize(kWeight);
  for (int64_t m = 0; m < p.rows; ++m) {
    const float* x = p.x + m * p.K;
    Vec sums[kLanes];
    for (int c = 0; c < kLanes; ++c) sums[c] = vzero();
    int64_t k = 0;
    for (; k + kLanes <= p.K; k += kLanes) {
      const Vec a = vload(x + k);
#pragma GCC unroll 16
      for (int c = 0; c < kLanes; ++c) vfma_acc(sums[c], a, vload_as(kWeight, columns[c], k, kLanes));
    }
    if (const int left = static_cast<int>(p.K - k); left > 0) {
      const Vec a = vload_n(x + k, left);
      for (int c = 0; c < kLanes; ++c) vfma_acc(sums[c], a, vload_as(kWeight, columns[c], k, left));
    }
    p.finish(m, n, lanes, vsum_lanes(sums));
  }
}

// kVecs vectors of columns from n on, the last of them `lanes` wide, row by row of K.
template <DType kWeight, int kVecs>
void add_columns(const FewRows& p, int64_t n, int lanes) {
  const int64_t stride = p.w.stride[1];
  for (int64_t m = 0; m < p.rows; ++m) {
    const float* x = p.x + m * p.K;
    Vec sums[2][kVecs];
    for (int v = 0; v < kVecs; ++v) sums[0][v] = sums[1][v] = vzero();
    auto add = [&](int64_t k, Vec* to) __attribute__((always_inline)) {
      const Vec a = vset(x[k]);
#pragma GCC unroll 4
      for (int v = 0; v < kVecs; ++v)
        vfma_acc(to[v], a, vload_as(kWeight, p.w.data, k * stride + n + v * kLanes, v + 1 < kVecs ? kLanes : lanes));
    };
    int64_t k = 0;
    for (; k + 2 <= p.K; k += 2) add(k, sums[0]), add(k + 1, sums[1]);
    if (k < p.K) add(k, sums[0]);
    for (int v = 0; v < kVecs; ++v)
      p.finish(m, n + v * kLanes, v + 1 < kVecs ? kLanes : lanes, vadd(sums[0][v], sums[1][v]));
  }
}

// Columns [n0, n1).
template <DType kWeight>
void run_few_rows(const FewRows& p, int64_t n0, int64_t n1) {
  if (p.has_dots()) {
    for (int64_t n = n0; n < n1; n += kLanes) dot_columns<kWeight>(p, n, static_cast<int>(min64(kLanes, n1 - n)));
    return;
  }
  int64_t n = n0;
  for (; n + 4 * kLanes <= n1; n += 4 * kLanes) add_columns<kWeight, 4>(p, n, kLanes);
  for (; n < n1; n += kLanes) add_columns<kWeight, 1>(p, n, static_cast<int>(min64(kLanes, n1 - n)));
}

inline void run_few_rows(const FewRows& p, int64_t n0, int64_t n1) {
  if (p.w.dtype == DType::f32) return run_few_rows<DType::f32>(p, n0, n1);
  if (p.w.dtype == DType::f16) return run_few_rows<DType::f16>(p, n0, n1);
  run_few_rows<DType::bf16>(p, n0, n1);
}

}  // namespace
