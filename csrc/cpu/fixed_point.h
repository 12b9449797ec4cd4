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
// Norms of words; rounding adds at most half a word each. A single value may be all of the norm of its row.
constexpr float kRowNorm = 32760, kColumnNorm = 65500, kLargestWord = 32767;
static_assert((kRowNorm + 6) * double(kColumnNorm + 6) < double(1u << 31) && 6 * 6 > kWordBlock / 4);
constexpr float kLeastSquares = 0x1p-100f, kMostSquares = 0x1p100f;  // whose square root is the norm
// Largest values of a block: of less and more, scales or sums times scales would leave f32.
constexpr float kLeastValue = 0x1p-100f, kMostValue = 0x1p60f;

// Columns of floats [k][stride], in whole vectors. What becomes words is such a class: `load` gives kLanes columns from
// v on of two k, the first of them even.
struct FloatColumns {
  const float* at;
  int64_t stride;
  __attribute__((always_inline)) void load(int64_t k, int64_t v, Vec& even, Vec& odd) const {
    even = vload(at + k * stride + v), odd = vload(at + (k + 1) * stride + v);
  }
};

// kLanes columns from v on, k being a multiple of 4: largest magnitudes, and sums of squares; of numbers times `unit`
// if they are scaled.
struct ColumnSize {
  Vec largest, squares;

  template <bool kScaled, class Columns>
  static ColumnSize of(const Columns& columns, int64_t v, int64_t k, Vec unit) {
    Vec most[4] = {vzero(), vzero(), vzero(), vzero()}, sum[4] = {vzero(), vzero(), vzero(), vzero()};
    for (int64_t i = 0; i < k; i += 4) {
      Vec w[4];
      columns.load(i, v, w[0], w[1]);
      columns.load(i + 2, v, w[2], w[3]);
#pragma GCC unroll 4
      for (int c = 0; c < 4; ++c) {
        if (kScaled) w[c] = vmul(w[c], unit);
        most[c] = vmax(most[c], vabs(w[c]));
        sum[c] = vfma(w[c], w[c], sum[c]);
      }
    }
    return {vmax(vmax(most[0], most[1]), vmax(most[2], most[3])), vadd(vadd(sum[0], sum[1]), vadd(sum[2], sum[3]))};
  }
};

inline bool all_lanes(Mask m) { return vreduce_max(vselect(m, vzero(), vset(1))) == 0.0f; }
// Nothing, or from `least` to `most`.
inline Mask none_or_within(Vec x, float least, float most) {
  const Vec known = vselect(vle(vset(least), x), x, vset(2 * most));
  return vle(vselect(veq(x, vzero()), vzero(), known), vset(most));
}

// Rows of zeros up to a multiple of 4; returns how many there are.
inline int64_t pad_rows(float* wide, int64_t columns, int64_t k) {
  for (; k % 4 != 0; ++k)
    for (int64_t v = 0; v < columns; v += kLanes) vstore(wide + k * columns + v, vzero());
  return k;
}

// `count` columns as pairs [k / 2][count][2] with their scales, in whole vectors; k is a multiple of 4. False if a
// column has no scale.
template <class Columns>
bool make_column_words(const Columns& columns, int64_t count, int64_t k, char* to, float* scales) {
  bool fits = true;
  for (int64_t v = 0; v < count; v += kLanes, to += 4 * kLanes) {
    Vec unit = vset(1);
    ColumnSize size = ColumnSize::of<false>(columns, v, k, unit);
    const Mask none = veq(size.largest, vzero());
    fits &= all_lanes(none_or_within(size.largest, kLeastValue, kMostValue));
    // Those of tiny values may be nothing, which is a norm only where there is nothing.
    const Vec squares = vselect(none, size.squares, vselect(veq(size.squares, vzero()), vset(-1), size.squares));
    if (!all_lanes(none_or_within(squares, kLeastSquares, kMostSquares))) {
      unit = vselect(none, vzero(), vdiv(vset(1), size.largest));
      size = ColumnSize::of<true>(columns, v, k, unit);
      fits &= all_lanes(none_or_within(size.squares, kLeastSquares, kMostSquares));
    }
    const Vec by_norm = vdiv(vset(kColumnNorm), vsqrt(size.squares));
    const Vec by_word = vdiv(vset(kLargestWord), size.largest);
    const Vec factor = vselect(none, vzero(), vmul(vmin(by_word, by_norm), unit));
    vstore(scales + v, vselect(none, vzero(), vdiv(vset(1), factor)));
    for (int64_t i = 0; i < k; i += 2) {
      Vec even, odd;
      columns.load(i, v, even, odd);
      store_pairs(to + i * count * 2, vmul(even, factor), vmul(odd, factor));
    }
  }
  return fits;
}

}  // namespace
