// The GEMM over codes with one scale a column on AMX tiles: products of bytes, exact sums over all of K.
//   codes of rows   [row tiles][32 rows][padded K]   signed bytes, an odd number of cache lines from row to row
//   tables          [row tiles][32 rows] each; what they mean is in prepare.h
// Codes of weights are multiplied as they are packed, unsigned: `start` takes their zero point out of the sums.
#pragma once
#include "cpu/linear/terms.h"
#include "cpu/linear_quantized/code_rows.h"

namespace {

constexpr int64_t kLeastCodeRows = 64;  // fewer do not pay for tiles

// Local memory: two tiles of sums, used in turn, then a panel of 8-bit codes made from 4-bit ones.
inline bool runs_on_codes(const CodeTiles& p) {
  if (p.tuning.family != LinearFamily::automatic || p.K == 0 || p.form.groups() != 1) return false;
  if (p.M * p.planes < kLeastCodeRows || p.row_bytes() % kTileBytes) return false;
  return 2 * 4 * kTileProduct + p.wide().panel_bytes() <= int64_t(kLocalBytes);
}

struct CodeSchedule : Cut {
  CodeSchedule(const CodeTiles& p, int threads) {
    panels = p.panels(), tiles = p.row_tiles();
    const int64_t wanted = kChunksPerThread * threads;
    // All panels of a chunk pass over its rows, which stay in L2. Fewer rows let more panels share a chunk: rows and
    // weights are fetched about equally often then.
    const int64_t fit = max64(1, kTileL2 / (kTileHeight * p.row_stride()));
    const int64_t row_blocks = max64(1, ceil_div(tiles, fit));
    span = max64(1, panels * row_blocks / wanted);
    blocks = 1, tiles_per_block = tiles;
    if (panels > 0) cut_rows(wanted, fit);
  }
};

// The panel as 8-bit codes: where it lies, or made at `to`.
const char* wide_codes(const CodeTiles& p, const char* packed, char* to) {
  if (p.form.bits == 8) return packed;
  widen_codes(p.form, packed, to);
  return to;
}

// kPlanes: of a token, 1, or 0 for any number of them.
template <int kPlanes>
struct CodeSums {
  const float* at;  // [rows][kPanel] integers
  Prepared row;     // its tables begin with the next row
  Vec scale[2], offset[2];
  int planes;
  bool offsets;

  CodeSums() = default;
  // factors: of the columns.
  CodeSums(const CodeTiles& p, const float* sums, const Prepared& rows, const char* factors)
      : at(sums), row(rows), planes(p.planes), offsets(p.form.offsets) {
    const float* w = reinterpret_cast<const float*>(factors);
    const Vec alpha = vset(p.alpha);
    for (int v = 0; v < 2; ++v) {
      scale[v] = vmul(vload(w + v * kLanes), alpha);
      offset[v] = offsets ? vmul(vload(w + kPanel + v * kLanes), alpha) : vzero();
    }
  }
  inline __attribute__((always_inline)) Vec operator()(int m, int v, Vec total) const {
    const int each = kPlanes ? kPlanes : planes;
    for (int i = m * each; i < (m + 1) * each; ++i) {
      const __m512i sum = _mm512_load_si512(at + i * kPanel + v * kLanes);
      const Vec exact = vfrom_int({_mm512_add_epi32(sum, _mm512_set1_epi32(row.start[i]))});
      if (offsets) total = vfma(offset[v], vset(row.sum[i]), total);
      total = vfma(vmul(exact, scale[v]), vset(row.scale[i]), total);
    }
    return total;
  }
  void advance(int64_t tokens) {
    const int64_t rows = tokens * (kPlanes ? kPlanes : planes);
    at += rows * kPanel, row.scale += rows, row.start += rows, row.sum += rows;
  }
};

template <int kPlanes>
struct CodeTileArgs {
  const char* a;  // 32 rows, row_stride apart
  const char* b;  // a panel of unsigned 8-bit codes
  int64_t row_bytes, row_stride;
  const char* ahead;  // weights wanted next: so many lines of 64 bytes in a step
  int64_t ahead_lines;
  float* sums;  // [32][kPanel], for integers
  TileEpilogue<CodeSums<kPlanes>>* before;
  Pace pace;
};

// kHalves: 2 for a whole row tile, 1 when it has no more than 16 rows.
template <int kHalves, int kPlanes>
void code_tile(const CodeTileArgs<kPlanes>& args) {
  constexpr int kStride = kPanel * 4, kHalf = kTileRows * kStride;
  const char *a = args.a, *b = args.b, *ahead = args.ahead;
  _tile_zero(0);
  _tile_zero(1);
  _tile_zero(2);
  _tile_zero(3);
  int64_t until = kProductsBefore + 1;
  for (int64_t k = 0; k < args.row_bytes; k += kTileBytes, b += kTileBytes / 4 * kStride) {
    for (int64_t line = args.ahead_lines; line > 0; --line, ahead += 64) __builtin_prefetch(ahead, 0, 2);
    keep_vectors_awake();
    // Rows that pass over a panel in L1 leave that there.
    _tile_stream_loadd(4, a + k, args.row_stride);
    if (kHalves == 2) _tile_stream_loadd(5, a + kTileRows * args.row_stride + k, args.row_stride);
    _tile_loadd(6, b, kStride);
    _tile_loadd(7, b + kTileBytes, kStride);
    _tile_dpbsud(0, 4, 6);
    _tile_dpbsud(1, 4, 7);
    if (kHalves == 2) {
      _tile_dpbsud(2, 5, 6);
      _tile_dpbsud(3, 5, 7);
    }
    if (--until > 0) continue;
    until = args.pace.every;
    args.before->some(args.pace.rows);
  }
  args.before->rest();
  char* to = reinterpret_cast<char*>(args.sums);
  _tile_stored(0, to, kStride);
  _tile_stored(1, to + kTileBytes, kStride);
  if (kHalves == 2) {
    _tile_stored(2, to + kHalf, kStride);
    _tile_stored(3, to + kHalf + kTileBytes, kStride);
  }
}

template <int kPlanes>
void multiply_codes(const CodeTiles& p, const CodeSchedule& s, int64_t chunk, int threads, const Scratch& scratch) {
  const Chunk c = s.chunk(chunk);
  const int64_t next_panel = s.next_panel(chunk, threads);
  const int64_t bytes = p.form.panel_bytes(), tiles = c.tile1 - c.tile0, steps = p.row_bytes() / kTileBytes;
  float* sums = reinterpret_cast<float*>(scratch.local);
  TileEpilogue<CodeSums<kPlanes>> epilogue(p);
  CodeTileArgs<kPlanes> args{nullptr,        nullptr,   p.row_bytes(),
                             p.row_stride(), nullptr,   ceil_div(bytes, 64 * tiles * steps),
                             nullptr,        &epilogue, Pace(steps)};
  int64_t turn = 0;
  const TileScope scope;
  for (int64_t panel = c.panel0; panel < c.panel1; ++panel) {
    const char* ahead = p.w.data + (panel + 1 < c.panel1 ? panel + 1 : next_panel) * bytes;
    const char* codes = wide_codes(p, p.w.data + panel * bytes, scratch.local + 2 * 4 * kTileProduct);
    args.b = codes;
    before_tile_loads();
    for (int64_t tile = c.tile0; tile < c.tile1; ++tile) {
      const int64_t token0 = tile * p.tile_tokens(), tokens = min64(p.tile_tokens(), p.M - token0);
      const Prepared rows = p.tile(scratch.shared, tile);
      args.a = rows.codes;
      args.ahead = ahead + (tile - c.tile0) * steps * args.ahead_lines * 64;
      args.sums = sums + ++turn % 2 * kTileProduct;
      (tokens * p.planes <= kTileRows ? code_tile<1, kPlanes> : code_tile<2, kPlanes>)(args);
      epilogue.begin(PanelOutputs(p, panel, token0), tokens, {p, args.sums, rows, codes + p.wide().code_bytes()});
    }
  }
  epilogue.rest();
}

void run_codes(const CodeTiles& p, const CodeSchedule& s, int64_t chunk, int threads, const Scratch& scratch) {
  (p.planes == 1 ? multiply_codes<1> : multiply_codes<0>)(p, s, chunk, threads, scratch);
}

}  // namespace
