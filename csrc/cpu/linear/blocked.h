// Products of many rows by FMA: the panels of a chunk stay in L2 for one K block while all tiles pass over it;
// meanwhile the weights that come next are fetched.
#pragma once
#include "cpu/linear/epilogue.h"
#include "cpu/linear/tile.h"

namespace {

// Tiles that are enough to pay for widening a 16-bit panel first; fewer widen it on the way.
constexpr int64_t kTilesToWiden = 5;

// Packed float weights, K block by K block.
struct FloatPanels {
  const Problem& p;
  const int64_t bytes;  // of a panel
  const bool widened;   // a block becomes f32 before the tiles pass over it

  FloatPanels(const Problem& problem, int64_t tiles)
      : p(problem), bytes(panel_bytes(problem.K, problem.weight)), widened(widens(problem, tiles)) {}

  static bool widens(const Problem& p, int64_t tiles) {
    const bool pays = p.tuning.family == LinearFamily::automatic && tiles >= kTilesToWiden;
    return p.weight != DType::f32 && (pays || p.tuning.family == LinearFamily::unpack);
  }
  bool is_f32() const { return widened || p.weight == DType::f32; }  // when the tiles pass over a block
  int64_t steps(int64_t k) const { return is_f32() ? k : k / steps_of(p.weight); }
  TileFunction tile(int rows) const { return is_f32() ? blocked_tile(rows) : stream_tile(p.weight, rows); }
  const char* at(int64_t panel, int64_t k) const { return p.w.data + panel * bytes + block_bytes(k); }
  int64_t block_bytes(int64_t k) const { return k * kPanel * itemsize(p.weight); }
  void widen(int64_t panel, int64_t k0, int64_t k, float* to) const {
    if (p.weight == DType::f16)
      ::widen<WeightF16>(at(panel, k0), k / WeightF16::kSteps, to);
    else
      ::widen<WeightBF16>(at(panel, k0), k / WeightBF16::kSteps, to);
  }
};

// a: the rows, prepared, or all of them as they lie. The chunk's tiles are some of `all`. `local` is the thread's
// scratch: kSumBytes of sums, then kWideBytes of widened panels.
template <class Weights>
void run_blocked(const Problem& p, const Weights& weights, const Schedule& s, const Chunk& c, int64_t next_panel,
                 const RowTiles& all, const float* a, float* local) {
  const int64_t tiles = c.tile1 - c.tile0, panels = c.panel1 - c.panel0;
  const bool is_f32 = weights.is_f32(), in_place = p.rows_in_place();
  float* wide = local + kSumBytes / 4;
  const char* blocks[kMaxSpan];
  for (int64_t block = 0; block < s.k_blocks; ++block) {
    const int64_t k0 = block * s.k_block, k = min64(p.padded_k() - k0, s.k_block), bytes = weights.block_bytes(k);
    const bool last = block + 1 == s.k_blocks;
    const char* next = last ? weights.at(next_panel, 0) : weights.at(c.panel0, k0 + k);
    for (int64_t i = 0; i < panels; ++i) {
      blocks[i] = weights.at(c.panel0 + i, k0);
      if (!weights.widened) continue;
      float* to = wide + i * k * kPanel;
      weights.widen(c.panel0 + i, k0, k, to);
      blocks[i] = reinterpret_cast<const char*>(to);
    }
    TileArgs args{};
    args.steps = weights.steps(k);
    args.a_stride = p.x.stride[0];
    args.accumulate = block > 0;
    args.ahead_stride = ceil_div(bytes, tiles * max64(1, args.steps));
    for (int64_t tile = c.tile0; tile < c.tile1; ++tile) {
      const int64_t row0 = all.row(tile);
      const int rows = static_cast<int>(all.row(tile + 1) - row0);
      const TileFunction run = in_place ? in_place_tile(rows) : weights.tile(rows);
      args.a = in_place ? a + row0 * args.a_stride + k0 : a + p.tile_offset(all, tile) + k0 * rows;
      for (int64_t i = 0; i < panels; ++i) {
        args.sums = local + (s.k_blocks == 1 ? 0 : (tile - c.tile0) * panels + i) * kTileSums;
        args.b = blocks[i];
        args.ahead = is_f32 ? next + i * weights.bytes + (tile - c.tile0) * bytes / tiles : blocks[i] + kStreamAhead;
        if (last) fetch_outputs(p, c.panel0 + i, row0, rows);
        run(args);
        if (last) finish_tile(p, c.panel0 + i, row0, rows, args.sums);
      }
    }
  }
}

}  // namespace
