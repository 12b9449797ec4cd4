// Prefill on AMX tiles, which multiply bf16: bf16 queries, keys and values as they are, f16 as sums of two such
// numbers, any others rounded where that was asked for (f32 as sums of three took as long as FMA). Sums, masks and
// softmax are f32, weights are split as their operands are.
//
// As in prefill.h a vector holds one key for kLanes query rows: Sᵀ = K Qᵀ, softmax down the keys, Oᵀ = alpha Oᵀ + Vᵀ
// Pᵀ. A chunk is several panels, for which each block of keys and values is brought into tiles once; a panel takes two
// row tiles at a time, so that their scores stay in L1 between the products.
#pragma once
#include "cpu/attention/tile_queue.h"

namespace {

// Weights exp(factor * score - shift), or exp(score - shift), of the scores in a column, as bf16 pairs of each term;
// returns their sum. A lone term is summed as it was rounded: what the weights of a row have in common of their
// roundings then leaves its outputs alone. `pieces` of the waiting products go between every 16 keys.
template <int T, bool kShiftFirst>
__attribute__((noinline)) Vec weigh_column(const float* s, int64_t keys, float factor, Vec shift, char* weights,
                                           TileQueue<T>& queue, int64_t pieces) {
  const Vec log2e = vset(kLog2e), scale = vset(factor * kLog2e), start = vneg(vmul(shift, log2e));
  auto weight = [&](int64_t j) __attribute__((always_inline)) {
    const Vec score = vload(s + j * kLanes);
    const Vec power = kShiftFirst ? vmul(vsub(score, shift), log2e) : vfma(score, scale, start);
    return T == 1 ? vexp2_rough(power) : vexp2_normal(power);
  };
  Vec total = vzero(), other = vzero(), nan = vzero();  // nan: rounding may lose that of a bias
  auto add = [&](Vec even, Vec odd) __attribute__((always_inline)) {
    total = vadd(total, even);
    other = vadd(other, odd);
  };
  for (int64_t j0 = 0; j0 < keys; j0 += 16) {
    for (int64_t n = min64(pieces, queue.left); n > 0; --n) queue.advance();
    for (int64_t j = j0; j < j0 + 16; j += 2, weights += kTileBytes) {
      Vec even = weight(j), odd = weight(j + 1);
      if (T > 1) add(even, odd);
      if (T == 1 && kShiftFirst) nan = vfma(vzero(), vadd(even, odd), nan);
      char* at = weights;
#pragma GCC unroll 2
      for (int n = 0; n + 1 < T; ++n, at += kKeySteps * kTileSize) _mm512_store_si512(at, split_pairs(even, odd));
      _mm512_store_si512(at, round_pairs(even, odd));
      if (T == 1) add(even, odd);
    }
  }
  return vadd(vadd(total, other), nan);
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

inline TileProducts score_products(const TileChunk& c, const TilePair& t, int slot) {
  TileProducts j{};
  j.a = c.keys, j.b = c.queries_of(t.n, t.v);
  j.a_step = c.key_step_bytes(), j.b_step = kTileSize;
  j.a_term = c.dim_steps * j.a_step, j.b_term = c.dim_steps * kTileSize;
  j.a_tile = kTileSize, j.b_tile = c.query_bytes();
  j.a_next = 2 * kTileSize, j.sums = c.scores_of(slot);
  j.steps = c.dim_steps, j.count = t.steps, j.accumulate = false;
  return j;
}
inline TileProducts output_products(const TileChunk& c, const TilePair& t, int slot) {
  TileProducts j{};
  j.a = c.values, j.b = c.weights_of(slot);
  j.a_step = kTileSize, j.b_step = kTileSize;
  j.a_term = c.value_bytes(), j.b_term = kKeySteps * kTileSize;
  j.a_tile = kKeySteps * kTileSize, j.b_tile = c.weight_bytes();
  j.a_next = 2 * kKeySteps * kTileSize, j.sums = c.panel[t.n].ot + t.v * kColumn;
  j.steps = t.steps, j.count = c.value_steps, j.accumulate = true;
  return j;
}

// Keys of a block whose values are not finite: only the rows that may see them take those.
inline void add_bad_values(const Problem& p, const TileChunk& c, const TilePair& t, int slot, int64_t j0) {
  alignas(64) float value[kWideRow];
  const Panel& a = c.panel[t.n];
  for (int64_t n = 0; n < c.num_bad && c.bad[n] < t.keys; ++n) {
    const int64_t j = c.bad[n];
    load_row(p.v->dtype, row_ptr(*p.v, a.b, a.kv_head, j0 + j), p.v_dim, value);
    for (int v = 0; v < 2; ++v) {
      const Mask dead = veq(vload(c.scores_of(slot) + v * kColumn + j * kLanes), vset(kNegInf));
      const char* pairs = c.weights_of(slot) + v * c.weight_bytes() + j / 2 * kTileBytes;
      Vec w = vzero();
      for (int64_t term = 0; term < c.terms; ++term, pairs += kKeySteps * kTileSize) {
        const __m512i words = _mm512_load_si512(pairs);
        w = vadd(w, j % 2 ? odd_words(words) : even_words(words));
      }
      for (int64_t d = 0; d < p.v_dim; ++d) {
        float* o = a.ot + (t.v + v) * kColumn + d * kLanes;
        const Vec old = vload(o);
        vstore(o, vselect(dead, old, vfma(w, vset(value[d]), old)));
      }
    }
  }
}

// Scores of a pair become weights, while the waiting products are computed.
template <int T>
void weigh_pair(const Problem& p, TileChunk& c, const TilePair& t, int slot, int64_t j0, TileQueue<T>& queue) {
  Panel& a = c.panel[t.n];
  a.st = c.scores_of(slot) - t.v * kColumn;
  const float scale = score_scale(p), factor = adjusts_scores(p, a) ? 1.0f : scale;
  const int64_t padded = t.steps * kTileStep, pieces = ceil_div(queue.left, padded / 8);
  if (a.masked) load_bias_block(p, a, t.v, t.v + 2, j0, t.keys);
  for (int v = t.v; v < t.v + 2; ++v) {
    float* s = a.st + v * kColumn;
    const Vec top = finish_scores(p, a, v, j0, t.keys, vset(scale), vset(kNegInf));
    for (int64_t j = t.keys; j < padded; ++j) vstore(s + j * kLanes, vset(kNegInf));

    const Vec new_max = vmax(vmul(vset(factor), top), a.max[v]), ninf = vset(kNegInf);
    const Vec shift = vselect(veq(new_max, ninf), vzero(), new_max);
    const Vec alpha = vexp2_normal(vmul(vsub(a.max[v], shift), vset(kLog2e)));
    char* weights = c.weights_of(slot) + (v - t.v) * c.weight_bytes();
    const auto weigh =
        takes_shift_first(p, a, v, padded, vset(factor), new_max) ? weigh_column<T, true> : weigh_column<T, false>;
    const Vec total = weigh(s, padded, factor, shift, weights, queue, pieces);
    a.sum[v] = vfma(a.sum[v], alpha, total);
    a.max[v] = new_max;
    shrink_outputs(a.ot + v * kColumn, p.v_dim, alpha);
  }
}

// One block of keys for the whole chunk: while a pair's scores become weights, the outputs of the pair before and the
// scores of the next are computed.
template <int T>
void attend_tiles(const Problem& p, TileChunk& c, int64_t j0, int64_t keys) {
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
  TileQueue<T> queue;
  queue.add(score_products(c, pair[0], 0));
  queue.finish();
  for (int i = 0; i < pairs; ++i) {
    const int slot = i % 2;
    if (i > 0 && c.num_bad == 0) queue.add(output_products(c, pair[i - 1], 1 - slot));
    if (i + 1 < pairs) queue.add(score_products(c, pair[i + 1], 1 - slot));
    weigh_pair(p, c, pair[i], slot, j0, queue);
    queue.finish();
    if (i + 1 < pairs && c.num_bad == 0) continue;
    queue.add(output_products(c, pair[i], slot));
    queue.finish();
    add_bad_values(p, c, pair[i], slot, j0);
  }
}

// As store_panel, for whole outputs in bf16: pairs of dims are rounded before they are transposed.
inline void store_tile_outputs(const Problem& p, const Panel& a) {
  for (int v = 0; v * kLanes < a.rows; ++v) {
    const Vec inverse = inverse_sums(p, a, v);
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

// The rows of a chunk [row0, row0 + rows) of one kv head; false if its numbers have no terms: nothing is written then.
template <int T>
bool prefill_chunk(const Problem& p, const Plan& plan, const RowChunk& chunk, const Scratch& scratch) {
  TileChunk c;
  c.panels = static_cast<int>(ceil_div(chunk.rows, kLd));
  c.terms = T, c.dim_steps = ceil_div(p.head_dim, kTileStep), c.value_steps = ceil_div(p.v_dim, kTileStep);
  place_scratch(c, scratch.local);
  int64_t lo = p.kv_len, hi = 0;
  for (int n = 0; n < c.panels; ++n) {
    Panel& a = c.panel[n];
    place_rows(a, chunk, n);
    a.nv = 2 * static_cast<int>(ceil_div(a.rows, 2 * kLanes));
    find_ranges(p, a);
    for (int v = 0; v < a.nv; ++v) {
      if (!load_tile_queries<T>(p, c, a, v, c.queries_of(n, v))) return false;
      lo = min64(lo, a.vec_lo[v]), hi = max64(hi, a.vec_hi[v]);
      a.max[v] = vset(kNegInf), a.sum[v] = vzero();
    }
    for (int64_t d = 0; d < c.value_steps * kTileStep; ++d)
      for (int v = 0; v < a.nv; ++v) vstore(a.ot + v * kColumn + d * kLanes, vzero());
  }
  const KeySpan span = chunk.keys(lo, hi);
  const TileScope scope;
  for (int64_t j = span.begin; j < span.end; j += kTileKeys) {
    const int64_t keys = min64(kTileKeys, span.end - j);
    if (!load_tile_keys<T>(p, c, j, keys)) return false;
    load_tile_values<T>(p, c, j, keys);
    attend_tiles<T>(p, c, j, keys);
  }
  for (int n = 0; n < c.panels; ++n)
    if (chunk.splits == 1 && p.out->dtype == DType::bf16)
      store_tile_outputs(p, c.panel[n]);
    else
      store_panel(p, plan, c.panel[n], chunk.split, chunk.splits, scratch.shared);
  return true;
}

inline void prefill_tiles(const Problem& p, const Plan& plan, int64_t number, int64_t splits, const Scratch& scratch) {
  const RowChunk chunk(p, plan, number, splits);
  const auto run = plan.terms == 1 ? prefill_chunk<1> : prefill_chunk<2>;
  if (run(p, plan, chunk, scratch)) return;
  prefill_panels(p, plan, chunk, scratch);
}

}  // namespace
