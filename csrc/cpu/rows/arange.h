// arange: y[n] = start + n * step.
//   operands: 0 y i64 [N], stride 1
//   ints: [start, step]
#pragma once
#include "cpu/rows/access.h"

namespace {

inline int64_t arange_chunks(const Step& s, int, int threads) { return chunk_count(s.t[0].size[0], 1, threads); }

inline void arange_run(const Step& s, int, int64_t chunk, int threads, const Scratch&) {
  const RowRange range = chunk_range(s.t[0].size[0], 1, threads, chunk);
  auto* y = reinterpret_cast<int64_t*>(s.t[0].data);
  for (int64_t n = range.begin; n < range.end; ++n) y[n] = s.i[0] + n * s.i[1];
}

}  // namespace
