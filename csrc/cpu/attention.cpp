// Attention on the CPU: softmax(scale * q kᵀ + bias) v with rotary embedding and the KV write in front of it.
//
// op attention. Operands ("-": may be absent; any strides, last dim dense, float dtypes may differ):
//   0 q [B,H,Sq,D]  1 k [B,Hkv,Skv,D]  2 v [B,Hkv,Skv,Dv]  3 out [B,H,Sq,Dv]
//   k and v may be signed bytes with a scale per row, [B,Hkv,Skv,D+4] (attention/codes.h)
//   4 mask [B,H,Sq,Skv] (b8: true attends; float: bias) -   5 bounds i32 [B,H,Sq,4] of mask_bounds, always with a mask
//   - 6 cos, 7 sin [B,1,Sq,R] -   8 k_new [B,Hkv,Sn,D] -   9 v_new [B,Hkv,Sn,Dv] -   10 positions i64 [Sn] -
//   - 11 codes of k [B,Hkv,Skv,D+4], 12 their state i64 [B,Hkv,2], 13 and 14 the same of v: what is kept beside floats
//   k and v (attention/mirror.h); with them and without new rows, positions are slots that a step in front wrote -
//   15 sinks [B,H,Sq,1], floats -
// ints: is_causal, causal_offset, window (0: none), rope_kind (0 none, 1 half, 2 interleaved), write_kv, bf16_products
//   (1: products of several queries may round what they multiply to bf16), nan_rows
// Many queries of f16, bf16, or what may be rounded, are multiplied on tiles (attention/tiles.h) or as 16-bit fixed
// point (attention/words.h) where the tier has one of these, whatever `out` is: the first keeps all bits of f16 and
// bf16, the second some 12 of each.
// floats: scale, softcap (0: none)
//   H is a multiple of Hkv; D and Dv are at most 512. Key j is allowed for row i when j <= i + causal_offset (causal),
//   j > i + causal_offset - window (window) and the mask lets it. A row with no allowed key gives zeros, with nan_rows
//   NaN, as a softmax of nothing but -inf does, unless there are no keys at all or it has a sink; what lies in
//   a key or value that a row may not see, NaN included, never reaches that row. A row's sink is one more score of its
//   softmax, which nothing scales, caps or masks and which has no value.
//   rope_kind rotates the first R dims of q and k_new. With write_kv, rotated k_new and v_new go to the slots
//   `positions` of k and v (the last Sn without positions) before attending; without k_new, k is used as it is.
// Phases: [write new rows], attend. Where keys are split, who ends the last part of a chunk's keys merges them.
#include "cpu/attention/decode.h"
#include "cpu/attention/prefill.h"
#ifdef __AMX_TILE__
#include "cpu/attention/tiles.h"
#elif defined(LLMOPT_ISA_WORDS)
#include "cpu/attention/words.h"
#endif

namespace {

constexpr int64_t kRowsPerWrite = 32;

inline bool writes(const Plan& plan, int phase) { return plan.write_first && phase == 0; }

int phases(const Step& s, int threads) { return make_plan(parse(s), threads).write_first ? 2 : 1; }

int64_t chunks(const Step& s, int phase, int threads) {
  const Problem p = parse(s);
  const Plan plan = make_plan(p, threads);
  if (writes(plan, phase)) return p.batch * p.kv_heads * ceil_div(p.new_len, kRowsPerWrite);
  return plan.rows == 0 ? 0 : plan.units * live_splits(p, plan);
}

size_t workspace(const Step& s, int threads) {
  const Problem p = parse(s);
  const Plan plan = make_plan(p, threads);
  if (plan.max_splits == 1) return 0;
  return static_cast<size_t>(p.batch * p.kv_heads * plan.rows * plan.max_splits * partial_stride(p)) * sizeof(float);
}

// Decoding begins with the keys of the thread's first chunk.
Span first_read(const Step& s, int phase, int threads, int thread) {
  const Problem p = parse(s);
  const Plan plan = make_plan(p, threads);
  if (!plan.decode || p.bounds || phase > 0 || plan.rows == 0) return {};
  const int64_t splits = live_splits(p, plan), first = first_chunk(plan.units * splits, threads, thread);
  if (first >= plan.units * splits) return {};
  const KeyRange live = key_range(p, 0, 0, 0);
  const DecodeChunk chunk(p, plan, first, splits);
  const int64_t lo = live.lo, length = live.hi - lo, item = itemsize(p.k->dtype);
  const int64_t row_bytes = (chunk.heads > 1 ? p.k->stride[2] : p.k->size[3]) * item;
  return {row_ptr(*p.k, chunk.b, chunk.head0, chunk.begin(lo, length)),
          (chunk.end(lo, length) - chunk.begin(lo, length)) * row_bytes};
}

inline void write_rows(const Problem& p, int64_t chunk) {
  const int64_t blocks = ceil_div(p.new_len, kRowsPerWrite), head = chunk / blocks, j = chunk % blocks * kRowsPerWrite;
  write_new_rows(p, head / p.kv_heads, head % p.kv_heads, j, min64(p.new_len, j + kRowsPerWrite), 0, p.kv_len);
}

// Partial softmaxes of one row, brought to their common max and added.
inline void merge_row(const Problem& p, const Plan& plan, int64_t b, int64_t kv_head, int64_t row, int64_t splits,
                      char* shared) {
  auto part = [&](int64_t n) { return partial(p, plan, shared, b, kv_head, row, n); };
  float max = kNegInf, sum = 0.0f;
  for (int64_t n = 0; n < splits; ++n) max = part(n)[0] > max ? part(n)[0] : max;
  const float shift = max == kNegInf ? 0.0f : max;
  alignas(64) float o[kMaxHeadDim + kLanes];
  for (int64_t d = 0; d < p.v_dim; d += kLanes) vstore(o + d, vzero());
  for (int64_t n = 0; n < splits; ++n) {
    const float* from = part(n);
    alignas(64) float weight[kLanes];
    const Vec w = vexp2_normal(vset((from[0] - shift) * kLog2e));
    vstore(weight, w);
    sum += from[1] * weight[0];
    for (int64_t d = 0; d < p.v_dim; d += kLanes) {
      const int lanes = static_cast<int>(min64(kLanes, p.v_dim - d));
      vstore(o + d, vfma(w, vload_n(from + 2 + d, lanes), vload(o + d)));
    }
  }
  const int64_t head = kv_head * p.group + row % p.group, pos = row / p.group;
  sum = sum_with_sink(p, b, head, pos, max, sum);
  const Vec inverse = vset(inverse_sum(p, sum));
  for (int64_t d = 0; d < p.v_dim; d += kLanes) vstore(o + d, vmul(vload(o + d), inverse));
  store_row(p.out->dtype, row_ptr(*p.out, b, head, pos), p.v_dim, o);
}

inline void attend(const Problem& p, const Plan& plan, int64_t chunk, int64_t splits, int threads,
                   const Scratch& scratch) {
  if (plan.decode) return decode(p, plan, chunk, splits, threads, scratch);
#ifdef __AMX_TILE__
  if (plan.terms > 0) return prefill_tiles(p, plan, chunk, splits, scratch);
#elif defined(LLMOPT_ISA_WORDS)
  if (plan.words) return prefill_words(p, plan, chunk, splits, scratch);
#endif
  prefill_panels(p, plan, RowChunk(p, plan, chunk, splits), scratch);
}

__attribute__((noinline)) void merge(const Problem& p, const Plan& plan, int64_t chunk, int64_t splits, char* shared) {
  if (!plan.decode) {
    const RowChunk c(p, plan, chunk, splits);
    for (int64_t row = c.row0; row < c.row0 + c.rows; ++row) merge_row(p, plan, c.b, c.kv_head, row, splits, shared);
    return;
  }
  const DecodeChunk c(p, plan, chunk, splits);
  for (int64_t head = c.head0; head < c.head0 + c.heads; ++head)
    for (int64_t row = 0; row < plan.rows; ++row) merge_row(p, plan, c.b, head, row, splits, shared);
}

// What the codes beside the cache are up to date with, after the last part of a chunk's keys. Without decoding nothing
// looks at the state of a head meanwhile, and one chunk notes what was written to all.
inline void note_mirrors(const Problem& p, const Plan& plan, int64_t chunk, int64_t splits) {
  if (plan.decode) return note_decoded(p, plan, DecodeChunk(p, plan, chunk, splits));
  for (int64_t head = 0; chunk < splits && head < p.batch * p.kv_heads; ++head)
    note_rounded(p, head / p.kv_heads, head % p.kv_heads, {0, 0});
}

void run(const Step& s, int phase, int64_t chunk, int threads, const Scratch& scratch) {
  const Problem p = parse(s);
  const Plan plan = make_plan(p, threads);
  if (writes(plan, phase)) return write_rows(p, chunk);
  const int64_t splits = live_splits(p, plan);
  attend(p, plan, chunk, splits, threads, scratch);
  if (splits > 1) {
    int32_t* ended = scratch.counters + chunk / splits;
    if (__atomic_add_fetch(ended, 1, __ATOMIC_ACQ_REL) < splits) return;
    *ended = 0;
    merge(p, plan, chunk, splits, scratch.shared);
  }
  if (p.k_mirror.codes) note_mirrors(p, plan, chunk, splits);
}

const Kernel kKernels[] = {
    {"attention", phases, chunks, workspace, run, first_read},
    {"mask_bounds", bounds_phases, bounds_chunks, nullptr, bounds_run},
};

}  // namespace

LLMOPT_EXPORT_FAMILY(attention, kKernels, 2, 0)
