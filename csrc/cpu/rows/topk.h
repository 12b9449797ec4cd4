// topk: the k largest numbers of each row, largest first, and where they are; of equal ones the first. NaN is larger
// than any number, as in PyTorch.
//   operands: 0 x [M,N], 1 values [M,k] of x's dtype | none, 2 indices i64 [M,k] | none   last strides 1; ints: [k], up
//   to N and kMostPlaces
// pick: y[m,j] = x[m,indices[m,j]]
//   operands: 0 x [M,N], 1 indices i64 [M,k], 2 y [M,k] of x's dtype   last strides 1
//   Indices out of range are read as the nearest in it.
// limit_groups: y = x, but for columns outside of each row's best groups, which are `fill`. A group is N / groups
// columns in a row and counts as the sum of its `best` largest numbers; of equal groups the first is kept.
//   operands: 0 x f32 [M,N], 1 y f32 [M,N]   last strides 1; ints: [groups, best, kept], up to kMostPlaces; floats:
//   [fill]
#pragma once
#include "cpu/rows/gather.h"

namespace {

inline bool is_larger(float a, float b) { return a > b || (a != a && b == b); }

// The `most` largest of some numbers, largest first, and where they were found.
struct Largest {
  int64_t most, count = 0;
  float value[kMostPlaces];
  int64_t index[kMostPlaces];

  explicit Largest(int64_t k) : most(k) {}

  void offer(float x, int64_t i) {
    if (count == most && !is_larger(x, value[most - 1])) return;
    int64_t place = count < most ? count++ : most - 1;
    for (; place > 0 && is_larger(x, value[place - 1]); --place)
      value[place] = value[place - 1], index[place] = index[place - 1];
    value[place] = x, index[place] = i;
  }
};

inline int64_t topk_chunks(const Step& s, int, int threads) {
  return chunk_count(s.t[0].size[0], s.t[0].size[1], threads);
}

template <class A>
inline void topk_rows(const Step& s, const RowRange& range) {
  const Tensor &x = s.t[0], &values = s.t[1], &indices = s.t[2];
  const A as(x.dtype);
  const int64_t width = x.size[1], k = s.i[0];
  float row[kLanes];
  for (int64_t m = range.begin; m < range.end; ++m) {
    Largest best(k);
    for_lanes(width, [&](int64_t i, int lanes) {
      vstore(row, as.load(at(x, m * x.stride[0]), i, lanes));
      for (int j = 0; j < lanes; ++j) best.offer(row[j], i + j);
    });
    if (indices.data)
      __builtin_memcpy(at(indices, m * indices.stride[0]), best.index, static_cast<size_t>(k) * sizeof(*best.index));
    if (!values.data) continue;
    char* to = at(values, m * values.stride[0]);
    for_lanes(k, [&](int64_t i, int lanes) { as.store(to, i, vload_n(best.value + i, lanes), lanes); });
  }
}

inline void topk_run(const Step& s, int, int64_t chunk, int threads, const Scratch&) {
  const RowRange rows = chunk_range(s.t[0].size[0], s.t[0].size[1], threads, chunk);
  with_access(s.t, 2, [&](auto access) { topk_rows<decltype(access)>(s, rows); });
}

inline int64_t limit_groups_chunks(const Step& s, int, int threads) {
  return chunk_count(s.t[0].size[0], s.t[0].size[1], threads);
}

inline void limit_groups_run(const Step& s, int, int64_t chunk, int threads, const Scratch&) {
  const Tensor &x = s.t[0], &y = s.t[1];
  const int64_t groups = s.i[0], each = x.size[1] / groups;
  const RowRange rows = chunk_range(x.size[0], x.size[1], threads, chunk);
  for (int64_t m = rows.begin; m < rows.end; ++m) {
    const float* from = reinterpret_cast<const float*>(at(x, m * x.stride[0]));
    float* to = reinterpret_cast<float*>(at(y, m * y.stride[0]));
    Largest kept(s.i[2]);
    for (int64_t g = 0; g < groups; ++g) {
      Largest best(s.i[1]);
      for (int64_t i = 0; i < each; ++i) best.offer(from[g * each + i], i);
      float sum = 0;
      for (int64_t i = 0; i < best.count; ++i) sum += best.value[i];
      kept.offer(sum, g);
    }
    for (int64_t i = 0; i < x.size[1]; ++i) to[i] = s.f[0];
    for (int64_t i = 0; i < kept.count; ++i)
      __builtin_memcpy(to + kept.index[i] * each, from + kept.index[i] * each,
                       static_cast<size_t>(each) * sizeof(float));
  }
}

inline int64_t pick_chunks(const Step& s, int, int threads) {
  return chunk_count(s.t[2].size[0], s.t[2].size[1], threads);
}

inline void pick_run(const Step& s, int, int64_t chunk, int threads, const Scratch&) {
  const Tensor &x = s.t[0], &indices = s.t[1], &y = s.t[2];
  const RowRange rows = chunk_range(y.size[0], y.size[1], threads, chunk);
  const int64_t bytes = itemsize(x.dtype);
  for (int64_t m = rows.begin; m < rows.end; ++m)
    for (int64_t j = 0; j < y.size[1]; ++j) {
      const int64_t column = nearest(load_id(indices, m * y.size[1] + j), x.size[1]);
      __builtin_memcpy(at(y, m * y.stride[0] + j), at(x, m * x.stride[0] + column), static_cast<size_t>(bytes));
    }
}

}  // namespace
