// How rows of work are cut into the chunks that threads take.
#pragma once
#include "cpu/family.h"

namespace {

// Rows of one chunk: four chunks a thread, so that an unequal pair of cores stays busy to the end, but at least 4096
// elements, so that taking a chunk costs nothing beside its work.
inline int64_t chunk_rows(int64_t rows, int64_t width, int threads) {
  return max64(ceil_div(4096, max64(width, 1)), ceil_div(rows, int64_t{4} * threads));
}
inline int64_t chunk_count(int64_t rows, int64_t width, int threads) {
  return rows <= 0 || width <= 0 ? 0 : ceil_div(rows, chunk_rows(rows, width, threads));
}
struct RowRange {
  int64_t begin, end;
};
inline RowRange chunk_range(int64_t rows, int64_t width, int threads, int64_t chunk) {
  const int64_t each = chunk_rows(rows, width, threads);
  return {chunk * each, min64(rows, (chunk + 1) * each)};
}

inline int one_phase(const Step&, int) { return 1; }

}  // namespace
