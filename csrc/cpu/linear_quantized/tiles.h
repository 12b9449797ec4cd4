// The GEMM over quantised weights on AMX tiles: products of signed and unsigned bytes, exact sums of one group at a
// time. While a group is multiplied, the sums of the one before it go times both scales into the f32 sums.
//   codes of rows   [row tiles][groups][32 rows][padded group]   signed bytes
//   tables          [row tiles][groups][32 rows] each; what they mean is in prepare.h
#pragma once
#include "cpu/linear_quantized/gemm.h"

namespace {

constexpr int64_t kTileHeight = 2 * kTileRows;
constexpr int64_t kTileFloats = kTileHeight * kPanel;
constexpr int64_t kTokensPrepared = 8;  // of a chunk
// Fewer rows, or groups shorter than a tile, leave less to multiply than the folding of sums takes.
constexpr int64_t kLeastTileRows = 64;

struct QuantizedTiles : QuantizedProblem {
  using QuantizedProblem::QuantizedProblem;

  int64_t group_bytes() const { return form.steps() * kStepK; }  // of a row's codes
  // k of one product: it divides the group.
  int64_t tile_k() const {
    int64_t k = min64(group_bytes(), kTileBytes);
    while (group_bytes() % k) k -= kStepK;
    return k;
  }
  int64_t tile_tokens() const { return kTileHeight / planes; }
  int64_t row_tiles() const { return ceil_div(M, tile_tokens()); }
  int64_t table_size() const { return row_tiles() * form.groups() * kTileHeight; }
  int64_t code_bytes() const { return table_size() * group_bytes(); }
  Form wide() const { return {K, 8, form.group, form.offsets}; }

  Prepared tile(char* shared, int64_t i) const {
    const int64_t first = i * form.groups() * kTileHeight;
    float* tables = reinterpret_cast<float*>(shared + code_bytes()) + first;
    return {shared + first * group_bytes(),
            tables,
            reinterpret_cast<int32_t*>(tables + table_size()),
            tables + 2 * table_size(),
            kTileHeight,
            kTileHeight * group_bytes(),
            4,
            group_bytes()};
  }
};

// Bytes of local memory: two buffers of integer sums, the f32 sums, and a widened panel.
constexpr int64_t kTileBuffers = 3 * kTileFloats * 4;

// A tuning that names a family means one of the kernels without tiles.
inline bool runs_on_tiles(const QuantizedTiles& p) {
  if (p.tuning.family != LinearFamily::automatic) return false;
  if (p.M * p.planes < kLeastTileRows || p.K == 0 || p.tile_k() < kTileBytes) return false;
  return p.form.bits == 8 || kTileBuffers + p.wide().panel_bytes() <= int64_t(kLocalBytes);
}

struct QuantizedTileSchedule : Cut {
  QuantizedTileSchedule(const QuantizedTiles& p, int threads) {
    panels = p.panels(), tiles = p.row_tiles();
    const int64_t wanted = kChunksPerThread * threads;
    span = max64(1, panels / wanted);
    blocks = min64(ceil_div(wanted, max64(1, panels)), max64(1, tiles / kMinBlockTiles));
    tiles_per_block = ceil_div(tiles, blocks);
    blocks = ceil_div(tiles, tiles_per_block);
  }
};

void prepare_tokens(const QuantizedTiles& p, int64_t chunk, const Scratch& scratch) {
  const int64_t end = min64(p.M, (chunk + 1) * kTokensPrepared);
  float* values = reinterpret_cast<float*>(scratch.local);
  for (int64_t token = chunk * kTokensPrepared; token < end; ++token) {
    const int64_t tile = token / p.tile_tokens();
    quantize_tokens(p, p.tile(scratch.shared, tile), tile * p.tile_tokens(), token, 1, 0, p.form.groups(), values);
  }
}

// f32 sums += (integer sums + start) * scale of the row * scale of the column [+ offset * sum].
template <bool kOffsets>
inline __attribute__((always_inline)) void fold_group(const Prepared& a, int64_t group, const char* factors, int rows,
                                                      const int32_t* products, float* sums) {
  const float* scale = a.scale + group * kTileHeight;
  const float* sum = a.sum + group * kTileHeight;
  const int32_t* start = a.start + group * kTileHeight;
  const float* w = reinterpret_cast<const float*>(factors);
  const Vec weight[2] = {vload(w), vload(w + kLanes)};
  const Vec offset[2] = {kOffsets ? vload(w + kPanel) : vzero(), kOffsets ? vload(w + kPanel + kLanes) : vzero()};
  for (int m = 0; m < rows; ++m, products += kPanel, sums += kPanel) {
    const Vec row_scale = vset(scale[m]), row_sum = vset(kOffsets ? sum[m] : 0.0f);
    const __m512i row_start = _mm512_set1_epi32(start[m]);
#pragma GCC unroll 2
    for (int v = 0; v < 2; ++v) {
      const IntVec exact{_mm512_add_epi32(_mm512_load_si512(products + v * kLanes), row_start)};
      Vec total = vfma(vfrom_int(exact), vmul(weight[v], row_scale), vload(sums + v * kLanes));
      if (kOffsets) total = vfma(offset[v], row_sum, total);
      vstore(sums + v * kLanes, total);
    }
  }
}

struct CodeTileArgs {
  Prepared a;
  const char* b;  // a panel of 8-bit codes
  int64_t groups, group_bytes, tile_k, panel_group_bytes, code_bytes;
  int rows;
  const char* ahead;  // weights wanted next: so many lines of 64 bytes in a group
  int64_t ahead_lines;
  int32_t* products;  // two buffers [32][kPanel]
  float* sums;        // [32][kPanel]
};

// kHalves: 2 for a whole row tile, 1 when it has no more than 16 rows.
template <int kHalves, bool kOffsets>
void code_tile(const CodeTileArgs& args) {
  constexpr int kStride = kPanel * 4, kHalf = kTileRows * kStride;
  for (int64_t i = 0; i < kTileFloats; i += kLanes) vstore(args.sums + i, vzero());
  const char *a = args.a.codes, *b = args.b, *ahead = args.ahead;
  for (int64_t group = 0; group < args.groups; ++group) {
    for (int64_t line = args.ahead_lines; line > 0; --line, ahead += 64) __builtin_prefetch(ahead, 0, 2);
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
    for (int64_t k = 0; k < args.group_bytes; k += args.tile_k) {
      _tile_loadd(4, a + k, args.group_bytes);
      if (kHalves == 2) _tile_loadd(5, a + kTileRows * args.group_bytes + k, args.group_bytes);
      _tile_loadd(6, b + k / 4 * kStride, kStride);
      _tile_loadd(7, b + k / 4 * kStride + kTileBytes, kStride);
      _tile_dpbsud(0, 4, 6);
      _tile_dpbsud(1, 4, 7);
      if (kHalves == 2) {
        _tile_dpbsud(2, 5, 6);
        _tile_dpbsud(3, 5, 7);
      }
    }
    int32_t* products = args.products + group % 2 * kTileFloats;
    if (group > 0)
      fold_group<kOffsets>(args.a, group - 1, b - args.panel_group_bytes + args.code_bytes, args.rows,
                           args.products + (group - 1) % 2 * kTileFloats, args.sums);
    char* to = reinterpret_cast<char*>(products);
    _tile_stored(0, to, kStride);
    _tile_stored(1, to + kTileBytes, kStride);
    if (kHalves == 2) {
      _tile_stored(2, to + kHalf, kStride);
      _tile_stored(3, to + kHalf + kTileBytes, kStride);
    }
    a += args.a.group_stride;
    b += args.panel_group_bytes;
  }
  fold_group<kOffsets>(args.a, args.groups - 1, b - args.panel_group_bytes + args.code_bytes, args.rows,
                       args.products + (args.groups - 1) % 2 * kTileFloats, args.sums);
}

void run_tiles(const QuantizedTiles& p, const QuantizedTileSchedule& s, int64_t chunk, int threads,
               const Scratch& scratch) {
  const Chunk c = s.chunk(chunk);
  const int64_t next_panel = s.next_panel(chunk, threads);
  const int64_t bytes = p.form.panel_bytes(), tiles = c.tile1 - c.tile0;
  const Form wide = p.wide();
  char* widened = scratch.local + kTileBuffers;
  CodeTileArgs args{};
  args.groups = p.form.groups();
  args.group_bytes = p.group_bytes();
  args.tile_k = p.tile_k();
  args.panel_group_bytes = wide.group_bytes();
  args.code_bytes = wide.code_bytes();
  args.products = reinterpret_cast<int32_t*>(scratch.local);
  args.sums = reinterpret_cast<float*>(scratch.local) + 2 * kTileFloats;
  args.ahead_lines = ceil_div(bytes, 64 * tiles * args.groups);
  const TileScope scope(static_cast<int>(args.tile_k));
  for (int64_t panel = c.panel0; panel < c.panel1; ++panel) {
    args.b = p.w.data + panel * bytes;
    if (p.form.bits == 4) {
      widen_codes(p.form, args.b, widened);
      args.b = widened;
    }
    const char* ahead = p.w.data + (panel + 1 < c.panel1 ? panel + 1 : next_panel) * bytes;
    for (int64_t tile = c.tile0; tile < c.tile1; ++tile) {
      const int64_t token0 = tile * p.tile_tokens(), tokens = min64(p.tile_tokens(), p.M - token0);
      args.a = p.tile(scratch.shared, tile);
      args.rows = static_cast<int>(tokens * p.planes);
      args.ahead = ahead + (tile - c.tile0) * args.groups * args.ahead_lines * 64;
      if (args.rows <= kTileRows)
        (p.form.offsets ? code_tile<1, true> : code_tile<1, false>)(args);
      else
        (p.form.offsets ? code_tile<2, true> : code_tile<2, false>)(args);
      settle(p, nullptr, tokens, args.sums);
      finish_tile(p, panel, token0, static_cast<int>(tokens), args.sums);
    }
  }
}

// ---- the op: on tiles where that pays, otherwise as in the tiers without them

int tier_phases(const Step& s, int threads) { return runs_on_tiles(QuantizedTiles(s)) ? 2 : linear_phases(s, threads); }

int64_t tier_chunks(const Step& s, int phase, int threads) {
  const QuantizedTiles p(s);
  if (!runs_on_tiles(p)) return linear_chunks(s, phase, threads);
  return phase == 0 ? ceil_div(p.M, kTokensPrepared) : QuantizedTileSchedule(p, threads).chunks();
}

size_t tier_workspace(const Step& s, int threads) {
  const QuantizedTiles p(s);
  if (!runs_on_tiles(p)) return linear_workspace(s, threads);
  return static_cast<size_t>(p.code_bytes() + 3 * 4 * p.table_size());
}

void tier_run(const Step& s, int phase, int64_t chunk, int threads, const Scratch& scratch) {
  const QuantizedTiles p(s);
  if (!runs_on_tiles(p)) return linear_run(s, phase, chunk, threads, scratch);
  if (phase == 0) return prepare_tokens(p, chunk, scratch);
  run_tiles(p, QuantizedTileSchedule(p, threads), chunk, threads, scratch);
}

Span tier_first_read(const Step& s, int phase, int threads, int thread) {
  return runs_on_tiles(QuantizedTiles(s)) ? Span{} : linear_first_read(s, phase, threads, thread);
}

}  // namespace
