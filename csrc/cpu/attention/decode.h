// Decode: a handful of query rows against a long cache. Each key and value row is read from memory once for all rows
// that share it; scores are dot products along the head dimension, kLanes of them in flight.
#pragma once
#include "cpu/attention/mask.h"
#include "cpu/attention/mirror.h"
#include "cpu/attention/quads.h"

namespace {

constexpr bool kManyRegisters = kVecRegisters == 32;
constexpr int64_t kScoreBlock = kManyRegisters ? 512 : 64;  // most keys between two updates of the running softmax
constexpr int64_t kSharedBlock = 64;                        // the same when heads share a stretch of memory
constexpr int64_t kLargeBlock = 16;                         // the same of keys so large that L2 would not hold more
constexpr int64_t kBlockBytes = kManyRegisters ? 256 << 10 : 64 << 10;  // of keys, beside their values
static_assert(kLargeBlock <= kSharedBlock && kSharedBlock <= kScoreBlock && kScoreBlock % kLanes == 0);
constexpr int64_t kSubBlock = 32;  // keys whose rows stay in L1 while every group of rows uses them
constexpr int64_t kValueBlock = kManyRegisters ? 32 : 16;  // the same of values, which take several tiles a row
constexpr int64_t kScoreLd = kScoreBlock + kLanes;
// A tile of outputs: 4 query rows x kNarrow vectors when that covers a row of values, else kWideRows x kWide, so that a
// row is read from end to end.
constexpr int kNarrow = kVecRegisters / 8, kWide = 2 * kNarrow, kWideRows = kManyRegisters ? 2 : 3;

struct DecodeRow {
  int64_t h, i;
  KeyRange range;
  float max, sum;
};
// One kv head of a chunk; q and o are rows of kMaxHeadDim floats.
struct DecodeHead {
  int64_t b, kv_head, rows;
  float *q, *o;
  CodedQuery* coded;
  DecodeRow row[kLanes];
};

// Rows of keys or values as they lie in memory, and rows that will be needed later, of `later_row` bytes each: reading
// row j fetches row j of those.
struct Stream {
  const char* data;
  int64_t row_bytes;
  const char* later;
  int64_t later_bytes, later_row;
  Stream from(int64_t j) const {
    return {data + j * row_bytes, row_bytes, later + j * later_bytes, later_bytes, later_row};
  }
  Stream again() const { return {data, row_bytes, data, row_bytes, 0}; }  // rows that are in L1 already
};

// Fetches row j of those needed later. Into L2: a fetch into L1 holds one of the core's few miss buffers for as long as
// memory takes, and streams slower than with no fetch at all.
inline __attribute__((always_inline)) void fetch_row(const Stream& s, int64_t j) {
  for (int64_t i = 0; i < s.later_row; i += 64) __builtin_prefetch(s.later + j * s.later_bytes + i, 0, 2);
}

// s[r][j] = q[r] . k[j] for R rows of q (padded with zeros to whole vectors) and `keys` keys.
template <DType T, int R>
void dot_scores(const Stream& k, int64_t keys, const float* q, int64_t depth, float* s) {
  constexpr int kKeys = kLanes / (R == 3 ? 4 : R);  // sums per reduction: R rows x kKeys keys
  const int64_t whole = depth / kLanes * kLanes;
  for (int64_t j = 0; j < keys; j += kKeys) {
    const char* row[kKeys];
#pragma GCC unroll 16
    for (int t = 0; t < kKeys; ++t) {
      row[t] = k.data + min64(j + t, keys - 1) * k.row_bytes;
      fetch_row(k, j + t);
    }
    Vec acc[kLanes];
#pragma GCC unroll 16
    for (int t = 0; t < kLanes; ++t) acc[t] = vzero();
    for (int64_t d = 0; d < whole; d += kLanes) {
      Vec x[R];
#pragma GCC unroll 4
      for (int r = 0; r < R; ++r) x[r] = vload(q + r * kMaxHeadDim + d);
#pragma GCC unroll 16
      for (int t = 0; t < kKeys; ++t) {
        const Vec key = load_lanes<T>(row[t], d);
#pragma GCC unroll 4
        for (int r = 0; r < R; ++r) acc[r * kKeys + t] = vfma(key, x[r], acc[r * kKeys + t]);
      }
    }
    if (whole < depth) {
      const int n = static_cast<int>(depth - whole);
#pragma GCC unroll 16
      for (int t = 0; t < kKeys; ++t) {
        const Vec key = load_tail<T>(row[t], whole, n);
#pragma GCC unroll 4
        for (int r = 0; r < R; ++r)
          acc[r * kKeys + t] = vfma(key, vload(q + r * kMaxHeadDim + whole), acc[r * kKeys + t]);
      }
    }
    alignas(64) float sums[kLanes];
    vstore(sums, vsum_lanes(acc));
    for (int r = 0; r < R; ++r) __builtin_memcpy(s + r * kScoreLd + j, sums + r * kKeys, kKeys * sizeof(float));
  }
}

// o[r][d..] += sum over j of w[r][j] * v[j][d..] for R rows and N vectors; where kTail the last has `lanes` lanes.
template <DType T, int R, int N, bool kTail>
void weigh(const Stream& v, int64_t keys, const float* w, int64_t d, int lanes, float* o) {
  const Stream at = v;  // which the sums could overlap, for all that the compiler knows
  Vec acc[R][N];
#pragma GCC unroll 4
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 8
    for (int c = 0; c < N; ++c) acc[r][c] = vload(o + r * kMaxHeadDim + d + c * kLanes);
  for (int64_t j = 0; j < keys; ++j) {
    const char* row = at.data + j * at.row_bytes;
    fetch_row(at, j);
    Vec weight[R];
#pragma GCC unroll 4
    for (int r = 0; r < R; ++r) weight[r] = vset(w[r * kScoreLd + j]);
#pragma GCC unroll 8
    for (int c = 0; c < N; ++c) {
      const Vec x = kTail && c == N - 1 ? load_tail<T>(row, d + c * kLanes, lanes) : load_lanes<T>(row, d + c * kLanes);
#pragma GCC unroll 4
      for (int r = 0; r < R; ++r) vfma_acc(acc[r][c], weight[r], x);
    }
  }
#pragma GCC unroll 4
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 8
    for (int c = 0; c < N; ++c) vstore(o + r * kMaxHeadDim + d + c * kLanes, acc[r][c]);
}
template <DType T, int R, int N>
void weigh_vectors(int n, const Stream& v, int64_t keys, const float* w, int64_t d, int lanes, float* o) {
  if (n == N) return (lanes < kLanes ? weigh<T, R, N, true> : weigh<T, R, N, false>)(v, keys, w, d, lanes, o);
  if constexpr (N > 1) weigh_vectors<T, R, N - 1>(n, v, keys, w, d, lanes, o);
}

// One to R rows of queries against the same keys.
template <DType T, int R>
void dot_rows(int64_t rows, const Stream& k, int64_t keys, const float* q, int64_t depth, float* s) {
  if (rows >= R) return dot_scores<T, R>(k, keys, q, depth, s);
  if constexpr (R > 1) dot_rows<T, R - 1>(rows, k, keys, q, depth, s);
}
template <DType T, int R, int N>
void weigh_rows(int64_t rows, const Stream& v, int64_t keys, const float* w, int64_t v_dim, float* o) {
  if (rows < R) {
    if constexpr (R > 1) weigh_rows<T, R - 1, N>(rows, v, keys, w, v_dim, o);
    return;
  }
  for (int64_t d = 0; d < v_dim; d += N * kLanes) {
    const int64_t left = min64(N * kLanes, v_dim - d);
    const int n = static_cast<int>(ceil_div(left, kLanes));
    weigh_vectors<T, R, N>(n, d ? v.again() : v, keys, w, d, static_cast<int>(left - (n - 1) * kLanes), o);
  }
}

// All rows against a block of keys, a few keys at a time so that they stay in L1 from one group of rows to the next.
template <DType T>
void dot_block(int64_t rows, const Stream& k, int64_t keys, const float* q, int64_t depth, float* s) {
  for (int64_t j = 0; j < keys; j += kSubBlock)
    for (int64_t r = 0; r < rows; r += 4)
      dot_rows<T, 4>(rows - r, r ? k.from(j).again() : k.from(j), min64(kSubBlock, keys - j), q + r * kMaxHeadDim,
                     depth, s + r * kScoreLd + j);
}
// The same over codes.
inline void dot_codes(int64_t rows, const Stream& k, int64_t keys, const CodedQuery* q, int64_t depth, float* s) {
  constexpr int kRows = kVecRegisters / 8;
  alignas(64) Vec quads[kMaxQuads];
  for (int64_t j = 0; j < keys; j += kLanes) {
    const char* row[kLanes];
    alignas(64) float scale[kLanes];
    for (int l = 0; l < kLanes; ++l) {
      row[l] = k.data + min64(j + l, keys - 1) * k.row_bytes;
      scale[l] = code_scale(row[l], depth);
      fetch_row(k, j + l);
    }
    transpose_rows(row, depth, quads);
    for (int64_t r = 0; r < rows; r += kRows)
      dot_queries<kRows>(rows - r, quads, scale, ceil_div(depth, 4), q + r, s + r * kScoreLd + j, kScoreLd);
  }
}
template <DType T, int R, int N>
void weigh_tiles(int64_t rows, const Stream& v, int64_t keys, const float* w, int64_t v_dim, float* o) {
  for (int64_t j = 0; j < keys; j += kValueBlock)
    for (int64_t r = 0; r < rows; r += R)
      weigh_rows<T, R, N>(rows - r, r ? v.from(j).again() : v.from(j), min64(kValueBlock, keys - j),
                          w + r * kScoreLd + j, v_dim, o + r * kMaxHeadDim);
}
template <DType T>
void weigh_block(int64_t rows, const Stream& v, int64_t keys, const float* w, int64_t v_dim, float* o) {
  if (v_dim <= kNarrow * kLanes) return weigh_tiles<T, 4, kNarrow>(rows, v, keys, w, v_dim, o);
  weigh_tiles<T, kWideRows, kWide>(rows, v, keys, w, v_dim, o);
}

// Softcap, bias and the row's own range on scores of keys [j0, j0 + keys); dead scores and the padding become -inf.
inline void mask_row(const Problem& p, int64_t b, const DecodeRow& row, int64_t j0, int64_t keys, float* s,
                     float* bias) {
  if (p.softcap > 0)
    for (int64_t j = 0; j < keys; j += kLanes) vstore(s + j, vmul(vset(p.softcap), vtanh(vload(s + j))));
  if (row.range.mask != MaskUse::none) {
    load_bias(p, row.range.mask, b, row.h, row.i, j0, keys, bias);
    for (int64_t j = 0; j < keys; j += kLanes) {
      const Vec x = vload(bias + j), dead = vset(kNegInf);
      vstore(s + j, vselect(veq(x, dead), dead, vadd(vload(s + j), x)));
    }
  }
  const int64_t lo = min64(row.range.lo - j0, keys), hi = max64(0, min64(row.range.hi - j0, keys));
  for (int64_t j = 0; j < lo; ++j) s[j] = kNegInf;
  for (int64_t j = hi; j < ceil_div(keys, kLanes) * kLanes; ++j) s[j] = kNegInf;
}

// Scores → weights in place; the row's running max and sum; its earlier output shrinks.
inline void softmax_row(DecodeRow& row, int64_t keys, float* s, int64_t v_dim, float* o) {
  Vec top = vset(row.max);
  for (int64_t j = 0; j < keys; j += kLanes) top = vmax(vload(s + j), top);
  const float new_max = vreduce_max(top);
  const float shift = new_max == kNegInf ? 0.0f : new_max;
  const Vec m = vset(shift), log2e = vset(kLog2e), ninf = vset(kNegInf), minus_zero = vset(-0.0f);
  Vec total = vzero();
  for (int64_t j = 0; j < keys; j += kLanes) {
    const Vec x = vload(s + j);
    const Vec w = vselect(veq(x, ninf), minus_zero, vexp2_normal(vmul(vsub(x, m), log2e)));
    vstore(s + j, w);
    total = vadd(total, w);
  }
  const Vec alpha = vexp2_normal(vmul(vsub(vset(row.max), m), log2e));
  alignas(64) float shrink[kLanes];
  vstore(shrink, alpha);
  row.sum = row.sum * shrink[0] + vreduce_add(total);
  row.max = new_max;
  for (int64_t d = 0; d < v_dim; d += kLanes) vstore(o + d, vmul(vload(o + d), alpha));
}

// Scores or weights of keys whose rows are codes, times the scales of those rows; those of `bad` keys stay.
inline void scale_columns(const Stream& codes, int64_t dim, int64_t keys, int64_t rows, const int32_t* bad,
                          int64_t num_bad, float* s) {
  alignas(64) float scale[kScoreLd];
  for (int64_t j = 0; j < keys; ++j) scale[j] = code_scale(codes.from(j).data, dim);
  for (int64_t j = keys; j % kLanes; ++j) scale[j] = 1.0f;
  for (int64_t n = 0; n < num_bad; ++n) scale[bad[n]] = 1.0f;
  for (int64_t r = 0; r < rows; ++r)
    for (int64_t j = 0; j < keys; j += kLanes)
      vstore(s + r * kScoreLd + j, vmul(vload(s + r * kScoreLd + j), vload(scale + j)));
}

// One key whose value is not finite, for the rows that may see it (a dead key's weight is -0).
inline void add_nonfinite_row(const Problem& p, int64_t rows, const char* value, const float* w, float* o) {
  alignas(64) float x[kMaxHeadDim + kLanes];
  load_row(p.v->dtype, value, p.v_dim, x);
  for (int64_t r = 0; r < rows; ++r) {
    if (1.0f / w[r * kScoreLd] == kNegInf) continue;
    for (int64_t d = 0; d < p.v_dim; d += kLanes) {
      float* at = o + r * kMaxHeadDim + d;
      vstore(at, vfma(vset(w[r * kScoreLd]), vload(x + d), vload(at)));
    }
  }
}

// A block of work: keys [j, j + keys) of some kv heads of a sequence.
struct Block {
  int64_t b, head0, heads, j, keys;
};

// Rows of the n-th head of `now`. They fetch the n-th part of what is read after this block, block `later` of `next`:
// where its heads lie side by side in dense rows, a stretch of that memory, because the hardware follows an unbroken
// stream best; else the same head's rows.
inline Stream stream(const Tensor& t, const Block& now, int64_t n, const Tensor& next, const Block& later) {
  const int64_t item = itemsize(next.dtype), next_bytes = next.stride[2] * item, head_bytes = next.size[3] * item;
  const char* data = row_ptr(t, now.b, now.head0 + n, now.j);
  const int64_t row_bytes = t.stride[2] * itemsize(t.dtype);
  const bool dense = next.stride[1] == next.size[3] && next_bytes == now.heads * head_bytes;
  if (!dense) return {data, row_bytes, row_ptr(next, later.b, later.head0 + n, later.j), next_bytes, head_bytes};
  const char* part = row_ptr(next, later.b, later.head0, later.j) + n * now.keys * head_bytes;
  return {data, row_bytes, part, head_bytes, head_bytes};
}

// Weights of one head's rows over a block of keys. Returns whether a row may not see some of them.
inline bool score_head(const Problem& p, DecodeHead& a, const Stream& k, const Block& now, float* s, float* bias) {
  const auto dot = p.k->dtype == DType::f32   ? &dot_block<DType::f32>
                   : p.k->dtype == DType::f16 ? &dot_block<DType::f16>
                   : p.k->dtype == DType::s8  ? &dot_block<DType::s8>
                                              : &dot_block<DType::bf16>;
  if (p.codes_by_byte)
    dot_codes(a.rows, k, now.keys, a.coded, p.head_dim, s);
  else
    dot(a.rows, k, now.keys, a.q, p.head_dim, s);
  if (p.k->dtype == DType::s8 && !p.codes_by_byte) scale_columns(k, p.head_dim, now.keys, a.rows, nullptr, 0, s);
  bool has_dead = false;
  for (int64_t r = 0; r < a.rows; ++r) {
    const KeyRange& range = a.row[r].range;
    has_dead |= range.mask != MaskUse::none || range.lo > now.j || range.hi < now.j + now.keys;
    mask_row(p, a.b, a.row[r], now.j, now.keys, s + r * kScoreLd, bias);
    softmax_row(a.row[r], now.keys, s + r * kScoreLd, p.v_dim, a.o + r * kMaxHeadDim);
  }
  return has_dead;
}

// Adds the values of a block, times those weights, to one head's rows.
inline void weigh_head(const Problem& p, DecodeHead& a, const Stream& v, const Block& now, bool has_dead, float* s) {
  const auto weigh = p.v->dtype == DType::f32   ? &weigh_block<DType::f32>
                     : p.v->dtype == DType::f16 ? &weigh_block<DType::f16>
                     : p.v->dtype == DType::s8  ? &weigh_block<DType::s8>
                                                : &weigh_block<DType::bf16>;
  int32_t bad[kScoreBlock];
  const int64_t num_bad = has_dead ? find_nonfinite(p.v->dtype, v.data, p.v->stride[2], p.v_dim, now.keys, bad) : 0;
  if (p.v->dtype == DType::s8) scale_columns(v, p.v_dim, now.keys, a.rows, bad, num_bad, s);
  int64_t j = 0;
  for (int64_t n = 0; n < num_bad; j = bad[n++] + 1) {
    weigh(a.rows, v.from(j), bad[n] - j, s + j, p.v_dim, a.o);
    add_nonfinite_row(p, a.rows, v.from(bad[n]).data, s + bad[n], a.o);
  }
  weigh(a.rows, v.from(j), now.keys - j, s + j, p.v_dim, a.o);
}

// The keys of all heads, which fetch their values, then the values, which fetch the keys of block `later`.
inline void decode_block(const Problem& p, DecodeHead* head, const Block& now, const Block& later, float* s,
                         float* bias) {
  constexpr int64_t kHeadScores = kLanes * kScoreLd;
  bool has_dead[kHeadsPerChunk];
  for (int64_t n = 0; n < now.heads; ++n)
    has_dead[n] = score_head(p, head[n], stream(*p.k, now, n, *p.v, now), now, s + n * kHeadScores, bias);
  for (int64_t n = 0; n < now.heads; ++n)
    weigh_head(p, head[n], stream(*p.v, now, n, *p.k, later), now, has_dead[n], s + n * kHeadScores);
}

// Queries of one kv head; grows `live`, the smallest interval with every row's keys.
inline void start_head(const Problem& p, DecodeHead& a, KeyRange& live) {
  for (int64_t r = 0; r < a.rows; ++r) {
    const int64_t h = a.kv_head * p.group + r % p.group, i = r / p.group;
    const KeyRange range = key_range(p, a.b, h, i);
    a.row[r] = {h, i, range, kNegInf, 0.0f};
    if (range.lo < range.hi) live.lo = min64(live.lo, range.lo), live.hi = max64(live.hi, range.hi);
    float *q = a.q + r * kMaxHeadDim, *o = a.o + r * kMaxHeadDim;
    load_query(p, a.b, h, i, q);
    if (p.codes_by_byte) code_query(q, p.head_dim, a.coded[r]);
    for (int64_t d = 0; d < p.v_dim; d += kLanes) vstore(o + d, vzero());
  }
}

inline void finish_head(const Problem& p, const Plan& plan, DecodeHead& a, int64_t split, int64_t splits,
                        char* shared) {
  for (int64_t r = 0; r < a.rows; ++r) {
    float* o = a.o + r * kMaxHeadDim;
    if (splits > 1) {
      float* to = partial(p, plan, shared, a.b, a.kv_head, r, split);
      to[0] = a.row[r].max, to[1] = a.row[r].sum;
      store_row(DType::f32, reinterpret_cast<char*>(to + 2), p.v_dim, o);
      continue;
    }
    const float sum = sum_with_sink(p, a.b, a.row[r].h, a.row[r].i, a.row[r].max, a.row[r].sum);
    const Vec inverse = vset(inverse_sum(p, sum));
    for (int64_t d = 0; d < p.v_dim; d += kLanes) vstore(o + d, vmul(vload(o + d), inverse));
    store_row(p.out->dtype, row_ptr(*p.out, a.b, a.row[r].h, a.row[r].i), p.v_dim, o);
  }
}

// Which part of the work a chunk is: one kv head, or some that lie side by side, and one split of their live keys.
struct DecodeChunk {
  int64_t split, splits, b, head0, heads;
  DecodeChunk(const Problem& p, const Plan& plan, int64_t chunk, int64_t num_splits) {
    const int64_t groups = ceil_div(p.kv_heads, plan.heads);
    split = chunk % num_splits, splits = num_splits, b = chunk / splits / groups;
    head0 = chunk / splits % groups * plan.heads, heads = min64(plan.heads, p.kv_heads - head0);
  }
  // Its keys when [lo, lo + length) live.
  int64_t begin(int64_t lo, int64_t length) const { return lo + length * split / splits; }
  int64_t end(int64_t lo, int64_t length) const { return lo + length * (split + 1) / splits; }
  // Of a block, where the chunk has `keys`: blocks are about even, because each fetches as many rows as it has.
  int64_t block_keys(const Problem& p, int64_t keys) const {
    const int64_t fit = kBlockBytes / max64(1, heads * p.k->size[3] * itemsize(p.k->dtype));
    const int64_t blocks = ceil_div(keys, min64(heads > 1 ? kSharedBlock : kScoreBlock, max64(kLargeBlock, fit)));
    return ceil_div(keys, max64(1, blocks));
  }
  Block first(const Problem& p, int64_t lo, int64_t length) const {
    const int64_t j = begin(lo, length), keys = end(lo, length) - j;
    return {b, head0, heads, j, min64(block_keys(p, keys), keys)};
  }
};

// What was rounded by the chunks of these heads, once all have ended: the slots that any of their rows may see.
inline void note_decoded(const Problem& p, const Plan& plan, const DecodeChunk& chunk) {
  Slots live{p.kv_len, 0};
  for (int64_t head = chunk.head0; head < chunk.head0 + chunk.heads; ++head)
    for (int64_t r = 0; r < plan.rows; ++r) {
      const KeyRange range = key_range(p, chunk.b, head * p.group + r % p.group, r / p.group);
      if (range.lo < range.hi) live.begin = min64(live.begin, range.lo), live.end = max64(live.end, range.hi);
    }
  for (int64_t head = chunk.head0; head < chunk.head0 + chunk.heads; ++head) note_rounded(p, chunk.b, head, live);
}

// New keys and values are written by the split that owns their slots.
inline void decode(const Problem& p, const Plan& plan, int64_t chunk, int64_t splits, int threads,
                   const Scratch& scratch) {
  const DecodeChunk mine(p, plan, chunk, splits);
  const int64_t split = mine.split, b = mine.b, head0 = mine.head0, heads = mine.heads;
  float* s = reinterpret_cast<float*>(scratch.local);
  float* bias = s + kHeadsPerChunk * kLanes * kScoreLd;
  float* rows = bias + kScoreLd;
  CodedQuery* coded = reinterpret_cast<CodedQuery*>(rows + kHeadsPerChunk * 2 * kLanes * kMaxHeadDim + kLanes);
  DecodeHead head[kHeadsPerChunk];
  KeyRange live{p.kv_len, 0, MaskUse::none};
  for (int64_t n = 0; n < heads; ++n) {
    float* q = rows + 2 * n * kLanes * kMaxHeadDim;
    head[n].b = b, head[n].kv_head = head0 + n, head[n].rows = plan.rows;
    head[n].q = q, head[n].o = q + kLanes * kMaxHeadDim, head[n].coded = coded + n * kLanes;
    start_head(p, head[n], live);
  }
  const int64_t length = max64(0, live.hi - live.lo), lo = length ? live.lo : 0;
  const int64_t begin = mine.begin(lo, length), end = mine.end(lo, length);
  for (int64_t n = 0; p.new_len && n < heads; ++n)
    write_new_rows(p, b, head0 + n, 0, p.new_len, split == 0 ? 0 : begin, split == splits - 1 ? p.kv_len : end);
  for (int64_t n = 0; p.k_mirror.codes && n < heads; ++n) round_new_slots(p, b, head0 + n, begin, end);
  // The chunk this thread likely takes next, whose live keys are most often the same. Nothing follows its last one.
  const bool is_last = !is_followed(plan.units * splits, threads, chunk);
  const DecodeChunk next_chunk(p, plan, is_last ? chunk : chunk + 1, splits);
  const int64_t step = mine.block_keys(p, end - begin);
  Block later{};
  for (Block now = mine.first(p, lo, length); now.j < end; now = later) {
    later = {b, head0, heads, now.j + step, min64(step, end - now.j - step)};
    const Block fetched = later.j < end ? later : is_last ? now : next_chunk.first(p, lo, length);
    decode_block(p, head, now, fetched, s, bias);
  }
  for (int64_t n = 0; n < heads; ++n) finish_head(p, plan, head[n], split, splits, scratch.shared);
}
static_assert(sizeof(float) * ((kHeadsPerChunk * kLanes + 1) * kScoreLd + kHeadsPerChunk * 2 * kLanes * kMaxHeadDim +
                               kLanes) +
                      sizeof(CodedQuery) * kHeadsPerChunk * kLanes <=
                  kMostLocalBytes,
              "a decode chunk must fit the local scratch");

}  // namespace
