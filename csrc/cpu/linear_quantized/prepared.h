// Rows of x → the left operand: normalised, rounded to planes of signed codes group by group.
//   codes   [tiles][groups][steps][2 quads][rows] kQuadBytes each, or row after row, as is cheaper to write, where
//           tiles multiply bytes of panels that stay in L2
//   then per tile three tables [groups][rows]: scale f32, start i32 (what the sums begin at, for the zero point of the
//   weights) and scaled sum f32 (scale * sum of codes, for their offsets).
// A row is a token, or one plane of it.
#pragma once
#include "cpu/linear_quantized/layout.h"

namespace {

struct Prepared {
  char* codes;
  float* scale;
  int32_t* start;
  float* sum;
  int64_t rows;                                   // of a table
  int64_t group_stride, quad_stride, row_stride;  // of codes, in bytes
  float unit = 1;                                 // `scale` and `sum` are stored times this

  char* quad(int64_t group, int64_t i, int64_t row) const {
    return codes + group * group_stride + i * quad_stride + row * row_stride;
  }
};

// Where the rows of so many tiles lie, prepared.
struct CodeMemory {
  char* at;
  RowTiles tiles;
};

inline int64_t code_bytes(const QuantizedProblem& p, int64_t rows) { return ceil_div(rows * p.row_stride(), 64) * 64; }
inline size_t prepared_bytes(const QuantizedProblem& p, int64_t rows) {
  return static_cast<size_t>(code_bytes(p, rows) + 3 * 4 * rows * p.form.groups());
}

// Streams multiply by f16 scales as they are packed, from kScaleTop on: in full, large activations would take their
// sums beyond f32.
inline float scale_unit(const QuantizedProblem& p) { return p.form.bits == 4 && p.streamed ? 1 / kScaleTop : 1.0f; }

inline Prepared prepared_tile(const QuantizedProblem& p, const CodeMemory& memory, int64_t tile) {
  const RowTiles& tiles = memory.tiles;
  const int64_t rows = tiles.rows * p.planes, row0 = (tiles.row(tile) - tiles.row0) * p.planes;
  const int64_t tile_rows = (tiles.row(tile + 1) - tiles.row(tile)) * p.planes, groups = p.form.groups();
  const int64_t quad_stride = p.by_rows() ? p.form.quad_bytes() : tile_rows * p.form.quad_bytes();
  float* tables = reinterpret_cast<float*>(memory.at + code_bytes(p, rows));
  return {memory.at + row0 * p.row_stride(),
          tables + row0 * groups,
          reinterpret_cast<int32_t*>(tables + rows * groups) + row0 * groups,
          tables + 2 * rows * groups + row0 * groups,
          tile_rows,
          2 * p.form.steps() * quad_stride,
          quad_stride,
          p.by_rows() ? p.row_stride() : p.form.quad_bytes(),
          scale_unit(p)};
}

// Groups of a token that are rounded together: the chains of one group are long, those of several overlap.
constexpr int64_t kBatch = 16, kBatchValues = 16 << 10;
static_assert(kBatchValues * 4 < int64_t(kLocalBytes));

}  // namespace
