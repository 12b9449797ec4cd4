// The op `linear`: phase 0 prepares the rows of x, phase 1 runs tiles over panels. Rows that need no preparing, those
// that each thread prepares alone, and those that are a chunk's own have one phase: the tiles.
#pragma once
#include "cpu/linear/blocked.h"
#include "cpu/linear/prepare.h"

namespace {

// Weights are read once, straight through the panels, some side by side. The end of every panel runs by itself because
// the end of the chunk must ask for the start of this thread's next one; every panel, so that sums do not depend on the
// chunks.
void run_stream(const Problem& p, const Chunk& c, int64_t next_panel, const float* a, float* sums) {
  const int64_t bytes = panel_bytes(p.K, p.weight), step_bytes = kPanel * itemsize(p.weight) * steps_of(p.weight);
  const int64_t ahead = p.tuning.ahead ? p.tuning.ahead : kStreamAhead;
  const int64_t steps = bytes / step_bytes, tail = min64(steps, ahead / step_bytes), body = steps - tail;
  const int64_t at_once = stream_panels(p.tallest_tile());
  const RowTiles tiles = p.all_tiles();
  for (int64_t panel = c.panel0; panel < c.panel1; panel += at_once) {
    const int64_t count = min64(at_once, c.panel1 - panel);
    const char* b = p.w.data + panel * bytes;
    const char* next = p.w.data + (panel + count < c.panel1 ? panel + count : next_panel) * bytes;
    for (int64_t tile = c.tile0; tile < c.tile1; ++tile) {
      const int64_t row0 = tiles.row(tile), rows = tiles.row(tile + 1) - row0;
      const TileFunction run = stream_tile(p.weight, rows, count);
      const float* rows_of_a = a + p.tile_offset(tiles, tile);
      run({rows_of_a, b, body, b + ahead, 0, sums, false, bytes});
      run({rows_of_a + body * steps_of(p.weight) * rows, b + body * step_bytes, tail, next, 0, sums, true, bytes});
      for (int64_t i = 0; i < count; ++i)
        finish_tile(p, panel + i, row0, static_cast<int>(rows), sums + i * rows * kPanel);
    }
  }
}

constexpr int64_t kOwnTiles = kSumBytes / (kTileSums * 4);  // whose sums of one panel wait between K blocks

// Chunks of panels and row tiles, or all panels by rows of a chunk's own.
struct LinearSchedule : Schedule {
  const int64_t row_blocks;  // 0: rows belong to no chunk

  LinearSchedule(const Problem& p, int threads) : Schedule(p, threads), row_blocks(row_blocks_of(p, threads)) {}
  int64_t chunks() const { return row_blocks ? row_blocks : Schedule::chunks(); }

 private:
  // Weights of 16 bits would be widened for every block of rows.
  static int64_t row_blocks_of(const Problem& p, int threads) {
    if (p.streams() || p.weight != DType::f32) return 0;
    const int64_t room = kWideBytes / 4 - kLanes, a_row = p.padded_k() + kLanes;  // in floats
    const int64_t fit = kOwnTiles * kMaxRows;
    return own_row_blocks(p, 1, p.prepared() ? min64(fit, room / a_row) : fit, threads);
  }
};

inline bool prepares_together(const Problem& p, const LinearSchedule& schedule) {
  return p.prepared() && !prepares_alone(p) && schedule.row_blocks == 0;
}

int linear_phases(const Step& s, int threads) {
  const Problem p(s);
  return prepares_together(p, {p, threads}) ? 2 : 1;
}

int64_t linear_chunks(const Step& s, int phase, int threads) {
  const Problem p(s);
  const LinearSchedule schedule(p, threads);
  return phase == 0 && prepares_together(p, schedule) ? prepare_chunks(p, threads) : schedule.chunks();
}

// A stream begins with the panels of the thread's first chunk.
Span linear_first_read(const Step& s, int, int threads, int thread) {
  const Problem p(s);
  const LinearSchedule schedule(p, threads);
  const int64_t first = first_chunk(schedule.chunks(), threads, thread);
  if (!p.streams() || first >= schedule.chunks()) return {};
  const Chunk c = schedule.chunk(first);
  const int64_t bytes = panel_bytes(p.K, p.weight);
  return {p.w.data + c.panel0 * bytes, (c.panel1 - c.panel0) * bytes};
}

size_t linear_workspace(const Step& s, int threads) {
  const Problem p(s);
  if (!prepares_together(p, {p, threads})) return 0;
  return static_cast<size_t>(p.prepared_floats(p.all_tiles())) * sizeof(float);
}

// All panels over rows that no other chunk needs, as many at once as stay in L2 and have room for their sums. `local`
// as for run_blocked, and in place of widened panels the prepared rows.
void run_own_rows(const Problem& p, const RowTiles& rows, const Schedule& s, float* local) {
  const FloatPanels weights(p, rows.count);
  const float* a = reinterpret_cast<const float*>(p.x.data);
  if (p.prepared()) {
    float* prepared = local + kSumBytes / 4;
    for (int64_t tile = 0; tile < rows.count; ++tile) prepare_tile(p, rows, tile, 0, 1, prepared);
    a = prepared;
  }
  const int64_t span = s.k_blocks == 1 ? s.span : min64(s.span, kOwnTiles / rows.count);
  for (int64_t panel = 0; panel < s.panels; panel += span) {
    const Chunk c{panel, min64(s.panels, panel + span), 0, rows.count};
    run_blocked(p, weights, s, c, c.panel1 < s.panels ? c.panel1 : 0, rows, a, local);
  }
}

void linear_run(const Step& s, int phase, int64_t chunk, int threads, const Scratch& scratch) {
  const Problem p(s);
  float* local = reinterpret_cast<float*>(scratch.local);
  const LinearSchedule schedule(p, threads);
  if (schedule.row_blocks) return run_own_rows(p, own_tiles(p, schedule.row_blocks, chunk), schedule, local);
  float* prepared = prepares_alone(p) ? local + kTileSums : reinterpret_cast<float*>(scratch.shared);
  if (phase == 0 && prepares_together(p, schedule)) return prepare_chunk(p, chunk, threads, prepared);
  if (prepares_alone(p) && is_first(schedule.chunks(), threads, chunk))
    prepare_tile(p, p.all_tiles(), 0, 0, 1, prepared);
  const Chunk c = schedule.chunk(chunk);
  const float* a = p.prepared() ? prepared : reinterpret_cast<const float*>(p.x.data);
  const int64_t next_panel = schedule.next_panel(chunk, threads);
  if (p.streams()) return run_stream(p, c, next_panel, a, local);
  run_blocked(p, FloatPanels(p, c.tile1 - c.tile0), schedule, c, next_panel, p.all_tiles(), a, local);
}

}  // namespace
