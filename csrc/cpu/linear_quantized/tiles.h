// The GEMM over quantised weights on AMX tiles: products of signed bytes, exact sums of one group at a time. While a
// group is multiplied, the sums of the one before it, of the tile before where it is the first, go times both scales
// into the f32 sums.
//   codes of rows   [row tiles][groups][32 rows][padded group]   signed bytes
//   tables          [row tiles][groups][32 rows] each; what they mean is in prepare.h; `start` is not read here
#pragma once
#include "cpu/linear_quantized/gemm.h"

namespace {

constexpr int64_t kTileHeight = 2 * kTileRows;
constexpr int64_t kTileFloats = kTileHeight * kPanel;
constexpr int64_t kTokensPrepared = 8;  // of a chunk
// Fewer rows, or groups that are no whole tiles, leave less to multiply than the folding of sums takes.
constexpr int64_t kLeastTileRows = 64;

struct QuantizedTiles : QuantizedProblem {
  using QuantizedProblem::QuantizedProblem;

  int64_t group_bytes() const { return form.steps() * kStepK; }  // of a row's codes
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

// Bytes of local memory: two buffers of integer sums and two of f32 sums, then a panel of signed codes.
constexpr int64_t kTileBuffers = 4 * kTileFloats * 4;

// A tuning that names a family means one of the kernels without tiles.
inline bool runs_on_tiles(const QuantizedTiles& p) {
  if (p.tuning.family != LinearFamily::automatic) return false;
  if (p.M * p.planes < kLeastTileRows || p.K == 0 || p.group_bytes() % kTileBytes) return false;
  return kTileBuffers + p.wide().panel_bytes() <= int64_t(kLocalBytes);
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

// The panel as signed 8-bit codes, less their zero point: otherwise every integer sum would need a correction.
void sign_codes(const QuantizedTiles& p, const char* packed, char* to) {
  const Form form = p.wide();
  if (p.form.bits == 4) {
    widen_codes(p.form, packed, to);
    if (p.form.zero_point() == 0) return;
    packed = to;
  }
  const __m512i zero = _mm512_set1_epi8(static_cast<char>(p.form.zero_point()));
  const int64_t codes = form.code_bytes(), bytes = form.group_bytes();
  for (int64_t group = 0; group < form.groups(); ++group, packed += bytes, to += bytes) {
    for (int64_t i = 0; i < codes; i += 64)
      _mm512_storeu_si512(to + i, _mm512_sub_epi8(_mm512_loadu_si512(packed + i), zero));
    for (int64_t i = codes; i < bytes; i += 64) _mm512_storeu_si512(to + i, _mm512_loadu_si512(packed + i));
  }
}

// Integer sums of one group that wait to be folded: they have left the tile registers, those of the next group have
// not.
struct Waiting {
  const int32_t* products;  // [32][kPanel]
  const float* row_scale;   // [32]
  const float* row_sum;     // [32]
  const char* factors;      // of the columns
  float* sums;              // [32][kPanel]
  int rows;
};

// f32 sums (+)= integer sums * scale of the row * scale of the column [+ offset * sum of the row].
template <bool kFirst, bool kOffsets>
inline __attribute__((always_inline)) void fold(const Waiting& f) {
  const float* w = reinterpret_cast<const float*>(f.factors);
  const Vec weight[2] = {vload(w), vload(w + kLanes)};
  const Vec offset[2] = {kOffsets ? vload(w + kPanel) : vzero(), kOffsets ? vload(w + kPanel + kLanes) : vzero()};
  const int32_t* products = f.products;
  float* sums = f.sums;
  for (int m = 0; m < f.rows; ++m, products += kPanel, sums += kPanel) {
    const Vec row_scale = vset(f.row_scale[m]), row_sum = kOffsets ? vset(f.row_sum[m]) : vzero();
#pragma GCC unroll 2
    for (int v = 0; v < 2; ++v) {
      const Vec exact = vfrom_int({_mm512_load_si512(products + v * kLanes)}), scale = vmul(weight[v], row_scale);
      Vec total = kFirst ? vmul(exact, scale) : vfma(exact, scale, vload(sums + v * kLanes));
      if (kOffsets) total = vfma(offset[v], row_sum, total);
      vstore(sums + v * kLanes, total);
    }
  }
}

struct CodeTileArgs {
  Prepared a;
  const char* b;  // a panel of signed 8-bit codes
  int64_t groups, group_bytes, panel_group_bytes, code_bytes;
  int rows;
  const char* ahead;  // weights wanted next: so many lines of 64 bytes in a group
  int64_t ahead_lines;
  int32_t* products[2];  // [32][kPanel], used in turn
  float* sums;           // [32][kPanel]
};

// The integer sums of one group after the other; `before` is called while those of the first are made. What is left
// waiting is the last group's. kHalves: 2 for a whole row tile, 1 when it has no more than 16 rows.
template <int kHalves, bool kOffsets, class Before>
Waiting code_tile(const CodeTileArgs& args, int64_t& turn, Before before) {
  constexpr int kStride = kPanel * 4, kHalf = kTileRows * kStride;
  const char *a = args.a.codes, *b = args.b, *ahead = args.ahead;
  Waiting waiting{};
  for (int64_t group = 0; group < args.groups; ++group) {
    for (int64_t line = args.ahead_lines; line > 0; --line, ahead += 64) __builtin_prefetch(ahead, 0, 2);
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
    for (int64_t k = 0; k < args.group_bytes; k += kTileBytes) {
      _tile_loadd(4, a + k, args.group_bytes);
      if (kHalves == 2) _tile_loadd(5, a + kTileRows * args.group_bytes + k, args.group_bytes);
      _tile_loadd(6, b + k / 4 * kStride, kStride);
      _tile_loadd(7, b + k / 4 * kStride + kTileBytes, kStride);
      _tile_dpbssd(0, 4, 6);
      _tile_dpbssd(1, 4, 7);
      if (kHalves == 2) {
        _tile_dpbssd(2, 5, 6);
        _tile_dpbssd(3, 5, 7);
      }
    }
    if (group == 0)
      before();
    else if (group == 1)
      fold<true, kOffsets>(waiting);
    else
      fold<false, kOffsets>(waiting);
    int32_t* products = args.products[++turn % 2];
    char* to = reinterpret_cast<char*>(products);
    _tile_stored(0, to, kStride);
    _tile_stored(1, to + kTileBytes, kStride);
    if (kHalves == 2) {
      _tile_stored(2, to + kHalf, kStride);
      _tile_stored(3, to + kHalf + kTileBytes, kStride);
    }
    waiting = {
        products, args.a.scale + group * kTileHeight, args.a.sum + group * kTileHeight, b + args.code_bytes, args.sums,
        args.rows};
    a += args.a.group_stride;
    b += args.panel_group_bytes;
  }
  return waiting;
}

// A tile whose last group waits to be folded, and its epilogue after that.
struct PendingTile {
  Waiting last;
  int64_t panel, token0, tokens;
};

template <bool kOffsets>
void finish_pending(const QuantizedTiles& p, const PendingTile& t) {
  if (t.tokens == 0) return;
  if (p.form.groups() == 1)
    fold<true, kOffsets>(t.last);
  else
    fold<false, kOffsets>(t.last);
  settle(p, nullptr, t.tokens, t.last.sums);
  finish_tile(p, t.panel, t.token0, static_cast<int>(t.tokens), t.last.sums);
}

template <bool kOffsets>
void run_tiles(const QuantizedTiles& p, const QuantizedTileSchedule& s, int64_t chunk, int threads,
               const Scratch& scratch) {
  const Chunk c = s.chunk(chunk);
  const int64_t next_panel = s.next_panel(chunk, threads);
  const int64_t bytes = p.form.panel_bytes(), tiles = c.tile1 - c.tile0;
  const Form wide = p.wide();
  int32_t* products = reinterpret_cast<int32_t*>(scratch.local);
  float* sums = reinterpret_cast<float*>(scratch.local) + 2 * kTileFloats;
  char* codes = scratch.local + kTileBuffers;
  CodeTileArgs args{};
  args.groups = p.form.groups();
  args.group_bytes = p.group_bytes();
  args.panel_group_bytes = wide.group_bytes();
  args.code_bytes = wide.code_bytes();
  args.products[0] = products, args.products[1] = products + kTileFloats;
  args.b = codes;
  args.ahead_lines = ceil_div(bytes, 64 * tiles * args.groups);
  PendingTile pending{};
  int64_t group_turn = 0, tile_turn = 0;
  const TileScope scope;
  for (int64_t panel = c.panel0; panel < c.panel1; ++panel) {
    const char* packed = p.w.data + panel * bytes;
    const char* ahead = p.w.data + (panel + 1 < c.panel1 ? panel + 1 : next_panel) * bytes;
    finish_pending<kOffsets>(p, pending);  // it needs the factors of the panel before
    pending = {};
    sign_codes(p, packed, codes);
    before_tile_loads();
    for (int64_t tile = c.tile0; tile < c.tile1; ++tile) {
      const int64_t token0 = tile * p.tile_tokens(), tokens = min64(p.tile_tokens(), p.M - token0);
      args.a = p.tile(scratch.shared, tile);
      args.rows = static_cast<int>(tokens * p.planes);
      args.ahead = ahead + (tile - c.tile0) * args.groups * args.ahead_lines * 64;
      args.sums = sums + ++tile_turn % 2 * kTileFloats;
      auto before = [&] { finish_pending<kOffsets>(p, pending); };
      const Waiting last = args.rows <= kTileRows ? code_tile<1, kOffsets>(args, group_turn, before)
                                                  : code_tile<2, kOffsets>(args, group_turn, before);
      pending = {last, panel, token0, tokens};
    }
  }
  finish_pending<kOffsets>(p, pending);
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
  const QuantizedTileSchedule schedule(p, threads);
  (p.form.offsets ? run_tiles<true> : run_tiles<false>)(p, schedule, chunk, threads, scratch);
}

Span tier_first_read(const Step& s, int phase, int threads, int thread) {
  return runs_on_tiles(QuantizedTiles(s)) ? Span{} : linear_first_read(s, phase, threads, thread);
}

}  // namespace
