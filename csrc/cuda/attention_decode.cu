// attention_decode: one query position a sequence over a cache of keys and values, split among blocks along the keys.
// A block serves up to 8 query heads of one head of the cache, so that the cache is read once. D / 8 lanes share a key;
// every such set of lanes runs its own online softmax over its keys, and the sets, the warps and the blocks are merged
// by their largest scores. The block that finishes last merges the blocks' results: no block ever waits for another.
#include "cuda/memory.h"
#include "cuda/problems.h"
#include "cuda/tiles.h"

namespace llmopt::cuda {

constexpr float kLowest = -1e30f;  // below every score, and finite: differences of two of them are not NaN

// Eight elements of a cache row.
template <class Cache>
struct Row;
template <>
struct Row<__half> {
  using Bits = uint4;
  static LLMOPT_DEVICE void widen(const Bits& bits, float (&out)[8]) {
    const auto values = unpack<__half, 8>(bits);
#pragma unroll
    for (int i = 0; i < 8; ++i) out[i] = to_float(values.at[i]);
  }
};
template <>
struct Row<int8_t> {
  using Bits = uint2;
  static LLMOPT_DEVICE void widen(const Bits& bits, float (&out)[8]) {
    const auto values = unpack<int8_t, 8>(bits);
#pragma unroll
    for (int i = 0; i < 8; ++i) out[i] = static_cast<float>(values.at[i]);
  }
};

// The state of a softmax over some keys, for 8 of the head's dimensions: sum of weights and weighted sum of values,
// with weights exp2(score - largest).
struct Softmax {
  float largest, weight, sums[8];
};

template <int kHeadDim, int kHeads, class Cache>
struct Decode {
  static constexpr int kLanes = kHeadDim / 8;   // lanes that share a key
  static constexpr int kSets = 32 / kLanes;     // keys a warp reads at once
  static constexpr int kUnits = 2 * kLanes;     // four dimensions each
  static constexpr float kLog2E = 1.44269504f;  // exp(x) = exp2(kLog2E x)
  using Bits = typename Row<Cache>::Bits;

  const AttentionDecode& p;
  const int lane, warp, group, kv_head, head0, heads, split, batch;

  LLMOPT_DEVICE explicit Decode(const AttentionDecode& problem)
      : p(problem),
        lane(threadIdx.x % 32),
        warp(threadIdx.x / 32),
        group(p.heads / p.kv_heads),
        kv_head(blockIdx.y % p.kv_heads),
        head0(blockIdx.y / p.kv_heads * kHeads),
        heads(group - head0 < kHeads ? group - head0 : kHeads),
        split(blockIdx.x),
        batch(blockIdx.z) {}

  // Row of q and o of the block's head h; heads the block does not have repeat its last one.
  LLMOPT_DEVICE int64_t row(int h) const {
    return static_cast<int64_t>(batch) * p.heads + kv_head * group + head0 + (h < heads ? h : heads - 1);
  }

  LLMOPT_DEVICE void run() const {
    Softmax states[kHeads];
    attend(states);
    merge_sets(states);
    merge_warps(states);
    if (p.splits > 1 && is_last()) merge_splits();
  }

  // The softmax over this set's keys of the split.
  LLMOPT_DEVICE void attend(Softmax (&states)[kHeads]) const {
    const int part = lane % kLanes, set = lane / kLanes;
    float q[kHeads][8];
#pragma unroll
    for (int h = 0; h < kHeads; ++h) {
      const auto values = unpack<__half, 8>(load<uint4>(global<__half>(p.q) + row(h) * kHeadDim + part * 8));
#pragma unroll
      for (int i = 0; i < 8; ++i) q[h][i] = to_float(values.at[i]) * (p.scale * kLog2E);
      states[h] = {kLowest, 0.0f, {}};
    }
    int length = p.keys;
    if (p.lengths) length = load(global<int32_t>(p.lengths) + batch);
    const int share = ceil_div(length, p.splits), begin = split * share;
    const int end = begin + share < length ? begin + share : length;
    const int64_t rows = batch * p.batch_stride + kv_head * p.head_stride + part * 8;
    const int64_t scales = batch * p.scale_batch_stride + kv_head * p.scale_head_stride;

    constexpr int kStep = kSets * kDecodeUnroll;  // keys of a warp; all lanes of a warp make the same steps
    for (int key0 = begin + warp * kStep; key0 < end; key0 += kDecodeWarps * kStep) {
      Bits k_bits[kDecodeUnroll], v_bits[kDecodeUnroll];
      float k_scale[kDecodeUnroll], v_scale[kDecodeUnroll];
      bool live[kDecodeUnroll];
#pragma unroll
      for (int u = 0; u < kDecodeUnroll; ++u) {
        const int wanted = key0 + u * kSets + set, key = wanted < end ? wanted : end - 1;
        live[u] = wanted < end;
        k_bits[u] = load_streamed<Bits>(global<Cache>(p.k) + rows + key * p.row_stride);
        v_bits[u] = load_streamed<Bits>(global<Cache>(p.v) + rows + key * p.row_stride);
        if (sizeof(Cache) == 1) {
          k_scale[u] = load(global<float>(p.k_scale) + scales + key * p.scale_row_stride);
          v_scale[u] = load(global<float>(p.v_scale) + scales + key * p.scale_row_stride);
        }
      }
      float scores[kHeads][kDecodeUnroll];
#pragma unroll
      for (int u = 0; u < kDecodeUnroll; ++u) {
        float k[8];
        Row<Cache>::widen(k_bits[u], k);
#pragma unroll
        for (int h = 0; h < kHeads; ++h) {
          float score = 0.0f;
#pragma unroll
          for (int i = 0; i < 8; ++i) score += q[h][i] * k[i];
#pragma unroll
          for (int step = kLanes / 2; step > 0; step /= 2) score += __shfl_xor_sync(0xffffffffu, score, step);
          if (sizeof(Cache) == 1) score *= k_scale[u];
          scores[h][u] = live[u] ? score : -INFINITY;
        }
      }
#pragma unroll
      for (int h = 0; h < kHeads; ++h) {  // scores become weights
        Softmax& s = states[h];
        float largest = s.largest;
#pragma unroll
        for (int u = 0; u < kDecodeUnroll; ++u) largest = fmaxf(largest, scores[h][u]);
        const float keep = ptx::exp2(s.largest - largest);
        s.largest = largest;
        s.weight *= keep;
#pragma unroll
        for (int i = 0; i < 8; ++i) s.sums[i] *= keep;
#pragma unroll
        for (int u = 0; u < kDecodeUnroll; ++u) {
          const float weight = ptx::exp2(scores[h][u] - largest);
          s.weight += weight;
          scores[h][u] = sizeof(Cache) == 1 ? weight * v_scale[u] : weight;
        }
      }
#pragma unroll
      for (int u = 0; u < kDecodeUnroll; ++u) {
        float v[8];
        Row<Cache>::widen(v_bits[u], v);
#pragma unroll
        for (int h = 0; h < kHeads; ++h)
#pragma unroll
          for (int i = 0; i < 8; ++i) states[h].sums[i] += scores[h][u] * v[i];
      }
    }
  }

  LLMOPT_DEVICE void merge_sets(Softmax (&states)[kHeads]) const {
#pragma unroll
    for (int step = kLanes; step < 32; step *= 2)
#pragma unroll
      for (int h = 0; h < kHeads; ++h) {
        Softmax& s = states[h];
        const float other = __shfl_xor_sync(0xffffffffu, s.largest, step);
        const float largest = fmaxf(s.largest, other);
        const float keep = ptx::exp2(s.largest - largest);
        const float take = ptx::exp2(other - largest);
        s.largest = largest;
        s.weight = s.weight * keep + __shfl_xor_sync(0xffffffffu, s.weight, step) * take;
#pragma unroll
        for (int i = 0; i < 8; ++i) s.sums[i] = s.sums[i] * keep + __shfl_xor_sync(0xffffffffu, s.sums[i], step) * take;
      }
  }

  // Shared memory: sums [warp][head][unit][4], then (largest, weight) [warp][head], then the flag of is_last.
  // A unit's first half holds dimensions 8i .. 8i + 3 of part i, its second half 8i + 4 .. 8i + 7.
  LLMOPT_DEVICE Shared<float> sums_at(int w, int h, int unit) const {
    return shared<float>() + ((w * kHeads + h) * kUnits + unit) * 4;
  }
  LLMOPT_DEVICE Shared<float> state_at(int w, int h) const {
    return shared<float>() + kDecodeWarps * kHeads * kHeadDim + (w * kHeads + h) * 2;
  }
  LLMOPT_DEVICE static int dimension(int unit) { return unit % kLanes * 8 + unit / kLanes * 4; }

  LLMOPT_DEVICE void merge_warps(const Softmax (&states)[kHeads]) const {
    if (lane < kLanes) {
#pragma unroll
      for (int h = 0; h < kHeads; ++h) {
        const Softmax& s = states[h];
        store(sums_at(warp, h, lane), float4{s.sums[0], s.sums[1], s.sums[2], s.sums[3]});
        store(sums_at(warp, h, lane + kLanes), float4{s.sums[4], s.sums[5], s.sums[6], s.sums[7]});
        if (lane == 0) store(state_at(warp, h), float2{s.largest, s.weight});
      }
    }
    __syncthreads();
    for (int i = threadIdx.x; i < heads * kUnits; i += 32 * kDecodeWarps) {
      const int h = i / kUnits, unit = i % kUnits;
      const auto state = [&](int w) { return load<float2>(state_at(w, h)); };
      const auto sums = [&](int w) { return load<float4>(sums_at(w, h, unit)); };
      finish(h, unit, kDecodeWarps, state, sums);
    }
  }

  // Merges `count` states of 4 dimensions; the result is an output, or a split's state for is_last's block.
  template <class State, class Sums>
  LLMOPT_DEVICE void finish(int h, int unit, int count, State state, Sums sums, bool is_final = false) const {
    float largest = kLowest, weight = 0.0f, out[4] = {};
    for (int i = 0; i < count; ++i) largest = fmaxf(largest, state(i).x);
    for (int i = 0; i < count; ++i) {
      const float2 s = state(i);
      const float4 add = sums(i);
      const float take = ptx::exp2(s.x - largest);
      weight += take * s.y;
      out[0] += take * add.x, out[1] += take * add.y, out[2] += take * add.z, out[3] += take * add.w;
    }
    if (p.splits > 1 && !is_final) {
      store(partial_sums(h, split) + unit * 4, float4{out[0], out[1], out[2], out[3]});
      if (unit == 0) store(partial_state(h, split), float2{largest, weight});
      return;
    }
    const float inverse = weight == 0.0f ? 0.0f : 1.0f / weight;
    Pack<__half, 4> result;
#pragma unroll
    for (int i = 0; i < 4; ++i) result.at[i] = from_float<__half>(out[i] * inverse);
    store(global<__half>(p.o) + row(h) * kHeadDim + dimension(unit), pack<uint2>(result));
  }

  LLMOPT_DEVICE Global<float> partial_sums(int h, int s) const {
    return Global<float>(p.partial) + (row(h) * p.splits + s) * kHeadDim;
  }
  LLMOPT_DEVICE Global<float> partial_state(int h, int s) const {
    const int64_t sums = static_cast<int64_t>(p.batch) * p.heads * p.splits * kHeadDim;
    return Global<float>(p.partial) + sums + (row(h) * p.splits + s) * 2;
  }

  // True in the block that finishes last among the splits; it leaves the counter ready for the next launch.
  LLMOPT_DEVICE bool is_last() const {
    const Shared<int> flag = shared<int>(kDecodeWarps * kHeads * (kHeadDim + 2) * 4);
    const Global<int32_t> counter = Global<int32_t>(p.finished) + (batch * gridDim.y + blockIdx.y);
    __threadfence();  // this thread's results are visible before the block is counted
    __syncthreads();
    if (threadIdx.x == 0) {
      const bool last = ptx::atomic_add(counter.address, 1) == p.splits - 1;
      if (last) store(counter, 0);
      __threadfence();
      store(flag, static_cast<int>(last));
    }
    __syncthreads();
    return load<int>(flag) != 0;
  }

  LLMOPT_DEVICE void merge_splits() const {
    for (int i = threadIdx.x; i < heads * kUnits; i += 32 * kDecodeWarps) {
      const int h = i / kUnits, unit = i % kUnits;
      const auto state = [&](int s) { return load_fresh<float2>(partial_state(h, s)); };
      const auto sums = [&](int s) { return load_fresh<float4>(partial_sums(h, s) + unit * 4); };
      finish(h, unit, p.splits, state, sums, true);
    }
  }
};

}  // namespace llmopt::cuda

#define LLMOPT_DECODE(head_dim, heads, dtype, type)                                                              \
  extern "C" __global__ void __launch_bounds__(32 * llmopt::cuda::kDecodeWarps)                                  \
      attention_decode_##head_dim##_##heads##_##dtype(const llmopt::cuda::AttentionDecode __grid_constant__ p) { \
    llmopt::cuda::Decode<head_dim, heads, type>(p).run();                                                        \
  }
#define LLMOPT_DECODE_HEADS(head_dim, dtype, type) \
  LLMOPT_DECODE(head_dim, 1, dtype, type)          \
  LLMOPT_DECODE(head_dim, 4, dtype, type)          \
  LLMOPT_DECODE(head_dim, 8, dtype, type)
LLMOPT_DECODE_HEADS(64, f16, __half)
LLMOPT_DECODE_HEADS(128, f16, __half)
LLMOPT_DECODE_HEADS(64, s8, int8_t)
LLMOPT_DECODE_HEADS(128, s8, int8_t)
