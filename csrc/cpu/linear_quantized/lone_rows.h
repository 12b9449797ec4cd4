// Rows of an exact step that planes cannot stand for: those that hold a NaN, an infinity, a group whose largest value
// leaves no room for three planes, or one that is nearly all in that value. Their sums come out of the integers as no
// numbers, and are made again by FMA.
#pragma once
#include "cpu/linear/rows.h"
#include "cpu/linear_quantized/code_panels.h"

namespace {

// The scales of a group's first plane that leave the last one, and sums with any weight, well inside f32.
constexpr float kLeastExactScale = 0x1p-90f, kMostExactScale = 0x1p90f;

// The share of the largest value that all others of a group add up to, at least: with less, the planes of that one
// leave them too few bits, which shows where its own weights are zeros.
constexpr float kLeastRest = 0x1p-5f;

// Whether three planes stand for a group of this scale as well as f32 does.
inline bool fits_planes(const float* values, int64_t count, float scale, float largest_code) {
  if (!(scale >= kLeastExactScale && scale <= kMostExactScale)) return false;
  const float most = scale * largest_code, below = most * 0.999f;  // the largest is `most` but for a rounding
  Vec rest = vzero();
  for (int64_t k = 0; k < count; k += kLanes) {
    const Vec x = vabs(vload(values + k));
    rest = vadd(rest, vselect(vlt(x, vset(below)), x, vzero()));
  }
  const float sum = vreduce_add(rest);
  return sum == 0.0f || sum >= most * kLeastRest;
}

// Row m of a panel.
__attribute__((noinline)) void lone_code_row(const QuantizedProblem& p, int64_t panel, int64_t m, float* sums) {
  constexpr int64_t kPiece = 64;  // k, whole steps of a group
  static_assert(kPiece % kStepK == 0);
  alignas(64) float wide[kPiece * kPanel], x[kPiece];
  const CodePanels weights(p);
  const RowNorm norm = row_norm(p, m);
  for (int64_t k0 = 0; k0 < p.K; k0 += kPiece) {
    const int64_t k = min64(kPiece, p.K - k0);
    weights.widen(panel, k0, k, wide);
    for (int64_t i = 0; i < k; i += kLanes) {
      Vec block;
      load_block(p, &norm, m, 1, k0 + i, &block);
      vstore(x + i, block);
    }
    const char* b = reinterpret_cast<const char*>(wide);
    blocked_tile(1)({x, b, k, b, 0, sums, k0 > 0, 0});
  }
}

inline void mend_rows(const QuantizedProblem& p, int64_t panel, int64_t token0, int64_t tokens, float* sums) {
  for (int64_t t = 0; t < tokens; ++t, sums += kPanel) {
    Vec zeros = vzero();  // unless one of the sums is no number
    for (int v = 0; v < kPanel; v += kLanes) zeros = vfma(vload(sums + v), vzero(), zeros);
    if (vreduce_add(zeros) != 0.0f) lone_code_row(p, panel, token0 + t, sums);
  }
}

}  // namespace
