// Rows of x → the left operand: normalised, rounded to planes of signed codes group by group, in the order the tiles
// read.
//   codes   [tiles][groups][steps][2 quads][rows] kQuadBytes each
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

// Where the rows of tiles [tile0, tile1) lie, prepared.
struct CodeMemory {
  char* memory;
  int64_t row0, rows;

  CodeMemory(const QuantizedProblem& p, char* at, int64_t tile0, int64_t tile1)
      : memory(at), row0(p.tile_row(tile0) * p.planes), rows(p.tile_row(tile1) * p.planes - row0) {}
  CodeMemory(const QuantizedProblem& p, char* at) : memory(at), row0(0), rows(p.M * p.planes) {}
};

inline size_t prepared_bytes(const QuantizedProblem& p, int64_t rows) {
  return static_cast<size_t>(ceil_div(rows * p.row_bytes(), 64) * 64 + 3 * 4 * rows * p.form.groups());
}

// Streams multiply by f16 scales as they are packed, from kScaleTop on: in full, large activations would take their
// sums beyond f32.
inline float scale_unit(const QuantizedProblem& p) { return p.form.bits == 4 && p.streamed ? 1 / kScaleTop : 1.0f; }

inline Prepared prepared_tile(const QuantizedProblem& p, const CodeMemory& at, int64_t tile) {
  const int64_t first = p.tile_row(tile) * p.planes, row0 = first - at.row0, groups = p.form.groups();
  const int64_t tile_rows = p.tile_row(tile + 1) * p.planes - first, quad_bytes = tile_rows * p.form.quad_bytes();
  float* tables = reinterpret_cast<float*>(at.memory + ceil_div(at.rows * p.row_bytes(), 64) * 64);
  return {at.memory + row0 * p.row_bytes(),
          tables + row0 * groups,
          reinterpret_cast<int32_t*>(tables + at.rows * groups) + row0 * groups,
          tables + 2 * at.rows * groups + row0 * groups,
          tile_rows,
          2 * p.form.steps() * quad_bytes,
          quad_bytes,
          p.form.quad_bytes(),
          scale_unit(p)};
}

// Groups of a token that are rounded together: the chains of one group are long, those of several overlap.
constexpr int64_t kBatch = 16, kBatchValues = 16 << 10;
static_assert(kBatchValues * 4 < int64_t(kLocalBytes));

}  // namespace
