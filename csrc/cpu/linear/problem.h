// One linear step with its operands by name, and how it is cut: row tiles, K blocks, chunks.
#pragma once
#include "cpu/linear/layout.h"
#include "cpu/linear/tuning.h"

namespace {

constexpr int64_t kPage = 4096;  // bytes

// Rows [row0, row0 + rows), cut into tiles of nearly equal height, so that no short one runs at low efficiency.
struct RowTiles {
  int64_t row0, rows, count;

  int64_t row(int64_t tile) const { return row0 + tile * rows / count; }
};

struct Problem {
  const Tensor &x, &w, &bias, &residual, &y, &norm_weight, &norm_bias;
  const int64_t M, N, K;
  const DType weight;
  const int64_t act;
  const bool gated;
  const int64_t norm;
  const float eps, alpha, norm_offset;
  const bool is_alone;  // in its step, as the linear of one of several experts is not
  const LinearTuning tuning;

  explicit Problem(const Step& s, int own_ints = kLinearInts)
      : x(s.t[0]),
        w(s.t[1]),
        bias(s.t[2]),
        residual(s.t[3]),
        y(s.t[4]),
        norm_weight(s.t[5]),
        norm_bias(s.t[6]),
        M(x.size[0]),
        N(s.i[0]),
        K(s.i[1]),
        weight(static_cast<DType>(s.i[2])),
        act(s.i[3]),
        gated(s.i[4] != 0),
        norm(s.i[5]),
        eps(s.f[0]),
        alpha(s.f[1]),
        norm_offset(s.f[2]),
        is_alone(s.num_tensors == kLinearOperands),
        tuning(tuning_of(s, own_ints, M)) {}

  int64_t outputs() const { return gated ? N / 2 : N; }
  int64_t panels() const { return ceil_div(N, kPanel); }
  int64_t padded_k() const { return ::padded_k(K, weight); }
  // Rows of f32 that need no norm and no zero pad may be read where they lie: one, and many beside weights in L2.
  bool is_plain() const { return x.dtype == DType::f32 && norm == kNormNone && padded_k() == K; }
  // Tiles see f32 weights, or codes that became f32. Rows that are a multiple of a page apart would share lines of L1.
  bool rows_in_place() const {
    const bool is_f32 = weight == DType::f32 || weight == DType::u8;
    return is_plain() && is_f32 && !streams() && x.stride[0] % (kPage / 4) != 0;
  }
  bool prepared() const { return !is_plain() || (M > 1 && !rows_in_place()); }

  RowTiles tiles_of(int64_t row0, int64_t rows) const {
    return {row0, rows, ceil_div(rows, tuning.rows ? tuning.rows : kMaxRows)};
  }
  RowTiles all_tiles() const { return tiles_of(0, M); }
  int64_t tiles() const { return all_tiles().count; }
  int64_t tallest_tile() const { return tiles() ? ceil_div(M, tiles()) : 0; }
  // Start of a prepared tile in floats: [padded K][rows of the tile], and room for one vector store past its end.
  int64_t tile_offset(const RowTiles& tiles, int64_t tile) const {
    return (tiles.row(tile) - tiles.row0) * padded_k() + tile * kLanes;
  }
  int64_t prepared_floats(const RowTiles& tiles) const { return tiles.rows * padded_k() + (tiles.count + 1) * kLanes; }
  bool streams() const {
    return tuning.family == LinearFamily::automatic ? tiles() <= 1 : tuning.family == LinearFamily::stream;
  }
};

// What a chunk works on: panels [panel0, panel1) by row tiles [tile0, tile1).
struct Chunk {
  int64_t panel0, panel1, tile0, tile1;
};

constexpr int64_t kMinBlockTiles = 4;  // row tiles of a chunk, where rows are cut for the sake of more chunks

constexpr int64_t kThreadRows = 128;  // of a thread, that are worth panels which it alone unpacks or fetches

// How a product is cut: a chunk is `span` panels by `tiles_per_block` row tiles. Chunks run over panels fastest, so
// that a thread, which has a range of them, works on the rows it had in the steps before.
struct Cut {
  int64_t panels, tiles;  // of the whole product
  int64_t span, tiles_per_block, blocks;

  int64_t chunks() const { return tiles == 0 ? 0 : ceil_div(panels, span) * blocks; }
  Chunk chunk(int64_t i) const {
    const int64_t spans = ceil_div(panels, span);
    const int64_t panel0 = i % spans * span, tile0 = i / spans * tiles_per_block;
    return {panel0, min64(panels, panel0 + span), tile0, min64(tiles, tile0 + tiles_per_block)};
  }
  // Few panels, or more row tiles than a chunk has room for: the rows are cut too. Neither panels nor tiles may be
  // none.
  void cut_rows(int64_t wanted, int64_t most_tiles, int64_t least_blocks = 1) {
    blocks = min64(max64(least_blocks, ceil_div(wanted, ceil_div(panels, span))), max64(1, tiles / kMinBlockTiles));
    tiles_per_block = ceil_div(tiles, max64(blocks, ceil_div(tiles, most_tiles)));
    blocks = ceil_div(tiles, tiles_per_block);
  }
  // The first panel of the chunk that a thread likely takes after this one.
  int64_t next_panel(int64_t i, int threads) const {
    return chunk(is_followed(chunks(), threads, i) ? i + 1 : i).panel0;
  }
};

constexpr int64_t kChunksPerThread = 8;  // enough that a core at half speed does not hold up the others for long

// Rows that go through one core need not be waited for, and stay in its L2. A chunk of them reads all weights, from L3
// as a rule, which takes less time than the products of so many rows.
constexpr int64_t kLeastOwnRows = 28;

// Blocks that rows are cut into, as many for each thread; 0: too few rows, or a tuning cuts them. A row counts as
// `planes` of products; `fit`: rows that a chunk has room for. A thread that is alone waits for nobody.
inline int64_t own_row_blocks(const Problem& p, int64_t planes, int64_t fit, int threads) {
  const LinearTuning& given = p.tuning;
  if (threads == 1 || given.rows || given.tiles || given.span || p.panels() == 0) return 0;
  const int64_t most = p.M * planes / kLeastOwnRows / threads;
  const int64_t each = max64(min64(most, kChunksPerThread), ceil_div(p.M, threads * max64(1, fit)));
  return each < 2 || each > most ? 0 : each * threads;
}
template <class P>  // a Problem
inline RowTiles own_tiles(const P& p, int64_t blocks, int64_t block) {
  const int64_t row0 = block * p.M / blocks;
  return p.tiles_of(row0, (block + 1) * p.M / blocks - row0);
}

// With more than one row tile the panels of a chunk stay in L2 while the tiles pass over them, K block after K block.
struct Schedule : Cut {
  int64_t k_block, k_blocks;

  // unit: what K blocks are multiples of.
  Schedule(const Problem& p, int threads, bool streams, int64_t unit = 4);
  Schedule(const Problem& p, int threads) : Schedule(p, threads, p.streams()) {}
};

// So few values of x that every thread prepares them for itself, with its first chunk: that takes less than waiting for
// each other. Not where the phase has chunks of other linears.
constexpr int64_t kAloneValues = 6144;
constexpr int64_t kL2Weights = 384 << 10;         // bytes of f32 weights that stay in L2 beside the passing rows
constexpr int64_t kStreamChunk = 512 << 10;       // bytes of weights in a chunk that reads them once
constexpr int64_t kTileSums = kMaxRows * kPanel;  // floats
static_assert(kMaxKBlock * kPanel * 4 <= kL2Weights && kL2Weights <= kWideBytes);

// Panels of a chunk that a stream reads `at_once` by `at_once`: the largest multiple within `span`. Where not even one
// fits, as many at once as let the thread with most of them end soonest, though chunks are then larger than wanted.
inline int64_t stream_span(int64_t panels, int64_t span, int at_once, int threads) {
  if (span >= at_once) return span - span % at_once;
  constexpr float kRate[] = {0.7f, 0.85f, 0.95f, 1.0f};  // of one thread, by panels at once
  auto time = [&](int64_t s) { return static_cast<float>(ceil_div(ceil_div(panels, s), threads) * s) / kRate[s - 1]; };
  int64_t best = at_once;
  for (int64_t s = at_once - 1; s > 0; --s)
    if (time(s) < time(best)) best = s;
  return best;
}

inline Schedule::Schedule(const Problem& p, int threads, bool streams, int64_t unit) {
  const LinearTuning& given = p.tuning;
  panels = p.panels(), tiles = p.tiles();
  const int64_t wanted = kChunksPerThread * threads;
  blocks = k_blocks = 1;
  tiles_per_block = given.tiles ? min64(given.tiles, tiles) : tiles;
  k_block = p.padded_k();
  if (tiles == 0 || panels == 0 || streams) {
    span = max64(1, min64(kStreamChunk / max64(1, panel_bytes(p.K, p.weight)), panels / wanted));
    span = given.span ? given.span : stream_span(panels, span, stream_panels(p.tallest_tile()), threads);
    if (tiles_per_block) blocks = ceil_div(tiles, tiles_per_block);
    return;
  }
  k_blocks = max64(1, ceil_div(p.padded_k(), given.k_block ? given.k_block : kMaxKBlock));
  k_block = given.k_block ? given.k_block : ceil_div(ceil_div(p.padded_k(), k_blocks), unit) * unit;
  k_blocks = max64(1, ceil_div(p.padded_k(), max64(1, k_block)));
  span = min64(kL2Weights / max64(1, k_block * kPanel * 4), panels / wanted);
  span = max64(1, min64(span, kMaxSpan));
  if (given.tiles && k_blocks > 1) span = max64(1, min64(span, kSumBytes / (tiles_per_block * kTileSums * 4)));
  if (given.span) span = given.span;
  if (given.tiles)
    blocks = ceil_div(tiles, tiles_per_block);
  else
    cut_rows(wanted, k_blocks > 1 ? kSumBytes / (span * kTileSums * 4) : tiles, min64(threads, p.M / kThreadRows));
}

}  // namespace
