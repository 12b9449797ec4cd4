// copy: y = x for any strides (0 allowed in x), converting among float dtypes; other dtypes must be equal.
//   operands: 0 x, 1 y, same sizes, up to 6 dimensions
// Dimensions are merged and ordered by y's strides first; then one of three ways: contiguous rows, two-dimensional
// transposes in register tiles, or element by element.
#pragma once
#include "cpu/iteration_space.h"
#include "cpu/rows/gather.h"

namespace {

struct CopyPlan {
  Space space;
  bool transposes;  // x is contiguous along the second last dimension, y along the last
  int64_t piece;    // elements of a row (transposes: values of the second last dimension) that are one unit of work
  int64_t pieces;   // units per row (transposes: per plane of the last two dimensions)
  int64_t units;
  int64_t unit_elements;
};

inline CopyPlan plan_copy(const Step& s) {
  CopyPlan p;
  p.space = make_space(s.t, 2, false, 1);
  Space& space = p.space;
  const int last = space.ndim - 1;
  p.transposes = false;
  if (last >= 1 && space.stride[1][last] == 1 && space.stride[0][last] != 1 && space.stride[0][last] != 0)
    for (int d = 0; d < last; ++d)
      if (space.stride[0][d] == 1 && space.size[d] >= 4 && !p.transposes) {
        for (int e = d; e < last - 1; ++e) swap_dims(space, e, e + 1);
        p.transposes = true;
      }
  const int64_t row = space.row();
  if (p.transposes) {
    const int64_t columns = space.size[last - 1];
    p.piece = 64;  // four lines of fp32 in each row of x, so that a page is not left after every line
    p.pieces = ceil_div(columns, p.piece);
    p.units = columns == 0 ? 0 : space.rows() / columns * p.pieces;
    p.unit_elements = row * p.piece;
    return p;
  }
  p.piece = 16384;
  p.pieces = ceil_div(row, p.piece);
  p.units = space.rows() * p.pieces;
  p.unit_elements = min64(row, p.piece);
  return p;
}

template <class T>
inline void copy_strided(const char* x, int64_t xs, char* y, int64_t ys, int64_t n) {
  const T* from = reinterpret_cast<const T*>(x);
  T* to = reinterpret_cast<T*>(y);
  if (xs == 0) {
    const T value = *from;
    for (int64_t i = 0; i < n; ++i) to[i * ys] = value;
    return;
  }
  for (int64_t i = 0; i < n; ++i) to[i * ys] = from[i * xs];
}

inline void copy_piece(const Tensor& x, const char* from, int64_t xs, const Tensor& y, char* to, int64_t ys,
                       int64_t n) {
  if (xs == 1 && ys == 1) return copy_row(x.dtype, from, y.dtype, to, n);
  if (x.dtype != y.dtype) {
    for (int64_t i = 0; i < n; ++i) store_scalar(y.dtype, to, i * ys, load_scalar(x.dtype, from, i * xs));
    return;
  }
  switch (itemsize(x.dtype)) {
    case 1:
      return copy_strided<uint8_t>(from, xs, to, ys, n);
    case 2:
      return copy_strided<uint16_t>(from, xs, to, ys, n);
    case 4:
      return copy_strided<uint32_t>(from, xs, to, ys, n);
    default:
      return copy_strided<uint64_t>(from, xs, to, ys, n);
  }
}

template <class X>
inline void prefetch_row(X x_as, const char* x, int64_t index, int64_t n) {
  const int item = itemsize(x_as.dtype);
  for (int64_t byte = 0; byte < n * item; byte += 64) __builtin_prefetch(x + index * item + byte);
}

// y[c, r] = x[r, c] for r < rows, c < columns: x rows xs apart, y rows ys apart, both contiguous within.
template <class X, class Y>
inline void transpose_float(X x_as, const char* x, int64_t xs, Y y_as, char* y, int64_t ys, int64_t rows,
                            int64_t columns) {
  for (int64_t r = 0; r < rows; r += kLanes) {
    const int tall = static_cast<int>(min64(kLanes, rows - r));
    // The rows of the next tile are a stride apart, where the hardware does not look ahead.
    for (int64_t i = r + kLanes; i < min64(rows, r + 2 * kLanes); ++i) prefetch_row(x_as, x, i * xs, columns);
    for (int64_t c = 0; c < columns; c += kLanes) {
      const int wide = static_cast<int>(min64(kLanes, columns - c));
      Vec tile[kLanes];
      if (tall == kLanes && wide == kLanes) {
#pragma GCC unroll 16
        for (int i = 0; i < kLanes; ++i) tile[i] = x_as.load(x, (r + i) * xs + c);
        vtranspose(tile);
#pragma GCC unroll 16
        for (int i = 0; i < kLanes; ++i) y_as.store(y, (c + i) * ys + r, tile[i]);
        continue;
      }
      for (int i = 0; i < kLanes; ++i) tile[i] = i < tall ? x_as.load(x, (r + i) * xs + c, wide) : vzero();
      vtranspose(tile);
      for (int i = 0; i < wide; ++i) y_as.store(y, (c + i) * ys + r, tile[i], tall);
    }
  }
}

template <class T>
inline void transpose_plain(const char* x, int64_t xs, char* y, int64_t ys, int64_t rows, int64_t columns) {
  const T* from = reinterpret_cast<const T*>(x);
  T* to = reinterpret_cast<T*>(y);
  for (int64_t r0 = 0; r0 < rows; r0 += 64)
    for (int64_t c = 0; c < columns; ++c)
      for (int64_t r = r0; r < min64(rows, r0 + 64); ++r) to[c * ys + r] = from[r * xs + c];
}

inline void transpose_tile(DType xd, const char* x, int64_t xs, DType yd, char* y, int64_t ys, int64_t rows,
                           int64_t columns) {
  const int bytes = itemsize(xd);
  if (bytes == 1) return transpose_plain<uint8_t>(x, xs, y, ys, rows, columns);
  if (bytes == 8) return transpose_plain<uint64_t>(x, xs, y, ys, rows, columns);
  if (xd != yd) return transpose_float(AnyFloat(xd), x, xs, AnyFloat(yd), y, ys, rows, columns);
  // Equal 16-bit dtypes travel as bf16, whose widening is a shift; equal 32-bit dtypes as f32, which only moves bits.
  if (bytes == 2) return transpose_float(Float<DType::bf16>(xd), x, xs, Float<DType::bf16>(yd), y, ys, rows, columns);
  transpose_float(Float<DType::f32>(xd), x, xs, Float<DType::f32>(yd), y, ys, rows, columns);
}

inline int64_t copy_chunks(const Step& s, int, int threads) {
  const CopyPlan p = plan_copy(s);
  return chunk_count(p.units, p.unit_elements, threads);
}

inline void copy_planes(const Step& s, const CopyPlan& p, const RowRange& units) {
  const Space& space = p.space;
  const int last = space.ndim - 1;
  const Tensor &x = s.t[0], &y = s.t[1];
  for (int64_t u = units.begin; u < units.end; ++u) {
    const int64_t column = u % p.pieces * p.piece;
    int64_t plane = u / p.pieces, from = column, to = column * space.stride[1][last - 1];
    for (int d = last - 2; d >= 0; --d) {
      const int64_t index = plane % space.size[d];
      plane /= space.size[d];
      from += index * space.stride[0][d];
      to += index * space.stride[1][d];
    }
    transpose_tile(x.dtype, at(x, from), space.stride[0][last], y.dtype, at(y, to), space.stride[1][last - 1],
                   space.row(), min64(p.piece, space.size[last - 1] - column));
  }
}

inline void copy_run(const Step& s, int, int64_t chunk, int threads, const Scratch&) {
  const CopyPlan p = plan_copy(s);
  const RowRange units = chunk_range(p.units, p.unit_elements, threads, chunk);
  if (p.transposes) return copy_planes(s, p, units);
  const Space& space = p.space;
  const Tensor &x = s.t[0], &y = s.t[1];
  const int64_t xs = space.row_stride(0), ys = space.row_stride(1);
  RowCursor cursor;
  cursor.seek(space, units.begin / p.pieces);
  if (p.pieces > 1) {
    int64_t piece = units.begin % p.pieces;
    for (int64_t u = units.begin; u < units.end; ++u) {
      const int64_t i = piece * p.piece;
      copy_piece(x, at(x, cursor.offset[0] + i * xs), xs, y, at(y, cursor.offset[1] + i * ys), ys,
                 min64(p.piece, space.row() - i));
      if (++piece < p.pieces) continue;
      piece = 0;
      cursor.next(space);
    }
    return;
  }
  for (int64_t u = units.begin; u < units.end;) {
    const int64_t run = min64(cursor.run(space), units.end - u);
    const int64_t x_step = run > 1 ? space.stride[0][space.ndim - 2] : 0;
    const int64_t y_step = run > 1 ? space.stride[1][space.ndim - 2] : 0;
    for (int64_t r = 0; r < run; ++r)
      copy_piece(x, at(x, cursor.offset[0] + r * x_step), xs, y, at(y, cursor.offset[1] + r * y_step), ys, space.row());
    cursor.advance(space, run);
    u += run;
  }
}

}  // namespace
