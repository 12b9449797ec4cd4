// The op `linear_quantized`: phase 0 rounds the rows of x, phase 1 runs tiles over panels. There is one phase only
// where each thread rounds all of few rows for itself, or every chunk the rows that are its own.
#pragma once
#include "cpu/linear/epilogue.h"
#include "cpu/linear_quantized/lone_rows.h"
#include "cpu/linear_quantized/prepare.h"
#ifdef LLMOPT_ISA_PAIRS
#include "cpu/linear_quantized/pair_tile.h"
#else
#include "cpu/linear_quantized/byte_tile.h"
#endif

namespace {

// Bytes of codes that a thread had better read once it has begun: a chunk begins with lines that nobody asked for in
// time.
constexpr int64_t kLongStream = 96 << 10;

// The most panels up to `most` that are a multiple of `at_once` more than `span` and give no thread more of them in
// all.
inline int64_t longer_span(int64_t panels, int64_t span, int64_t most, int at_once, int threads) {
  const auto longest = [&](int64_t s) { return ceil_div(ceil_div(panels, s), threads) * s; };
  int64_t best = span;
  for (int64_t s = span + at_once; s <= most; s += at_once)
    if (longest(s) <= longest(best)) best = s;
  return best;
}

constexpr int64_t kOwnRowBytes = 256 << 10;  // of codes of rows that belong to one chunk
static_assert(kQuantizedSums + kOwnRowBytes * 5 / 2 + 4 * (kBatchValues + kLanes) <= int64_t(kLocalBytes),
              "tables take 12 bytes for at least 8 of codes");

// A chunk is `span` panels by `tiles_per_block` tiles. A panel has all of K: it stays in L2 while the tiles pass. Or it
// is all panels by rows of its own.
struct QuantizedSchedule : Cut {
  const int64_t row_blocks;  // 0: rows belong to no chunk

  QuantizedSchedule(const QuantizedProblem& p, int threads) : row_blocks(row_blocks_of(p, threads)) {
    panels = p.panels(), tiles = p.tiles();
    const int64_t wanted = kChunksPerThread * threads;
    const LinearTuning& given = p.tuning;
    blocks = 1;
    tiles_per_block = given.tiles ? min64(given.tiles, tiles) : tiles;
    span = max64(1, panels / wanted);
    if (p.streamed) {
      const int64_t bytes = max64(1, p.form.panel_bytes());
      const int at_once = quantized_stream_panels(p.tallest_tile());
      span = stream_span(panels, max64(1, min64(kStreamChunk / bytes, span)), at_once, threads);
      // Two chunks a thread at least, so that a slow core does not hold up the others for long.
      span = longer_span(panels, span, min64(kLongStream / bytes, panels / (2 * threads)), at_once, threads);
    }
    if (given.span) span = given.span;
    if (tiles <= 1 || panels == 0) return;
    if (given.tiles)
      blocks = ceil_div(tiles, tiles_per_block);
    else
      cut_rows(wanted, tiles, min64(threads, p.M / kThreadRows));
  }

  int64_t chunks() const { return row_blocks ? row_blocks : Cut::chunks(); }

 private:
  // Panels that are unpacked first would be so for every block.
  static int64_t row_blocks_of(const QuantizedProblem& p, int threads) {
    if (p.streamed || p.unpacked_bytes() > 0) return 0;
    return own_row_blocks(p, p.planes, kOwnRowBytes / max64(1, p.row_stride() * p.planes), threads);
  }
};

constexpr int64_t kQuantizedAhead = 2 << 10;  // bytes a stream asks for its weights before it needs them

// The planes of a token become one row; columns of 4-bit weights get their factors, and back what their rows' scales
// were divided by.
void settle(const QuantizedProblem& p, const char* factors, int64_t tokens, float* sums) {
  if (p.planes > 1)
    for (int64_t t = 0; t < tokens; ++t)
      for (int v = 0; v < kPanel; v += kLanes) {
        Vec sum = vload(sums + t * p.planes * kPanel + v);
        for (int i = 1; i < p.planes; ++i) sum = vadd(sum, vload(sums + (t * p.planes + i) * kPanel + v));
        vstore(sums + t * kPanel + v, sum);
      }
  if (!factors) return;
  for (int64_t t = 0; t < tokens; ++t)
    for (int v = 0; v < kPanel; v += kLanes) {
      float* at = sums + t * kPanel + v;
      const Vec factor = vmul(vload(reinterpret_cast<const float*>(factors) + v), vset(kScaleTop));
      vstore(at, vmul(vload(at), factor));
    }
}

QuantizedTileArgs tile_args(const QuantizedProblem& p, const Prepared& tile, float* sums) {
  QuantizedTileArgs args{};
  args.a = tile.codes;
  args.a_stride = tile.row_stride;
  args.scale = tile.scale;
  args.start = tile.start;
  args.sum = tile.sum;
  args.groups = p.form.groups();
  args.steps = p.form.steps();
  args.offsets = p.form.offsets;
  args.sums = sums;
  return args;
}

inline const char* column_factors(const Form& form, const char* panel) {
  return form.bits == 8 ? nullptr : panel + form.groups() * form.group_bytes();
}

// Weights are read once, straight through the panels, some side by side. At the end of the chunk the start of this
// thread's next one is asked for.
void stream_panels(const QuantizedProblem& p, const Chunk& c, int64_t next_panel, const CodeMemory& rows, float* sums) {
  const int64_t bytes = p.form.panel_bytes();
  const int64_t distance = p.tuning.ahead ? p.tuning.ahead : kQuantizedAhead;
  const int64_t at_once = quantized_stream_panels(p.tallest_tile());
  for (int64_t panel = c.panel0; panel < c.panel1; panel += at_once) {
    const int64_t count = min64(at_once, c.panel1 - panel);
    const char* b = p.w.data + panel * bytes;
    for (int64_t tile = c.tile0; tile < c.tile1; ++tile) {
      const int64_t token0 = rows.tiles.row(tile), tokens = rows.tiles.row(tile + 1) - token0;
      const int64_t height = tokens * p.planes;
      QuantizedTileArgs args = tile_args(p, prepared_tile(p, rows, tile), sums);
      args.b = b;
      args.ahead = b + min64(distance, bytes);
      args.ahead_end = b + bytes;
      args.next = p.w.data + (panel + count < c.panel1 ? panel + count : next_panel) * bytes;
      args.panel_bytes = bytes;
      code_stream_function(p.form, height, count)(args);
      for (int64_t i = 0; i < count; ++i) {
        float* tile_sums = sums + i * height * kPanel;
        settle(p, column_factors(p.form, b + i * bytes), tokens, tile_sums);
        if (p.exact) mend_rows(p, panel + i, token0, tokens, tile_sums);
        finish_tile(p, panel + i, token0, static_cast<int>(tokens), tile_sums);
      }
    }
  }
}

// Panel after panel, unpacked where tiles want that, all tiles pass over it while the next one is fetched.
void block_panels(const QuantizedProblem& p, const Chunk& c, int64_t next_panel, const CodeMemory& rows, float* sums,
                  char* unpacked) {
  const int64_t bytes = p.form.panel_bytes(), tiles = c.tile1 - c.tile0;
  const int64_t ahead_stride = ceil_div(bytes, max64(1, tiles * p.form.groups() * p.form.steps()));
  for (int64_t panel = c.panel0; panel < c.panel1; ++panel) {
    const char* b = p.w.data + panel * bytes;
    const char* ahead = p.w.data + (panel + 1 < c.panel1 ? panel + 1 : next_panel) * bytes;
    const char* codes = tile_codes(p.form, b, unpacked);
    for (int64_t tile = c.tile0; tile < c.tile1; ++tile) {
      const int64_t token0 = rows.tiles.row(tile), tokens = rows.tiles.row(tile + 1) - token0;
      QuantizedTileArgs args = tile_args(p, prepared_tile(p, rows, tile), sums);
      args.b = codes;
      args.ahead = ahead + (tile - c.tile0) * bytes / tiles;
      args.ahead_stride = ahead_stride;
      fetch_outputs(p, panel, token0, static_cast<int>(tokens));
      code_tile_function(p.form, tokens * p.planes)(args);
      settle(p, nullptr, tokens, sums);
      if (p.exact) mend_rows(p, panel, token0, tokens, sums);
      finish_tile(p, panel, token0, static_cast<int>(tokens), sums);
    }
  }
}

// As in `linear` (kAloneValues).
bool rounds_alone(const QuantizedProblem& p) {
  return p.is_alone && p.tiles() == 1 && p.streamed && p.M * p.K <= kAloneValues;
}

// Whether phase 0 rounds the rows for all chunks.
bool rounds_together(const QuantizedProblem& p, const QuantizedSchedule& schedule) {
  return !rounds_alone(p) && schedule.row_blocks == 0;
}

int linear_phases(const Step& s, int threads) {
  const QuantizedProblem p(s);
  return rounds_together(p, {p, threads}) ? 2 : 1;
}

int64_t linear_chunks(const Step& s, int phase, int threads) {
  const QuantizedProblem p(s);
  const QuantizedSchedule schedule(p, threads);
  return phase == 0 && rounds_together(p, schedule) ? p.tiles() * quantize_parts(p, threads) : schedule.chunks();
}

// A stream begins with the panels of the thread's first chunk.
Span linear_first_read(const Step& s, int, int threads, int thread) {
  const QuantizedProblem p(s);
  const QuantizedSchedule schedule(p, threads);
  const int64_t first = first_chunk(schedule.chunks(), threads, thread);
  if (!p.streamed || first >= schedule.chunks()) return {};
  const Chunk c = schedule.chunk(first);
  return {p.w.data + c.panel0 * p.form.panel_bytes(), (c.panel1 - c.panel0) * p.form.panel_bytes()};
}

size_t linear_workspace(const Step& s, int threads) {
  const QuantizedProblem p(s);
  return rounds_together(p, {p, threads}) ? prepared_bytes(p, p.M * p.planes) : 0;
}

void linear_run(const Step& s, int phase, int64_t chunk, int threads, const Scratch& scratch) {
  const QuantizedProblem p(s);
  const QuantizedSchedule schedule(p, threads);
  const bool alone = rounds_alone(p), owns = schedule.row_blocks > 0;
  if (phase == 0 && rounds_together(p, schedule)) {
    const int64_t parts = quantize_parts(p, threads);
    return quantize_tile(p, {scratch.shared, p.all_tiles()}, chunk / parts, chunk % parts, parts, scratch.local);
  }
  const CodeMemory rows{alone || owns ? scratch.local + kQuantizedSums : scratch.shared,
                        owns ? own_tiles(p, schedule.row_blocks, chunk) : p.all_tiles()};
  if (owns || (alone && is_first(schedule.chunks(), threads, chunk))) {
    const size_t bytes = prepared_bytes(p, rows.tiles.rows * p.planes);
    char* behind = rows.at + ceil_div(static_cast<int64_t>(bytes), 64) * 64;
    for (int64_t tile = 0; tile < rows.tiles.count; ++tile) quantize_tile(p, rows, tile, 0, 1, behind);
  }
  const Chunk c = owns ? Chunk{0, p.panels(), 0, rows.tiles.count} : schedule.chunk(chunk);
  const int64_t next_panel = owns ? 0 : schedule.next_panel(chunk, threads);
  float* sums = reinterpret_cast<float*>(scratch.local);  // behind them rows, or what is unpacked: never both
  if (p.streamed) return stream_panels(p, c, next_panel, rows, sums);
  block_panels(p, c, next_panel, rows, sums, scratch.local + kQuantizedSums);
}

}  // namespace
