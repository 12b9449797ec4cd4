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
//   weights   [k steps][U][16 k pairs][kPanel][2]         bf16, one K block of one panel; U <= T terms hold them
//
// The weights are a class of the op that includes this:
//   const char* packed(panel), int64_t bytes            what a panel is made from: asked for ahead
//   const char* terms(panel, step0, step1, to, finite)  such a K block, made at `to` or where it lies already; `finite`
//                                                       becomes false if a weight is not, and there are several terms
//   void lone_row(panel, m, sums, x)                    row m of a panel without tiles; x: memory for kLoneK values
#pragma once
#include "cpu/linear/rows.h"
#include "cpu/linear/tile_schedule.h"

namespace {

constexpr int64_t kTileK = 32;                       // k of one step
constexpr int64_t kTermBytes = kTileK * kPanel * 2;  // of one step, rows and weights alike
constexpr int64_t kPreparedRows = 8;                 // of a chunk
constexpr int64_t kLoneK = 4096;                     // of a row that goes to the FMA kernels
static_assert(kTileHeight == kPanel && kTermBytes == 2 * kTileRows * kTileBytes);
static_assert(kTileL2Sums + kTileL1 + kLoneK * 4 <= int64_t(kLocalBytes));

// Of a step: the products of terms that are taken.
constexpr int rounds_of(int terms, int of_weights) {
  const int left_out = terms - of_weights;
  return terms * (terms + 1) / 2 - left_out * (left_out + 1) / 2;
}
inline int terms_of(DType dtype) { return dtype == DType::bf16 ? 1 : dtype == DType::f16 ? 2 : 3; }

struct TileProblem : Problem {
  const int terms, weight_terms;
  const bool in_place;       // the terms of weights lie ready
  const bool rows_in_place;  // those of rows do; the last tile of them begins earlier than after the one before

  TileProblem(const Step& s, int own_ints, int terms_, int weight_terms_, bool in_place_)
      : Problem(s, own_ints),
        terms(terms_),
        weight_terms(weight_terms_),
        in_place(in_place_),
        rows_in_place(in_place && may_stay()) {}

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

inline TileSchedule tile_schedule(const TileProblem& p, int threads) {
  return {p.M, p.row_tiles(), p.panels(), p.steps(), p.terms * kTermBytes, threads};
}

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
  const char* b;  // [steps][U][16][128 bytes]
  int64_t steps;
  const char* ahead;  // weights wanted next: so many lines of 64 bytes in a step
  int64_t ahead_lines;
  float* sums;  // [32][kPanel]
  bool accumulate;
  TileEpilogue<TileSums>* before;  // of the product before
  Pace pace{0};
};

// kHalves: 2 for a whole row tile, 1 when it has no more than 16 rows. kWeightTerms: no more than kTerms.
template <int kTerms, int kWeightTerms, int kHalves>
void term_tile(const TermArgs& args) {
  char* sums = reinterpret_cast<char*>(args.sums);
  begin_sums<kHalves>(sums, args.accumulate);
  const char *a = args.a, *b = args.b, *ahead = args.ahead;
  const int64_t a_row = kTerms == 1 ? args.a_row : kTileBytes, a_step = kTerms == 1 ? args.a_step : kTerms * kTermBytes;
  // Rows that pass over a panel in L1 leave that there.
  auto rows = [&](int term) __attribute__((always_inline)) {
    _tile_stream_loadd(4, a + term * kTermBytes, a_row);
    if (kHalves == 2) _tile_stream_loadd(5, a + term * kTermBytes + kTileRows * a_row, a_row);
  };
  auto weights = [&](int term) __attribute__((always_inline)) {
    _tile_loadd(6, b + term * kTermBytes, 2 * kTileBytes);
    _tile_loadd(7, b + term * kTermBytes + kTileBytes, 2 * kTileBytes);
  };
  int64_t until = kRoundsBefore + 1;
  auto multiply = [&]() __attribute__((always_inline)) {
    _tile_dpbf16ps(0, 4, 6);
    _tile_dpbf16ps(1, 4, 7);
    if (kHalves == 2) {
      _tile_dpbf16ps(2, 5, 6);
      _tile_dpbf16ps(3, 5, 7);
    }
    if (--until > 0) return;
    until = args.pace.every;
    args.before->some(args.pace.rows);
  };
  for (int64_t step = args.steps; step > 0; --step, a += a_step, b += kWeightTerms * kTermBytes) {
    for (int64_t line = args.ahead_lines; line > 0; --line, ahead += 64) __builtin_prefetch(ahead, 0, 2);
    keep_vectors_awake();
    // An order in which neighbours share a side, so that most products load one.
    rows(0);
    if (kWeightTerms == 3) weights(2), multiply();
    if (kWeightTerms >= 2) weights(1), multiply();
    weights(0), multiply();
    if (kTerms >= 2) rows(1), multiply();
    if (kTerms == 3) {
      if (kWeightTerms >= 2) weights(1), multiply();
      rows(2);
      if (kWeightTerms >= 2) weights(0);
      multiply();
    }
  }
  args.before->rest();
  store_sums<kHalves>(sums);
}

using TermFunction = void (*)(const TermArgs&);

template <int kHalves>
TermFunction term_function(int terms, int of_weights) {
  if (terms == 1) return term_tile<1, 1, kHalves>;
  if (terms == 2) return of_weights == 1 ? term_tile<2, 1, kHalves> : term_tile<2, 2, kHalves>;
  return of_weights == 1   ? term_tile<3, 1, kHalves>
         : of_weights == 2 ? term_tile<3, 2, kHalves>
                           : term_tile<3, 3, kHalves>;
}

template <class Weights>
void run_tiles(const TileProblem& p, const Weights& weights, const TileSchedule& s, int64_t chunk, int threads,
               const Scratch& scratch) {
  const Chunk c = s.chunk(chunk);
  const int64_t tiles = c.tile1 - c.tile0;
  const char* lone = p.lone(scratch.shared);
  float* lone_x = reinterpret_cast<float*>(scratch.local + kTileL2Sums);
  char* memory = scratch.local + kTileL2Sums + kLoneK * 4;
  TileEpilogue<TileSums> epilogue(p);
  // A product is done but for its epilogue.
  auto finish = [&](int64_t panel, int64_t row0, int64_t rows, bool finite, float* sums) {
    for (int64_t r = 0; r < rows && !p.rows_in_place; ++r)
      if (!finite || lone[row0 + r]) weights.lone_row(panel, row0 + r, sums + r * kPanel, lone_x);
    epilogue.begin(PanelOutputs(p, panel, row0), rows, {sums, vset(p.alpha)});
  };
  TileSumSlots slots(s, c, scratch.local);
  bool finite[kMostWaiting];  // of the panels whose sums wait, or of the one there is
  const TermFunction whole = term_function<2>(p.terms, p.weight_terms),
                     half = term_function<1>(p.terms, p.weight_terms);
  const TileScope scope;
  each_block(s, c, s.next_panel(chunk, threads), [&](const TileBlock& b) __attribute__((always_inline)) {
    if (b.step0 == 0) finite[b.waiting] = true;
    TermArgs args{};
    args.steps = b.step1 - b.step0, args.accumulate = b.step0 > 0;
    args.b = weights.terms(b.panel, b.step0, b.step1, memory, finite[b.waiting]);
    before_tile_loads();
    args.before = &epilogue, args.pace = Pace(args.steps * rounds_of(p.terms, p.weight_terms));
    const TileAhead ahead(s, b, weights.packed(b.ahead_panel), weights.bytes, tiles);
    args.ahead_lines = ahead.lines;
    for (int64_t tile = c.tile0; tile < c.tile1; ++tile) {
      const TileRows rows(p, tile, scratch.shared);
      args.a = rows.at + b.step0 * rows.step_bytes, args.a_row = rows.stride, args.a_step = rows.step_bytes;
      args.sums = slots.of(b, tile - c.tile0), args.ahead = ahead.of(b, tile - c.tile0);
      (rows.both_halves ? whole : half)(args);
      if (b.last) finish(b.panel, rows.row0, rows.rows, finite[b.waiting], args.sums + rows.before * kPanel);
    }
  });
  epilogue.rest();
}

}  // namespace
