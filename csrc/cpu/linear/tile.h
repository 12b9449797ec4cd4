// Micro-kernels: sums[rows][kPanel] (+)= tile[k][rows] * panel[k][kPanel], all sums in registers.
#pragma once
#include "cpu/linear/layout.h"

namespace {

struct TileArgs {
  const float* a;     // [steps * kSteps][rows]
  const char* b;      // the panel, from the first k of the block on
  int64_t steps;      // of the weight's kSteps values of k each
  const char* ahead;  // weights wanted next: a stream's own or its successor's, otherwise those of the next chunk ...
  int64_t ahead_stride;  // ... and how many bytes of them to ask for in a step (a stream asks for as many as it uses)
  float* sums;
  bool accumulate;  // start from `sums` instead of zero
};

// kStream: the weights come from DRAM, are used once and are widened on the way. Otherwise they are f32 in L2 already,
// and the next ones are fetched while these are used.
template <class Weight, int kRows, bool kStream>
void tile(const TileArgs& args) {
  // Few rows have few sums: several k in flight keep the FMA pipes busy over their latency.
  constexpr int kSets = kRows == 1 ? 4 : kRows == 2 ? 2 : 1;
  constexpr int kUnroll = 4 / Weight::kSteps;
  Vec acc[kSets][kRows][2];
#pragma GCC unroll 16
  for (int s = 0; s < kSets; ++s)
#pragma GCC unroll 16
    for (int m = 0; m < kRows; ++m) acc[s][m][0] = acc[s][m][1] = vzero();
  if (args.accumulate)
#pragma GCC unroll 16
    for (int m = 0; m < kRows; ++m) {
      acc[0][m][0] = vload(args.sums + m * kPanel);
      acc[0][m][1] = vload(args.sums + m * kPanel + kLanes);
    }
  const float* a = args.a;
  const char* b = args.b;
  const char* ahead = args.ahead;
  auto step = [&](int u) __attribute__((always_inline)) {
    if (kStream) {
      __builtin_prefetch(ahead);
      if (Weight::kStepBytes > 64) __builtin_prefetch(ahead + 64);
      ahead += Weight::kStepBytes;
    } else {
      __builtin_prefetch(ahead, 0, 2);
      ahead += args.ahead_stride;
    }
    Weight::step(b, [&](int i, Vec b0, Vec b1) __attribute__((always_inline)) {
      const int s = (u * Weight::kSteps + i) % kSets;
#pragma GCC unroll 16
      for (int m = 0; m < kRows; ++m) {
        const Vec x = vset(a[m]);
        vfma_acc(acc[s][m][0], x, b0);
        vfma_acc(acc[s][m][1], x, b1);
      }
      a += kRows;
    });
    b += Weight::kStepBytes;
  };
  int64_t n = args.steps;
  for (; n >= kUnroll; n -= kUnroll)
#pragma GCC unroll 4
    for (int u = 0; u < kUnroll; ++u) step(u);
  for (; n > 0; --n) step(0);
#pragma GCC unroll 16
  for (int m = 0; m < kRows; ++m)
#pragma GCC unroll 2
    for (int v = 0; v < 2; ++v) {
      Vec sum = acc[0][m][v];
#pragma GCC unroll 4
      for (int s = 1; s < kSets; ++s) sum = vadd(sum, acc[s][m][v]);
      vstore(args.sums + m * kPanel + v * kLanes, sum);
    }
}

using TileFunction = void (*)(const TileArgs&);

// The kernel for a height of kRows or less; rows >= 1.
template <class Weight, bool kStream, int kRows = kMaxRows>
TileFunction tile_function(int64_t rows) {
  if constexpr (kRows > 1) {
    if (rows < kRows) return tile_function<Weight, kStream, kRows - 1>(rows);
  }
  return tile<Weight, kRows, kStream>;
}

inline TileFunction stream_tile(DType weight, int64_t rows) {
  switch (weight) {
    case DType::f16:
      return tile_function<WeightF16, true>(rows);
    case DType::bf16:
      return tile_function<WeightBF16, true>(rows);
    default:
      return tile_function<WeightF32, true>(rows);
  }
}
inline TileFunction blocked_tile(int64_t rows) { return tile_function<WeightF32, false>(rows); }
inline int steps_of(DType weight) { return weight == DType::bf16 ? WeightBF16::kSteps : WeightF32::kSteps; }

// `steps` steps of a 16-bit panel as f32. Many tiles share the work, which in each of them would take FMA slots.
template <class Weight>
void widen(const char* b, int64_t steps, float* to) {
  for (; steps > 0; --steps, b += Weight::kStepBytes)
    Weight::step(b, [&](int, Vec b0, Vec b1) __attribute__((always_inline)) {
      vstore(to, b0);
      vstore(to + kLanes, b1);
      to += kPanel;
    });
}

}  // namespace
