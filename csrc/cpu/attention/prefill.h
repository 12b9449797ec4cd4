// Prefill: a panel of query rows walks over its keys block by block with a running softmax.
//   Qᵀ [D][rows] is built once; per block  Sᵀ = K Qᵀ,  mask and softmax down the keys,  Oᵀ = alpha Oᵀ + Vᵀ Pᵀ.
// Everything but K and V lives in the thread's local scratch, so memory does not grow with the sequence.
#pragma once
#include "cpu/attention/mask.h"
#include "cpu/attention/rope.h"
#include "cpu/attention/tile.h"

namespace {

constexpr int64_t kBlock = 96;      // keys per block: a multiple of both tile heights
constexpr int64_t kMostKeys = 128;  // of a block of any kind of prefill
constexpr int64_t kRowLd = (kMaxHeadDim > kBlock ? kMaxHeadDim : kBlock) + kLanes;  // of rows on their way to lanes
constexpr float kFarScore = 0x1p20f;
constexpr int64_t kMinSegment = 16;  // keys worth a tile call of their own on the causal diagonal

struct Panel {
  int64_t b, kv_head, row0, rows;
  int nv;
  float *qt, *ot, *st, *bias, *k_block, *v_block, *row;  // scratch
  int64_t row_ld, vec_ld;                  // floats between rows and vectors of ot and st: as masks see them
  int64_t head[kLd], pos[kLd];             // query row of each lane
  KeyRange range[kLd];                     // its keys; padding lanes see every key
  int64_t vec_lo[kMaxNv], vec_hi[kMaxNv];  // keys that any lane of a vector may see
  int64_t common_lo, common_hi;            // keys that every lane sees
  bool masked;                             // some lane must read the mask
  Vec max[kMaxNv], sum[kMaxNv];
};

// Hands out a thread's scratch.
struct LocalMemory {
  char* at;
  char* bytes(int64_t n) {
    char* r = at;
    at += n;
    return r;
  }
  float* floats(int64_t n) { return reinterpret_cast<float*>(bytes(n * static_cast<int64_t>(sizeof(float)))); }
};

inline void place_scratch(Panel& a, char* local) {
  LocalMemory memory{local};
  a.qt = memory.floats(kMaxHeadDim * kLd), a.ot = memory.floats(kMaxHeadDim * kLd);
  a.st = memory.floats(kBlock * kLd), a.bias = memory.floats(kBlock * kLd);
  a.k_block = memory.floats(kBlock * kMaxHeadDim), a.v_block = memory.floats(kBlock * kMaxHeadDim);
  a.row = memory.floats(kLanes * kRowLd);
  a.row_ld = kLd, a.vec_ld = kLanes;
}
static_assert(sizeof(float) * (kMaxHeadDim * kLd * 2 + kBlock * kLd * 2 + kBlock * kMaxHeadDim * 2 + kLanes * kRowLd) <=
                  kMostLocalBytes,
              "a prefill panel must fit the local scratch");

// Qᵀ, rotated and scaled; padding lanes are zero.
__attribute__((noinline)) void load_queries(const Problem& p, Panel& a) {
  const int64_t dim = ceil_div(p.head_dim, kLanes) * kLanes;
  for (int v = 0; v < a.nv; ++v) {
    for (int l = 0; l < kLanes; ++l) {
      const int lane = v * kLanes + l;
      float* row = a.row + l * kRowLd;
      if (lane < a.rows)
        load_query(p, a.b, a.head[lane], a.pos[lane], row);
      else
        for (int64_t d = 0; d < dim; ++d) row[d] = 0.0f;
    }
    for (int64_t d = 0; d < dim; d += kLanes) {
      Vec t[kLanes];
      for (int l = 0; l < kLanes; ++l) t[l] = vload(a.row + l * kRowLd + d);
      vtranspose(t);
      for (int l = 0; l < kLanes && d + l < p.head_dim; ++l) vstore(a.qt + (d + l) * kLd + v * kLanes, t[l]);
    }
  }
}

__attribute__((noinline)) void find_ranges(const Problem& p, Panel& a) {
  int64_t pos = a.row0 / p.group, g = a.row0 % p.group;
  for (int lane = 0; lane < a.nv * kLanes; ++lane) {
    a.head[lane] = a.kv_head * p.group + g, a.pos[lane] = pos;
    if (++g == p.group) g = 0, ++pos;
  }
  a.common_lo = 0, a.common_hi = p.kv_len, a.masked = false;
  for (int v = 0; v < a.nv; ++v) {
    a.vec_lo[v] = p.kv_len, a.vec_hi[v] = 0;
    for (int lane = v * kLanes; lane < (v + 1) * kLanes; ++lane) {
      KeyRange r{0, p.kv_len, MaskUse::none};
      if (lane < a.rows) r = key_range(p, a.b, a.head[lane], a.pos[lane]);
      KeyRange& to = a.range[lane];
      to.lo = r.lo, to.hi = r.hi, to.mask = r.mask;  // GCC copies a whole one by loads that wait for its stores
      if (lane >= a.rows) continue;
      a.common_lo = max64(a.common_lo, r.lo), a.common_hi = min64(a.common_hi, r.hi);
      a.masked |= r.mask != MaskUse::none;
      if (r.lo >= r.hi) continue;
      a.vec_lo[v] = min64(a.vec_lo[v], r.lo), a.vec_hi[v] = max64(a.vec_hi[v], r.hi);
    }
  }
}

// biasᵀ [keys][rows] of the lanes that read the mask.
inline void load_bias_block(const Problem& p, const Panel& a, int v0, int v1, int64_t j0, int64_t keys) {
  for (int v = v0; v < v1; ++v) {
    for (int l = 0; l < kLanes; ++l) {
      const int lane = v * kLanes + l;
      load_bias(p, a.range[lane].mask, a.b, a.head[lane], a.pos[lane], j0, keys, a.row + l * kRowLd);
    }
    for (int64_t j = 0; j < keys; j += kLanes) {
      Vec t[kLanes];
      const int n = static_cast<int>(min64(kLanes, keys - j));
      for (int l = 0; l < kLanes; ++l) t[l] = vload_n(a.row + l * kRowLd + j, n);
      vtranspose(t);
      for (int l = 0; l < n; ++l) vstore(a.bias + (j + l) * kLd + v * kLanes, t[l]);
    }
  }
}

// Scale (of scores that still want one), softcap, bias and the lanes' own ranges for keys [begin, end) of the block at
// j0; dead scores become -inf. Returns the running max including these.
__attribute__((noinline)) void mask_scores(const Problem& p, const Panel& a, int v, int64_t j0, int64_t begin,
                                           int64_t end, Vec scale, bool ragged, Vec* block_max) {
  alignas(64) float lo[kLanes], hi[kLanes];
  for (int l = 0; l < kLanes; ++l) {  // relative to the block, so that they are exact as floats
    const KeyRange& r = a.range[v * kLanes + l];
    lo[l] = static_cast<float>(max64(-1, min64(kMostKeys, r.lo - j0)));
    hi[l] = static_cast<float>(max64(-1, min64(kMostKeys, r.hi - j0)));
  }
  const Vec first = vload(lo), last = vload(hi), dead = vset(kNegInf), cap = vset(p.softcap);
  Vec top = *block_max;
  for (int64_t j = begin; j < end; ++j) {
    float* at = a.st + j * a.row_ld + v * a.vec_ld;
    Vec s = vmul(scale, vload(at));
    if (p.softcap > 0) s = vmul(cap, vtanh(s));
    if (a.masked) {
      const Vec bias = vload(a.bias + j * kLd + v * kLanes);
      s = vselect(veq(bias, dead), dead, vadd(s, bias));
    }
    if (ragged) {
      const Vec key = vset(static_cast<float>(j));
      s = vselect(vle(first, key), vselect(vlt(key, last), s, dead), dead);
    }
    vstore(at, s);
    top = vmax(s, top);
  }
  *block_max = top;
}

// The largest of keys [begin, end) in a column of scores that lie `stride` floats apart, or `top`.
inline Vec column_max(const float* s, int64_t stride, int64_t begin, int64_t end, Vec top) {
  Vec other = top;
  int64_t j = begin;
  for (; j + 1 < end; j += 2) {
    top = vmax(vload(s + j * stride), top);
    other = vmax(vload(s + (j + 1) * stride), other);
  }
  if (j < end) top = vmax(vload(s + j * stride), top);
  return vmax(other, top);
}

// Whether scores get biases or a softcap, before which they are scaled.
inline bool adjusts_scores(const Problem& p, const Panel& a) { return a.masked || p.softcap > 0; }

// A block's scores of one vector, ready for the softmax: scaled where they are adjusted at all, dead ones -inf. Returns
// their largest, or `top`.
inline Vec finish_scores(const Problem& p, const Panel& a, int v, int64_t j0, int64_t keys, Vec scale, Vec top) {
  const int64_t clean0 = min64(keys, max64(0, a.common_lo - j0));
  const int64_t clean1 = min64(keys, max64(clean0, a.common_hi - j0));
  if (adjusts_scores(p, a)) {
    mask_scores(p, a, v, j0, 0, keys, scale, clean0 > 0 || clean1 < keys, &top);
    return top;
  }
  if (clean0 > 0) mask_scores(p, a, v, j0, 0, clean0, vset(1.0f), true, &top);
  top = column_max(a.st + v * a.vec_ld, a.row_ld, clean0, clean1, top);
  if (clean1 < keys) mask_scores(p, a, v, j0, clean1, keys, vset(1.0f), true, &top);
  return top;
}

// Weights exp(factor * score - max) are FMAs and powers, but not where another rounding of the max would make the
// largest infinite: there the max is taken from scores as they were compared, which are multiplied with their factor
// now if they are not adjusted. (A bias may be finfo.min.) Returns whether this is such a place.
inline bool takes_shift_first(const Problem& p, const Panel& a, int v, int64_t keys, Vec factor, Vec max) {
  if (adjusts_scores(p, a)) return true;
  const Vec far = vselect(vle(vabs(max), vset(kFarScore)), vzero(), vset(1.0f));
  if (vreduce_max(vselect(veq(max, vset(kNegInf)), vzero(), far)) == 0.0f) return false;
  for (int64_t j = 0; j < keys; ++j) {
    float* at = a.st + j * a.row_ld + v * a.vec_ld;
    vstore(at, vmul(factor, vload(at)));
  }
  return true;
}

// P = exp(S - max) in place, its sum, and how much the rows' earlier sums shrink. A dead key's weight is stored as -0,
// which adds nothing and tells it from a live key whose weight underflowed.
__attribute__((noinline)) void exponentiate(Panel& a, int v, int64_t keys, bool has_dead, Vec new_max, float* alpha) {
  const Vec ninf = vset(kNegInf), minus_zero = vset(-0.0f), log2e = vset(kLog2e);
  const Vec shift = vselect(veq(new_max, ninf), vzero(), new_max);
  const Vec shrink = vexp2_normal(vmul(vsub(a.max[v], shift), log2e));
  Vec total = vzero();
  float* at = a.st + v * kLanes;
  if (has_dead) {
    for (int64_t j = 0; j < keys; ++j, at += kLd) {
      const Vec s = vload(at);
      const Vec w = vselect(veq(s, ninf), minus_zero, vexp2_normal(vmul(vsub(s, shift), log2e)));
      vstore(at, w);
      total = vadd(total, w);
    }
  } else {
    for (int64_t j = 0; j < keys; ++j, at += kLd) {
      const Vec w = vexp2_normal(vmul(vsub(vload(at), shift), log2e));
      vstore(at, w);
      total = vadd(total, w);
    }
  }
  a.sum[v] = vfma(a.sum[v], shrink, total);
  a.max[v] = new_max;
  vstore(alpha + v * kLanes, shrink);
}

// O += P V for one key whose value is not finite: only the lanes that may see the key take it.
inline void add_nonfinite(const Problem& p, const Panel& a, int v0, int v1, const float* value, int64_t j) {
  for (int v = v0; v < v1; ++v) {
    const Vec w = vload(a.st + j * kLd + v * kLanes);
    const Mask dead = veq(vdiv(vset(1.0f), w), vset(kNegInf));  // 1 / -0
    for (int64_t d = 0; d < p.v_dim; ++d) {
      float* o = a.ot + d * kLd + v * kLanes;
      const Vec old = vload(o);
      vstore(o, vselect(dead, old, vfma(w, vset(value[d]), old)));
    }
  }
}

// Keys [j0, j0 + keys) that only vectors v0.. may see, pairs of keys together; v1 is the end for the whole block.
struct Segment {
  int64_t begin, end;
  int v0;
};
inline Segment next_segment(const Panel& a, int v1, int64_t block0, int64_t begin, int64_t keys) {
  int v0 = 0;
  while (v0 + 1 < v1 && a.vec_hi[v0] <= block0 + begin) ++v0;
  int64_t end = keys;
  if (v0 + 1 < v1) end = min64(keys, max64(ceil_div(a.vec_hi[v0] - block0, 2) * 2, begin + kMinSegment));
  return {begin, end, v0};
}

// One block of keys for the whole panel.
inline void attend_block(const Problem& p, Panel& a, int64_t j0, int64_t keys) {
  const bool has_dead = a.masked || j0 < a.common_lo || j0 + keys > a.common_hi;
  int v1 = a.nv;
  while (v1 > 1 && a.vec_lo[v1 - 1] >= j0 + keys) --v1;

  const float* k = reinterpret_cast<const float*>(row_ptr(*p.k, a.b, a.kv_head, j0));
  int64_t k_stride = p.k->stride[2];
  if (p.k->dtype != DType::f32) {
    for (int64_t j = 0; j < keys; ++j)
      load_row(p.k->dtype, row_ptr(*p.k, a.b, a.kv_head, j0 + j), p.head_dim, a.k_block + j * p.head_dim);
    k = a.k_block, k_stride = p.head_dim;
  }
  int v0 = 0;  // vectors before v0 see nothing of this block
  for (int64_t j = 0; j < keys;) {
    const Segment s = next_segment(a, v1, j0, j, keys);
    if (j == 0) v0 = s.v0;
    const Scores scores{k + j * k_stride, k_stride, a.qt + s.v0 * kLanes, p.head_dim, a.st + j * kLd + s.v0 * kLanes};
    multiply(v1 - s.v0, scores, s.end - j);
    j = s.end;
  }

  alignas(64) float alpha[kLd];
  if (a.masked) load_bias_block(p, a, v0, v1, j0, keys);
  for (int v = v0; v < v1; ++v) {
    const int64_t seen = max64(0, min64(keys, a.vec_hi[v] - j0));
    const Vec top = finish_scores(p, a, v, j0, seen, vset(1.0f), a.max[v]);
    exponentiate(a, v, seen, has_dead, top, alpha);
    for (int64_t j = seen; j < keys; ++j) vstore(a.st + j * kLd + v * kLanes, vset(-0.0f));
  }

  const char* v_base = row_ptr(*p.v, a.b, a.kv_head, j0);
  const float* value = reinterpret_cast<const float*>(v_base);
  int64_t v_stride = p.v->stride[2];
  if (p.v->dtype != DType::f32) {
    for (int64_t j = 0; j < keys; ++j)
      load_row(p.v->dtype, v_base + j * v_stride * itemsize(p.v->dtype), p.v_dim, a.v_block + j * p.v_dim);
    value = a.v_block, v_stride = p.v_dim;
  }
  int32_t bad[kBlock];
  int64_t num_bad = 0, next_bad = 0;
  if (has_dead)
    num_bad = find_nonfinite(DType::f32, reinterpret_cast<const char*>(value), v_stride, p.v_dim, keys, bad);
  for (int64_t j = 0; j < keys;) {
    Segment s = next_segment(a, v1, j0, j, keys);
    if (next_bad < num_bad) s.end = min64(s.end, bad[next_bad]);
    const int64_t first = s.v0 * kLanes;
    const Values values{value + j * v_stride, v_stride, a.st + j * kLd + first, s.end - j, alpha + first, a.ot + first};
    multiply(v1 - s.v0, values, p.v_dim);
    for (int l = s.v0 * kLanes; l < v1 * kLanes; ++l) alpha[l] = 1.0f;
    j = s.end;
    if (next_bad < num_bad && j == bad[next_bad]) {
      add_nonfinite(p, a, v0, v1, value + j * v_stride, j);
      ++next_bad, ++j;
    }
  }
}

// As inverse_sum, of kLanes rows that have seen all their keys, the weights of their sinks in their sums.
inline Vec inverse_sums(const Problem& p, const Panel& a, int v) {
  Vec sum = a.sum[v];
  if (p.sinks) {
    alignas(64) float sink[kLanes];
    for (int l = 0; l < kLanes; ++l) {
      const int lane = v * kLanes + l;
      sink[l] = lane < a.rows ? row_sink(p, a.b, a.head[lane], a.pos[lane]) : kNegInf;
    }
    sum = vadd(sum, sink_weight(vload(sink), a.max[v]));
  }
  return vselect(veq(sum, vzero()), vset(p.no_keys), vdiv(vset(1.0f), sum));
}

// O of kLanes rows at once: back to rows, divided by the sums.
__attribute__((noinline)) void store_panel(const Problem& p, const Plan& plan, Panel& a, int64_t split, int64_t splits,
                                           char* shared) {
  for (int v = 0; v < a.nv; ++v) {
    alignas(64) float max[kLanes], sum[kLanes];
    vstore(max, a.max[v]);
    vstore(sum, a.sum[v]);
    const Vec inverse = splits > 1 ? vset(1.0f) : inverse_sums(p, a, v);
    const int lanes = static_cast<int>(min64(kLanes, a.rows - v * kLanes));
    char* row[kLanes];
    for (int l = 0; l < lanes; ++l) {
      const int lane = v * kLanes + l;
      if (splits > 1)
        row[l] = reinterpret_cast<char*>(partial(p, plan, shared, a.b, a.kv_head, a.row0 + lane, split) + 2);
      else
        row[l] = row_ptr(*p.out, a.b, a.head[lane], a.pos[lane]);
    }
    const DType dtype = splits > 1 ? DType::f32 : p.out->dtype;
    for (int64_t d = 0; d < p.v_dim; d += kLanes) {
      const int n = static_cast<int>(min64(kLanes, p.v_dim - d));
      Vec t[kLanes];
      for (int c = 0; c < kLanes; ++c)
        t[c] = c < n ? vmul(inverse, vload(a.ot + (d + c) * a.row_ld + v * a.vec_ld)) : vzero();
      vtranspose(t);
      for (int l = 0; l < lanes; ++l) vstore_as(dtype, row[l], d, t[l], n);
    }
    for (int l = 0; splits > 1 && l < lanes; ++l) {
      float* to = reinterpret_cast<float*>(row[l]) - 2;
      to[0] = max[l], to[1] = sum[l];
    }
  }
}

struct KeySpan {
  int64_t begin, end;
};

// Rows of one kv head and the part of their keys that one chunk of work takes. Chunks run over splits fastest, then
// panels from the last (under a causal mask the longest), then heads: the chunks in flight share a head's keys, and the
// shortest come at the end.
struct RowChunk {
  int64_t b, kv_head, row0, rows, split, splits;

  RowChunk(const Problem& p, const Plan& plan, int64_t number, int64_t splits_) : splits(splits_) {
    const int64_t head = number / splits / plan.panels;
    split = number % splits;
    row0 = (plan.panels - 1 - number / splits % plan.panels) * plan.nv * kLanes;
    b = head / p.kv_heads, kv_head = head % p.kv_heads;
    rows = min64(plan.nv * kLanes, plan.rows - row0);
  }
  // Of keys [lo, hi) that its rows may see, those of its split.
  KeySpan keys(int64_t lo, int64_t hi) const {
    const int64_t length = max64(0, hi - lo);
    return {lo + length * split / splits, lo + length * (split + 1) / splits};
  }
};

// Panel n of a chunk.
inline void place_rows(Panel& a, const RowChunk& chunk, int n) {
  a.b = chunk.b, a.kv_head = chunk.kv_head;
  a.row0 = chunk.row0 + n * kLd, a.rows = min64(kLd, chunk.rows - n * kLd);
}

// The same, before any key.
inline void start_panel(const Problem& p, Panel& a, const RowChunk& chunk, int n) {
  place_rows(a, chunk, n);
  a.nv = static_cast<int>(ceil_div(a.rows, kLanes));
  find_ranges(p, a);
  for (int v = 0; v < a.nv; ++v) a.max[v] = vset(kNegInf), a.sum[v] = vzero();
  for (int64_t d = 0; d < p.v_dim; ++d)
    for (int v = 0; v < a.nv; ++v) vstore(a.ot + d * a.row_ld + v * a.vec_ld, vzero());
}

// A chunk's rows by FMA.
inline void prefill_panels(const Problem& p, const Plan& plan, const RowChunk& chunk, const Scratch& scratch) {
  Panel a;
  place_scratch(a, scratch.local);
  for (int n = 0; n * kLd < chunk.rows; ++n) {
    start_panel(p, a, chunk, n);
    load_queries(p, a);
    int64_t lo = p.kv_len, hi = 0;
    for (int v = 0; v < a.nv; ++v) lo = min64(lo, a.vec_lo[v]), hi = max64(hi, a.vec_hi[v]);
    const KeySpan span = chunk.keys(lo, hi);
    for (int64_t j = span.begin; j < span.end; j += kBlock) attend_block(p, a, j, min64(kBlock, span.end - j));
    store_panel(p, plan, a, chunk.split, chunk.splits, scratch.shared);
  }
}

}  // namespace
