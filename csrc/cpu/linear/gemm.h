// The op `linear`: phase 0 prepares the rows of x, phase 1 runs tiles over panels. Rows that need no preparing, and
// those that each thread prepares alone, have one phase: the tiles.
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
  for (int64_t panel = c.panel0; panel < c.panel1; panel += at_once) {
    const int64_t count = min64(at_once, c.panel1 - panel);
    const char* b = p.w.data + panel * bytes;
    const char* next = p.w.data + (panel + count < c.panel1 ? panel + count : next_panel) * bytes;
    for (int64_t tile = c.tile0; tile < c.tile1; ++tile) {
      const int64_t row0 = p.tile_row(tile), rows = p.tile_row(tile + 1) - row0;
      const TileFunction run = stream_tile(p.weight, rows, count);
      const float* rows_of_a = a + p.tile_offset(tile);
      run({rows_of_a, b, body, b + ahead, 0, sums, false, bytes});
      run({rows_of_a + body * steps_of(p.weight) * rows, b + body * step_bytes, tail, next, 0, sums, true, bytes});
      for (int64_t i = 0; i < count; ++i)
        finish_tile(p, panel + i, row0, static_cast<int>(rows), sums + i * rows * kPanel);
    }
  }
}

inline bool prepares_together(const Problem& p) { return p.prepared() && !prepares_alone(p); }

int linear_phases(const Step& s, int) { return prepares_together(Problem(s)) ? 2 : 1; }

int64_t linear_chunks(const Step& s, int phase, int threads) {
  const Problem p(s);
  if (prepares_together(p) && phase == 0) return prepare_chunks(p, threads);
  return Schedule(p, threads).chunks();
}

// A stream begins with the panels of the thread's first chunk.
Span linear_first_read(const Step& s, int, int threads, int thread) {
  const Problem p(s);
  const Schedule schedule(p, threads);
  const int64_t first = first_chunk(schedule.chunks(), threads, thread);
  if (!p.streams() || first >= schedule.chunks()) return {};
  const Chunk c = schedule.chunk(first);
  const int64_t bytes = panel_bytes(p.K, p.weight);
  return {p.w.data + c.panel0 * bytes, (c.panel1 - c.panel0) * bytes};
}

size_t linear_workspace(const Step& s, int) {
  const Problem p(s);
  return prepares_together(p) ? static_cast<size_t>(p.prepared_floats()) * sizeof(float) : 0;
}

void linear_run(const Step& s, int phase, int64_t chunk, int threads, const Scratch& scratch) {
  const Problem p(s);
  float* sums = reinterpret_cast<float*>(scratch.local);
  float* prepared = prepares_alone(p) ? sums + kTileSums : reinterpret_cast<float*>(scratch.shared);
  if (prepares_together(p) && phase == 0) return prepare_tile(p, chunk, threads, prepared);
  const Schedule schedule(p, threads);
  if (prepares_alone(p) && is_first(schedule.chunks(), threads, chunk)) prepare_tile(p, 0, 1, prepared);
  const Chunk c = schedule.chunk(chunk);
  const float* a = p.prepared() ? prepared : reinterpret_cast<const float*>(p.x.data);
  const int64_t next_panel = schedule.next_panel(chunk, threads);
  if (p.streams()) return run_stream(p, c, next_panel, a, sums);
  run_blocked(p, FloatPanels(p, c.tile1 - c.tile0), schedule, c, next_panel, a, sums);
}

}  // namespace
