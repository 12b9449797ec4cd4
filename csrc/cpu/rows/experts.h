// Tokens on their way to experts and back. Every token t of T has k places, t * k to t * k + k - 1 of S in all.
// sort_by_expert: places in the order of their experts, those of one expert as they were
//   operands: 0 ids i64 or i32 [S], 1 order i64 [S], 2 ends i32 [E]: where each expert's places end in it, 3 sorted ids
//   like ids | none, 4 inverse i64 [S] | none: where each place went   last strides 1
//   Ids that name no expert come last and count for none.
// gather_tokens: y[i,:] = x[order[i] / k,:]
//   operands: 0 x [T,H], 1 order i64 [S], 2 y [S,H]   ints: [k]
// combine_experts: y[t,:] = sum over j of weights[t,j] * x[inverse[t * k + j],:]
//   operands: 0 x [S,H], 1 inverse i64 [S], 2 weights [T,k] any strides, 3 y [T,H]   k up to kMostPlaces
// Indices out of range are read as the nearest in it.
#pragma once
#include "cpu/rows/gather.h"

namespace {

inline int64_t expert_of(const Tensor& ids, int64_t i, int64_t experts) {
  const int64_t id = load_id(ids, i);
  return id >= 0 && id < experts ? id : experts;
}

inline int64_t one_chunk(const Step&, int, int) { return 1; }

inline size_t sort_by_expert_workspace(const Step& s, int) {
  return static_cast<size_t>(s.t[2].size[0] + 1) * sizeof(int32_t);
}

inline void sort_by_expert_run(const Step& s, int, int64_t, int, const Scratch& scratch) {
  const Tensor &ids = s.t[0], &sorted = s.t[3];
  const int64_t count = ids.size[0], experts = s.t[2].size[0];
  int64_t* order = reinterpret_cast<int64_t*>(s.t[1].data);
  int64_t* inverse = reinterpret_cast<int64_t*>(s.t[4].data);
  int32_t* ends = reinterpret_cast<int32_t*>(s.t[2].data);
  int32_t* next = reinterpret_cast<int32_t*>(scratch.shared);  // where the next place of an expert goes
  for (int64_t e = 0; e <= experts; ++e) next[e] = 0;
  for (int64_t i = 0; i < count; ++i) ++next[expert_of(ids, i, experts)];
  int32_t end = 0;
  for (int64_t e = 0; e <= experts; ++e) {
    const int32_t begin = end;
    end += next[e], next[e] = begin;
    if (e < experts) ends[e] = end;
  }
  for (int64_t i = 0; i < count; ++i) {
    const int64_t id = load_id(ids, i), to = next[expert_of(ids, i, experts)]++;
    order[to] = i;
    if (inverse) inverse[i] = to;
    if (!sorted.data) continue;
    if (sorted.dtype == DType::i32)
      reinterpret_cast<int32_t*>(sorted.data)[to] = static_cast<int32_t>(id);
    else
      reinterpret_cast<int64_t*>(sorted.data)[to] = id;
  }
}

inline int64_t gather_tokens_chunks(const Step& s, int, int threads) {
  return chunk_count(s.t[2].size[0], s.t[2].size[1], threads);
}

inline void gather_tokens_run(const Step& s, int, int64_t chunk, int threads, const Scratch&) {
  const Tensor &x = s.t[0], &order = s.t[1], &y = s.t[2];
  const RowRange rows = chunk_range(y.size[0], y.size[1], threads, chunk);
  for (int64_t i = rows.begin; i < rows.end; ++i) {
    const int64_t token = nearest(load_id(order, i) / s.i[0], x.size[0]);
    copy_row(x.dtype, at(x, token * x.stride[0]), y.dtype, at(y, i * y.stride[0]), y.size[1]);
  }
}

inline int64_t combine_experts_chunks(const Step& s, int, int threads) {
  return chunk_count(s.t[3].size[0], s.t[3].size[1] * s.t[2].size[1], threads);
}

template <class A>
inline void combine_tokens(const Step& s, const RowRange& tokens) {
  const Tensor &x = s.t[0], &inverse = s.t[1], &weights = s.t[2], &y = s.t[3];
  const A x_as(x.dtype), y_as(y.dtype);
  const int64_t k = weights.size[1];
  const char* rows[kMostPlaces];
  float factors[kMostPlaces];
  for (int64_t t = tokens.begin; t < tokens.end; ++t) {
    for (int64_t j = 0; j < k; ++j) {
      rows[j] = at(x, nearest(load_id(inverse, t * k + j), x.size[0]) * x.stride[0]);
      factors[j] = load_scalar(weights.dtype, weights.data, t * weights.stride[0] + j * weights.stride[1]);
    }
    char* to = at(y, t * y.stride[0]);
    for_lanes(y.size[1], [&](int64_t i, int lanes) {
      Vec sum = vzero();
      for (int64_t j = 0; j < k; ++j) sum = vfma(vset(factors[j]), x_as.load(rows[j], i, lanes), sum);
      y_as.store(to, i, sum, lanes);
    });
  }
}

inline void combine_experts_run(const Step& s, int, int64_t chunk, int threads, const Scratch&) {
  const RowRange tokens = chunk_range(s.t[3].size[0], s.t[3].size[1] * s.t[2].size[1], threads, chunk);
  const Tensor operands[] = {s.t[0], s.t[3]};
  with_access(operands, 2, [&](auto access) { combine_tokens<decltype(access)>(s, tokens); });
}

}  // namespace
