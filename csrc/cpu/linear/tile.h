// Micro-kernels: sums[rows][kPanel] (+)= tile[k][rows] * panel[k][kPanel], all sums in registers.
#pragma once
#include "cpu/linear/layout.h"

namespace {

struct TileArgs {
  const float* a;     // [steps * kSteps][rows], or rows that are a_stride apart
  const char* b;      // the panel, from the first k of the block on
  int64_t steps;      // of the weight's kSteps values of k each
  const char* ahead;  // weights wanted next: a stream's own or its successor's, otherwise those of the next chunk ...
  int64_t ahead_stride;  // ... and how many bytes of them to ask for in a step (a stream asks for as many as it uses)
  float* sums;           // [panels][rows][kPanel]
  bool accumulate;       // start from `sums` instead of zero
  int64_t panel_bytes;   // from one panel of several to the next
  int64_t a_stride = 0;
};

// One step's values of the rows of a tile, as prepared: [k][rows].
template <int kRows>
struct PreparedRows {
  const float* a;

  explicit PreparedRows(const TileArgs& args) : a(args.a) {}
  Vec value(int i, int m) const { return vset(a[i * kRows + m]); }
  void advance(int steps) { a += steps * kRows; }
  void read_anew() { a = read_again(a); }
};

// The same where the rows lie.
template <int kRows>
struct RowsInPlace {
  RowPointers<kRows> rows;

  explicit RowsInPlace(const TileArgs& args) : rows(reinterpret_cast<const char*>(args.a), args.a_stride * 4) {}
  inline __attribute__((always_inline)) Vec value(int i, int m) const {
    return vset(*reinterpret_cast<const float*>(rows.row(m, 4 * i)));
  }
  inline __attribute__((always_inline)) void advance(int steps) { rows.advance(4 * steps); }
  void read_anew() {}
};

// kStream: the weights come from DRAM, are used once and are widened on the way; kPanels of them side by side.
// Otherwise they are f32 in L2 already, and the next ones are fetched while these are used.
template <class Weight, template <int> class Rows, int kRows, bool kStream, int kPanels = 1>
void tile(const TileArgs& args) {
  static_assert(kStream || kPanels == 1);
  // Few rows have few sums: several k in flight keep the FMA pipes busy over their latency.
  constexpr int kSets = kStream ? stream_sets(kRows) : kRows == 1 ? 4 : kRows == 2 ? 2 : 1;
  constexpr int kUnroll = 4 / Weight::kSteps;
  Vec acc[kPanels][kSets][kRows][2];
  each_sum<kPanels, kRows>([&](int p, int m, int v) __attribute__((always_inline)) {
    acc[p][0][m][v] = args.accumulate ? vload(args.sums + (p * kRows + m) * kPanel + v * kLanes) : vzero();
#pragma GCC unroll 4
    for (int s = 1; s < kSets; ++s) acc[p][s][m][v] = vzero();
  });
  Rows<kRows> rows(args);
  const char* b = args.b;
  const char* ahead = args.ahead;
  auto step = [&](int u) __attribute__((always_inline)) {
#pragma GCC unroll 4
    for (int p = 0; p < kPanels; ++p) {
      const int64_t at = p * args.panel_bytes;
      if (kPanels > 1) rows.read_anew();
      __builtin_prefetch(ahead + at, 0, kStream ? 3 : 2);
      if (kStream && Weight::kStepBytes > 64) __builtin_prefetch(ahead + at + 64);
      Weight::step(b + at, [&](int i, Vec b0, Vec b1) __attribute__((always_inline)) {
        const int s = (u * Weight::kSteps + i) % kSets;
#pragma GCC unroll 16
        for (int m = 0; m < kRows; ++m) {
          const Vec value = rows.value(i, m);
          vfma_acc(acc[p][s][m][0], value, b0);
          vfma_acc(acc[p][s][m][1], value, b1);
        }
      });
    }
    rows.advance(Weight::kSteps);
    b += Weight::kStepBytes;
    ahead += kStream ? Weight::kStepBytes : args.ahead_stride;
  };
  int64_t n = args.steps;
  for (; n >= kUnroll; n -= kUnroll)
#pragma GCC unroll 4
    for (int u = 0; u < kUnroll; ++u) step(u);
  for (; n > 0; --n) step(0);
  each_sum<kPanels, kRows>([&](int p, int m, int v) __attribute__((always_inline)) {
    Vec sum = acc[p][0][m][v];
#pragma GCC unroll 4
    for (int s = 1; s < kSets; ++s) sum = vadd(sum, acc[p][s][m][v]);
    vstore(args.sums + (p * kRows + m) * kPanel + v * kLanes, sum);
  });
}

// A stream asks for its weights this far ahead: the hardware prefetcher alone leaves bandwidth unused. Measured: Xeons
// with AVX-512 do best at 2 KiB, Zen 3 at 8 (8 % more than at 2).
constexpr int64_t kStreamAhead = kVecRegisters == 32 ? 2 << 10 : 8 << 10;

using TileFunction = void (*)(const TileArgs&);

template <class Weight, int kRows, int kPanels = stream_panels(kRows)>
TileFunction panels_function(int64_t panels) {
  if constexpr (kPanels > 1) {
    if (panels < kPanels) return panels_function<Weight, kRows, kPanels - 1>(panels);
  }
  return tile<Weight, PreparedRows, kRows, true, kPanels>;
}

// The kernel for a height of kRows or less; rows >= 1.
template <class Weight, int kRows = kMaxRows>
TileFunction stream_function(int64_t rows, int64_t panels) {
  if constexpr (kRows > 1) {
    if (rows < kRows) return stream_function<Weight, kRows - 1>(rows, panels);
  }
  return panels_function<Weight, kRows>(panels);
}
template <template <int> class Rows, int kRows = kMaxRows>
TileFunction blocked_function(int64_t rows) {
  if constexpr (kRows > 1) {
    if (rows < kRows) return blocked_function<Rows, kRows - 1>(rows);
  }
  return tile<WeightF32, Rows, kRows, false>;
}

// panels: 1 to stream_panels(rows).
inline TileFunction stream_tile(DType weight, int64_t rows, int64_t panels = 1) {
  switch (weight) {
    case DType::f16:
      return stream_function<WeightF16>(rows, panels);
    case DType::bf16:
      return stream_function<WeightBF16>(rows, panels);
    default:
      return stream_function<WeightF32>(rows, panels);
  }
}
inline TileFunction blocked_tile(int64_t rows) { return blocked_function<PreparedRows>(rows); }
inline TileFunction in_place_tile(int64_t rows) { return blocked_function<RowsInPlace>(rows); }
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
