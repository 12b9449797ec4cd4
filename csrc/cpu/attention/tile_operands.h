// What attention on tiles multiplies: queries, keys and values as sums of T bf16 numbers (linear/terms.h), and the
// memory that a chunk keeps them in.
//
//   queries  [row tile][T][d step][16 pairs of d][16 rows][2]          B of the scores
//   keys     [T][d step][kTileKeys][32 d]                              A of the scores
//   weights  [2 row tiles][T][key step][16 pairs of keys][16 rows][2]  B of the outputs
//   values   [T][dim tile][key step][16 dims][32 keys]                 A of the outputs
#pragma once
#include "cpu/attention/prefill.h"

namespace {

constexpr int64_t kTileStep = 32;                        // k of one product
constexpr int64_t kTileSize = kTileRows * kTileBytes;    // bytes of a tile
constexpr int64_t kTileKeys = 128;                       // keys per block
constexpr int64_t kKeySteps = kTileKeys / kTileStep;     // of a block
constexpr int64_t kColumn = (kMaxHeadDim + 8) * kLanes;  // floats of one vector's scores or outputs, off a power of two
constexpr int kTilePanels = kTileVectors / kMaxNv;       // of a chunk
static_assert(kTileVectors % kMaxNv == 0 && kMaxNv % 2 == 0 && kTileKeys <= kMostKeys && kLanes == kTileRows);

struct TileChunk {
  Panel panel[kTilePanels];
  int panels;
  int64_t terms, dim_steps, value_steps;  // T; steps of the head, and of the values' own
  char *queries, *keys, *values, *weights;
  float* scores;
  int32_t bad[kTileKeys];  // keys of the block whose values are not finite; among `values` they are zero
  int64_t num_bad;

  int64_t query_bytes() const { return terms * dim_steps * kTileSize; }  // of a row tile
  int64_t weight_bytes() const { return terms * kKeySteps * kTileSize; }
  int64_t key_step_bytes() const { return kTileKeys * kTileBytes; }
  int64_t value_bytes() const { return 2 * value_steps * kKeySteps * kTileSize; }  // of a term
  char* queries_of(int n, int v) const { return queries + (n * kMaxNv + v) * query_bytes(); }
  char* weights_of(int slot) const { return weights + slot * 2 * weight_bytes(); }
  float* scores_of(int slot) const { return scores + slot * 2 * kColumn; }
};

constexpr int64_t tile_chunk_bytes(int64_t vectors, int64_t terms, int64_t dim) {
  const int64_t steps = (dim + kTileStep - 1) / kTileStep;
  const int64_t numbers = vectors * steps + steps * kTileKeys / kTileRows + 2 * steps * kKeySteps + 4 * kKeySteps;
  return terms * numbers * kTileSize + 4 * (kTileKeys * kLd + kLanes * kRowLd + (4 + vectors) * kColumn);
}
static_assert(tile_chunk_bytes(kTileVectors, 1, kMaxHeadDim) <= int64_t(kMostLocalBytes) &&
                  tile_chunk_bytes(kTileVectors, 2, kMaxHeadDim) <= int64_t(kMostLocalBytes),
              "a chunk on tiles must fit the local scratch");

inline void place_scratch(TileChunk& c, char* local) {
  LocalMemory memory{local};
  c.queries = memory.bytes(c.panels * kMaxNv * c.query_bytes());
  c.keys = memory.bytes(c.terms * c.dim_steps * c.key_step_bytes());
  c.values = memory.bytes(c.terms * c.value_bytes());
  c.weights = memory.bytes(4 * c.weight_bytes());
  c.scores = memory.floats(4 * kColumn);
  float* bias = memory.floats(kTileKeys * kLd);
  float* row = memory.floats(kLanes * kRowLd);
  for (int n = 0; n < c.panels; ++n) {
    Panel& a = c.panel[n];
    a.bias = bias, a.row = row;
    a.ot = memory.floats(kMaxNv * kColumn);
    a.row_ld = kLanes, a.vec_ld = kColumn;
  }
}

// Collects whether a number it has seen is NaN, an infinity, or becomes one when it is rounded to bf16.
struct FiniteFloats {
  __m512i largest = _mm512_setzero_si512();
  void see(Vec x) {
    largest = _mm512_max_epu32(largest, _mm512_and_si512(_mm512_castps_si512(x.v), _mm512_set1_epi32(0x7FFFFFFF)));
  }
  bool all() const { return _mm512_cmpge_epu32_mask(largest, _mm512_set1_epi32(0x7F7F8000)) == 0; }
};

inline __mmask32 words_left(int64_t n) { return static_cast<__mmask32>(~uint64_t{0} >> (64 - min64(kTileStep, n))); }
// 32 bf16 numbers of a row from d on, zero past its n.
inline Vec load_words(const char* row, int64_t d, int64_t n) {
  return {_mm512_castsi512_ps(_mm512_maskz_loadu_epi16(words_left(n - d), reinterpret_cast<const uint16_t*>(row) + d))};
}
inline void store_words(char* to, Vec words) { vstore(reinterpret_cast<float*>(to), words); }

constexpr int64_t kWideRow = kMaxHeadDim + kLanes;
// A row as floats, zero up to whole steps: where it lies, or made at `to`, which has kWideRow floats.
inline const float* wide_row(DType dtype, const char* row, int64_t n, float* to) {
  if (dtype == DType::f32 && n % kTileStep == 0) return reinterpret_cast<const float*>(row);
  load_row(dtype, row, n, to);
  if (n % kTileStep > 0 && n % kTileStep <= kLanes) vstore(to + ceil_div(n, kLanes) * kLanes, vzero());
  return to;
}

// The bf16 terms of 32 numbers, each of what the ones before left over; all rounded.
template <int T>
inline void split_words(const float* from, FiniteFloats& finite, Vec (&words)[T]) {
  Vec low = vload(from), high = vload(from + kLanes);
  finite.see(low);
  finite.see(high);
#pragma GCC unroll 2
  for (int t = 0; t < T; ++t) {
    const __m512i w = tile_words(low, high);
    words[t].v = _mm512_castsi512_ps(w);
    if (t + 1 == T) break;
    low = vsub(low, low_words(w));
    high = vsub(high, high_words(w));
  }
}

// Vector v of a panel, rotated; padding lanes are zero. Returns whether all terms are finite, if they are split.
template <int T>
bool load_tile_queries(const Problem& p, const TileChunk& c, const Panel& a, int v, char* to) {
  const bool as_it_is = T == 1 && p.q->dtype == DType::bf16 && p.rope_kind == kRopeNone;
  const char* row[kLanes];
  const int64_t lanes = max64(0, min64(kLanes, a.rows - v * kLanes));
  for (int l = 0; l < lanes; ++l) {
    const int lane = v * kLanes + l;
    row[l] = row_ptr(*p.q, a.b, a.head[lane], a.pos[lane]);
    if (as_it_is) continue;
    float* own = a.row + l * kRowLd;
    const float* wide = wide_row(p.q->dtype, row[l], p.head_dim, own);
    if (p.rope_kind != kRopeNone && wide != own) __builtin_memcpy(own, wide, p.head_dim * sizeof(float)), wide = own;
    rotate(p, a.b, a.pos[lane], own);
    row[l] = reinterpret_cast<const char*>(wide);
  }
  FiniteFloats finite;
  for (int64_t step = 0; step < c.dim_steps; ++step, to += kTileSize) {
    Vec t[T][kLanes];
    for (int l = 0; l < kLanes; ++l) {
      Vec words[T];
      for (int n = 0; n < T; ++n) words[n] = vzero();
      if (l < lanes && as_it_is)
        words[0] = load_words(row[l], step * kTileStep, p.head_dim);
      else if (l < lanes)
        split_words<T>(reinterpret_cast<const float*>(row[l]) + step * kTileStep, finite, words);
      for (int n = 0; n < T; ++n) t[n][l] = words[n];
    }
    for (int n = 0; n < T; ++n) {
      vtranspose(t[n]);
      for (int l = 0; l < kLanes; ++l) store_words(to + n * c.dim_steps * kTileSize + l * kTileBytes, t[n][l]);
    }
  }
  return finite.all();
}

// Keys of a block, zero up to whole steps; returns as load_tile_queries.
template <int T>
bool load_tile_keys(const Problem& p, const TileChunk& c, int64_t j0, int64_t keys) {
  alignas(64) float own[kWideRow];
  const char* row = row_ptr(*p.k, c.panel[0].b, c.panel[0].kv_head, j0);
  const int64_t row_bytes = p.k->stride[2] * itemsize(p.k->dtype), padded = ceil_div(keys, kTileStep) * kTileStep;
  const int64_t term_bytes = c.dim_steps * c.key_step_bytes();
  const bool as_it_is = T == 1 && p.k->dtype == DType::bf16;
  FiniteFloats finite;
  for (int64_t j = 0; j < keys; ++j, row += row_bytes) {
    char* to = c.keys + j * kTileBytes;
    const float* wide = as_it_is ? nullptr : wide_row(p.k->dtype, row, p.head_dim, own);
    for (int64_t step = 0; step < c.dim_steps; ++step, to += c.key_step_bytes()) {
      Vec words[T];
      if (as_it_is)
        words[0] = load_words(row, step * kTileStep, p.head_dim);
      else
        split_words<T>(wide + step * kTileStep, finite, words);
      for (int n = 0; n < T; ++n) store_words(to + n * term_bytes, words[n]);
    }
  }
  for (int64_t j = keys; j < padded; ++j)
    for (int64_t n = 0; n < T * c.dim_steps; ++n)
      store_words(c.keys + n * c.key_step_bytes() + j * kTileBytes, vzero());
  return finite.all();
}

// Words of two keys, for 32 dims, in turn: the pairs of 16 dims each.
inline void pair_words(Vec even, Vec odd, Vec& low, Vec& high) {
  const __m512i first = _mm512_set_epi16(47, 15, 46, 14, 45, 13, 44, 12, 43, 11, 42, 10, 41, 9, 40, 8, 39, 7, 38, 6, 37,
                                         5, 36, 4, 35, 3, 34, 2, 33, 1, 32, 0);
  const __m512i second = _mm512_add_epi16(first, _mm512_set1_epi16(16));
  const __m512i a = _mm512_castps_si512(even.v), b = _mm512_castps_si512(odd.v);
  low.v = _mm512_castsi512_ps(_mm512_permutex2var_epi16(a, first, b));
  high.v = _mm512_castsi512_ps(_mm512_permutex2var_epi16(a, second, b));
}

// Values of 32 keys from row j on, transposed, for the 32 dims of a step.
inline void load_value_tiles(const char* base, int64_t row_bytes, int64_t v_dim, int64_t j, int64_t keys, int64_t step,
                             char* to, FiniteWords& finite) {
  Vec low[kLanes], high[kLanes];
  for (int i = 0; i < kLanes; ++i) {
    auto load = [&](int64_t key) {
      return key < keys ? load_words(base + key * row_bytes, step * kTileStep, v_dim) : vzero();
    };
    const Vec even = load(j + 2 * i), odd = load(j + 2 * i + 1);
    finite.see(_mm512_castps_si512(even.v));
    finite.see(_mm512_castps_si512(odd.v));
    pair_words(even, odd, low[i], high[i]);
  }
  vtranspose(low);
  vtranspose(high);
  for (int i = 0; i < kLanes; ++i) {
    store_words(to + i * kTileBytes, low[i]);
    store_words(to + kKeySteps * kTileSize + i * kTileBytes, high[i]);
  }
}

// The same of rows that are split into terms: rows of key pairs first, which are transposed where they lie.
template <int T>
void split_value_tiles(const Problem& p, const TileChunk& c, const char* base, int64_t j, int64_t keys,
                       FiniteFloats& finite) {
  alignas(64) float own[2][kWideRow];
  const int64_t row_bytes = p.v->stride[2] * itemsize(p.v->dtype);
  const int64_t tiles = 2 * c.value_steps, tile_bytes = kKeySteps * kTileSize;
  char* to = c.values + j / kTileStep * kTileSize;
  for (int i = 0; i < kLanes; ++i) {
    const float* wide[2];
    for (int odd = 0; odd < 2; ++odd) {
      const int64_t key = j + 2 * i + odd;
      wide[odd] = own[odd];
      if (key < keys)
        wide[odd] = wide_row(p.v->dtype, base + key * row_bytes, p.v_dim, own[odd]);
      else
        for (int64_t d = 0; d < c.value_steps * kTileStep; d += kLanes) vstore(own[odd] + d, vzero());
    }
    for (int64_t tile = 0; tile < tiles; ++tile) {
      Vec even = vload(wide[0] + tile * kLanes), odd = vload(wide[1] + tile * kLanes);
      finite.see(even);
      finite.see(odd);
      char* at = to + tile * tile_bytes + i * kTileBytes;
#pragma GCC unroll 2
      for (int n = 0; n + 1 < T; ++n, at += c.value_bytes()) _mm512_store_si512(at, split_pairs(even, odd));
      _mm512_store_si512(at, round_pairs(even, odd));
    }
  }
  for (int64_t n = 0; n < T * tiles; ++n) {
    float* tile = reinterpret_cast<float*>(to + n * tile_bytes);
    Vec t[kLanes];
    for (int i = 0; i < kLanes; ++i) t[i] = vload(tile + i * kLanes);
    vtranspose(t);
    for (int i = 0; i < kLanes; ++i) vstore(tile + i * kLanes, t[i]);
  }
}

// Finds the keys of a block whose values are not finite as terms, and makes them zero there.
inline void take_out_bad_values(const Problem& p, TileChunk& c, const char* base, int64_t keys) {
  alignas(64) float own[kWideRow];
  const int64_t row_bytes = p.v->stride[2] * itemsize(p.v->dtype);
  for (int64_t j = 0; j < keys; ++j) {
    FiniteFloats finite;
    const float* wide = wide_row(p.v->dtype, base + j * row_bytes, p.v_dim, own);
    for (int64_t d = 0; d < c.value_steps * kTileStep; d += kLanes) finite.see(vload(wide + d));
    if (finite.all()) continue;
    c.bad[c.num_bad++] = static_cast<int32_t>(j);
    for (int64_t n = 0; n < c.terms; ++n)
      for (int64_t d = 0; d < p.v_dim; ++d) {
        char* tile = c.values + n * c.value_bytes() + (d / kTileRows * kKeySteps + j / kTileStep) * kTileSize;
        reinterpret_cast<uint16_t*>(tile + d % kTileRows * kTileBytes)[j % kTileStep] = 0;
      }
  }
}

template <int T>
void load_tile_values(const Problem& p, TileChunk& c, int64_t j0, int64_t keys) {
  const char* base = row_ptr(*p.v, c.panel[0].b, c.panel[0].kv_head, j0);
  FiniteWords words;
  FiniteFloats floats;
  if (T == 1 && p.v->dtype == DType::bf16) {
    for (int64_t step = 0; step < c.value_steps; ++step)
      for (int64_t j = 0; j < keys; j += kTileStep)
        load_value_tiles(base, p.v->stride[2] * itemsize(DType::bf16), p.v_dim, j, keys, step,
                         c.values + (2 * step * kKeySteps + j / kTileStep) * kTileSize, words);
  } else {
    for (int64_t j = 0; j < keys; j += kTileStep) split_value_tiles<T>(p, c, base, j, keys, floats);
  }
  c.num_bad = 0;
  if (!words.all() || !floats.all()) take_out_bad_values(p, c, base, keys);
}

}  // namespace
