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

template <class A>
inline void softmax_row(A x_as, const char* x, A y_as, char* y, int64_t n, float* kept) {
  Vec best = vset(-__builtin_inff()), other = best;
  int64_t i = 0;
  for (; i + 2 * kLanes <= n; i += 2 * kLanes) {
    best = vmax(best, x_as.load(x, i));
    other = vmax(other, x_as.load(x, i + kLanes));
  }
  for (; i < n; i += kLanes) {
    const int lanes = static_cast<int>(min64(kLanes, n - i));
    float tail[kLanes];
    for (int j = 0; j < kLanes; ++j) tail[j] = -__builtin_inff();
    vstore_n(tail, x_as.load(x, i, lanes), lanes);
    best = vmax(best, vload(tail));
  }
  // A NaN may have been lost from the maximum; it comes back through its own exponential into the sum.
  const Vec m = vset(vreduce_max(vmax(best, other)));
  auto exponential = [&](int64_t j, int lanes) { return vexp(vsub(x_as.load(x, j, lanes), m)); };
  const float total = sum_over(n, [&](int64_t j, int lanes) {
    Vec e = exponential(j, lanes);
    if (kept) vstore(kept + j, e);
    return e;
  });
  const Vec scale = vset(1.0f / total);
  if (kept) return for_lanes(n, [&](int64_t j, int lanes) { y_as.store(y, j, vmul(vload(kept + j), scale), lanes); });
  for_lanes(n, [&](int64_t j, int lanes) { y_as.store(y, j, vmul(exponential(j, lanes), scale), lanes); });
}

template <class A>
inline void softmax_rows(const Step& s, const Space& space, const RowRange& rows, float* kept) {
  RowCursor cursor;
  cursor.seek(space, rows.begin);
  for (int64_t r = rows.begin; r < rows.end; ++r, cursor.next(space))
    softmax_row(A(s.t[0].dtype), at(s.t[0], cursor.offset[0]), A(s.t[1].dtype), at(s.t[1], cursor.offset[1]),
                space.row(), kept);
}

inline void softmax_run(const Step& s, int, int64_t chunk, int threads, const Scratch& scratch) {
  const Space space = make_space(s.t, 2, true, 1);
  const RowRange rows = chunk_range(space.rows(), space.row(), threads, chunk);
  // The exponentials are kept between the passes where they fit, padded to whole vectors, and computed twice elsewhere.
  const bool fits = (space.row() + kLanes) * sizeof(float) <= kLocalBytes;
  float* kept = fits ? reinterpret_cast<float*>(scratch.local) : nullptr;
  with_access(s.t, s.num_tensors, [&](auto access) { softmax_rows<decltype(access)>(s, space, rows, kept); });
}

}  // namespace
