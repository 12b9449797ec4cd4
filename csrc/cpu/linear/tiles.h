// The GEMM on AMX tiles: products of bf16 numbers, sums in f32.
//
// A bf16 operand is one term; f16 is the sum of two bf16 numbers, f32 of three (8 + 8 + 8 bits of its mantissa), each
// of what the ones before left over; rounded in rows, so that what is left out has either sign, cut off in weights. Of
// the products of T terms with T terms those whose places add up to less than T are taken: 1, 3 or 6. What is left out
// is below 2^-24 of |x| * |w| in f32, no more than a rounding of the product (Henry, Tang, Heinecke: Leveraging the
// bfloat16 Artificial Intelligence Datatype For Higher-Precision Computations, 2019). Terms of an infinity would be
// NaN: rows and panels that hold one are computed by the FMA kernels.
//
//   rows      [row tiles][k steps][T][2][16 rows][32 k]   bf16, zero past M and K
//   weights   [k steps][T][16 k pairs][kPanel][2]         bf16, one K block of one panel; packed bf16 weights already
//                                                         look like this
#pragma once
#include "cpu/linear/gemm.h"

namespace {

constexpr int64_t kTileK = 32;                       // k of one step
constexpr int64_t kTileHeight = 2 * kTileRows;       // rows of a row tile
constexpr int64_t kTermBytes = kTileK * kPanel * 2;  // of one step, rows and weights alike
constexpr int64_t kTileWeights = 480 << 10;          // bytes of weight terms that stay in L2
constexpr int64_t kTileSpan = 6;                     // panels that pass over a row tile together
constexpr int64_t kTileL2 = 900 << 10;               // bytes of row tiles that stay in L2
constexpr int64_t kPreparedRows = 8;                 // of a chunk
constexpr int64_t kLoneK = 4096;                     // of a row that goes to the FMA kernels
static_assert(kTileHeight == kPanel && kTermBytes == 2 * kTileRows * kTileBytes);
static_assert(kSumBytes + kTileWeights + kLoneK * 4 <= int64_t(kLocalBytes));

inline int terms_of(DType dtype) { return dtype == DType::bf16 ? 1 : dtype == DType::f16 ? 2 : 3; }

// Terms of the operands. Normalised rows are rounded to no less than what y keeps.
inline int terms_of(const Problem& p) {
  int terms = terms_of(p.weight) > terms_of(p.x.dtype) ? terms_of(p.weight) : terms_of(p.x.dtype);
  if (p.norm != kNormNone && terms_of(p.y.dtype) > terms) terms = terms_of(p.y.dtype);
  return terms;
}

struct TileProblem : Problem {
  const int terms;
  explicit TileProblem(const Step& s) : Problem(s), terms(terms_of(*this)) {}

  int64_t steps() const { return ceil_div(K, kTileK); }
  int64_t row_tiles() const { return ceil_div(M, kTileHeight); }
  int64_t padded_rows() const { return row_tiles() * kTileHeight; }
  int64_t tile_bytes() const { return steps() * terms * kTermBytes; }
  // One byte a row behind the prepared rows: whether the FMA kernels have to take it.
  char* lone(char* shared) const { return shared + row_tiles() * tile_bytes(); }
  bool in_place() const { return terms == 1 && K % kTileK == 0; }  // packed weights are read as they lie
};

// Fewer rows leave too much of a tile empty, or do not pay for splitting the weights. A tuning that names a family
// means one of the FMA kernels.
inline bool runs_on_tiles(const Problem& p) {
  constexpr int64_t kLeastRows[] = {0, 8, 20, 96};  // by terms
  return p.tuning.family == LinearFamily::automatic && p.K > 0 && p.M >= kLeastRows[terms_of(p)];
}

struct TileSchedule : Cut {
  int64_t k_block, k_blocks;  // in steps

  TileSchedule(const TileProblem& p, int threads) {
    panels = p.panels(), tiles = p.row_tiles();
    const int64_t wanted = kChunksPerThread * threads;
    // Rows that do not stay in L2 pass by once for all panels of a chunk: then chunks are cut between rows instead.
    const bool rows_stay = tiles * p.tile_bytes() <= kTileL2;
    span = max64(1, min64(kTileSpan, panels / (rows_stay ? wanted : int64_t{threads})));
    // As many steps of K as the terms of all panels of a chunk have room for.
    k_blocks = p.in_place() ? 1 : ceil_div(p.steps(), kTileWeights / (p.terms * kTermBytes * span));
    k_block = ceil_div(p.steps(), k_blocks);
    k_blocks = ceil_div(p.steps(), k_block);
    blocks = min64(ceil_div(wanted, max64(1, ceil_div(panels, span))), max64(1, tiles / kMinBlockTiles));
    if (k_blocks > 1) blocks = max64(blocks, ceil_div(tiles, kSumBytes / (span * kTileHeight * kPanel * 4)));
    tiles_per_block = ceil_div(tiles, blocks);
    blocks = ceil_div(tiles, tiles_per_block);
  }
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
        if (term == 0 && kTerms > 1) finite[r].see(words);
        left = vsub(left, low_words(words));
        right = vsub(right, high_words(words));
      }
    }
    to += kTerms * kTermBytes;
  }
  char* lone = p.lone(shared) + row0;
  for (int r = 0; r < kPreparedRows; ++r) lone[r] = !finite[r].all();
}

inline void prepare_tile_rows(const TileProblem& p, int64_t chunk, char* shared) {
  (p.terms == 1 ? prepare_terms<1> : p.terms == 2 ? prepare_terms<2> : prepare_terms<3>)(p, chunk, shared);
}

// ---- weights

// Two k of one panel half, as f32.
template <DType kWeight>
inline void load_weights(const char* panel, int64_t k, int v, bool has_odd, Vec& even, Vec& odd) {
  if (kWeight == DType::bf16) {
    const uint16_t* from = reinterpret_cast<const uint16_t*>(panel) + k * kPanel + v * kPanel;
    even = vload_bf16_even(from), odd = vload_bf16_odd(from);
    return;
  }
  even = vload_as(kWeight, panel, k * kPanel + v * kLanes, kLanes);
  odd = has_odd ? vload_as(kWeight, panel, (k + 1) * kPanel + v * kLanes, kLanes) : vzero();
}

// Steps [step0, step1) of a packed panel as terms. False if a weight is not finite.
template <DType kWeight, int kTerms>
bool split_weights(const TileProblem& p, const char* panel, int64_t step0, int64_t step1, char* to) {
  FiniteWords finite;
  const int64_t k1 = p.padded_k();
  for (int64_t step = step0; step < step1; ++step, to += kTerms * kTermBytes)
    for (int64_t pair = 0; pair < kTileK / 2; ++pair) {
      const int64_t k = step * kTileK + 2 * pair;
      char* at = to + pair * kPanel * 4;
#pragma GCC unroll 2
      for (int v = 0; v < 2; ++v, at += kTileBytes) {
        Vec even = vzero(), odd = vzero();
        if (k < k1) load_weights<kWeight>(panel, k, v, k + 1 < k1, even, odd);
#pragma GCC unroll 3
        for (int term = 0; term < kTerms; ++term) {
          const __m512i pairs = split_pairs(even, odd);
          _mm512_store_si512(at + term * kTermBytes, pairs);
          if (term == 0 && kTerms > 1) finite.see(pairs);
        }
      }
    }
  return finite.all();
}

using SplitFunction = bool (*)(const TileProblem&, const char*, int64_t, int64_t, char*);

inline SplitFunction split_function(const TileProblem& p) {
  if (p.weight == DType::f32) return split_weights<DType::f32, 3>;
  if (p.weight == DType::f16) return p.terms == 2 ? split_weights<DType::f16, 2> : split_weights<DType::f16, 3>;
  return p.terms == 1   ? split_weights<DType::bf16, 1>
         : p.terms == 2 ? split_weights<DType::bf16, 2>
                        : split_weights<DType::bf16, 3>;
}

// ---- epilogues

// Row m of a panel by the FMA kernel of one row, piece by piece of K.
void lone_row(const TileProblem& p, int64_t panel, int64_t m, float* sums, float* x) {
  const RowNorm norm = row_norm(p, m);
  const char* b = p.w.data + panel * panel_bytes(p.K, p.weight);
  for (int64_t k0 = 0; k0 < p.padded_k(); k0 += kLoneK) {
    const int64_t k = min64(kLoneK, p.padded_k() - k0);
    for (int64_t i = 0; i < k; i += kLanes) {
      Vec block[1];
      load_block(p, &norm, m, 1, k0 + i, block);
      vstore_n(x + i, block[0], static_cast<int>(min64(kLanes, k - i)));
    }
    const char* from = b + k0 * kPanel * itemsize(p.weight);
    stream_tile(p.weight, 1)({x, from, k / steps_of(p.weight), from, 0, sums, k0 > 0, 0});
  }
}

// A finished product that waits for its epilogue. That is done a few rows at a time between the steps of the next
// product: the core looks only some hundred instructions ahead, so the tiles would idle while it works on all rows.
class Epilogue {
 public:
  Epilogue(const TileProblem& p, const char* lone, float* lone_x) : p_(p), lone_(lone), lone_x_(lone_x) {}

  // lone: the FMA kernels take all rows.
  void begin(int64_t panel, int64_t row0, int rows, bool lone, float* sums) {
    panel_ = panel, row_ = row0, left_ = rows, all_lone_ = lone, sums_ = sums;
  }
  void some(int rows) {
    if (left_ == 0) return;
    if (rows > left_) rows = left_;
    for (int r = 0; r < rows; ++r)
      if (all_lone_ || lone_[row_ + r]) lone_row(p_, panel_, row_ + r, sums_ + r * kPanel, lone_x_);
    finish_tile(p_, panel_, row_, rows, sums_);
    row_ += rows, left_ -= rows, sums_ += rows * kPanel;
  }
  void rest() { some(left_); }

 private:
  const TileProblem& p_;
  const char* lone_;
  float* lone_x_;
  int64_t panel_ = 0, row_ = 0;
  int left_ = 0;
  bool all_lone_ = false;
  float* sums_ = nullptr;
};

// ---- products

struct TermArgs {
  const char* a;  // [steps][T][2][16][64 bytes]
  const char* b;  // [steps][T][16][128 bytes]
  int64_t steps;
  const char* ahead;  // weights wanted next: so many lines of 64 bytes in a step
  int64_t ahead_lines;
  float* sums;  // [32][kPanel]
  bool accumulate;
  Epilogue* before;  // of the product before
  int rows_a_step;   // of it
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
  auto rows = [&](int term) __attribute__((always_inline)) {
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
  for (int64_t step = args.steps; step > 0; --step, a += kTerms * kTermBytes, b += kTerms * kTermBytes) {
    for (int64_t line = args.ahead_lines; line > 0; --line, ahead += 64) __builtin_prefetch(ahead, 0, 2);
    // An order in which neighbours share a side, so that each product loads one.
    rows(0);
    if (kTerms == 3) weights(2), multiply();
    if (kTerms >= 2) weights(1), multiply();
    weights(0), multiply();
    if (kTerms >= 2) rows(1), multiply();
    if (kTerms == 3) {
      weights(1), multiply();
      rows(2), weights(0), multiply();
    }
    args.before->some(args.rows_a_step);
  }
  _tile_stored(0, sums, kSumStride);
  _tile_stored(1, sums + kTileBytes, kSumStride);
  if (kHalves == 2) {
    _tile_stored(2, sums + kHalf, kSumStride);
    _tile_stored(3, sums + kHalf + kTileBytes, kSumStride);
  }
}

using TermFunction = void (*)(const TermArgs&);

inline TermFunction term_function(int terms, int rows) {
  if (rows <= kTileRows) return terms == 1 ? term_tile<1, 1> : terms == 2 ? term_tile<2, 1> : term_tile<3, 1>;
  return terms == 1 ? term_tile<1, 2> : terms == 2 ? term_tile<2, 2> : term_tile<3, 2>;
}

void run_tiles(const TileProblem& p, const TileSchedule& s, int64_t chunk, int threads, char* shared, char* local) {
  const Chunk c = s.chunk(chunk);
  const int64_t next_panel = s.next_panel(chunk, threads);
  const int64_t bytes = panel_bytes(p.K, p.weight), step_bytes = kTileK * kPanel * itemsize(p.weight);
  const int64_t panels = c.panel1 - c.panel0, tiles = c.tile1 - c.tile0;
  float *waiting = reinterpret_cast<float*>(local), *lone_x = waiting + kSumBytes / 4;
  char* terms = local + kSumBytes + kLoneK * 4;
  const char* weights[kTileSpan];
  bool finite[kTileSpan] = {true, true, true, true, true, true};
  const SplitFunction split = split_function(p);
  Epilogue epilogue(p, p.lone(shared), lone_x);
  int64_t turn = 0;
  const TileScope scope;
  for (int64_t step0 = 0; step0 < p.steps(); step0 += s.k_block) {
    const int64_t step1 = min64(p.steps(), step0 + s.k_block);
    const bool last = step1 == p.steps();
    for (int64_t i = 0; i < panels; ++i) {
      const char* packed = p.w.data + (c.panel0 + i) * bytes;
      if (p.in_place()) {
        weights[i] = packed + step0 * step_bytes;
        continue;
      }
      char* to = terms + i * s.k_block * p.terms * kTermBytes;
      finite[i] &= split(p, packed, step0, step1, to);
      weights[i] = to;
    }
    TermArgs args{};
    args.steps = step1 - step0;
    args.accumulate = step0 > 0;
    args.before = &epilogue;
    args.rows_a_step = static_cast<int>(max64(2, ceil_div(kTileHeight, args.steps)));
    args.ahead_lines = ceil_div(step_bytes / 64, tiles);
    for (int64_t tile = c.tile0; tile < c.tile1; ++tile) {
      const int64_t row0 = tile * kTileHeight;
      const int rows = static_cast<int>(min64(kTileHeight, p.M - row0));
      args.a = shared + tile * p.tile_bytes() + step0 * p.terms * kTermBytes;
      for (int64_t i = 0; i < panels; ++i) {
        const int64_t slot = s.k_blocks == 1 ? ++turn % 2 : (tile - c.tile0) * panels + i;
        args.sums = waiting + slot * kTileHeight * kPanel;
        args.b = weights[i];
        args.ahead = p.w.data + (last ? next_panel + i : c.panel0 + i) * bytes + (last ? 0 : step1 * step_bytes) +
                     (tile - c.tile0) * args.steps * args.ahead_lines * 64;
        term_function(p.terms, rows)(args);
        if (!last) continue;
        epilogue.rest();
        epilogue.begin(c.panel0 + i, row0, rows, !finite[i], args.sums);
      }
    }
  }
  epilogue.rest();
}

// ---- the op: on tiles where that pays, otherwise as in the tiers without them

int tier_phases(const Step& s, int threads) { return runs_on_tiles(Problem(s)) ? 2 : linear_phases(s, threads); }

int64_t tier_chunks(const Step& s, int phase, int threads) {
  const TileProblem p(s);
  if (!runs_on_tiles(p)) return linear_chunks(s, phase, threads);
  return phase == 0 ? tile_prepare_chunks(p) : TileSchedule(p, threads).chunks();
}

size_t tier_workspace(const Step& s, int threads) {
  const TileProblem p(s);
  if (!runs_on_tiles(p)) return linear_workspace(s, threads);
  return static_cast<size_t>(p.row_tiles() * p.tile_bytes() + p.padded_rows());
}

void tier_run(const Step& s, int phase, int64_t chunk, int threads, const Scratch& scratch) {
  const TileProblem p(s);
  if (!runs_on_tiles(p)) return linear_run(s, phase, chunk, threads, scratch);
  if (phase == 0) return prepare_tile_rows(p, chunk, scratch.shared);
  run_tiles(p, TileSchedule(p, threads), chunk, threads, scratch.shared, scratch.local);
}

Span tier_first_read(const Step& s, int phase, int threads, int thread) {
  return runs_on_tiles(Problem(s)) ? Span{} : linear_first_read(s, phase, threads, thread);
}

}  // namespace
