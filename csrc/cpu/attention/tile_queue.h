// Products of attention on tiles, queued so that they are computed between pieces of the softmax.
#pragma once
#include "cpu/attention/tile_operands.h"

namespace {

// 32 rows of A by two row tiles of B, and the same for the rows that follow.
struct TileProducts {
  const char *a, *b;
  int64_t a_step, b_step;  // bytes to the next step of k
  int64_t a_term, b_term;  // to the next term
  int64_t a_tile, b_tile;  // from the first tile of a side to the second
  int64_t a_next;          // to the next 32 rows
  float* sums;             // [2 columns][rows][16]
  int64_t steps, count;    // of k, of 32 rows
  bool accumulate;
};

// Products that wait to be computed, four tiles at a time between pieces of other work: a core that has both in its
// window does both at once. Sums leave the tile registers when the next ones begin, which by then are finished.
template <int T>
struct TileQueue {
  TileProducts job[2];
  int jobs = 0, next = 0;
  int64_t step = 0, left = 0;  // left: pieces in all
  float* finished = nullptr;

  void add(const TileProducts& products) {
    job[jobs++] = products;
    left += products.steps * products.count;
  }
  void store() {
    if (!finished) return;
    _tile_stored(0, finished, kTileBytes);
    _tile_stored(1, finished + kColumn, kTileBytes);
    _tile_stored(2, finished + kTileSize / 4, kTileBytes);
    _tile_stored(3, finished + kColumn + kTileSize / 4, kTileBytes);
    finished = nullptr;
  }
  static __attribute__((always_inline)) void multiply() {
    _tile_dpbf16ps(0, 4, 6);
    _tile_dpbf16ps(1, 4, 7);
    _tile_dpbf16ps(2, 5, 6);
    _tile_dpbf16ps(3, 5, 7);
  }
  __attribute__((always_inline)) void advance() {
    TileProducts& j = job[next];
    before_tile_loads();
    if (step == 0) {
      store();
      if (j.accumulate) {
        _tile_loadd(0, j.sums, kTileBytes);
        _tile_loadd(1, j.sums + kColumn, kTileBytes);
        _tile_loadd(2, j.sums + kTileSize / 4, kTileBytes);
        _tile_loadd(3, j.sums + kColumn + kTileSize / 4, kTileBytes);
      } else {
        _tile_zero(0);
        _tile_zero(1);
        _tile_zero(2);
        _tile_zero(3);
      }
    }
    const char *a = j.a + step * j.a_step, *b = j.b + step * j.b_step;
    auto load_b = [&](int term) __attribute__((always_inline)) {
      _tile_loadd(6, b + term * j.b_term, kTileBytes);
      _tile_loadd(7, b + term * j.b_term + j.b_tile, kTileBytes);
    };
    auto load_a = [&](int term) __attribute__((always_inline)) {
      _tile_loadd(4, a + term * j.a_term, kTileBytes);
      _tile_loadd(5, a + term * j.a_term + j.a_tile, kTileBytes);
    };
    // The pairs of terms whose places add up to less than T; neighbours share a side.
    load_a(0);
    if (T == 2) load_b(1), multiply();
    load_b(0), multiply();
    if (T == 2) load_a(1), multiply();
    --left;
    if (++step == j.steps) {
      step = 0, finished = j.sums;
      j.a += j.a_next, j.sums += kTileStep * kLanes;
      if (--j.count == 0) ++next;
    }
  }
  __attribute__((noinline)) void finish() {
    while (left > 0) advance();
    store();
    jobs = next = 0;
  }
};

}  // namespace
