// Prefill of bf16 queries, keys and values on AMX tiles: sums, masks and softmax in f32, weights rounded to bf16.
//
// As in prefill.h a vector holds one key for kLanes query rows: Sᵀ = K Qᵀ, softmax down the keys, Oᵀ = alpha Oᵀ + Vᵀ
// Pᵀ. A chunk is several panels, for which each block of keys and values is brought into tiles once; a panel takes two
// row tiles at a time, so that their scores stay in L1 between the products.
//
//   queries  [row tile][d step][16 pairs of d][16 rows][2]          B of the scores
//   keys     [d step][kTileKeys][32 d]                              A of the scores
//   weights  [2 row tiles][key step][16 pairs of keys][16 rows][2]  B of the outputs
//   values   [dim tile][key step][16 dims][32 keys]                 A of the outputs
#pragma once
#include "cpu/attention/prefill.h"

namespace {

constexpr int64_t kTileStep = 32;                      // k of one product
constexpr int64_t kTileSize = kTileRows * kTileBytes;  // bytes of a tile
constexpr int64_t kTileKeys = 128;                     // keys per block
constexpr int64_t kKeySteps = kTileKeys / kTileStep;   // of a block
constexpr int64_t kMaxDimSteps = kMaxHeadDim / kTileStep;
constexpr int64_t kColumn = (kMaxHeadDim + 8) * kLanes;  // floats of one vector's scores or outputs, off a power of two
constexpr int kTilePanels = kTileVectors / kMaxNv;       // of a chunk
static_assert(kTileVectors % kMaxNv == 0 && kMaxNv % 2 == 0 && kTileKeys <= kBlock && kLanes == kTileRows);

struct TileChunk {
  Panel panel[kTilePanels];
  int panels;
  char *queries, *keys, *values, *weights;
  float* scores;
  int32_t bad[kTileKeys];  // keys of the block whose values are not finite; among `values` they are zero
  int64_t num_bad;

  char* queries_of(int n, int v) const { return queries + (n * kMaxNv + v) * kMaxDimSteps * kTileSize; }
  char* weights_of(int slot) const { return weights + slot * 2 * kKeySteps * kTileSize; }
  float* scores_of(int slot) const { return scores + slot * 2 * kColumn; }
};

inline void place_scratch(TileChunk& c, char* local) {
  char* p = local;
  auto take = [&p](int64_t bytes) {
    char* r = p;
    p += bytes;
    return r;
  };
  c.queries = take(kTileVectors * kMaxDimSteps * kTileSize);
  c.keys = take(kMaxDimSteps * kTileKeys * kTileBytes);
  c.values = take(2 * kMaxDimSteps * kKeySteps * kTileSize);
  c.weights = take(4 * kKeySteps * kTileSize);
  c.scores = reinterpret_cast<float*>(take(4 * kColumn * sizeof(float)));
  float* bias = reinterpret_cast<float*>(take(kTileKeys * kLd * sizeof(float)));
  float* row = reinterpret_cast<float*>(take(kLanes * kRowLd * sizeof(float)));
  for (Panel& a : c.panel) {
    a.bias = bias, a.row = row;
    a.ot = reinterpret_cast<float*>(take(kMaxNv * kColumn * sizeof(float)));
    a.row_ld = kLanes, a.vec_ld = kColumn;
  }
}
static_assert(kTileVectors * kMaxDimSteps * kTileSize + kMaxDimSteps * kTileKeys * kTileBytes +
                      (2 * kMaxDimSteps + 4) * kKeySteps * kTileSize +
                      4 * (kTileKeys * kLd + kLanes * kRowLd + (4 + kTileVectors) * kColumn) <=
                  int64_t(kLocalBytes),
              "a chunk on tiles must fit the local scratch");

// ---- operands

inline __mmask32 words_left(int64_t n) { return static_cast<__mmask32>(~uint64_t{0} >> (64 - min64(kTileStep, n))); }
// 32 numbers of a row from d on, zero past its n.
inline Vec load_words(const char* row, int64_t d, int64_t n) {
  return {_mm512_castsi512_ps(_mm512_maskz_loadu_epi16(words_left(n - d), reinterpret_cast<const uint16_t*>(row) + d))};
}
inline void store_words(char* to, Vec words) { vstore(reinterpret_cast<float*>(to), words); }

// Vector v of a panel, rotated; padding lanes are zero. Rotated numbers are rounded to bf16, as the model's own would
// be.
inline void load_tile_queries(const Problem& p, const Panel& a, int v, char* to) {
  alignas(64) float wide[kMaxHeadDim + kLanes];
  const char* row[kLanes];
  const int64_t lanes = max64(0, min64(kLanes, a.rows - v * kLanes));
  for (int l = 0; l < lanes; ++l) {
    const int lane = v * kLanes + l;
    row[l] = row_ptr(*p.q, a.b, a.head[lane], a.pos[lane]);
    if (p.rope_kind == kRopeNone) continue;
    load_row(p.q->dtype, row[l], p.head_dim, wide);
    rotate(p, a.b, a.pos[lane], wide);
    char* turned = reinterpret_cast<char*>(a.row + l * kRowLd);
    store_row(DType::bf16, turned, p.head_dim, wide);
    row[l] = turned;
  }
  for (int64_t d = 0; d < p.head_dim; d += kTileStep, to += kTileSize) {
    Vec t[kLanes];
    for (int l = 0; l < kLanes; ++l) t[l] = l < lanes ? load_words(row[l], d, p.head_dim) : vzero();
    vtranspose(t);
    for (int l = 0; l < kLanes; ++l) store_words(to + l * kTileBytes, t[l]);
  }
}

inline void load_tile_keys(const Problem& p, const TileChunk& c, int64_t j0, int64_t keys) {
  const char* row = row_ptr(*p.k, c.panel[0].b, c.panel[0].kv_head, j0);
  const int64_t row_bytes = p.k->stride[2] * itemsize(DType::bf16), padded = ceil_div(keys, kTileStep) * kTileStep;
  for (int64_t j = 0; j < padded; ++j, row += row_bytes)
    for (int64_t d = 0; d < p.head_dim; d += kTileStep)
      store_words(c.keys + (d / kTileStep * kTileKeys + j) * kTileBytes,
                  j < keys ? load_words(row, d, p.head_dim) : vzero());
}

// Values of 32 keys from row j on, transposed, for 32 dims from d on.
inline void load_value_tiles(const char* base, int64_t row_bytes, int64_t v_dim, int64_t j, int64_t keys, int64_t d,
                             char* to, FiniteWords& finite) {
  const __m512i first = _mm512_set_epi16(47, 15, 46, 14, 45, 13, 44, 12, 43, 11, 42, 10, 41, 9, 40, 8, 39, 7, 38, 6, 37,
                                         5, 36, 4, 35, 3, 34, 2, 33, 1, 32, 0);
  const __m512i second = _mm512_add_epi16(first, _mm512_set1_epi16(16));
  Vec low[kLanes], high[kLanes];
  for (int i = 0; i < kLanes; ++i) {
    auto load = [&](int64_t key) {
      return key < keys ? _mm512_castps_si512(load_words(base + key * row_bytes, d, v_dim).v) : _mm512_setzero_si512();
    };
    const __m512i even = load(j + 2 * i), odd = load(j + 2 * i + 1);
    finite.see(even);
    finite.see(odd);
    low[i].v = _mm512_castsi512_ps(_mm512_permutex2var_epi16(even, first, odd));
    high[i].v = _mm512_castsi512_ps(_mm512_permutex2var_epi16(even, second, odd));
  }
  vtranspose(low);
  vtranspose(high);
  for (int i = 0; i < kLanes; ++i) {
    store_words(to + i * kTileBytes, low[i]);
    store_words(to + kKeySteps * kTileSize + i * kTileBytes, high[i]);
  }
}

inline void load_tile_values(const Problem& p, TileChunk& c, int64_t j0, int64_t keys) {
  const char* base = row_ptr(*p.v, c.panel[0].b, c.panel[0].kv_head, j0);
  const int64_t row_bytes = p.v->stride[2] * itemsize(DType::bf16);
  FiniteWords finite;
  for (int64_t d = 0; d < p.v_dim; d += kTileStep)
    for (int64_t j = 0; j < keys; j += kTileStep)
      load_value_tiles(base, row_bytes, p.v_dim, j, keys, d,
                       c.values + (d / kTileRows * kKeySteps + j / kTileStep) * kTileSize, finite);
  c.num_bad = 0;
  if (finite.all()) return;
  c.num_bad = find_nonfinite(DType::bf16, base, p.v->stride[2], p.v_dim, keys, c.bad);
  for (int64_t n = 0; n < c.num_bad; ++n)
    for (int64_t d = 0; d < p.v_dim; ++d) {
      char* tile = c.values + (d / kTileRows * kKeySteps + c.bad[n] / kTileStep) * kTileSize;
      reinterpret_cast<uint16_t*>(tile + d % kTileRows * kTileBytes)[c.bad[n] % kTileStep] = 0;
    }
}

// ---- products of two row tiles

// 32 rows of A by two row tiles of B, and the same for the rows that follow.
struct TileProducts {
  const char *a, *b;
  int64_t a_step, b_step;  // bytes to the next step of k
  int64_t a_tile, b_tile;  // from the first tile of a side to the second
  int64_t a_next;          // to the next 32 rows
  float* sums;             // [2 columns][rows][16]
  int64_t steps, count;    // of k, of 32 rows
  bool accumulate;
};

// Products that wait to be computed, four tiles at a time between pieces of other work: a core that has both in its
// window does both at once. Sums leave the tile registers when the next ones begin, which by then are finished.
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
    _tile_loadd(4, a, kTileBytes);
    _tile_loadd(6, b, kTileBytes);
    _tile_dpbf16ps(0, 4, 6);
    _tile_loadd(7, b + j.b_tile, kTileBytes);
    _tile_dpbf16ps(1, 4, 7);
    _tile_loadd(5, a + j.a_tile, kTileBytes);
    _tile_dpbf16ps(2, 5, 6);
    _tile_dpbf16ps(3, 5, 7);
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

// ---- softmax

// The largest of keys [begin, end) in a column of scores, or `top`.
inline Vec column_max(const float* s, int64_t begin, int64_t end, Vec top) {
  Vec other = top;
  int64_t j = begin;
  for (; j + 1 < end; j += 2) {
    top = vmax(vload(s + j * kLanes), top);
    other = vmax(vload(s + (j + 1) * kLanes), other);
  }
  if (j < end) top = vmax(vload(s + j * kLanes), top);
  return vmax(other, top);
}

// Weights exp(factor * score - shift) of the scores in a column, as bf16 pairs; returns their sum. Scores with biases
// lose the shift before anything multiplies them: a row of finfo.min must not overflow. `pieces` of the waiting
// products go between every 16 keys.
template <bool kBiased>
__attribute__((noinline)) Vec weigh_column(const float* s, int64_t keys, float factor, Vec shift, char* weights,
                                           TileQueue& queue, int64_t pieces) {
  const Vec log2e = vset(kLog2e), scale = vset(factor * kLog2e), start = vneg(vmul(shift, log2e));
  auto weight = [&](int64_t j) __attribute__((always_inline)) {
    const Vec score = vload(s + j * kLanes);
    return vexp2_rough(kBiased ? vmul(vsub(score, shift), log2e) : vfma(score, scale, start));
  };
  Vec total = vzero(), other = vzero();
  for (int64_t j0 = 0; j0 < keys; j0 += 16) {
    for (int64_t n = min64(pieces, queue.left); n > 0; --n) queue.advance();
    for (int64_t j = j0; j < j0 + 16; j += 2, weights += kTileBytes) {
      const Vec even = weight(j), odd = weight(j + 1);
      total = vadd(total, even);
      other = vadd(other, odd);
      _mm512_store_si512(weights, round_pairs(even, odd));
    }
  }
  return vadd(total, other);
}

// O of one vector times alpha.
inline void shrink_outputs(float* o, int64_t v_dim, Vec alpha) {
  if (veq(alpha, vset(1.0f)).m == 0xFFFF) return;
  for (int64_t d = 0; d < v_dim; ++d) vstore(o + d * kLanes, vmul(alpha, vload(o + d * kLanes)));
}

// A block of keys as vectors v and v + 1 of a panel see it. Pairs take turns on two slots for scores and weights.
struct TilePair {
  int n, v;
  int64_t keys, steps;
};

inline TileProducts score_products(const Problem& p, const TileChunk& c, const TilePair& t, int slot) {
  return {c.keys,
          c.queries_of(t.n, t.v),
          kTileKeys * kTileBytes,
          kTileSize,
          kTileSize,
          kMaxDimSteps * kTileSize,
          2 * kTileSize,
          c.scores_of(slot),
          ceil_div(p.head_dim, kTileStep),
          t.steps,
          false};
}
inline TileProducts output_products(const Problem& p, const TileChunk& c, const TilePair& t, int slot) {
  return {c.values,
          c.weights_of(slot),
          kTileSize,
          kTileSize,
          kKeySteps * kTileSize,
          kKeySteps * kTileSize,
          2 * kKeySteps * kTileSize,
          c.panel[t.n].ot + t.v * kColumn,
          t.steps,
          ceil_div(p.v_dim, kTileStep),
          true};
}

// Keys of a block whose values are not finite: only the rows that may see them take those.
inline void add_bad_values(const Problem& p, const TileChunk& c, const TilePair& t, int slot, int64_t j0) {
  alignas(64) float value[kMaxHeadDim + kLanes];
  const Panel& a = c.panel[t.n];
  for (int64_t n = 0; n < c.num_bad && c.bad[n] < t.keys; ++n) {
    const int64_t j = c.bad[n];
    load_row(DType::bf16, row_ptr(*p.v, a.b, a.kv_head, j0 + j), p.v_dim, value);
    for (int v = 0; v < 2; ++v) {
      const Mask dead = veq(vload(c.scores_of(slot) + v * kColumn + j * kLanes), vset(kNegInf));
      const char* pairs = c.weights_of(slot) + v * kKeySteps * kTileSize + j / 2 * kTileBytes;
      const __m512i words = _mm512_load_si512(pairs);
      const Vec w = j % 2 ? odd_words(words) : even_words(words);
      for (int64_t d = 0; d < p.v_dim; ++d) {
        float* o = a.ot + (t.v + v) * kColumn + d * kLanes;
        const Vec old = vload(o);
        vstore(o, vselect(dead, old, vfma(w, vset(value[d]), old)));
      }
    }
  }
}

// Scores of a pair become weights, while the waiting products are computed.
inline void weigh_pair(const Problem& p, TileChunk& c, const TilePair& t, int slot, int64_t j0, TileQueue& queue) {
  Panel& a = c.panel[t.n];
  a.st = c.scores_of(slot) - t.v * kColumn;
  const bool adjusted = a.masked || p.softcap > 0;  // scores are scaled before the softmax
  const float scale = p.softcap > 0 ? p.scale / p.softcap : p.scale, factor = adjusted ? 1.0f : scale;
  const int64_t clean0 = min64(t.keys, max64(0, a.common_lo - j0)), padded = t.steps * kTileStep;
  const int64_t clean1 = min64(t.keys, max64(clean0, a.common_hi - j0)), pieces = ceil_div(queue.left, padded / 8);
  if (a.masked) load_bias_block(p, a, t.v, t.v + 2, j0, t.keys);
  for (int v = t.v; v < t.v + 2; ++v) {
    float* s = a.st + v * kColumn;
    Vec top = vset(kNegInf);
    if (adjusted) {
      mask_scores(p, a, v, j0, 0, t.keys, scale, clean0 > 0 || clean1 < t.keys, &top);
    } else {
      if (clean0 > 0) mask_scores(p, a, v, j0, 0, clean0, 1.0f, true, &top);
      top = column_max(s, clean0, clean1, top);
      if (clean1 < t.keys) mask_scores(p, a, v, j0, clean1, t.keys, 1.0f, true, &top);
    }
    for (int64_t j = t.keys; j < padded; ++j) vstore(s + j * kLanes, vset(kNegInf));

    const Vec new_max = vmax(vmul(vset(factor), top), a.max[v]), ninf = vset(kNegInf);
    const Vec shift = vselect(veq(new_max, ninf), vzero(), new_max);
    const Vec alpha = vexp2(vmul(vsub(a.max[v], shift), vset(kLog2e)));
    char* weights = c.weights_of(slot) + (v - t.v) * kKeySteps * kTileSize;
    const Vec total =
        (adjusted ? weigh_column<true> : weigh_column<false>)(s, padded, factor, shift, weights, queue, pieces);
    a.sum[v] = vfma(a.sum[v], alpha, total);
    a.max[v] = new_max;
    shrink_outputs(a.ot + v * kColumn, p.v_dim, alpha);
  }
}

// One block of keys for the whole chunk: while a pair's scores become weights, the outputs of the pair before and the
// scores of the next are computed.
inline void attend_tiles(const Problem& p, TileChunk& c, int64_t j0, int64_t keys) {
  TilePair pair[kTileVectors / 2];
  int pairs = 0;
  for (int n = 0; n < c.panels; ++n)
    for (int v = 0; v < c.panel[n].nv; v += 2) {
      const Panel& a = c.panel[n];
      const int64_t lo = min64(a.vec_lo[v], a.vec_lo[v + 1]), hi = max64(a.vec_hi[v], a.vec_hi[v + 1]);
      const int64_t seen = min64(keys, hi - j0);
      if (seen > 0 && lo < j0 + keys) pair[pairs++] = {n, v, seen, ceil_div(seen, kTileStep)};
    }
  if (pairs == 0) return;
  TileQueue queue;
  queue.add(score_products(p, c, pair[0], 0));
  queue.finish();
  for (int i = 0; i < pairs; ++i) {
    const int slot = i % 2;
    if (i > 0 && c.num_bad == 0) queue.add(output_products(p, c, pair[i - 1], 1 - slot));
    if (i + 1 < pairs) queue.add(score_products(p, c, pair[i + 1], 1 - slot));
    weigh_pair(p, c, pair[i], slot, j0, queue);
    queue.finish();
    if (i + 1 < pairs && c.num_bad == 0) continue;
    queue.add(output_products(p, c, pair[i], slot));
    queue.finish();
    add_bad_values(p, c, pair[i], slot, j0);
  }
}

// As store_panel, for whole outputs in bf16: pairs of dims are rounded before they are transposed.
inline void store_tile_outputs(const Problem& p, const Panel& a) {
  for (int v = 0; v * kLanes < a.rows; ++v) {
    const Vec none = vzero();
    const Vec inverse = vselect(veq(a.sum[v], none), none, vdiv(vset(1.0f), a.sum[v]));
    const int lanes = static_cast<int>(min64(kLanes, a.rows - v * kLanes));
    for (int64_t d = 0; d < p.v_dim; d += kTileStep) {
      const float* o = a.ot + v * kColumn + d * kLanes;
      Vec t[kLanes];
      for (int c = 0; c < kLanes; ++c, o += 2 * kLanes)
        t[c].v = _mm512_castsi512_ps(word_pairs(vmul(inverse, vload(o)), vmul(inverse, vload(o + kLanes))));
      vtranspose(t);
      const __mmask32 mask = words_left(p.v_dim - d);
      for (int l = 0; l < lanes; ++l) {
        char* row = row_ptr(*p.out, a.b, a.head[v * kLanes + l], a.pos[v * kLanes + l]);
        _mm512_mask_storeu_epi16(row + d * itemsize(DType::bf16), mask, _mm512_castps_si512(t[l].v));
      }
    }
  }
}

// Chunks in the order of prefill.
inline void prefill_tiles(const Problem& p, const Plan& plan, int64_t chunk, int64_t splits, const Scratch& scratch) {
  TileChunk c;
  const int64_t split = chunk % splits, head = chunk / splits / plan.panels;
  const int64_t row0 = (plan.panels - 1 - chunk / splits % plan.panels) * plan.nv * kLanes;
  const int64_t rows = min64(plan.nv * kLanes, plan.rows - row0);
  c.panels = static_cast<int>(ceil_div(rows, kLd));
  place_scratch(c, scratch.local);
  int64_t lo = p.kv_len, hi = 0;
  for (int n = 0; n < c.panels; ++n) {
    Panel& a = c.panel[n];
    a.b = head / p.kv_heads, a.kv_head = head % p.kv_heads;
    a.row0 = row0 + n * kLd, a.rows = min64(kLd, rows - n * kLd);
    a.nv = 2 * static_cast<int>(ceil_div(a.rows, 2 * kLanes));
    find_ranges(p, a);
    for (int v = 0; v < a.nv; ++v) {
      load_tile_queries(p, a, v, c.queries_of(n, v));
      lo = min64(lo, a.vec_lo[v]), hi = max64(hi, a.vec_hi[v]);
      a.max[v] = vset(kNegInf), a.sum[v] = vzero();
    }
    for (int64_t d = 0; d < ceil_div(p.v_dim, kTileStep) * kTileStep; ++d)
      for (int v = 0; v < a.nv; ++v) vstore(a.ot + v * kColumn + d * kLanes, vzero());
  }
  const int64_t length = max64(0, hi - lo), end = lo + length * (split + 1) / splits;
  const TileScope scope;
  for (int64_t j = lo + length * split / splits; j < end; j += kTileKeys) {
    const int64_t keys = min64(kTileKeys, end - j);
    load_tile_keys(p, c, j, keys);
    load_tile_values(p, c, j, keys);
    attend_tiles(p, c, j, keys);
  }
  for (int n = 0; n < c.panels; ++n)
    if (splits == 1 && p.out->dtype == DType::bf16)
      store_tile_outputs(p, c.panel[n]);
    else
      store_panel(p, plan, c.panel[n], split, splits, scratch.shared);
}

}  // namespace
