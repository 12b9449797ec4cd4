// The packed weight layout: panels of kPanel columns, each a stream of k, then of columns.
//   f32, f16:  [panels][K][kPanel]
//   bf16:      [panels][ceil(K / 2)][kPanel][2]: one 64-byte load holds k and k + 1 of 16 columns, and widening either
//              is a shift or a mask instead of a shuffle.
// Columns past N and the k past an odd K are zero.
#pragma once
#include "cpu/family.h"

namespace {

constexpr int kPanel = 2 * kLanes;  // NR
// MR: accumulators of the largest register tile leave room for two weight vectors and one broadcast.
constexpr int kMaxRows = kVecRegisters == 32 ? 14 : kLanes == 8 ? 6 : 4;
static_assert(kMaxRows <= kLanes, "rows of a tile are transposed as one square block");

// Sums of one row and column in a stream, over every so-many-th k: several chains where there are few sums. Their
// number does not depend on the panels read at once, so that neither do the results.
constexpr int stream_sets(int rows) { return rows == 1 && kVecRegisters == 32 ? 2 : 1; }

// Panels whose sums fit the registers together, beside a broadcast and some weights. One core fetches faster from
// several streams than from one: its prefetcher goes on ahead in each of them.
constexpr int kMostStreams = 4;
constexpr int stream_panels(int64_t rows) {
  if (rows == 0) return kMostStreams;
  const int64_t fit = (kVecRegisters - 6) / (2 * rows * stream_sets(static_cast<int>(rows)));
  return static_cast<int>(fit < 1 ? 1 : fit < kMostStreams ? fit : kMostStreams);
}
constexpr bool sums_fit(int rows) {
  return rows == 0 || (rows * stream_panels(rows) <= kMaxRows && sums_fit(rows - 1));
}
static_assert(sums_fit(kMaxRows), "the sums of all panels lie in the memory of one register tile");

// The same pointer, of which the compiler does not know so, and no load goes past it: the panels of a step take their
// turns with the registers.
template <class T>
inline __attribute__((always_inline)) T* read_again(T* p) {
  asm volatile("" : "+r"(p) : : "memory");
  return p;
}

// f(panel, row, half) for every vector of sums of kPanels register tiles, unrolled.
template <int kPanels, int kRows, class F>
inline __attribute__((always_inline)) void each_sum(F f) {
#pragma GCC unroll 4
  for (int p = 0; p < kPanels; ++p)
#pragma GCC unroll 16
    for (int m = 0; m < kRows; ++m)
#pragma GCC unroll 2
      for (int v = 0; v < 2; ++v) f(p, m, v);
}

inline int64_t padded_k(int64_t k, DType weight) { return weight == DType::bf16 ? (k + 1) / 2 * 2 : k; }
inline int64_t panel_bytes(int64_t k, DType weight) { return padded_k(k, weight) * kPanel * itemsize(weight); }
// Element index inside a panel.
inline int64_t packed_index(int64_t k, int64_t column, DType weight) {
  if (weight == DType::bf16) return (k / 2 * kPanel + column) * 2 + k % 2;
  return k * kPanel + column;
}

// The rows of a tile where they lie, `stride` bytes apart. A pointer for four of them, so that all fit the registers.
template <int kRows>
class RowPointers {
 public:
  RowPointers(const char* first, int64_t stride) : stride_(stride), thrice_(3 * stride) {
#pragma GCC unroll 4
    for (int p = 0; p < kPointers; ++p) at_[p] = first + 4 * p * stride;
  }
  // `offset` bytes into row m.
  inline __attribute__((always_inline)) const char* row(int m, int offset) const {
    const char* at = at_[m / 4] + offset;
    return m % 4 == 0 ? at : m % 4 == 1 ? at + stride_ : m % 4 == 2 ? at + 2 * stride_ : at + thrice_;
  }
  inline __attribute__((always_inline)) void advance(int bytes) {
#pragma GCC unroll 4
    for (int p = 0; p < kPointers; ++p) at_[p] += bytes;
  }

 private:
  static constexpr int kPointers = (kRows + 3) / 4;
  const char* at_[kPointers];
  const int64_t stride_, thrice_;
};

// How a micro-kernel reads weights: one `step` covers kSteps values of k and gives f(i, b0, b1) the two column vectors
// of each.
struct WeightF32 {
  static constexpr int kSteps = 1;
  static constexpr int kStepBytes = kPanel * 4;
  template <class F>
  static inline __attribute__((always_inline)) void step(const char* b, F f) {
    const float* p = reinterpret_cast<const float*>(b);
    f(0, vload(p), vload(p + kLanes));
  }
};
struct WeightF16 {
  static constexpr int kSteps = 1;
  static constexpr int kStepBytes = kPanel * 2;
  template <class F>
  static inline __attribute__((always_inline)) void step(const char* b, F f) {
    const uint16_t* p = reinterpret_cast<const uint16_t*>(b);
    f(0, vload_f16(p), vload_f16(p + kLanes));
  }
};
struct WeightBF16 {
  static constexpr int kSteps = 2;
  static constexpr int kStepBytes = kPanel * 4;
  template <class F>
  static inline __attribute__((always_inline)) void step(const char* b, F f) {
    const uint16_t* p = reinterpret_cast<const uint16_t*>(b);
    f(0, vload_bf16_even(p), vload_bf16_even(p + kPanel));
    f(1, vload_bf16_odd(p), vload_bf16_odd(p + kPanel));
  }
};

}  // namespace
