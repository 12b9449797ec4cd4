// Rows picked by index.
// embedding: y[m,:] = scale * table[ids[m],:]
//   operands: 0 ids i64 or i32 [...], M together, 1 table [V,K], 2 y [M,K]   floats: [scale]
//   The op's contract checks the ids before the program runs, so they must come from outside it. One that another
//   thread changes after that reads the row nearest to it, never anything outside the table.
// index_copy: y[:,:,index[j],:] = x[:,:,j,:]
//   operands: 0 y [B,H,S,D], 1 index i64 [Sn], 2 x [B,H,Sn,D]   The caller guarantees the range.
#pragma once
#include "cpu/rows/access.h"

namespace {

// One contiguous row, converted where the dtypes differ. A short row of whole 32-bit words is moved by vectors: calling
// memcpy costs as much as moving a head.
inline void copy_row(DType from, const char* x, DType to, char* y, int64_t n) {
  if (from == to) {
    const int64_t bytes = n * itemsize(from);
    if (bytes > 1024 || bytes % 4 != 0) {
      __builtin_memcpy(y, x, static_cast<size_t>(bytes));
      return;
    }
    const Float<DType::f32> words(DType::f32);
    return for_lanes(bytes / 4, [&](int64_t i, int lanes) { words.store(y, i, words.load(x, i, lanes), lanes); });
  }
  with_float(from, [&](auto x_as) {
    with_float(to, [&](auto y_as) {
      for_lanes(n, [&](int64_t i, int lanes) { y_as.store(y, i, x_as.load(x, i, lanes), lanes); });
    });
  });
}

inline void scale_row(DType from, const char* x, DType to, char* y, int64_t n, float scale) {
  const AnyFloat x_as(from), y_as(to);
  const Vec factor = vset(scale);
  for_lanes(n, [&](int64_t i, int lanes) { y_as.store(y, i, vmul(x_as.load(x, i, lanes), factor), lanes); });
}

inline int64_t load_id(const Tensor& ids, int64_t m) {
  const int64_t i = position_offset(ids, ids.ndim, m);
  return ids.dtype == DType::i32 ? reinterpret_cast<const int32_t*>(ids.data)[i]
                                 : reinterpret_cast<const int64_t*>(ids.data)[i];
}

// The index of so many that is nearest to one.
inline int64_t nearest(int64_t i, int64_t count) { return max64(0, min64(i, count - 1)); }

inline int64_t embedding_chunks(const Step& s, int, int threads) {
  return chunk_count(s.t[2].size[0], s.t[2].size[1], threads);
}

inline void embedding_run(const Step& s, int, int64_t chunk, int threads, const Scratch&) {
  const Tensor &ids = s.t[0], &table = s.t[1], &y = s.t[2];
  const RowRange rows = chunk_range(y.size[0], y.size[1], threads, chunk);
  for (int64_t m = rows.begin; m < rows.end; ++m) {
    const int64_t id = nearest(load_id(ids, m), table.size[0]);
    const char* from = at(table, id * table.stride[0]);
    char* to = at(y, m * y.stride[0]);
    if (s.f[0] == 1.0f)
      copy_row(table.dtype, from, y.dtype, to, y.size[1]);
    else
      scale_row(table.dtype, from, y.dtype, to, y.size[1], s.f[0]);
  }
}

inline int64_t index_copy_chunks(const Step& s, int, int threads) {
  const Tensor& x = s.t[2];
  return chunk_count(x.size[0] * x.size[1] * x.size[2], x.size[3], threads);
}

inline void index_copy_run(const Step& s, int, int64_t chunk, int threads, const Scratch&) {
  const Tensor &y = s.t[0], &index = s.t[1], &x = s.t[2];
  const RowRange rows = chunk_range(x.size[0] * x.size[1] * x.size[2], x.size[3], threads, chunk);
  for (int64_t r = rows.begin; r < rows.end; ++r) {
    const int64_t j = r % x.size[2], h = r / x.size[2] % x.size[1], b = r / (x.size[2] * x.size[1]);
    const int64_t slot = reinterpret_cast<const int64_t*>(index.data)[j * index.stride[0]];
    copy_row(x.dtype, at(x, b * x.stride[0] + h * x.stride[1] + j * x.stride[2]), y.dtype,
             at(y, b * y.stride[0] + h * y.stride[1] + slot * y.stride[2]), x.size[3]);
  }
}

}  // namespace
