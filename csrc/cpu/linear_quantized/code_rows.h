// Rows of x → the left operand of the GEMM over codes with one scale a column, where tiles read it.
#pragma once
#include "cpu/linear/terms.h"
#include "cpu/linear_quantized/gemm.h"

namespace {

constexpr int64_t kTokensPrepared = 8;  // of a chunk

struct CodeTiles : QuantizedProblem {
  using QuantizedProblem::QuantizedProblem;

  int64_t row_bytes() const { return form.steps() * kStepK; }
  // A tile takes a line of each of 16 rows: a power of two of lines apart, or a multiple, they would share sets of L1.
  int64_t row_stride() const { return (row_bytes() / 64 | 1) * 64; }
  int64_t tile_tokens() const { return kTileHeight / planes; }
  int64_t row_tiles() const { return ceil_div(M, tile_tokens()); }
  int64_t table_size() const { return row_tiles() * kTileHeight; }
  Form wide() const { return {K, 8, form.group, form.offsets}; }

  Prepared tile(char* shared, int64_t i) const {
    float* tables = reinterpret_cast<float*>(shared + table_size() * row_stride()) + i * kTileHeight;
    return {shared + i * kTileHeight * row_stride(),
            tables,
            reinterpret_cast<int32_t*>(tables + table_size()),
            tables + 2 * table_size(),
            kTileHeight,
            kTileHeight * row_stride(),
            4,
            row_stride()};
  }
};

void prepare_tokens(const CodeTiles& p, int64_t chunk, const Scratch& scratch) {
  const int64_t end = min64(p.M, (chunk + 1) * kTokensPrepared);
  for (int64_t token = chunk * kTokensPrepared; token < end; ++token) {
    const int64_t i = token / p.tile_tokens(), first = i * p.tile_tokens();
    quantize_tokens(p, p.tile(scratch.shared, i), first, token, 1, 0, 1, reinterpret_cast<float*>(scratch.local));
  }
}

}  // namespace
