// topk: the k largest numbers of each row, largest first, and where they are; of equal ones the first. NaN is larger
// than any number, as in PyTorch.
//   operands: 0 x [M,N], 1 values [M,k] of x's dtype | none, 2 indices i64 [M,k] | none   last strides 1; ints: [k], up
//   to N and kMostPlaces
// pick: y[m,j] = x[m,indices[m,j]]
//   operands: 0 x [M,N], 1 indices i64 [M,k], 2 y [M,k] of x's dtype   last strides 1
//   Indices out of range are read as the nearest in it.
#pragma once
#include "cpu/rows/gather.h"

namespace {

inline bool is_larger(float a, float b) { return a > b || (a != a && b == b); }

inline int64_t topk_chunks(const Step& s, int, int threads) {
  return chunk_count(s.t[0].size[0], s.t[0].size[1], threads);
}

template <class A>
inline void topk_rows(const Step& s, const RowRange& range) {
  const Tensor &x = s.t[0], &values = s.t[1], &indices = s.t[2];
  const A as(x.dtype);
  const int64_t width = x.size[1], k = s.i[0];
  float best[kMostPlaces], row[kLanes];
  int64_t index[kMostPlaces];
  for (int64_t m = range.begin; m < range.end; ++m) {
    int64_t count = 0;
    for_lanes(width, [&](int64_t i, int lanes) {
      vstore(row, as.load(at(x, m * x.stride[0]), i, lanes));
      for (int j = 0; j < lanes; ++j) {
        if (count == k && !is_larger(row[j], best[k - 1])) continue;
        int64_t place = count < k ? count++ : k - 1;
        for (; place > 0 && is_larger(row[j], best[place - 1]); --place)
          best[place] = best[place - 1], index[place] = index[place - 1];
        best[place] = row[j], index[place] = i + j;
      }
    });
    if (indices.data)
      __builtin_memcpy(at(indices, m * indices.stride[0]), index, static_cast<size_t>(k) * sizeof(*index));
    if (!values.data) continue;
    char* to = at(values, m * values.stride[0]);
    for_lanes(k, [&](int64_t i, int lanes) { as.store(to, i, vload_n(best + i, lanes), lanes); });
  }
}

inline void topk_run(const Step& s, int, int64_t chunk, int threads, const Scratch&) {
  const RowRange rows = chunk_range(s.t[0].size[0], s.t[0].size[1], threads, chunk);
  with_access(s.t, 2, [&](auto access) { topk_rows<decltype(access)>(s, rows); });
}

inline int64_t pick_chunks(const Step& s, int, int threads) {
  return chunk_count(s.t[2].size[0], s.t[2].size[1], threads);
}

inline void pick_run(const Step& s, int, int64_t chunk, int threads, const Scratch&) {
  const Tensor &x = s.t[0], &indices = s.t[1], &y = s.t[2];
  const RowRange rows = chunk_range(y.size[0], y.size[1], threads, chunk);
  const int64_t bytes = itemsize(x.dtype);
  for (int64_t m = rows.begin; m < rows.end; ++m)
    for (int64_t j = 0; j < y.size[1]; ++j) {
      const int64_t column = nearest(load_id(indices, m * y.size[1] + j), x.size[1]);
      __builtin_memcpy(at(y, m * y.stride[0] + j), at(x, m * x.stride[0] + column), static_cast<size_t>(bytes));
    }
}

}  // namespace
