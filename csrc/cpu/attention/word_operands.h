// What attention as 16-bit fixed point multiplies: queries, keys and values as words, and the memory that a chunk keeps
// them in.
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
// The largest word of a value, and the norm of a row's weights. In a block each value of a dimension may be the largest
// of its key; rounding moves weights by less than 1.
constexpr float kValueWord = 5785, kWeightNorm = 32700;
constexpr double kBlockRoot = 11.32;
static_assert((kValueWord + 0.5) * kBlockRoot * (kWeightNorm + kBlockRoot) < double(1u << 31) &&
              kBlockRoot * kBlockRoot > kWordKeys);
// Scales of the values of a block: smaller ones beside the largest would leave the range of squares.
constexpr float kLeastValueShare = 0x1p-32f, kLeastWeightSquares = 0x1p-120f;

// A dimension of values should come within a 64th of the largest of its key; of less, words keep fewer than 6 bits.
constexpr float kLeastTop = kValueWord / 64;
constexpr int64_t kTellingKeys = 8;

struct WordChunk {
  Panel panel[kWordPanels];
  int panels;
  int64_t dim, v_dim;                    // whole steps, whole vectors
  char *queries, *keys, *values, *rows;  // rows: of queries on their way to lanes
  float *query_scale, *key_scale, *value_scale;
  float value_unit;  // of the scales of a block's values: a power of two

  int64_t query_bytes() const { return dim / 2 * kPairLine; }  // of a panel
  int64_t key_bytes() const { return dim * 2; }
};

constexpr int64_t word_chunk_bytes(int64_t panels, int64_t dim) {
  return panels * (dim / 2 * kPairLine + kLd * 4 + dim * kLd * 4) + kWordKeys * (dim * 2 + 4 + dim * 2 + 4 + kLd * 8) +
         kLanes * (dim * 2 + kRowLd * 4);
}
static_assert(word_chunk_bytes(kWordPanels, kMaxHeadDim) <= int64_t(kMostLocalBytes),
              "a chunk of words must fit the local scratch");

inline void place_scratch(WordChunk& c, char* local) {
  LocalMemory memory{local};
  c.queries = memory.bytes(c.panels * c.query_bytes());
  c.keys = memory.bytes(kWordKeys * c.key_bytes()), c.rows = memory.bytes(kLanes * c.key_bytes());
  c.values = memory.bytes(kWordKeys * c.v_dim * 2);
  c.query_scale = memory.floats(c.panels * kLd), c.key_scale = memory.floats(kWordKeys),
  c.value_scale = memory.floats(kWordKeys);
  float *st = memory.floats(kWordKeys * kLd), *bias = memory.floats(kWordKeys * kLd),
        *row = memory.floats(kLanes * kRowLd);
  for (int n = 0; n < c.panels; ++n) {
    Panel& a = c.panel[n];
    a.st = st, a.bias = bias, a.row = row, a.ot = memory.floats(c.v_dim * kLd);
    a.row_ld = kLd, a.vec_ld = kLanes;
  }
}

// kLanes rows at most of n floats, which are whole vectors, as words `to_bytes` apart, with their scales. False if one
// has none. A norm whose square is zero is no norm: products with such rows are.
inline bool make_word_rows(const float* const* rows, int64_t count, int64_t n, char* to, int64_t to_bytes,
                           Vec* scales) {
  Vec squares[kLanes];
  for (int64_t r = 0; r < kLanes; ++r) {
    squares[r] = vzero();
    for (int64_t i = 0; r < count && i < n; i += kLanes)
      squares[r] = vfma(vload(rows[r] + i), vload(rows[r] + i), squares[r]);
  }
  const Vec sums = vsum_lanes(squares), length = vsqrt(sums);
  if (!all_lanes(none_or_within(sums, kLeastSquares, kMostSquares))) return false;
  *scales = vmul(length, vset(1 / kRowNorm));
  alignas(64) float inverse[kLanes];
  vstore(inverse, vselect(veq(sums, vzero()), vzero(), vdiv(vset(kRowNorm), length)));
  for (int64_t r = 0; r < count; ++r, to += to_bytes)
    for (int64_t i = 0; i < n; i += kLanes)
      vstore_s16(reinterpret_cast<int16_t*>(to) + i, vmul(vload(rows[r] + i), vset(inverse[r])));
  return true;
}

// kLanes rows at most of n values, which are whole vectors, as pairs of neighbouring rows [n][2], with their scales.
// False if one has none.
template <DType T>
bool make_word_pairs(const char* const* rows, int64_t count, int64_t n, char* to, float* scales) {
  Vec most[kLanes];
  for (int64_t r = 0; r < kLanes; ++r) {
    most[r] = vzero();
    for (int64_t i = 0; r < count && i < n; i += kLanes)
      most[r] = vmax_magnitude(most[r], vabs(load_lanes<T>(rows[r], i)));
  }
  vtranspose(most);
  Vec top = most[0];
  for (int r = 1; r < kLanes; ++r) top = vmax_magnitude(top, most[r]);
  if (!all_lanes(none_or_within(top, kLeastValue, kMostValue))) return false;
  vstore(scales, vmul(top, vset(1 / kValueWord)));
  alignas(64) float inverse[kLanes];
  vstore(inverse, vselect(veq(top, vzero()), vzero(), vdiv(vset(kValueWord), top)));
  for (int64_t r = 0; r < count; r += 2) {
    const bool whole = r + 1 < count;
    const char *even = rows[r], *odd = rows[whole ? r + 1 : r];
    const Vec by_even = vset(inverse[r]), by_odd = vset(whole ? inverse[r + 1] : 0.0f);
    for (int64_t i = 0; i < n; i += kLanes, to += 4 * kLanes)
      store_pairs(to, vmul(load_lanes<T>(even, i), by_even), vmul(load_lanes<T>(odd, i), by_odd));
  }
  return true;
}

// Whether rows of n numbers can be read as whole vectors of floats where they lie.
inline bool lies_as_floats(DType dtype, int64_t n, int64_t step) { return dtype == DType::f32 && n % step == 0; }

// The parts of a chunk are functions of their own: inlined into one, they take registers from each other.

// Queries of a panel, rotated; what padding lanes hold does not matter.
__attribute__((noinline)) bool load_word_queries(const Problem& p, const WordChunk& c, int n) {
  const Panel& a = c.panel[n];
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
  const int64_t whole = ceil_div(p.head_dim, kLanes) * kLanes;
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
    if (!make_word_rows(rows, count, whole, c.keys + j * c.key_bytes(), c.key_bytes(), &scales)) return false;
    vstore(c.key_scale + j, scales);
  }
  return true;
}

// Brings the scales of a block's values to a common unit; false if they are too far apart.
inline bool share_unit(WordChunk& c, int64_t keys) {
  Vec most = vzero(), least = vset(__builtin_inff());
  for (int64_t j = 0; j < keys; j += kLanes) {
    const Vec s = vload(c.value_scale + j);
    most = vmax(most, s), least = vmin(least, vselect(veq(s, vzero()), least, s));
  }
  const float largest = vreduce_max(most);
  if (largest == 0.0f) return c.value_unit = 0.0f, true;
  if (vreduce_min(least) < kLeastValueShare * largest) return false;
  uint32_t bits;
  __builtin_memcpy(&bits, &largest, 4);
  bits &= 0x7F800000u;  // the power of two below it
  __builtin_memcpy(&c.value_unit, &bits, 4);
  const Vec inverse = vset(1 / c.value_unit);
  for (int64_t j = 0; j < keys; j += kLanes) vstore(c.value_scale + j, vmul(vload(c.value_scale + j), inverse));
  return true;
}

// Whether words keep enough of each dimension of a block's values: some of its keys have it above kLeastTop, or none
// has anything. Few keys say nothing about that.
__attribute__((noinline)) bool keeps_dims(const Problem& p, const WordChunk& c, int64_t j0, int64_t keys) {
  const Panel& a = c.panel[0];
  for (int64_t d = 0; d < p.v_dim && keys >= kTellingKeys; d += kLanes) {
    IntVec most = iset(0);
    for (int64_t j = 0; j < keys; j += 2) most = most_words(most, load_pairs(c.values + (j / 2 * c.v_dim + d) * 4));
    Vec low = vselect(vlt(larger_word(most), vset(kLeastTop)), vset(1), vzero());
    low = vkeep(low, static_cast<int>(min64(kLanes, p.v_dim - d)));
    if (vreduce_max(low) == 0.0f) continue;
    Vec top = vzero();
    for (int64_t j = 0; j < keys; ++j) {
      load_row(p.v->dtype, row_ptr(*p.v, a.b, a.kv_head, j0 + j), p.v_dim, a.row);
      top = vmax(top, vabs(vmul(low, vload(a.row + d))));
    }
    if (vreduce_max(top) != 0.0f) return false;
  }
  return true;
}

// Values of a block.
__attribute__((noinline)) bool load_word_values(const Problem& p, WordChunk& c, int64_t j0, int64_t keys) {
  const Panel& a = c.panel[0];
  const bool in_place = p.v_dim == c.v_dim && p.v->dtype != DType::s8;
  const auto make = !in_place || p.v->dtype == DType::f32 ? make_word_pairs<DType::f32>
                    : p.v->dtype == DType::f16            ? make_word_pairs<DType::f16>
                                                          : make_word_pairs<DType::bf16>;
  for (int64_t j = 0; j < keys; j += kLanes) {
    const int64_t count = min64(kLanes, keys - j);
    const char* rows[kLanes];
    for (int64_t r = 0; r < count; ++r) {
      rows[r] = row_ptr(*p.v, a.b, a.kv_head, j0 + j + r);
      if (in_place) continue;
      float* own = a.row + r * kRowLd;
      load_row(p.v->dtype, rows[r], p.v_dim, own);
      rows[r] = reinterpret_cast<const char*>(own);
    }
    if (!make(rows, count, c.v_dim, c.values + j * c.v_dim * 2, c.value_scale + j)) return false;
  }
  return keeps_dims(p, c, j0, keys) && share_unit(c, keys);
}

}  // namespace
