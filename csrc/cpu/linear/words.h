// Products of many rows as 16-bit fixed point (cpu/fixed_point.h), which costs half of FMA. Rows and panels with a
// block that has no scale are multiplied as floats, and what their words are does not matter.
//
// A panel becomes words part by part of K, which all tiles of a chunk pass over while it stays in L1.
//
//   rows      [M] words, an odd number of lines apart; then scales [row tiles][blocks][rows]; then a byte a row: it is
//             multiplied as floats
//   a part    [k pairs][kPanel][2] words
//
// The weights are a class of the op that includes this:
//   const char* at(panel, k), int64_t block_bytes(k)   what is packed from k on, and how long: asked for ahead
//   void widen(panel, k0, k, to)                       f32 [k][kPanel]
//   bool make_words(panel, k0, k, wide, to, scales)    as make_column_words; there is room for f32 [k][kPanel]
#pragma once
#include "cpu/linear/epilogue.h"
#include "cpu/linear/rows.h"
#include "cpu/linear/tile.h"
#include "cpu/linear/word_columns.h"

namespace {

constexpr int kWordRows = 14;  // MR: integer sums, two vectors of weights and a broadcast fill the registers
constexpr float kMostBesideTiny = 0x1p-60f;  // of a row in which smaller ones than kLeastValue count
constexpr int64_t kPartBlocks = 3;           // of a part: with the rows of a tile they take 35 KiB of L1
constexpr int64_t kWordSums = kWordRows * kPanel, kWideBlock = kWordBlock * kPanel;  // floats
constexpr int64_t kWordTiles = kSumBytes / (4 * kWordSums);                          // of a chunk, whose sums wait

// Of a thread: sums of its tiles, then what a panel is made in.
struct WordMemory {
  float sums[kWordTiles][kWordSums];
  float wide[kWideBlock], x[kWordBlock], scales[kPartBlocks][kPanel];
  char words[kPartBlocks * kWideBlock * 2];
};
static_assert(sizeof(WordMemory) <= kLocalBytes);

struct WordProblem {
  const Problem& p;
  const RowTiles tiles;

  explicit WordProblem(const Problem& problem) : p(problem), tiles{0, p.M, ceil_div(p.M, kWordRows)} {}

  int64_t blocks() const { return ceil_div(p.K, kWordBlock); }
  int64_t part_blocks() const { return ceil_div(blocks(), ceil_div(blocks(), kPartBlocks)); }

  int64_t row_stride() const { return (ceil_div(2 * p.K, 64) | 1) * 64; }
  char* row(char* shared, int64_t m) const { return shared + m * row_stride(); }
  float* scales(char* shared, int64_t tile) const {
    return reinterpret_cast<float*>(row(shared, p.M)) + tiles.row(tile) * blocks();
  }
  char* lone(char* shared) const { return reinterpret_cast<char*>(scales(shared, tiles.count)); }
  size_t workspace() const { return static_cast<size_t>(p.M * (row_stride() + blocks() * 4 + 1)); }

  // Panels are made once a chunk.
  Cut cut(int threads) const {
    const int64_t wanted = kChunksPerThread * threads;
    Cut c{p.panels(), tiles.count, max64(1, p.panels() / wanted), tiles.count, 1};
    if (c.panels > 0) c.cut_rows(wanted, kWordTiles);
    return c;
  }
};

// ---- rows

// What a block of a row is as words.
enum class Words { fit, tiny, none };  // tiny: zeros that stand for less than kLeastValue

// The squares of values leave f32, or they are no numbers: their scale by way of the largest.
__attribute__((noinline)) Words rare_row_words(const Vec* x, int count, Vec largest, float squares, float* length) {
  const float most = vreduce_max(largest);
  *length = 0.0f;
  if (squares == squares && most < kLeastValue) return most == 0.0f ? Words::fit : Words::tiny;
  if (!(most <= kMostValue)) return Words::none;
  Vec sum = vzero();
  for (int v = 0; v < count; ++v) {
    const Vec share = vmul(x[v], vset(1 / most));
    sum = vfma(share, share, sum);
  }
  *length = most * __builtin_sqrtf(vreduce_add(sum));
  return *length == *length ? Words::fit : Words::none;
}

// `vectors` of a row from k0 on as words with their scale.
template <int kVectors>
inline Words make_row_words(const Problem& p, const RowNorm& norm, int64_t m, int64_t k0, int vectors, char* to,
                            float* scale, Vec* top) {
  const int count = kVectors ? kVectors : vectors;
  Vec x[kWordBlock / kLanes], squares = vzero(), largest = vzero();
#pragma GCC unroll 8
  for (int v = 0; v < count; ++v) {
    load_block(p, &norm, m, 1, k0 + v * kLanes, x + v);
    squares = vfma(x[v], x[v], squares);
    largest = vmax(largest, vabs(x[v]));
  }
  *top = vmax(*top, largest);
  const float sum = vreduce_add(squares);
  float length;
  Words words = Words::fit;
  if (sum >= kLeastSquares && sum <= kMostSquares)
    length = __builtin_sqrtf(sum);
  else
    words = rare_row_words(x, count, largest, sum, &length);
  const float inverse = length > 0.0f ? kRowNorm / length : 0.0f;
  *scale = length * (1 / kRowNorm);
#pragma GCC unroll 8
  for (int v = 0; v < count; ++v) vstore_s16(reinterpret_cast<int16_t*>(to) + v * kLanes, vmul(x[v], vset(inverse)));
  return words;
}

void prepare_words(const WordProblem& w, int64_t tile, char* shared) {
  const Problem& p = w.p;
  const int64_t row0 = w.tiles.row(tile), rows = w.tiles.row(tile + 1) - row0;
  float* scales = w.scales(shared, tile);
  for (int64_t r = 0; r < rows; ++r) {
    const RowNorm norm = row_norm(p, row0 + r);
    char* to = w.row(shared, row0 + r);
    float* scale = scales + r;
    Vec top = vzero();
    bool has_none = false, has_tiny = false;
    for (int64_t k0 = 0; k0 < p.K; k0 += kWordBlock, to += 2 * kWordBlock, scale += rows) {
      const int vectors = static_cast<int>(ceil_div(min64(kWordBlock, p.K - k0), kLanes));
      const Words words = vectors == kWordBlock / kLanes
                              ? make_row_words<kWordBlock / kLanes>(p, norm, row0 + r, k0, vectors, to, scale, &top)
                              : make_row_words<0>(p, norm, row0 + r, k0, vectors, to, scale, &top);
      has_none |= words == Words::none, has_tiny |= words == Words::tiny;
    }
    w.lone(shared)[row0 + r] = has_none || (has_tiny && vreduce_max(top) < kMostBesideTiny);
  }
}

// ---- panels

// k of a panel's columns by way of floats.
template <class Weights>
bool make_wide_words(const Weights& weights, int64_t panel, int64_t k0, int64_t k, float* wide, char* to,
                     float* scales) {
  weights.widen(panel, k0, k, wide);
  return make_column_words(FloatColumns{wide, kPanel}, kPanel, pad_rows(wide, kPanel, k), to, scales);
}

template <class Weights>
bool make_part(const Weights& weights, int64_t panel, int64_t k0, int64_t k1, WordMemory& memory) {
  bool fits = true;
  for (int64_t k = k0, block = 0; k < k1; k += kWordBlock, ++block)
    fits &= weights.make_words(panel, k, min64(kWordBlock, k1 - k), memory.wide, memory.words + block * kWideBlock * 2,
                               memory.scales[block]);
  return fits;
}

// ---- products

struct WordArgs {
  const char* a;  // rows that are a_stride apart
  int64_t a_stride;
  const float* a_scale;  // [blocks][rows]
  const char* b;         // a part
  const float* b_scale;  // [blocks][kPanel]
  int64_t pairs;
  bool accumulate;  // start from `sums` instead of zero
  float* sums;      // [rows][kPanel]
};

template <int kRows>
void word_tile(const WordArgs& args) {
  constexpr int kVectorBytes = 4 * kLanes;
  const char* b = args.b;
  const float *a_scale = args.a_scale, *b_scale = args.b_scale;
  RowPointers<kRows> rows(args.a, args.a_stride);
  if (!args.accumulate)
    each_sum<1, kRows>([&](int, int m, int v)
                           __attribute__((always_inline)) { vstore(args.sums + m * kPanel + v * kLanes, vzero()); });
  for (int64_t left = args.pairs; left > 0; left -= kWordBlock / 2, a_scale += kRows, b_scale += kPanel) {
    IntVec acc[kRows][2];
#pragma GCC unroll 16
    for (int m = 0; m < kRows; ++m) acc[m][0] = acc[m][1] = iset(0);
    auto multiply = [&](int i) __attribute__((always_inline)) {
      const IntVec b0 = load_pairs(b + 2 * i * kVectorBytes), b1 = load_pairs(b + (2 * i + 1) * kVectorBytes);
#pragma GCC unroll 16
      for (int m = 0; m < kRows; ++m) {
        const IntVec x = all_pairs(rows.row(m, 4 * i));
        word_dot(acc[m][0], b0, x);
        word_dot(acc[m][1], b1, x);
      }
    };
    int64_t pairs = min64(left, kWordBlock / 2);
    for (; pairs >= 2; pairs -= 2, b += 4 * kVectorBytes) {
      multiply(0);
      multiply(1);
      rows.advance(8);
    }
    if (pairs > 0) {
      multiply(0);
      rows.advance(4);
      b += 2 * kVectorBytes;
    }
    const Vec scale[2] = {vload(b_scale), vload(b_scale + kLanes)};
    each_sum<1, kRows>([&](int, int m, int v) __attribute__((always_inline)) {
      float* at = args.sums + m * kPanel + v * kLanes;
      vstore(at, vfma(vmul(vfrom_int(acc[m][v]), scale[v]), vset(a_scale[m]), vload(at)));
    });
  }
}

using WordFunction = void (*)(const WordArgs&);

// The kernel for a height of kRows or less; rows >= 1.
template <int kRows = kWordRows>
WordFunction word_function(int64_t rows) {
  if constexpr (kRows > 1) {
    if (rows < kRows) return word_function<kRows - 1>(rows);
  }
  return word_tile<kRows>;
}

// Row m of a panel by FMA.
template <class Weights>
void lone_sums(const Problem& p, const Weights& weights, int64_t panel, int64_t m, WordMemory& memory, float* sums) {
  const RowNorm norm = row_norm(p, m);
  for (int64_t k0 = 0; k0 < p.K; k0 += kWordBlock) {
    const int64_t k = min64(kWordBlock, p.padded_k() - k0);
    weights.widen(panel, k0, k, memory.wide);
    for (int64_t i = 0; i < k; i += kLanes) {
      Vec block;
      load_block(p, &norm, m, 1, k0 + i, &block);
      vstore(memory.x + i, block);
    }
    const char* b = reinterpret_cast<const char*>(memory.wide);
    blocked_tile(1)({memory.x, b, k, b, 0, sums, k0 > 0, 0});
  }
}

// The nth of so many pieces of what is wanted next.
inline void fetch_piece(const char* from, int64_t bytes, int64_t nth, int64_t pieces) {
  for (int64_t at = nth * bytes / pieces; at < (nth + 1) * bytes / pieces; at += 64)
    __builtin_prefetch(from + at, 0, 2);
}

template <class Weights>
void run_words(const WordProblem& w, const Weights& weights, const Cut& cut, int64_t chunk, int threads,
               const Scratch& scratch) {
  const Problem& p = w.p;
  const Chunk c = cut.chunk(chunk);
  const int64_t next_panel = cut.next_panel(chunk, threads), tiles = c.tile1 - c.tile0;
  const int64_t part = w.part_blocks(), k_part = part * kWordBlock, K = p.padded_k();
  auto& memory = *reinterpret_cast<WordMemory*>(scratch.local);
  const char* lone = w.lone(scratch.shared);
  WordArgs args{};
  args.a_stride = w.row_stride();
  args.b = memory.words;
  args.b_scale = memory.scales[0];
  for (int64_t panel = c.panel0; panel < c.panel1; ++panel) {
    bool fits = true;
    for (int64_t k0 = 0; k0 < K; k0 += k_part) {
      const int64_t k1 = min64(K, k0 + k_part);
      const bool last = k1 == K;
      const char* ahead = last ? weights.at(panel + 1 < c.panel1 ? panel + 1 : next_panel, 0) : weights.at(panel, k1);
      fits &= make_part(weights, panel, k0, k1, memory);
      args.pairs = ceil_div(k1 - k0, 2);
      args.accumulate = k0 > 0;
      for (int64_t tile = c.tile0; tile < c.tile1; ++tile) {
        const int64_t row0 = w.tiles.row(tile), rows = w.tiles.row(tile + 1) - row0;
        fetch_piece(ahead, weights.block_bytes(min64(K, k_part)), tile - c.tile0, tiles);
        if (last) fetch_outputs(p, panel, row0, static_cast<int>(rows));
        args.a = w.row(scratch.shared, row0) + 2 * k0;
        args.a_scale = w.scales(scratch.shared, tile) + k0 / kWordBlock * rows;
        args.sums = memory.sums[tile - c.tile0];
        word_function(rows)(args);
        if (!last) continue;
        for (int64_t r = 0; r < rows; ++r)
          if (!fits || lone[row0 + r]) lone_sums(p, weights, panel, row0 + r, memory, args.sums + r * kPanel);
        finish_tile(p, panel, row0, static_cast<int>(rows), args.sums);
      }
    }
  }
}

// The kernel of an op where some of its problems P run by words, in phases of rows and of products, and `kOthers` has
// the rest.
template <class P, bool (*kRunsOnWords)(const P&), class Weights, const Kernel& kOthers>
struct WordKernel {
  static int phases(const Step& s, int threads) { return kRunsOnWords(P(s)) ? 2 : kOthers.phases(s, threads); }

  static int64_t chunks(const Step& s, int phase, int threads) {
    const P p(s);
    if (!kRunsOnWords(p)) return kOthers.chunks(s, phase, threads);
    const WordProblem w(p);
    return phase == 0 ? w.tiles.count : w.cut(threads).chunks();
  }

  static size_t workspace(const Step& s, int threads) {
    const P p(s);
    return kRunsOnWords(p) ? WordProblem(p).workspace() : kOthers.workspace(s, threads);
  }

  static void run(const Step& s, int phase, int64_t chunk, int threads, const Scratch& scratch) {
    const P p(s);
    if (!kRunsOnWords(p)) return kOthers.run(s, phase, chunk, threads, scratch);
    const WordProblem w(p);
    if (phase == 0) return prepare_words(w, chunk, scratch.shared);
    run_words(w, Weights(p), w.cut(threads), chunk, threads, scratch);
  }

  static Span first_read(const Step& s, int phase, int threads, int thread) {
    return kRunsOnWords(P(s)) ? Span{} : kOthers.first_read(s, phase, threads, thread);
  }

  static constexpr Kernel kernel(const char* name) { return {name, phases, chunks, workspace, run, first_read}; }
};

}  // namespace
