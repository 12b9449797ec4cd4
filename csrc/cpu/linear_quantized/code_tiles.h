// The GEMM over codes with one scale a column on AMX tiles: products of bytes, exact sums over all of K.
//   codes of rows   [row tiles][32 rows][padded K]   signed bytes, an odd number of cache lines from row to row
//   tables          [row tiles][32 rows] each; what they mean is in prepare.h
// Codes of weights are multiplied as they are packed, unsigned: `start` takes their zero point out of the sums.
#pragma once
#include "cpu/linear/terms.h"
#include "cpu/linear_quantized/gemm.h"

namespace {

constexpr int64_t kTokensPrepared = 8;               // of a chunk
constexpr int64_t kLeastCodeRows = 64;               // fewer do not pay for tiles
constexpr int64_t kCodeSums = kTileHeight * kPanel;  // of a tile

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

// Local memory: two tiles of sums, used in turn, then a panel of 8-bit codes made from 4-bit ones.
inline bool runs_on_codes(const CodeTiles& p) {
  if (p.tuning.family != LinearFamily::automatic || p.K == 0 || p.form.groups() != 1) return false;
  if (p.M * p.planes < kLeastCodeRows || p.row_bytes() % kTileBytes) return false;
  return 2 * 4 * kCodeSums + p.wide().panel_bytes() <= int64_t(kLocalBytes);
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

void prepare_tokens(const CodeTiles& p, int64_t chunk, const Scratch& scratch) {
  const int64_t end = min64(p.M, (chunk + 1) * kTokensPrepared);
  float* values = reinterpret_cast<float*>(scratch.local);
  for (int64_t token = chunk * kTokensPrepared; token < end; ++token) {
    const int64_t tile = token / p.tile_tokens();
    quantize_tokens(p, p.tile(scratch.shared, tile), tile * p.tile_tokens(), token, 1, 0, 1, values);
  }
}

// The panel as 8-bit codes: where it lies, or made at `to`.
const char* wide_codes(const CodeTiles& p, const char* packed, char* to) {
  if (p.form.bits == 8) return packed;
  widen_codes(p.form, packed, to);
  return to;
}

// The scales of a finished product, and its epilogue.
class CodeEpilogue {
 public:
  explicit CodeEpilogue(const CodeTiles& p) : p_(p) {}

  // factors: of the columns. sums: [32][kPanel] integers; they become f32 where they lie.
  void begin(int64_t panel, int64_t token0, int64_t tokens, const Prepared& rows, const char* factors, float* sums) {
    waiting_ = {panel, token0, tokens, sums};
    waiting_.keep(p_.planes);
    row_ = rows;
    const float* w = reinterpret_cast<const float*>(factors);
    for (int v = 0; v < 2; ++v) {
      scale_[v] = vload(w + v * kLanes);
      offset_[v] = p_.form.offsets ? vload(w + kPanel + v * kLanes) : vzero();
    }
  }
  void some(int64_t most) {
    waiting_.some(most, p_.planes, [this](int tokens) {
      scale(tokens * p_.planes);
      settle(p_, nullptr, tokens, waiting_.sums);
      finish_tile(p_, waiting_.panel, waiting_.row, tokens, waiting_.sums);
    });
  }
  void rest() { some(waiting_.left); }

 private:
  void scale(int rows) {
    for (int m = 0; m < rows; ++m, ++row_.scale, ++row_.start, ++row_.sum)
#pragma GCC unroll 2
      for (int v = 0; v < 2; ++v) {
        float* at = waiting_.sums + m * kPanel + v * kLanes;
        const Vec exact = vfrom_int({_mm512_add_epi32(_mm512_load_si512(at), _mm512_set1_epi32(*row_.start))});
        Vec total = vmul(vmul(exact, scale_[v]), vset(*row_.scale));
        if (p_.form.offsets) total = vfma(offset_[v], vset(*row_.sum), total);
        vstore(at, total);
      }
  }

  const CodeTiles& p_;
  WaitingRows waiting_;
  Prepared row_{};  // its tables begin with the next row
  Vec scale_[2], offset_[2];
};

struct CodeTileArgs {
  const char* a;  // 32 rows, row_stride apart
  const char* b;  // a panel of unsigned 8-bit codes
  int64_t row_bytes, row_stride;
  const char* ahead;  // weights wanted next: so many lines of 64 bytes in a step
  int64_t ahead_lines;
  float* sums;  // [32][kPanel], for integers
  CodeEpilogue* before;
  int64_t tokens_a_step;  // of it
};

// kHalves: 2 for a whole row tile, 1 when it has no more than 16 rows.
template <int kHalves>
void code_tile(const CodeTileArgs& args) {
  constexpr int kStride = kPanel * 4, kHalf = kTileRows * kStride;
  const char *a = args.a, *b = args.b, *ahead = args.ahead;
  _tile_zero(0);
  _tile_zero(1);
  _tile_zero(2);
  _tile_zero(3);
  for (int64_t k = 0; k < args.row_bytes; k += kTileBytes, b += kTileBytes / 4 * kStride) {
    for (int64_t line = args.ahead_lines; line > 0; --line, ahead += 64) __builtin_prefetch(ahead, 0, 2);
    _tile_loadd(4, a + k, args.row_stride);
    if (kHalves == 2) _tile_loadd(5, a + kTileRows * args.row_stride + k, args.row_stride);
    _tile_loadd(6, b, kStride);
    _tile_loadd(7, b + kTileBytes, kStride);
    _tile_dpbsud(0, 4, 6);
    _tile_dpbsud(1, 4, 7);
    if (kHalves == 2) {
      _tile_dpbsud(2, 5, 6);
      _tile_dpbsud(3, 5, 7);
    }
    args.before->some(args.tokens_a_step);
  }
  char* to = reinterpret_cast<char*>(args.sums);
  _tile_stored(0, to, kStride);
  _tile_stored(1, to + kTileBytes, kStride);
  if (kHalves == 2) {
    _tile_stored(2, to + kHalf, kStride);
    _tile_stored(3, to + kHalf + kTileBytes, kStride);
  }
}

void run_codes(const CodeTiles& p, const CodeSchedule& s, int64_t chunk, int threads, const Scratch& scratch) {
  const Chunk c = s.chunk(chunk);
  const int64_t next_panel = s.next_panel(chunk, threads);
  const int64_t bytes = p.form.panel_bytes(), tiles = c.tile1 - c.tile0, steps = p.row_bytes() / kTileBytes;
  float* sums = reinterpret_cast<float*>(scratch.local);
  CodeEpilogue epilogue(p);
  CodeTileArgs args{};
  args.row_bytes = p.row_bytes(), args.row_stride = p.row_stride();
  args.ahead_lines = ceil_div(bytes, 64 * tiles * steps);
  args.before = &epilogue;
  args.tokens_a_step = ceil_div(max64(2, ceil_div(kTileHeight, steps)), p.planes);
  int64_t turn = 0;
  const TileScope scope;
  for (int64_t panel = c.panel0; panel < c.panel1; ++panel) {
    const char* ahead = p.w.data + (panel + 1 < c.panel1 ? panel + 1 : next_panel) * bytes;
    const char* codes = wide_codes(p, p.w.data + panel * bytes, scratch.local + 2 * 4 * kCodeSums);
    args.b = codes;
    before_tile_loads();
    for (int64_t tile = c.tile0; tile < c.tile1; ++tile) {
      const int64_t token0 = tile * p.tile_tokens(), tokens = min64(p.tile_tokens(), p.M - token0);
      const Prepared rows = p.tile(scratch.shared, tile);
      args.a = rows.codes;
      args.ahead = ahead + (tile - c.tile0) * steps * args.ahead_lines * 64;
      args.sums = sums + ++turn % 2 * kCodeSums;
      (tokens * p.planes <= kTileRows ? code_tile<1> : code_tile<2>)(args);
      epilogue.rest();
      epilogue.begin(panel, token0, tokens, rows, codes + p.wide().code_bytes(), args.sums);
    }
  }
  epilogue.rest();
}

}  // namespace
