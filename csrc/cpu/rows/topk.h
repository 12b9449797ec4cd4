// topk: the k largest numbers of each row, largest first, and where they are; of equal ones the first. NaN is larger
// than any number, as in PyTorch.
//   operands: 0 x [M,N], 1 values [M,k] of x's dtype, 2 indices i64 [M,k]   last strides 1; k up to N and kMostPlaces
#pragma once
#include "cpu/rows/access.h"

namespace {

inline bool is_larger(float a, float b) { return a > b || (a != a && b == b); }

inline int64_t topk_chunks(const Step& s, int, int threads) {
  return chunk_count(s.t[0].size[0], s.t[0].size[1], threads);
}

template <class A>
inline void topk_rows(const Step& s, const RowRange& range) {
  const Tensor &x = s.t[0], &values = s.t[1], &indices = s.t[2];
  const A as(x.dtype);
  const int64_t width = x.size[1], k = values.size[1];
  float best[kMostPlaces], row[kLanes];
  for (int64_t m = range.begin; m < range.end; ++m) {
    int64_t* index = reinterpret_cast<int64_t*>(indices.data) + m * indices.stride[0];
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
    char* to = at(values, m * values.stride[0]);
    for_lanes(k, [&](int64_t i, int lanes) { as.store(to, i, vload_n(best + i, lanes), lanes); });
  }
}

inline void topk_run(const Step& s, int, int64_t chunk, int threads, const Scratch&) {
  const RowRange rows = chunk_range(s.t[0].size[0], s.t[0].size[1], threads, chunk);
  with_access(s.t, 2, [&](auto access) { topk_rows<decltype(access)>(s, rows); });
}

}  // namespace
