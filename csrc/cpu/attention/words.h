// Prefill as 16-bit fixed point (cpu/fixed_point.h), which costs half of FMA: f16 and bf16, and any others where they
// may be rounded to bf16. Each query, key and value has a scale of its own. Those of values go to the softmax weights,
// which then have one scale for each row in a block of keys: what a row gives no weight, or may not see, takes nothing
// from the others, and small values leave the bits to the weights of large ones. Sums of a block, masks and softmax are
// f32. Blocks begin at multiples of their length, so that what shares a scale does not depend on the rows of a chunk.
//
// As in prefill.h a vector holds one key for kLanes query rows. A chunk is several panels, for which each block of keys
// and values becomes words once.
#pragma once
#include "cpu/attention/word_operands.h"

namespace {

inline __attribute__((always_inline)) void add_product(IntVec& sum, IntVec a, IntVec b) { word_dot(sum, a, b); }

// s[i][:] = k_scale[i] * sum over d of k[i][d] * q[d][:].
struct WordScores {
  const char* k;
  int64_t k_stride;  // bytes
  const char* q;
  int64_t pairs;
  const float* k_scale;
  float* s;

  template <int NV, int MR>
  __attribute__((noinline)) void tile(int64_t row) const {
    const char* key_row = k + row * k_stride;
    IntVec acc[MR][NV];
    each_of_tile<NV, MR>([&](int i, int v) __attribute__((always_inline)) { acc[i][v] = iset(0); });
    for (int64_t d = 0; d < pairs; ++d)
      add_products(
          acc, [&](int v) __attribute__((always_inline)) { return load_pairs(q + d * kPairLine + v * kLanes * 4); },
          [&](int i) __attribute__((always_inline)) { return all_pairs(key_row + i * k_stride + 4 * d); });
    each_of_tile<NV, MR>([&](int i, int v) __attribute__((always_inline)) {
      vstore(s + (row + i) * kLd + v * kLanes, vmul(vfrom_int(acc[i][v]), vset(k_scale[row + i])));
    });
  }
};

// o[i][:] = o[i][:] * alpha[:] + w_scale[:] * sum over j of value[j][i] * w[j][:].
struct WordValues {
  const char* value;
  int64_t v_stride;  // bytes from pair to pair
  const char* w;
  int64_t pairs;
  const float *w_scale, *alpha;
  float* o;

  template <int NV, int MR>
  __attribute__((noinline)) void tile(int64_t row) const {
    const char* from = value + row * 4;
    IntVec acc[MR][NV];
    each_of_tile<NV, MR>([&](int i, int v) __attribute__((always_inline)) { acc[i][v] = iset(0); });
    for (int64_t j = 0; j < pairs; ++j, from += v_stride)
      add_products(
          acc, [&](int v) __attribute__((always_inline)) { return load_pairs(w + j * kPairLine + v * kLanes * 4); },
          [&](int i) __attribute__((always_inline)) { return all_pairs(from + 4 * i); });
    each_of_tile<NV, MR>([&](int i, int v) __attribute__((always_inline)) {
      float* out = o + (row + i) * kLd + v * kLanes;
      const Vec old = vmul(vload(alpha + v * kLanes), vload(out));
      vstore(out, vfma(vfrom_int(acc[i][v]), vload(w_scale + v * kLanes), old));
    });
  }
};

// What is added to a weight before it is rounded, by its key: evenly spread, whichever keys one looks at (the multiples
// of the golden ratio, less their whole parts). Many weights of less than half a word then count as much together as
// they are; rounded alike, all of them would be nothing.
constexpr struct RoundingSpread {
  float of[kWordKeys];
  constexpr RoundingSpread() : of() {
    double at = 0;
    for (float& x : of) {
      x = static_cast<float>(at - 0.5) * 0.99f;
      at += 0.6180339887498949;
      if (at >= 1) at -= 1;
    }
  }
} kRoundingSpread;

// Weights P = exp(factor * S - max), or exp(S - max), of the keys [j0, j0 + seen) that a vector sees: their sum, and
// how much the rows' earlier sums shrink. P times the scales of the values become words where their scores were, and
// zeros up to `keys`.
template <bool kShiftFirst>
__attribute__((noinline)) void weigh_words(const WordChunk& c, Panel& a, int v, int64_t j0, int64_t seen, int64_t keys,
                                           Vec factor, Vec new_max, float* scale, float* alpha) {
  const Vec ninf = vset(kNegInf), log2e = vset(kLog2e);
  const Vec shift = vselect(veq(new_max, ninf), vzero(), new_max);
  const Vec shrink = vexp2_normal(vmul(vsub(a.max[v], shift), log2e));
  const Vec start = vneg(vmul(shift, log2e)), slope = vmul(factor, log2e);
  float* s = a.st + v * kLanes;
  Vec squares = vzero(), total = vzero();
  for (int64_t j = 0; j < seen; ++j) {
    const Vec score = vload(s + j * kLd);
    const Vec w = vexp2_rough(kShiftFirst ? vmul(vsub(score, shift), log2e) : vfma(score, slope, start));
    const Vec share = vmul(w, vset(c.value_scale[j]));
    vstore(s + j * kLd, share);
    total = vadd(total, w);
    squares = vfma(share, share, squares);
  }
  if (seen % 2 != 0) vstore(s + seen * kLd, vzero());
  const Vec length = vsqrt(vselect(vlt(squares, vset(kLeastWeightSquares)), vzero(), squares));
  const Vec inverse = vselect(veq(length, vzero()), vzero(), vdiv(vset(kWeightNorm), length));
  int64_t j = 0;
  for (; j < seen; j += 2) {
    const float *spread = kRoundingSpread.of + (j0 + j) % kWordKeys,
                *next = kRoundingSpread.of + (j0 + j + 1) % kWordKeys;
    store_pairs(reinterpret_cast<char*>(s + j / 2 * kLd), vfma(vload(s + j * kLd), inverse, vset(*spread)),
                vfma(vload(s + (j + 1) * kLd), inverse, vset(*next)));
  }
  for (; j < keys; j += 2) vstore(s + j / 2 * kLd, vzero());
  a.sum[v] = vfma(a.sum[v], shrink, total);
  a.max[v] = new_max;
  vstore(scale + v * kLanes, vmul(length, vset(c.value_unit / kWeightNorm)));
  vstore(alpha + v * kLanes, shrink);
}

// One block of keys for panel n.
inline void attend_words(const Problem& p, WordChunk& c, int n, int64_t j0, int64_t keys) {
  Panel& a = c.panel[n];
  int v0 = 0, v1 = a.nv;  // of the vectors that see any of it
  while (v0 < v1 && a.vec_hi[v0] <= j0) ++v0;
  while (v0 < v1 && a.vec_lo[v1 - 1] >= j0 + keys) --v1;
  if (v0 == v1) return;
  for (int64_t j = 0; j < keys;) {
    const Segment s = next_segment(a, v1, j0, j, keys);
    const int64_t first = s.v0 * kLanes;
    const WordScores scores{c.keys + j * c.key_bytes(), c.key_bytes(),   c.queries + n * c.query_bytes() + first * 4,
                            ceil_div(p.head_dim, 2),    c.key_scale + j, a.st + j * kLd + first};
    multiply(v1 - s.v0, scores, s.end - j);
    j = s.end;
  }
  alignas(64) float alpha[kLd], scale[kLd];
  if (a.masked) load_bias_block(p, a, v0, v1, j0, keys);
  for (int v = v0; v < v1; ++v) {
    const int64_t seen = max64(0, min64(keys, a.vec_hi[v] - j0));
    const Vec own = vload(c.query_scale + n * kLd + v * kLanes), factor = adjusts_scores(p, a) ? vset(1.0f) : own;
    const Vec top = finish_scores(p, a, v, j0, seen, own, vset(kNegInf));
    const Vec new_max = vmax(vmul(factor, top), a.max[v]);
    const auto weigh = takes_shift_first(p, a, v, seen, factor, new_max) ? weigh_words<true> : weigh_words<false>;
    weigh(c, a, v, j0, seen, keys, factor, new_max, scale, alpha);
  }
  for (int64_t j = 0; j < keys;) {
    const Segment s = next_segment(a, v1, j0, j, keys);
    const int64_t first = s.v0 * kLanes;
    const WordValues values{c.values + j / 2 * c.v_dim * 4,
                            c.v_dim * 4,
                            reinterpret_cast<const char*>(a.st + j / 2 * kLd + first),
                            ceil_div(s.end - j, 2),
                            scale + first,
                            alpha + first,
                            a.ot + first};
    multiply(v1 - s.v0, values, p.v_dim);
    for (int64_t l = first; l < v1 * kLanes; ++l) alpha[l] = 1.0f;
    j = s.end;
  }
}

// The rows of a chunk; false if words do not stand for some of its numbers: nothing is written then.
inline bool prefill_chunk(const Problem& p, const Plan& plan, const RowChunk& chunk, const Scratch& scratch) {
  WordChunk c;
  c.panels = static_cast<int>(ceil_div(chunk.rows, kLd));
  c.dim = ceil_div(p.head_dim, kWordStep) * kWordStep, c.v_dim = ceil_div(p.v_dim, kLanes) * kLanes;
  place_scratch(c, scratch.local);
  int64_t lo = p.kv_len, hi = 0;
  for (int n = 0; n < c.panels; ++n) {
    Panel& a = c.panel[n];
    start_panel(p, a, chunk, n);
    if (!load_word_queries(p, c, n)) return false;
    for (int v = 0; v < a.nv; ++v) lo = min64(lo, a.vec_lo[v]), hi = max64(hi, a.vec_hi[v]);
  }
  const KeySpan span = chunk.keys(lo, hi);
  for (int64_t j = span.begin, end; j < span.end; j = end) {
    end = min64(span.end, (j / kWordKeys + 1) * kWordKeys);
    const int64_t keys = end - j;
    if (!load_word_keys(p, c, j, keys) || !load_word_values(p, c, j, keys)) return false;
    for (int n = 0; n < c.panels; ++n) attend_words(p, c, n, j, keys);
  }
  for (int n = 0; n < c.panels; ++n) store_panel(p, plan, c.panel[n], chunk.split, chunk.splits, scratch.shared);
  return true;
}

inline void prefill_words(const Problem& p, const Plan& plan, int64_t number, int64_t splits, const Scratch& scratch) {
  const RowChunk chunk(p, plan, number, splits);
  if (!prefill_chunk(p, plan, chunk, scratch)) prefill_panels(p, plan, chunk, scratch);
}

}  // namespace
