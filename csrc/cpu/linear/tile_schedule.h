// Which rows, panels and k of a product on AMX tiles meet when. The rows of a chunk stay in L2, part by part of K;
// meanwhile its panels go through L1, block by block of such a part, and all row tiles pass over a block.
//
// A step is as many k as a tile register holds in a row; a row tile and a panel take equally many bytes for it.
#pragma once
#include "cpu/linear/problem.h"
#include "cpu/linear/tile_epilogue.h"

namespace {

constexpr int64_t kTileL1 = 40 << 10;                   // bytes of a panel that stay in L1 while row tiles pass
constexpr int64_t kTileL2 = 900 << 10;                  // bytes of row tiles that stay in L2 while panels pass
constexpr int64_t kTileL2Sums = 640 << 10;              // bytes of sums, which wait in L2 beside them
constexpr int64_t kTilesAtOnce = 12;                    // most of a chunk, unless more stay in L2 with all their k
constexpr int64_t kPanelsAtOnce = 12;                   // that pay for fetching the rows of a chunk in every part of K
constexpr int64_t kLeastChunks = 2;                     // for a thread, even so
constexpr int64_t kTileProduct = kTileHeight * kPanel;  // sums of a product
constexpr int64_t kMostWaiting = kTileL2Sums / (4 * kTileProduct);
// K in parts means no more than so many tiles. K in blocks but not in parts means more than kTileL1 bytes a tile.
static_assert(kTilesAtOnce * kPanelsAtOnce <= kMostWaiting && kTileL2 / kTileL1 <= kMostWaiting);

struct TileSchedule : Cut {
  int64_t steps, k_part, k_block;  // in steps
  bool sums_wait = false;          // those of all panels of a chunk, from part to part

  // rows: as many as make the tiles; step_bytes: of a row tile.
  TileSchedule(int64_t rows, int64_t row_tiles, int64_t panels_, int64_t steps_, int64_t step_bytes, int threads) {
    panels = panels_, tiles = tiles_per_block = row_tiles, steps = k_part = k_block = steps_;
    span = blocks = 1;
    if (panels == 0 || tiles == 0) return;
    const int64_t wanted = kChunksPerThread * threads;
    // Rows in as many blocks for each thread as stay in its L2, whose share of chunks they are.
    const int64_t fit = max64(kTilesAtOnce, kTileL2 / (steps * step_bytes));
    const bool own = rows >= kThreadRows * threads;
    cut_rows(wanted, fit, own ? ceil_div(ceil_div(tiles, fit), threads) * threads : 1);
    k_part = even_steps(steps, kTileL2 / (tiles_per_block * step_bytes));
    k_block = even_steps(k_part, kTileL1 / step_bytes);
    sums_wait = k_part < steps;
    span = max64(1, panels * blocks / wanted);
    if (!sums_wait) return;
    const int64_t shared_out = ceil_div(panels * blocks, kLeastChunks * threads);
    span = min64(max64(span, min64(kPanelsAtOnce, shared_out)), kMostWaiting / tiles_per_block);
    span = ceil_div(panels, ceil_div(panels, span));
  }
  void keep_k_whole() { k_part = k_block = steps, sums_wait = false; }
  bool one_block() const { return k_block == steps; }

 private:
  static int64_t even_steps(int64_t steps, int64_t most) { return ceil_div(steps, ceil_div(steps, max64(1, most))); }
};

// Steps [step0, step1) of a panel, for all row tiles of a chunk.
struct TileBlock {
  int64_t panel, step0, step1;
  int64_t waiting;                  // panels of the chunk whose sums wait in front of this one's
  bool last;                        // of the panel
  int64_t ahead_panel, ahead_step;  // where the weights that are wanted next begin
};

// The weights wanted next, so many lines of 64 bytes in a step of each row tile.
struct TileAhead {
  const char* at;
  int64_t lines;

  // panel: of the weights wanted next; bytes: of a panel.
  TileAhead(const TileSchedule& s, const TileBlock& b, const char* panel, int64_t bytes, int64_t row_tiles)
      : at(panel + bytes * b.ahead_step / s.steps) {
    const int64_t wanted = bytes * min64(s.k_block, s.steps - b.ahead_step) / s.steps;
    lines = ceil_div(wanted, 64 * (b.step1 - b.step0) * row_tiles);
  }
  const char* of(const TileBlock& b, int64_t row_tile) const {
    return at + row_tile * (b.step1 - b.step0) * lines * 64;
  }
};

// f(block) for all blocks of a chunk; next_panel: the first of the chunk that follows.
template <class F>
inline __attribute__((always_inline)) void each_block(const TileSchedule& s, const Chunk& c, int64_t next_panel, F f) {
  for (int64_t part0 = 0; part0 < s.steps; part0 += s.k_part)
    for (int64_t panel = c.panel0; panel < c.panel1; ++panel) {
      const int64_t part1 = min64(s.steps, part0 + s.k_part);
      for (int64_t step0 = part0; step0 < part1; step0 += s.k_block) {
        TileBlock b{};
        b.panel = panel, b.step0 = step0, b.step1 = min64(part1, step0 + s.k_block);
        b.waiting = s.sums_wait ? panel - c.panel0 : 0;
        b.last = b.step1 == s.steps;
        b.ahead_panel = panel, b.ahead_step = b.step1;
        if (b.step1 == part1 && panel + 1 < c.panel1)
          b.ahead_panel = panel + 1, b.ahead_step = part0;
        else if (b.last)
          b.ahead_panel = next_panel, b.ahead_step = 0;
        else if (b.step1 == part1)
          b.ahead_panel = c.panel0;
        f(b);
      }
    }
}

// The sums of a product, [32][kPanel], in tile registers 0 to 3. kHalves: 2 for a whole row tile, 1 when it has no more
// than 16 rows.
constexpr int kSumStride = kPanel * 4, kHalfSums = kTileRows * kSumStride;
template <int kHalves>
inline __attribute__((always_inline)) void begin_sums(const char* sums, bool accumulate) {
  if (!accumulate) {
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
    return;
  }
  _tile_loadd(0, sums, kSumStride);
  _tile_loadd(1, sums + kTileBytes, kSumStride);
  if (kHalves == 1) return;
  _tile_loadd(2, sums + kHalfSums, kSumStride);
  _tile_loadd(3, sums + kHalfSums + kTileBytes, kSumStride);
}
template <int kHalves>
inline __attribute__((always_inline)) void store_sums(char* sums) {
  _tile_stored(0, sums, kSumStride);
  _tile_stored(1, sums + kTileBytes, kSumStride);
  if (kHalves == 1) return;
  _tile_stored(2, sums + kHalfSums, kSumStride);
  _tile_stored(3, sums + kHalfSums + kTileBytes, kSumStride);
}

// Where the sums of products go: two take turns if nothing waits, else each row tile of a panel has its own.
class TileSumSlots {
 public:
  TileSumSlots(const TileSchedule& s, const Chunk& c, char* memory)
      : sums_(reinterpret_cast<float*>(memory)), tiles_(c.tile1 - c.tile0), take_turns_(s.one_block()) {}
  float* of(const TileBlock& b, int64_t row_tile) {
    return sums_ + (take_turns_ ? ++turn_ % 2 : b.waiting * tiles_ + row_tile) * kTileProduct;
  }

 private:
  float* const sums_;
  const int64_t tiles_;
  const bool take_turns_;
  int64_t turn_ = 0;
};

}  // namespace
