// Prefill as 16-bit fixed point (cpu/fixed_point.h), which costs half of FMA: f16 and bf16, and any others where they
// may be rounded to bf16. Queries and keys have a scale per row, values one per dimension in a block of keys, softmax
// weights one per row in a block. Sums of a block, masks and softmax are f32.
//
// As in prefill.h a vector holds one key for kLanes query rows. A chunk is several panels, for which each block of keys
// and values becomes words once.
//
//   queries  [panel][d pairs][kLd][2]
//   keys     [keys][d]
//   weights  [key pairs][kLd][2], where their scores were
//   values   [key pairs][v dims][2]
#pragma once
#include "cpu/attention/prefill.h"
#include "cpu/fixed_point.h"

namespace {

constexpr int64_t kWordKeys = kWordBlock;           // keys per block
constexpr int64_t kWordStep = 2 * kLanes;           // words of a row that make one vector of pairs
constexpr int kWordPanels = kTileVectors / kMaxNv;  // of a chunk
constexpr int64_t kPairLine = kLd * 4;              // bytes of one pair of a panel's rows
static_assert(kTileVectors % kMaxNv == 0 && kWordKeys <= kMostKeys);
constexpr float kLeastScale = 0x1p-100f;  // of queries: nothing, which dead scores may be multiplied with
static_assert((kRowNorm + 0.5 * 23) * (kRowNorm + 0.5 * 23) < double(1u << 31) && 23 * 23 > kMaxHeadDim);

struct WordChunk {
  Panel panel[kWordPanels];
  int panels;
  int64_t dim, v_dim;                    // whole steps, whole vectors
  char *queries, *keys, *values, *rows;  // rows: of queries on their way to lanes
  float *query_scale, *key_scale, *value_scale, *wide;

  int64_t query_bytes() const { return dim / 2 * kPairLine; }  // of a panel
  int64_t key_bytes() const { return dim * 2; }
};

constexpr int64_t word_chunk_bytes(int64_t panels, int64_t dim) {
  return panels * (dim / 2 * kPairLine + kLd * 4 + dim * kLd * 4) +
         kWordKeys * (dim * 2 + 4 + dim * 2 + dim * 4 + kLd * 8) + dim * 4 + kLanes * (dim * 2 + kRowLd * 4);
}
static_assert(word_chunk_bytes(kWordPanels, kMaxHeadDim) <= int64_t(kMostLocalBytes),
              "a chunk of words must fit the local scratch");

inline void place_scratch(WordChunk& c, char* local) {
  char* p = local;
  auto take = [&p](int64_t bytes) {
    char* r = p;
    p += bytes;
    return r;
  };
  auto floats = [&](int64_t n) { return reinterpret_cast<float*>(take(n * 4)); };
  c.queries = take(c.panels * c.query_bytes());
  c.keys = take(kWordKeys * c.key_bytes()), c.rows = take(kLanes * c.key_bytes());
  c.values = take(kWordKeys * c.v_dim * 2);
  c.query_scale = floats(c.panels * kLd), c.key_scale = floats(kWordKeys), c.value_scale = floats(c.v_dim);
  c.wide = floats(kWordKeys * c.v_dim);
  float *st = floats(kWordKeys * kLd), *bias = floats(kWordKeys * kLd), *row = floats(kLanes * kRowLd);
  for (int n = 0; n < c.panels; ++n) {
    Panel& a = c.panel[n];
    a.st = st, a.bias = bias, a.row = row, a.ot = floats(c.v_dim * kLd);
    a.row_ld = kLd, a.vec_ld = kLanes;
  }
}

// kLanes rows at most of n floats, which are whole vectors, as words `to_bytes` apart, with their scales. False if one
// has none.
inline bool make_word_rows(const float* const* rows, int64_t count, int64_t n, char* to, int64_t to_bytes,
                           Vec* scales) {
  Vec squares[kLanes];
  for (int64_t r = 0; r < kLanes; ++r) {
    squares[r] = vzero();
    for (int64_t i = 0; r < count && i < n; i += kLanes)
      squares[r] = vfma(vload(rows[r] + i), vload(rows[r] + i), squares[r]);
  }
  const Vec sums = vsum_lanes(squares);
  const Mask fit = none_or_within(sums, kLeastSquares, kMostSquares), none = veq(sums, vzero());
  if (!all_lanes(fit)) return false;
  alignas(64) float is_none[kLanes], inverse[kLanes];
  vstore(is_none, vselect(none, vset(1), vzero()));
  for (int64_t r = 0; r < count; ++r) {
    if (is_none[r] == 0.0f) continue;
    Vec largest = vzero();  // squares of tiny numbers are zeros too
    for (int64_t i = 0; i < n; i += kLanes) largest = vmax(largest, vabs(vload(rows[r] + i)));
    if (vreduce_max(largest) != 0.0f) return false;
  }
  const Vec length = vsqrt(sums);
  *scales = vmul(length, vset(1 / kRowNorm));
  vstore(inverse, vselect(none, vzero(), vdiv(vset(kRowNorm), length)));
  for (int64_t r = 0; r < count; ++r, to += to_bytes)
    for (int64_t i = 0; i < n; i += kLanes)
      vstore_s16(reinterpret_cast<int16_t*>(to) + i, vmul(vload(rows[r] + i), vset(inverse[r])));
  return true;
}

// Whether rows of n numbers can be read as whole vectors of floats where they lie.
inline bool lies_as_floats(DType dtype, int64_t n, int64_t step) { return dtype == DType::f32 && n % step == 0; }

// The parts of a chunk are functions of their own: inlined into one, they take registers from each other.

// Queries of a panel, rotated; padding lanes are zero.
__attribute__((noinline)) bool load_word_queries(const Problem& p, const WordChunk& c, const Panel& a, int n) {
  const bool in_place = p.rope_kind == kRopeNone && lies_as_floats(p.q->dtype, p.head_dim, kWordStep);
  const Vec scale = vset(score_scale(p));
  char* to = c.queries + n * c.query_bytes();
  for (int v = 0; v < a.nv; ++v) {
    const int64_t lanes = min64(kLanes, a.rows - v * kLanes);
    const float* rows[kLanes];
    for (int64_t l = 0; l < lanes; ++l) {
      const int64_t lane = v * kLanes + l;
      const char* from = row_ptr(*p.q, a.b, a.head[lane], a.pos[lane]);
      rows[l] = reinterpret_cast<const float*>(from);
      if (in_place) continue;
      float* own = a.row + l * kRowLd;
      load_row(p.q->dtype, from, p.head_dim, own);
      rotate(p, a.b, a.pos[lane], own);
      if (c.dim - p.head_dim >= kLanes) vstore(own + c.dim - kLanes, vzero());
      rows[l] = own;
    }
    Vec scales;
    if (!make_word_rows(rows, lanes, c.dim, c.rows, c.key_bytes(), &scales)) return false;
    __builtin_memset(c.rows + lanes * c.key_bytes(), 0, (kLanes - lanes) * c.key_bytes());
    vstore(c.query_scale + n * kLd + v * kLanes, vmax(vmul(scales, scale), vset(kLeastScale)));
    for (int64_t d = 0; d < c.dim; d += kWordStep) {
      Vec t[kLanes];
      for (int l = 0; l < kLanes; ++l) t[l] = vload(reinterpret_cast<float*>(c.rows + l * c.key_bytes() + d * 2));
      vtranspose(t);
      for (int l = 0; l < kLanes; ++l)
        vstore(reinterpret_cast<float*>(to + (d / 2 + l) * kPairLine) + v * kLanes, t[l]);
    }
  }
  return true;
}

// Keys of a block.
__attribute__((noinline)) bool load_word_keys(const Problem& p, const WordChunk& c, int64_t j0, int64_t keys) {
  const Panel& a = c.panel[0];
  const bool in_place = lies_as_floats(p.k->dtype, p.head_dim, kLanes);
  for (int64_t j = 0; j < keys; j += kLanes) {
    const int64_t count = min64(kLanes, keys - j);
    const float* rows[kLanes];
    for (int64_t r = 0; r < count; ++r) {
      const char* from = row_ptr(*p.k, a.b, a.kv_head, j0 + j + r);
      rows[r] = reinterpret_cast<const float*>(from);
      if (in_place) continue;
      load_row(p.k->dtype, from, p.head_dim, a.row + r * kRowLd);
      rows[r] = a.row + r * kRowLd;
    }
    Vec scales;
    const int64_t whole = ceil_div(p.head_dim, kLanes) * kLanes;
    if (!make_word_rows(rows, count, whole, c.keys + j * c.key_bytes(), c.key_bytes(), &scales)) return false;
    vstore(c.key_scale + j, scales);
  }
  return true;
}

// Columns of rows as they lie in memory.
template <DType T>
struct RowColumns {
  const char* at;
  int64_t row_bytes;
  __attribute__((always_inline)) void load(int64_t k, int64_t v, Vec& even, Vec& odd) const {
    even = load_lanes<T>(at + k * row_bytes, v), odd = load_lanes<T>(at + (k + 1) * row_bytes, v);
  }
};

// Values of a block.
__attribute__((noinline)) bool load_word_values(const Problem& p, const WordChunk& c, int64_t j0, int64_t keys) {
  const char* from = row_ptr(*p.v, c.panel[0].b, c.panel[0].kv_head, j0);
  const int64_t row_bytes = p.v->stride[2] * itemsize(p.v->dtype);
  auto make = [&](auto columns, int64_t rows) {
    return make_column_words(columns, c.v_dim, rows, c.values, c.value_scale);
  };
  if (p.v_dim == c.v_dim && keys % 4 == 0) {
    if (p.v->dtype == DType::f32) return make(RowColumns<DType::f32>{from, row_bytes}, keys);
    if (p.v->dtype == DType::f16) return make(RowColumns<DType::f16>{from, row_bytes}, keys);
    if (p.v->dtype == DType::bf16) return make(RowColumns<DType::bf16>{from, row_bytes}, keys);
  }
  for (int64_t j = 0; j < keys; ++j) load_row(p.v->dtype, from + j * row_bytes, p.v_dim, c.wide + j * c.v_dim);
  return make(FloatColumns{c.wide, c.v_dim}, pad_rows(c.wide, c.v_dim, keys));
}

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
#pragma GCC unroll 8
    for (int i = 0; i < MR; ++i)
#pragma GCC unroll 8
      for (int v = 0; v < NV; ++v) acc[i][v] = iset(0);
    for (int64_t d = 0; d < pairs; ++d) {
      IntVec x[NV];
#pragma GCC unroll 8
      for (int v = 0; v < NV; ++v) x[v] = load_pairs(q + d * kPairLine + v * kLanes * 4);
#pragma GCC unroll 8
      for (int i = 0; i < MR; ++i) {
        const IntVec key = all_pairs(key_row + i * k_stride + 4 * d);
#pragma GCC unroll 8
        for (int v = 0; v < NV; ++v) word_dot(acc[i][v], x[v], key);
      }
    }
    each_of_tile<NV, MR>([&](int i, int v) __attribute__((always_inline)) {
      vstore(s + (row + i) * kLd + v * kLanes, vmul(vfrom_int(acc[i][v]), vset(k_scale[row + i])));
    });
  }
};

// o[i][:] = o[i][:] * alpha[:] + v_scale[i] * w_scale[:] * sum over j of value[j][i] * w[j][:].
struct WordValues {
  const char* value;
  int64_t v_stride;  // bytes from pair to pair
  const char* w;
  int64_t pairs;
  const float *v_scale, *w_scale, *alpha;
  float* o;

  template <int NV, int MR>
  __attribute__((noinline)) void tile(int64_t row) const {
    const char* from = value + row * 4;
    IntVec acc[MR][NV];
#pragma GCC unroll 8
    for (int i = 0; i < MR; ++i)
#pragma GCC unroll 8
      for (int v = 0; v < NV; ++v) acc[i][v] = iset(0);
    for (int64_t j = 0; j < pairs; ++j, from += v_stride) {
      IntVec x[NV];
#pragma GCC unroll 8
      for (int v = 0; v < NV; ++v) x[v] = load_pairs(w + j * kPairLine + v * kLanes * 4);
#pragma GCC unroll 8
      for (int i = 0; i < MR; ++i) {
        const IntVec pair = all_pairs(from + 4 * i);
#pragma GCC unroll 8
        for (int v = 0; v < NV; ++v) word_dot(acc[i][v], x[v], pair);
      }
    }
    each_of_tile<NV, MR>([&](int i, int v) __attribute__((always_inline)) {
      float* out = o + (row + i) * kLd + v * kLanes;
      const Vec sum = vmul(vfrom_int(acc[i][v]), vset(v_scale[row + i]));
      vstore(out, vfma(sum, vload(w_scale + v * kLanes), vmul(vload(alpha + v * kLanes), vload(out))));
    });
  }
};

// What is added to a weight before it is rounded, by its key: evenly spread, every few keys. Many weights of less than
// half a word then count as much together as they are; rounded alike, all of them would be nothing.
constexpr int64_t kSpread = 32;
constexpr struct RoundingSpread {
  float of[kSpread];
  constexpr RoundingSpread() : of() {
    for (int j = 0; j < kSpread; ++j) {
      int reversed = 0;
      for (int bit = 0; bit < 5; ++bit) reversed |= (j >> bit & 1) << (4 - bit);
      of[j] = (reversed + 0.5f) / kSpread - 0.5f;
    }
  }
} kRoundingSpread;

// P = exp(factor * S - max), or exp(S - max), of the keys that a vector sees, as words where their scores were, and
// zeros up to `keys`; their sum, of what they are as words, and how much the rows' earlier sums shrink.
template <bool kShiftFirst>
__attribute__((noinline)) void weigh_words(Panel& a, int v, int64_t seen, int64_t keys, Vec factor, Vec new_max,
                                           float* scale, float* alpha) {
  const Vec ninf = vset(kNegInf), log2e = vset(kLog2e);
  const Vec shift = vselect(veq(new_max, ninf), vzero(), new_max);
  const Vec shrink = vexp2_normal(vmul(vsub(a.max[v], shift), log2e));
  const Vec start = vneg(vmul(shift, log2e)), slope = vmul(factor, log2e);
  float* s = a.st + v * kLanes;
  Vec squares = vzero();
  for (int64_t j = 0; j < seen; ++j) {
    const Vec score = vload(s + j * kLd);
    const Vec w = vexp2_rough(kShiftFirst ? vmul(vsub(score, shift), log2e) : vfma(score, slope, start));
    vstore(s + j * kLd, w);
    squares = vfma(w, w, squares);
  }
  if (seen % 2 != 0) vstore(s + seen * kLd, vzero());
  // Less than this is nothing beside the rows' largest weights, which are 1.
  const Vec length = vsqrt(vselect(vlt(squares, vset(kLeastSquares)), vzero(), squares));
  const Vec inverse = vselect(veq(length, vzero()), vzero(), vdiv(vset(kRowNorm), length));
  const Vec unit = vmul(length, vset(1 / kRowNorm));
  IntVec total = iset(0);
  const IntVec ones = iset(0x00010001);
  int64_t j = 0;
  for (; j < seen; j += 2) {
    char* to = reinterpret_cast<char*>(s + j / 2 * kLd);
    const float* spread = kRoundingSpread.of + j % kSpread;
    store_pairs(to, vfma(vload(s + j * kLd), inverse, vset(spread[0])),
                vfma(vload(s + (j + 1) * kLd), inverse, vset(spread[1])));
    word_dot(total, load_pairs(to), ones);
  }
  for (; j < keys; j += 2) vstore(s + j / 2 * kLd, vzero());
  a.sum[v] = vfma(a.sum[v], shrink, vmul(vfrom_int(total), unit));
  a.max[v] = new_max;
  vstore(scale + v * kLanes, unit);
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
    weigh(a, v, seen, keys, factor, new_max, scale, alpha);
  }
  for (int64_t j = 0; j < keys;) {
    const Segment s = next_segment(a, v1, j0, j, keys);
    const int64_t first = s.v0 * kLanes;
    const WordValues values{c.values + j / 2 * c.v_dim * 4,
                            c.v_dim * 4,
                            reinterpret_cast<const char*>(a.st + j / 2 * kLd + first),
                            ceil_div(s.end - j, 2),
                            c.value_scale,
                            scale + first,
                            alpha + first,
                            a.ot + first};
    multiply(v1 - s.v0, values, p.v_dim);
    for (int64_t l = first; l < v1 * kLanes; ++l) alpha[l] = 1.0f;
    j = s.end;
  }
}

// The rows of a chunk; false if a row or a column has no scale: nothing is written then.
inline bool prefill_chunk(const Problem& p, const Plan& plan, const RowChunk& chunk, const Scratch& scratch) {
  WordChunk c;
  c.panels = static_cast<int>(ceil_div(chunk.rows, kLd));
  c.dim = ceil_div(p.head_dim, kWordStep) * kWordStep, c.v_dim = ceil_div(p.v_dim, kLanes) * kLanes;
  place_scratch(c, scratch.local);
  int64_t lo = p.kv_len, hi = 0;
  for (int n = 0; n < c.panels; ++n) {
    Panel& a = c.panel[n];
    start_panel(p, a, chunk, n);
    if (!load_word_queries(p, c, a, n)) return false;
    for (int v = 0; v < a.nv; ++v) lo = min64(lo, a.vec_lo[v]), hi = max64(hi, a.vec_hi[v]);
  }
  const KeySpan span = chunk.keys(lo, hi);
  for (int64_t j = span.begin; j < span.end; j += kWordKeys) {
    const int64_t keys = min64(kWordKeys, span.end - j);
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
