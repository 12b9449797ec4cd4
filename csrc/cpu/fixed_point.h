// 16-bit fixed point. Pairs of words are multiplied and added to sums of 32 bits, exactly and at twice the rate of FMA.
//
// In a block of kWordBlock k the values of a row, or of a column, are words times a scale of their own. The scale is
// chosen by their Euclidean norm: by the Cauchy-Schwarz inequality no sum of products is larger than the product of
// two norms, which keeps it below 2^31, and values near the norm's share of each keep 11 to 13 bits, which is finer
// than f16 and bf16 round them; beside one some hundred times as large they keep fewer. What lies beyond kLeastValue
// and kMostValue, or is no number, has no such scale.
#pragma once
#include "cpu/family.h"

namespace {

constexpr int64_t kWordBlock = 128;
// Of the words of a row; a single value may be all of it.
constexpr float kRowNorm = 32760;
constexpr float kLeastSquares = 0x1p-100f, kMostSquares = 0x1p100f;  // whose square root is the norm
// Largest values of a block: of less and more, scales or sums times scales would leave f32.
constexpr float kLeastValue = 0x1p-100f, kMostValue = 0x1p60f;

inline bool all_lanes(Mask m) { return vreduce_max(vselect(m, vzero(), vset(1))) == 0.0f; }
// Nothing, or from `least` to `most`.
inline Mask none_or_within(Vec x, float least, float most) {
  const Vec known = vselect(vle(vset(least), x), x, vset(2 * most));
  return vle(vselect(veq(x, vzero()), vzero(), known), vset(most));
}

}  // namespace
