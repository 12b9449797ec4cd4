// Columns of weights as 16-bit fixed point (cpu/fixed_point.h): pairs of neighbouring k.
#pragma once
#include "cpu/fixed_point.h"

namespace {

// The norm of a column's words, and the largest of them. Rounding adds at most half a word to each.
constexpr float kColumnNorm = 65500, kLargestWord = 32767;
static_assert((kRowNorm + 6) * double(kColumnNorm + 6) < double(1u << 31) && 6 * 6 > kWordBlock / 4);

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
