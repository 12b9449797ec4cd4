// softmax over the last dimension.
//   operands: 0 x [..., N], 1 y [..., N], up to 4 dimensions, last stride 1; y may be x
#pragma once
#include "cpu/iteration_space.h"
#include "cpu/rows/access.h"

namespace {

inline int64_t softmax_chunks(const Step& s, int, int threads) {
  const Space space = make_space(s.t, 2, true, 1);
  return chunk_count(space.rows(), space.row(), threads);
}

template <class X, class Y>
inline void softmax_row(const char* x, char* y, int64_t n, float* kept) {
  Vec best = vset(-__builtin_inff()), other = best;
  int64_t i = 0;
  for (; i + 2 * kLanes <= n; i += 2 * kLanes) {
    best = vmax(best, load<X>(x, i));
    other = vmax(other, load<X>(x, i + kLanes));
  }
  float top = vreduce_max(vmax(best, other));
  for (; i < n; ++i) {
    const float v = load_scalar(X::dtype, x, i);
    top = v > top ? v : top;
  }
  // A NaN may have been lost from the maximum; it comes back through its own exponential into the sum.
  const Vec m = vset(top);
  auto exponential = [&](int64_t j, int lanes) { return vexp(vsub(load<X>(x, j, lanes), m)); };
  const float total = sum_over(n, [&](int64_t j, int lanes) {
    Vec e = exponential(j, lanes);
    if (kept) vstore(kept + j, e);
    return e;
  });
  const Vec scale = vset(1.0f / total);
  if (kept) return for_lanes(n, [&](int64_t j, int lanes) { store<Y>(y, j, vmul(vload(kept + j), scale), lanes); });
  for_lanes(n, [&](int64_t j, int lanes) { store<Y>(y, j, vmul(exponential(j, lanes), scale), lanes); });
}

inline void softmax_run(const Step& s, int, int64_t chunk, int threads, const Scratch& scratch) {
  const Space space = make_space(s.t, 2, true, 1);
  const int64_t n = space.row();
  const RowRange rows = chunk_range(space.rows(), n, threads, chunk);
  // The exponentials are kept between the passes where they fit, padded to whole vectors, and computed twice elsewhere.
  const bool fits = (n + kLanes) * sizeof(float) <= llmopt::kLocalBytes;
  float* kept = fits ? reinterpret_cast<float*>(scratch.local) : nullptr;
  RowCursor at_row;
  at_row.seek(space, rows.begin);
  with_float(s.t[0].dtype, [&](auto x_type) {
    with_float(s.t[1].dtype, [&](auto y_type) {
      for (int64_t r = rows.begin; r < rows.end; ++r, at_row.next(space))
        softmax_row<decltype(x_type), decltype(y_type)>(at(s.t[0], at_row.offset[0]), at(s.t[1], at_row.offset[1]), n,
                                                        kept);
    });
  });
}

}  // namespace
