// Rows of x → the left operand of the GEMM: tiles [k][rows] of normalised f32.
#pragma once
#include "cpu/linear/rows.h"

namespace {

// Small M has one tile: its K is cut so that all threads prepare it.
inline int64_t prepare_parts(const Problem& p, int threads) {
  return p.tiles() > 1 ? 1 : max64(1, min64(threads, p.K / (8 * kLanes)));
}

inline bool prepares_alone(const Problem& p) {
  return p.is_alone && p.prepared() && p.tiles() == 1 && p.streams() && p.M * p.K <= kAloneValues;
}

int64_t prepare_chunks(const Problem& p, int threads) { return p.tiles() * prepare_parts(p, threads); }

// The part-th of so many parts of a tile's K. memory: where the first of `tiles` begins.
void prepare_tile(const Problem& p, const RowTiles& tiles, int64_t tile, int64_t part, int64_t parts, float* memory) {
  const int64_t vectors = ceil_div(p.padded_k(), kLanes);
  const int64_t k0 = part * vectors / parts * kLanes;
  const int64_t k1 = min64(p.padded_k(), (part + 1) * vectors / parts * kLanes);
  const int64_t row0 = tiles.row(tile);
  const int rows = static_cast<int>(tiles.row(tile + 1) - row0);
  float* out = memory + p.tile_offset(tiles, tile);
  RowNorm norms[kMaxRows];
  for (int r = 0; r < rows; ++r) norms[r] = row_norm(p, row0 + r);

  Vec block[kLanes];
  for (int r = rows; r < kLanes; ++r) block[r] = vzero();
  for (int64_t k = k0; k < k1; k += kLanes) {
    load_block(p, norms, row0, rows, k, block);
    const int columns = static_cast<int>(min64(kLanes, k1 - k));
    if (rows == 1) {
      vstore_n(out + k, block[0], columns);
      continue;
    }
    Vec turned[kLanes];
    for (int r = 0; r < kLanes; ++r) turned[r] = block[r];
    vtranspose(turned);
    for (int i = 0; i < columns; ++i) {
      // A whole vector is stored: what lies past the rows is overwritten by the next k. Near the end of a part those
      // are another thread's.
      float* to = out + (k + i) * rows;
      if (part + 1 == parts || to + kLanes <= out + k1 * rows)
        vstore(to, turned[i]);
      else
        vstore_n(to, turned[i], rows);
    }
  }
}
void prepare_chunk(const Problem& p, int64_t chunk, int threads, float* shared) {
  const int64_t parts = prepare_parts(p, threads);
  prepare_tile(p, p.all_tiles(), chunk / parts, chunk % parts, parts, shared);
}

}  // namespace
