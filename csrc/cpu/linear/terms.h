// The GEMM on AMX tiles: products of bf16 numbers, sums in f32.
//
// A bf16 operand is one term; f16 is the sum of two bf16 numbers, f32 of three (8 + 8 + 8 bits of its mantissa), each
// of what the ones before left over; rounded in rows, so that what is left out has either sign, cut off in weights. Of
// the products of T terms with T terms those whose places add up to less than T are taken: 1, 3 or 6. What is left out
// is below 2^-24 of |x| * |w| in f32, no more than a rounding of the product (Henry, Tang, Heinecke: Leveraging the
// bfloat16 Artificial Intelligence Datatype For Higher-Precision Computations, 2019). Terms of an infinity would be
// NaN: prepared rows that hold one or a NaN, and panels of several terms, are left to the weights' own way. In rows
// where they lie an infinity is multiplied as it is; times a denormal weight, which counts as zero, it is NaN.
//
//   rows      [row tiles][k steps][T][2][16 rows][32 k]   bf16, zero past M and K, or where they lie
//   weights   [k steps][T][16 k pairs][kPanel][2]         bf16, one K block of one panel
//
// The weights are a class of the op that includes this:
//   const char* packed(panel), int64_t bytes            what a panel is made from: asked for ahead
//   const char* terms(panel, step0, step1, to, finite)  such a K block, made at `to` or where it lies already; `finite`
//                                                       becomes false if a weight is not, and there are several terms
//   void lone_row(panel, m, sums, x)                    row m of a panel without tiles; x: memory for kLoneK values
#pragma once
#include "cpu/linear/rows.h"
#include "cpu/linear/tile_epilogue.h"

namespace {

constexpr int64_t kTileK = 32;                          // k of one step
constexpr int64_t kTermBytes = kTileK * kPanel * 2;     // of one step, rows and weights alike
constexpr int64_t kTileWeights = 480 << 10;             // bytes of weight terms that stay in L2
constexpr int64_t kTileSpan = 6;                        // panels of such weights that pass over a row tile together
constexpr int64_t kTileL1 = 40 << 10;                   // bytes of a panel that stay in L1 while row tiles pass
constexpr int64_t kTileL2 = 900 << 10;                  // bytes of row tiles that stay in L2
constexpr int64_t kPreparedRows = 8;                    // of a chunk
constexpr int64_t kTileProduct = kTileHeight * kPanel;  // sums of a product
constexpr int64_t kLoneK = 4096;                        // of a row that goes to the FMA kernels
static_assert(kTileHeight == kPanel && kTermBytes == 2 * kTileRows * kTileBytes);
static_assert(kSumBytes + kTileWeights + kLoneK * 4 <= int64_t(kLocalBytes));

inline int terms_of(DType dtype) { return dtype == DType::bf16 ? 1 : dtype == DType::f16 ? 2 : 3; }

struct TileProblem : Problem {
  const int terms;
  const bool in_place;       // the terms of weights lie ready
  const bool rows_in_place;  // those of rows do; the last tile of them begins earlier than after the one before

  TileProblem(const Step& s, int own_ints, int terms_, bool in_place_)
      : Problem(s, own_ints), terms(terms_), in_place(in_place_), rows_in_place(in_place && may_stay()) {}

  int64_t steps() const { return ceil_div(K, kTileK); }
  int64_t row_tiles() const { return ceil_div(M, kTileHeight); }
  int64_t padded_rows() const { return row_tiles() * kTileHeight; }
  int64_t tile_bytes() const { return steps() * terms * kTermBytes; }
  // Rows are terms as they are, in whole steps.
  bool are_terms() const { return terms == 1 && x.dtype == DType::bf16 && norm == kNormNone && K % kTileK == 0; }
  // One byte a row behind the prepared rows: whether the FMA kernels have to take it.
  char* lone(char* shared) const { return shared + row_tiles() * tile_bytes(); }

 private:
  // A multiple of a page apart, rows of a tile would share lines of L1.
  bool may_stay() const { return are_terms() && M >= kTileHeight && x.stride[0] * 2 % kPage != 0; }
};

// The rows of a tile that a product has to do with, and where they lie.
struct TileRows {
  int64_t row0, rows, before;  // `before`: rows of the product in front of them, which are another tile's
  const char* at;              // from step 0 on
  int64_t stride, step_bytes;  // from row to row, from step to step
  bool both_halves;            // the product has 32 rows, else 16

  TileRows(const TileProblem& p, int64_t tile, const char* prepared)
      : row0(tile * kTileHeight), rows(min64(kTileHeight, p.M - row0)), both_halves(rows > kTileRows) {
    const int64_t height = both_halves ? kTileHeight : kTileRows;
    before = p.rows_in_place ? height - rows : 0;
    at = p.rows_in_place ? p.x.data + (row0 - before) * p.x.stride[0] * 2 : prepared + tile * p.tile_bytes();
    stride = p.rows_in_place ? p.x.stride[0] * 2 : kTileBytes;
    step_bytes = p.rows_in_place ? kTileBytes : p.terms * kTermBytes;
  }
};

// Weights of several terms stay in L2, those of all panels of a chunk together, while all rows pass. Those of one go
// through L1, panel by panel, once for every so many rows as stay in L2.
struct TileSchedule : Cut {
  int64_t k_block, k_blocks;  // in steps

  TileSchedule(const TileProblem& p, int threads) {
    panels = p.panels(), tiles = p.row_tiles();
    span = blocks = k_blocks = 1, tiles_per_block = tiles, k_block = p.steps();
    if (panels == 0 || tiles == 0) return;
    const int64_t wanted = kChunksPerThread * threads;
    if (p.terms > 1) {
      // Rows that do not stay in L2 pass by once for all panels of a chunk: then chunks are cut between rows instead.
      const bool rows_stay = tiles * p.tile_bytes() <= kTileL2;
      span = max64(1, min64(kTileSpan, panels / (rows_stay ? wanted : int64_t{threads})));
      cut_k(p, kTileWeights / span);
      cut_rows(wanted, most_tiles());
      return;
    }
    cut_k(p, kTileL1);
    // As many blocks of rows for each thread as make them stay in its L2, whose share of chunks they are.
    const int64_t fit = max64(1, min64(most_tiles(), kTileL2 / p.tile_bytes()));
    const bool own = p.M >= kThreadRows * threads;
    cut_rows(wanted, fit, own ? ceil_div(ceil_div(tiles, fit), threads) * threads : 1);
    span = max64(1, panels * blocks / wanted);
  }

 private:
  // room: bytes for the terms of a panel.
  void cut_k(const TileProblem& p, int64_t room) {
    k_blocks = ceil_div(p.steps(), max64(1, room / (p.terms * kTermBytes)));
    k_block = ceil_div(p.steps(), k_blocks);
    k_blocks = ceil_div(p.steps(), k_block);
  }
  // Whose sums wait, for `span` panels.
  int64_t most_tiles() const { return k_blocks > 1 ? kSumBytes / (span * kTileProduct * 4) : tiles; }
};

// ---- rows

inline int64_t tile_prepare_chunks(const TileProblem& p) { return p.padded_rows() / kPreparedRows; }

template <int kTerms>
void prepare_terms(const TileProblem& p, int64_t chunk, char* shared) {
  const int64_t row0 = chunk * kPreparedRows, in_tile = row0 % kTileHeight;
  const int rows = static_cast<int>(max64(0, min64(kPreparedRows, p.M - row0)));
  char* to = shared + row0 / kTileHeight * p.tile_bytes() + in_tile * kTileBytes;
  RowNorm norms[kPreparedRows];
  FiniteWords finite[kPreparedRows];
  for (int r = 0; r < rows; ++r) norms[r] = row_norm(p, row0 + r);
  Vec low[kLanes], high[kLanes];
  for (int r = 0; r < kPreparedRows; ++r) low[r] = high[r] = vzero();
  for (int64_t step = 0; step < p.steps(); ++step) {
    load_block(p, norms, row0, rows, step * kTileK, low);
    load_block(p, norms, row0, rows, step * kTileK + kLanes, high);
    for (int r = 0; r < kPreparedRows; ++r) {
      Vec left = low[r], right = high[r];
#pragma GCC unroll 3
      for (int term = 0; term < kTerms; ++term) {
        const __m512i words = tile_words(left, right);
        _mm512_store_si512(to + term * kTermBytes + r * kTileBytes, words);
        if (term == 0) finite[r].see(words);
        left = vsub(left, low_words(words));
        right = vsub(right, high_words(words));
      }
    }
    to += kTerms * kTermBytes;
  }
  char* lone = p.lone(shared) + row0;
  for (int r = 0; r < kPreparedRows; ++r) lone[r] = !finite[r].all();
}

// Rows that are bf16 already are moved as they are, whole steps of them, where they cannot stay.
void move_rows(const TileProblem& p, int64_t chunk, char* shared) {
  const int64_t row0 = chunk * kPreparedRows;
  const int64_t rows = max64(0, min64(kPreparedRows, p.M - row0));
  char* to = shared + row0 / kTileHeight * p.tile_bytes() + row0 % kTileHeight * kTileBytes;
  FiniteWords finite[kPreparedRows];
  for (int64_t step = 0; step < p.steps(); ++step, to += kTermBytes) {
    const char* from = p.x.data + row0 * p.x.stride[0] * 2 + step * kTileBytes;
#pragma GCC unroll 8
    for (int64_t r = 0; r < kPreparedRows; ++r, from += p.x.stride[0] * 2) {
      const __m512i words = r < rows ? _mm512_loadu_si512(from) : _mm512_setzero_si512();
      finite[r].see(words);
      _mm512_store_si512(to + r * kTileBytes, words);
    }
  }
  for (int64_t r = 0; r < kPreparedRows; ++r) p.lone(shared)[row0 + r] = !finite[r].all();
}

inline int tile_phases(const TileProblem& p) { return p.rows_in_place ? 1 : 2; }

inline size_t tile_workspace(const TileProblem& p) {
  if (p.rows_in_place) return 0;
  return static_cast<size_t>(p.row_tiles() * p.tile_bytes() + p.padded_rows());
}

inline void prepare_tile_rows(const TileProblem& p, int64_t chunk, char* shared) {
  if (p.are_terms()) return move_rows(p, chunk, shared);
  (p.terms == 1 ? prepare_terms<1> : p.terms == 2 ? prepare_terms<2> : prepare_terms<3>)(p, chunk, shared);
}

// ---- products

struct TermArgs {
  const char* a;  // [steps][T][2][16][64 bytes], or one term with rows and steps so many bytes apart
  int64_t a_row, a_step;
  const char* b;  // [steps][T][16][128 bytes]
  int64_t steps;
  const char* ahead;  // weights wanted next: so many lines of 64 bytes in a step
  int64_t ahead_lines;
  float* sums;  // [32][kPanel]
  bool accumulate;
  TileEpilogue<TileSums>* before;  // of the product before
  Pace pace{0};
};

// kHalves: 2 for a whole row tile, 1 when it has no more than 16 rows.
template <int kTerms, int kHalves>
void term_tile(const TermArgs& args) {
  constexpr int kSumStride = kPanel * 4, kHalf = kTileRows * kSumStride, kTile = kTileRows * kTileBytes;
  char* sums = reinterpret_cast<char*>(args.sums);
  if (args.accumulate) {
    _tile_loadd(0, sums, kSumStride);
    _tile_loadd(1, sums + kTileBytes, kSumStride);
    if (kHalves == 2) {
      _tile_loadd(2, sums + kHalf, kSumStride);
      _tile_loadd(3, sums + kHalf + kTileBytes, kSumStride);
    }
  } else {
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
  }
  const char *a = args.a, *b = args.b, *ahead = args.ahead;
  const int64_t a_row = args.a_row, a_step = kTerms == 1 ? args.a_step : kTerms * kTermBytes;
  // Rows that pass over a panel in L1 leave that there.
  auto rows = [&](int term) __attribute__((always_inline)) {
    if (kTerms == 1) {
      _tile_stream_loadd(4, a, a_row);
      if (kHalves == 2) _tile_stream_loadd(5, a + kTileRows * a_row, a_row);
      return;
    }
    _tile_loadd(4, a + term * kTermBytes, kTileBytes);
    if (kHalves == 2) _tile_loadd(5, a + term * kTermBytes + kTile, kTileBytes);
  };
  auto weights = [&](int term) __attribute__((always_inline)) {
    _tile_loadd(6, b + term * kTermBytes, 2 * kTileBytes);
    _tile_loadd(7, b + term * kTermBytes + kTileBytes, 2 * kTileBytes);
  };
  auto multiply = [&]() __attribute__((always_inline)) {
    _tile_dpbf16ps(0, 4, 6);
    _tile_dpbf16ps(1, 4, 7);
    if (kHalves == 2) {
      _tile_dpbf16ps(2, 5, 6);
      _tile_dpbf16ps(3, 5, 7);
    }
  };
  int64_t until = kStepsBefore + 1;
  for (int64_t step = args.steps; step > 0; --step, a += a_step, b += kTerms * kTermBytes) {
    for (int64_t line = args.ahead_lines; line > 0; --line, ahead += 64) __builtin_prefetch(ahead, 0, 2);
    // An order in which neighbours share a side, so that each product loads one. Six products take long enough to bring
    // the operands of the next step to L1 meanwhile.
    int64_t next = kTerms * kTermBytes;
    auto fetch = [&]() __attribute__((always_inline)) {
#pragma GCC unroll 16
      for (int line = 0; line < (kTerms == 3 ? 16 : 0); ++line, next += 64) {
        if (kHalves == 2 || next / kTile % 2 == 0) __builtin_prefetch(a + next);
        __builtin_prefetch(b + next);
      }
    };
    rows(0);
    if (kTerms == 3) weights(2), multiply(), fetch();
    if (kTerms >= 2) weights(1), multiply(), fetch();
    weights(0), multiply(), fetch();
    if (kTerms >= 2) rows(1), multiply(), fetch();
    if (kTerms == 3) {
      weights(1), multiply(), fetch();
      rows(2), weights(0), multiply(), fetch();
    }
    if (--until > 0) continue;
    until = args.pace.every;
    args.before->some(args.pace.rows);
  }
  args.before->rest();
  _tile_stored(0, sums, kSumStride);
  _tile_stored(1, sums + kTileBytes, kSumStride);
  if (kHalves == 2) {
    _tile_stored(2, sums + kHalf, kSumStride);
    _tile_stored(3, sums + kHalf + kTileBytes, kSumStride);
  }
}

using TermFunction = void (*)(const TermArgs&);

inline TermFunction term_function(int terms, bool both_halves) {
  if (!both_halves) return terms == 1 ? term_tile<1, 1> : terms == 2 ? term_tile<2, 1> : term_tile<3, 1>;
  return terms == 1 ? term_tile<1, 2> : terms == 2 ? term_tile<2, 2> : term_tile<3, 2>;
}

template <class Weights>
void run_tiles(const TileProblem& p, const Weights& weights, const TileSchedule& s, int64_t chunk, int threads,
               const Scratch& scratch) {
  const Chunk c = s.chunk(chunk);
  const int64_t next_panel = s.next_panel(chunk, threads), tiles = c.tile1 - c.tile0;
  const char* lone = p.lone(scratch.shared);
  float *waiting = reinterpret_cast<float*>(scratch.local), *lone_x = waiting + kSumBytes / 4;
  char* memory = scratch.local + kSumBytes + kLoneK * 4;
  TileEpilogue<TileSums> epilogue(p);
  // A product is done but for its epilogue.
  auto finish = [&](int64_t panel, int64_t row0, int64_t rows, bool finite, float* sums) {
    for (int64_t r = 0; r < rows && !p.rows_in_place; ++r)
      if (!finite || lone[row0 + r]) weights.lone_row(panel, row0 + r, sums + r * kPanel, lone_x);
    epilogue.begin(PanelOutputs(p, panel, row0), rows, {sums, vset(p.alpha)});
  };
  int64_t turn = 0;
  const TileScope scope;
  const int64_t at_once = p.terms == 1 ? 1 : s.span;  // panels that pass over a row tile together
  for (int64_t panel0 = c.panel0; panel0 < c.panel1; panel0 += at_once) {
    const int64_t panels = min64(at_once, c.panel1 - panel0);
    const int64_t following = panel0 + panels < c.panel1 ? panel0 + panels : next_panel;
    const char* terms[kTileSpan];
    bool finite[kTileSpan] = {true, true, true, true, true, true};
    for (int64_t step0 = 0; step0 < p.steps(); step0 += s.k_block) {
      const int64_t step1 = min64(p.steps(), step0 + s.k_block), steps = step1 - step0;
      const bool last = step1 == p.steps();
      for (int64_t i = 0; i < panels; ++i)
        terms[i] = weights.terms(panel0 + i, step0, step1, memory + i * s.k_block * p.terms * kTermBytes, finite[i]);
      before_tile_loads();
      const int64_t wanted0 = weights.bytes * (last ? 0 : step1) / p.steps();
      const int64_t wanted = weights.bytes * min64(s.k_block, last ? p.steps() : p.steps() - step1) / p.steps();
      TermArgs args{};
      args.steps = steps, args.ahead_lines = ceil_div(wanted, 64 * steps * tiles), args.accumulate = step0 > 0;
      args.before = &epilogue, args.pace = Pace(steps);
      for (int64_t tile = c.tile0; tile < c.tile1; ++tile) {
        const TileRows rows(p, tile, scratch.shared);
        args.a = rows.at + step0 * rows.step_bytes, args.a_row = rows.stride, args.a_step = rows.step_bytes;
        for (int64_t i = 0; i < panels; ++i) {
          const int64_t slot = s.k_blocks == 1 ? ++turn % 2 : (tile - c.tile0) * panels + i;
          args.sums = waiting + slot * kTileProduct;
          args.b = terms[i];
          args.ahead = weights.packed((last ? following : panel0) + i) + wanted0 +
                       (tile - c.tile0) * steps * args.ahead_lines * 64;
          term_function(p.terms, rows.both_halves)(args);
          if (last) finish(panel0 + i, rows.row0, rows.rows, finite[i], args.sums + rows.before * kPanel);
        }
      }
    }
  }
  epilogue.rest();
}

}  // namespace
