// What an attention step asks for, which keys each query row may see, and how the work is cut into chunks.
#pragma once
#include "cpu/family.h"
#include "runtime/contracts.h"

namespace {

constexpr float kLog2e = 1.44269504f;
constexpr float kNegInf = -__builtin_inff();

constexpr int kMaxNv = kVecRegisters == 32 ? 4 : 2;  // vectors of query rows in one prefill panel
constexpr int kLd = kMaxNv * kLanes;                 // floats per row of every transposed panel
constexpr int64_t kMinSplitKeys = 128;               // fewer keys cost less than handing them to another thread
constexpr int64_t kLongSplitKeys = 8192;             // of decode: more are worth cutting for the sake of uneven cores
constexpr int64_t kHeadsPerChunk = 8;                // of kv heads whose rows lie side by side in memory
constexpr int64_t kTileDecodeRows = 8;               // more rows of several queries are worth tiles
constexpr int64_t kRoundedTileRows = 31;             // of operands that are rounded first
constexpr int64_t kSplitTileRows = 63;               // of operands that are split into terms
constexpr int64_t kFloatRows = 39, kFloatKeys = 31;  // more are worth making words of keys
constexpr int kTileVectors = 16;                     // vectors of query rows in one chunk of several panels
#ifdef __AMX_TILE__
constexpr bool kHasTiles = true, kHasWords = false;
#else
constexpr bool kHasTiles = false;
#ifdef LLMOPT_ISA_WORDS
constexpr bool kHasWords = true;
#else
constexpr bool kHasWords = false;
#endif
#endif

// Codes kept beside keys or values of floats, and which of them are up to date (attention/mirror.h).
struct Mirror {
  const Tensor *codes, *state;  // nullptr: none is kept
};

struct Problem {
  const Tensor *q, *k, *v, *out, *mask, *bounds, *cos, *sin, *k_new, *v_new, *positions, *sinks;  // nullptr: not given
  const Tensor *k_cache, *v_cache;  // what new rows are written to: k and v, or the floats where those are a mirror's
  Mirror k_mirror, v_mirror;
  int64_t batch, heads, kv_heads, group, q_len, kv_len, head_dim, v_dim, new_len;
  bool is_causal, codes_by_byte;  // byte products give the scores of keys that are codes
  bool bf16_products;             // products of several queries may round what they multiply to bf16
  int64_t causal_offset, window, rope_kind;
  float scale, softcap;
  float no_keys;  // the output of a row without keys
};

// Byte address of row (b, h, i) of a 4-d operand; dimensions of size 1 broadcast.
inline int64_t row_index(const Tensor& t, int64_t b, int64_t h, int64_t i) {
  return (t.size[0] == 1 ? 0 : b * t.stride[0]) + (t.size[1] == 1 ? 0 : h * t.stride[1]) +
         (t.size[2] == 1 ? 0 : i * t.stride[2]);
}
inline char* row_ptr(const Tensor& t, int64_t b, int64_t h, int64_t i) {
  return t.data + row_index(t, b, h, i) * itemsize(t.dtype);
}

// How a row reads its mask: not at all; holes are dead keys; or every bias is a number to add (a row of a float mask in
// which no key is live: softmax over whatever fp32 gives).
enum class MaskUse { none, holes, bias };

struct KeyRange {
  int64_t lo, hi;  // no key outside [lo, hi) is allowed
  MaskUse mask;
};

// A bias at or below this is how models write "not allowed" in a float mask of this dtype.
inline float dead_bias(DType d) { return d == DType::f16 ? -65504.0f : -1e30f; }
inline bool is_bool(DType d) { return d == DType::b8 || d == DType::u8; }

inline KeyRange key_range(const Problem& p, int64_t b, int64_t h, int64_t i) {
  KeyRange r{0, p.kv_len, MaskUse::none};
  if (p.bounds) {
    const Tensor& t = *p.bounds;
    const int32_t* row = reinterpret_cast<const int32_t*>(row_ptr(t, b, h, i));
    r.lo = row[0], r.hi = row[t.stride[3]];
    if (p.mask && !row[2 * t.stride[3]]) r.mask = MaskUse::holes;
  }
  if (r.mask == MaskUse::holes && !is_bool(p.mask->dtype)) {
    const int64_t first = row_index(*p.mask, b, h, i) + r.lo * p.mask->stride[3];
    if (load_scalar(p.mask->dtype, p.mask->data, first) <= dead_bias(p.mask->dtype)) r.mask = MaskUse::bias;
  }
  if (p.is_causal) r.hi = min64(r.hi, i + p.causal_offset + 1);
  if (p.window > 0) r.lo = max64(r.lo, i + p.causal_offset - p.window + 1);
  r.hi = max64(r.lo, r.hi);
  return r;
}

// What sinks add to sums of weights that are relative to `max`. Where a sink outweighs all keys beyond f32's range the
// sum is infinite, which makes the output zero, as it is where there is no key.
inline Vec sink_weight(Vec sink, Vec max) { return vexp2(vmul(vsub(sink, max), vset(kLog2e))); }
inline float row_sink(const Problem& p, int64_t b, int64_t h, int64_t i) {
  return load_scalar(p.sinks->dtype, p.sinks->data, row_index(*p.sinks, b, h, i));
}
inline float sum_with_sink(const Problem& p, int64_t b, int64_t h, int64_t i, float max, float sum) {
  if (!p.sinks) return sum;
  alignas(64) float weight[kLanes];
  vstore(weight, sink_weight(vset(row_sink(p, b, h, i)), vset(max)));
  return sum + weight[0];
}

// What the weighted sums of a row's values are multiplied with.
inline float inverse_sum(const Problem& p, float sum) { return sum == 0.0f ? p.no_keys : 1.0f / sum; }

// How the work is cut. Rows of one kv head are stacked as i * group + g, so that the heads of a group share every key.
struct Plan {
  bool decode;                // few rows: dot products along the head dimension; else panels of rows in vector lanes
  int terms;                  // of numbers that prefill by attention/tiles.h multiplies; 0: not by tiles
  bool words;                 // prefill by attention/words.h
  bool write_first;           // new keys and values get a phase of their own; decode writes them in its chunks
  int nv;                     // vectors of rows in one chunk of prefill
  int64_t rows, panels;       // of one kv head: rows, and chunks that they make
  int64_t heads;              // kv heads of one chunk
  int64_t units, max_splits;  // chunks of a phase without splits; most splits of the keys
  int64_t even_splits;        // fewest that give all threads as many chunks
};

// Whether q, k and v are of these dtypes.
inline bool all_of(const Problem& p, DType a, DType b) {
  return (p.q->dtype == a || p.q->dtype == b) && (p.k->dtype == a || p.k->dtype == b) &&
         (p.v->dtype == a || p.v->dtype == b);
}

// bf16 numbers that the widest operand is the sum of when tiles multiply it; 0: they do not.
inline int tile_terms(const Problem& p) {
  // Scores are scaled behind the products, where their largest must stay the largest.
  if (!kHasTiles || p.head_dim == 0 || p.v_dim == 0 || !(p.scale > 0.0f)) return 0;
  if (p.bf16_products && p.q_len > 1) return 1;
  return all_of(p, DType::bf16, DType::bf16) ? 1 : all_of(p, DType::f16, DType::bf16) ? 2 : 0;
}

// Whether words may stand for the operands.
inline bool may_be_words(const Problem& p) {
  if (!kHasWords || p.head_dim == 0 || p.v_dim == 0 || !(p.scale > 0.0f)) return false;
  return (p.bf16_products && p.q_len > 1) || all_of(p, DType::f16, DType::bf16);
}

// More rows than these are worth the preparation of tiles.
inline int64_t most_rows_without_tiles(const Problem& p, int terms) {
  if (terms == 0) return INT64_MAX;
  if (terms == 2) return kSplitTileRows;
  if (!all_of(p, DType::bf16, DType::bf16)) return kRoundedTileRows;
  return p.q_len > 1 ? kTileDecodeRows : kLanes;
}

// Few enough to be decoded: read with dot products along the head dimension.
inline bool few_rows(const Problem& p) {
  return p.q_len * p.group <= min64(kLanes, most_rows_without_tiles(p, tile_terms(p)));
}

inline Problem parse(const Step& s) {
  auto given = [&](int n) { return n < s.num_tensors && s.t[n].data ? &s.t[n] : nullptr; };
  Problem p{};
  p.q = &s.t[0], p.k = &s.t[1], p.v = &s.t[2], p.out = &s.t[3];
  p.mask = given(4), p.bounds = given(5), p.cos = given(6), p.sin = given(7);
  const bool write_kv = s.i[4] != 0;
  p.k_new = write_kv ? given(8) : nullptr;
  p.v_new = write_kv ? given(9) : nullptr;
  p.positions = given(10);
  p.k_cache = p.k, p.v_cache = p.v;
  p.k_mirror = {given(11), given(12)}, p.v_mirror = {given(13), given(14)};
  p.sinks = given(15);
  p.batch = p.q->size[0], p.heads = p.q->size[1], p.q_len = p.q->size[2], p.head_dim = p.q->size[3];
  p.kv_heads = p.k->size[1], p.kv_len = p.k->size[2], p.v_dim = head_size(*p.v);
  p.group = p.kv_heads ? p.heads / p.kv_heads : 1;
  p.new_len = p.k_new ? p.k_new->size[2] : p.v_new ? p.v_new->size[2] : 0;
  p.is_causal = s.i[0] != 0, p.causal_offset = s.i[1], p.window = s.i[2], p.bf16_products = s.i[5] != 0;
  p.rope_kind = p.cos && p.sin ? s.i[3] : kRopeNone;
  p.scale = s.f[0], p.softcap = s.f[1];
  p.no_keys = s.i[6] && p.kv_len > 0 ? __builtin_nanf("") : 0.0f;
  if (p.k_mirror.codes && few_rows(p)) p.k = p.k_mirror.codes, p.v = p.v_mirror.codes;
  p.codes_by_byte = kMultipliesBytes && p.k->dtype == DType::s8;
  return p;
}

inline Plan make_plan(const Problem& p, int threads) {
  Plan plan{};
  plan.rows = p.q_len * p.group;
  const int terms = tile_terms(p);
  plan.decode = few_rows(p);
  plan.write_first = (p.k_new || p.v_new) && !plan.decode;
  plan.terms = plan.rows > most_rows_without_tiles(p, terms) ? terms : 0;
  plan.words = plan.rows > kFloatRows && p.kv_len > kFloatKeys && may_be_words(p);
  const bool shared = plan.terms > 0 || plan.words;  // blocks of keys, by the panels of a chunk
  plan.nv = shared ? kTileVectors : kMaxNv;
  plan.heads = 1;
  // With [B,S,H,D] memory a chunk takes neighbouring heads together, so that it reads whole stretches of memory.
  if (plan.decode && p.k->stride[1] < p.k->stride[2]) plan.heads = max64(1, min64(p.kv_heads, kHeadsPerChunk));
  const int64_t head_groups = p.batch * ceil_div(p.kv_heads, plan.heads);
  const int least = shared ? kMaxNv : 1, step = least, chunks = (shared ? 4 : 2) * threads;
  if (!plan.decode)
    while (plan.nv > least && head_groups * ceil_div(plan.rows, plan.nv * kLanes) < chunks) plan.nv -= step;
  plan.panels = plan.decode ? 1 : ceil_div(plan.rows, plan.nv * kLanes);
  plan.units = head_groups * plan.panels;
  const int64_t wanted = threads > 1 ? 4 * threads : 1, per = max64(1, plan.units);
  // The parts of a chunk's keys are those of each of its panels only where it is one panel: any of them may leave
  // tiles or words.
  const bool whole = per >= min64(wanted, kCounters) || plan.nv > kMaxNv;
  plan.max_splits = whole ? 1 : max64(1, min64(ceil_div(wanted, per), p.kv_len * plan.heads / kMinSplitKeys));
  plan.even_splits = 1;
  while (plan.even_splits < plan.max_splits && per * plan.even_splits % threads) ++plan.even_splits;
  return plan;
}

// Splits that the live keys of this call deserve: a long cache with few live keys is not cut. Only known while running.
// Decoding reads one stretch of memory a thread, up to lengths where a slow core would keep the others waiting: each
// chunk begins with keys that nobody fetched ahead, and each split adds a row to merge.
inline int64_t live_splits(const Problem& p, const Plan& plan) {
  if (plan.max_splits == 1) return 1;
  const bool per_batch = p.bounds && p.bounds->size[0] > 1 && p.bounds->stride[0] != 0;
  const bool per_head = p.bounds && p.bounds->size[1] > 1 && p.bounds->stride[1] != 0;
  int64_t longest = 0;
  for (int64_t b = 0; b < (per_batch ? p.batch : 1); ++b)
    for (int64_t h = 0; h < (per_head ? p.heads : 1); ++h)
      for (int64_t i = 0; i < p.q_len; ++i) {
        const KeyRange r = key_range(p, b, h, i);
        longest = max64(longest, r.hi - r.lo);
      }
  const int64_t keys = longest * plan.heads;
  const int64_t wanted = plan.decode ? max64(plan.even_splits, keys / kLongSplitKeys) : plan.max_splits;
  return max64(1, min64(plan.max_splits, min64(wanted, keys / kMinSplitKeys)));
}

// The state of one row after some of its keys, when its keys are split: max, sum and the weighted sum of values.
inline int64_t partial_stride(const Problem& p) { return ceil_div(p.v_dim + 2, 16) * 16; }
inline float* partial(const Problem& p, const Plan& plan, char* shared, int64_t b, int64_t kv_head, int64_t row,
                      int64_t split) {
  const int64_t index = ((b * p.kv_heads + kv_head) * plan.rows + row) * plan.max_splits + split;
  return reinterpret_cast<float*>(shared) + index * partial_stride(p);
}

}  // namespace
