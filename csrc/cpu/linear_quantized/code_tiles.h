// The GEMM over codes with one scale a column on AMX tiles: products of bytes, exact sums over all of K.
//   codes of rows   [row tiles][32 rows][padded K]   signed bytes, an odd number of cache lines from row to row
//   tables          [row tiles][32 rows] each; what they mean is in prepare.h
// Codes of weights are multiplied as they are packed, unsigned: `start` takes their zero point out of the sums.
#pragma once
#include "cpu/linear/tile_schedule.h"
#include "cpu/linear_quantized/code_rows.h"

namespace {

constexpr int64_t kLeastCodeRows = 64;  // fewer do not pay for tiles

// Local memory: sums (linear/tile_schedule.h), then a panel of 8-bit codes made from 4-bit ones.
inline bool runs_on_codes(const CodeTiles& p) {
  if (p.tuning.family != LinearFamily::automatic || p.K == 0 || p.form.groups() != 1) return false;
  if (p.M * p.planes < kLeastCodeRows || p.row_bytes() % kTileBytes) return false;
  return p.form.bits == 8 || kTileL2Sums + p.wide().panel_bytes() <= int64_t(kLocalBytes);
}

inline TileSchedule code_schedule(const CodeTiles& p, int threads) {
  const int64_t steps = p.row_bytes() / kTileBytes;
  TileSchedule s(p.M * p.planes, p.row_tiles(), p.panels(), steps, kTileHeight * kTileBytes, threads);
  if (p.form.bits != 8) s.keep_k_whole();  // a panel is widened once a chunk
  return s;
}

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
  const char* b;  // steps of a panel of unsigned 8-bit codes
  int64_t steps, row_stride;
  const char* ahead;  // weights wanted next: so many lines of 64 bytes in a step
  int64_t ahead_lines;
  float* sums;  // [32][kPanel], for integers
  bool accumulate;
  TileEpilogue<CodeSums<kPlanes>>* before;  // of the product before
  Pace pace{0};
};

// kHalves: 2 for a whole row tile, 1 when it has no more than 16 rows.
template <int kHalves, int kPlanes>
void code_tile(const CodeTileArgs<kPlanes>& args) {
  constexpr int kStride = kPanel * 4;
  char* sums = reinterpret_cast<char*>(args.sums);
  begin_sums<kHalves>(sums, args.accumulate);
  const char *a = args.a, *b = args.b, *ahead = args.ahead;
  int64_t until = kRoundsBefore + 1;
  for (int64_t step = args.steps; step > 0; --step, a += kTileBytes, b += kTileBytes / 4 * kStride) {
    for (int64_t line = args.ahead_lines; line > 0; --line, ahead += 64) __builtin_prefetch(ahead, 0, 2);
    keep_vectors_awake();
    // Rows that pass over a panel in L1 leave that there.
    _tile_stream_loadd(4, a, args.row_stride);
    if (kHalves == 2) _tile_stream_loadd(5, a + kTileRows * args.row_stride, args.row_stride);
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
  store_sums<kHalves>(sums);
}

template <int kPlanes>
void multiply_codes(const CodeTiles& p, const TileSchedule& s, int64_t chunk, int threads, const Scratch& scratch) {
  const Chunk c = s.chunk(chunk);
  const int64_t bytes = p.form.panel_bytes();
  TileSumSlots slots(s, c, scratch.local);
  TileEpilogue<CodeSums<kPlanes>> epilogue(p);
  const TileScope scope;
  each_block(s, c, s.next_panel(chunk, threads), [&](const TileBlock& b) __attribute__((always_inline)) {
    const char* codes = wide_codes(p, p.w.data + b.panel * bytes, scratch.local + kTileL2Sums);
    before_tile_loads();
    CodeTileArgs<kPlanes> args{};
    args.steps = b.step1 - b.step0, args.row_stride = p.row_stride(), args.accumulate = b.step0 > 0;
    args.b = codes + b.step0 * kTileBytes * kPanel, args.before = &epilogue, args.pace = Pace(args.steps);
    const TileAhead ahead(s, b, p.w.data + b.ahead_panel * bytes, bytes, c.tile1 - c.tile0);
    args.ahead_lines = ahead.lines;
    for (int64_t tile = c.tile0; tile < c.tile1; ++tile) {
      const int64_t token0 = tile * p.tile_tokens(), tokens = min64(p.tile_tokens(), p.M - token0);
      const Prepared rows = p.tile(scratch.shared, tile);
      args.a = rows.codes + b.step0 * kTileBytes;
      args.sums = slots.of(b, tile - c.tile0), args.ahead = ahead.of(b, tile - c.tile0);
      (tokens * p.planes <= kTileRows ? code_tile<1, kPlanes> : code_tile<2, kPlanes>)(args);
      if (!b.last) continue;
      epilogue.begin(PanelOutputs(p, b.panel, token0), tokens, {p, args.sums, rows, codes + p.wide().code_bytes()});
    }
  });
  epilogue.rest();
}

void run_codes(const CodeTiles& p, const TileSchedule& s, int64_t chunk, int threads, const Scratch& scratch) {
  (p.planes == 1 ? multiply_codes<1> : multiply_codes<0>)(p, s, chunk, threads, scratch);
}

}  // namespace
