// The common index space of several strided tensors, made as simple as it can be: size-1 dimensions dropped, neighbours
// merged, dimensions ordered by the strides of one tensor. The last dimension is called the row.
#pragma once
#include "runtime/tensor.h"

namespace {

constexpr int kMaxSpaceTensors = 24;

struct Space {
  int ndim;  // at least 1
  int num_tensors;
  int64_t size[llmopt::kMaxDims];
  int64_t stride[kMaxSpaceTensors][llmopt::kMaxDims];  // in elements

  int64_t row() const { return size[ndim - 1]; }
  int64_t row_stride(int t) const { return stride[t][ndim - 1]; }
  int64_t rows() const {
    int64_t n = 1;
    for (int d = 0; d < ndim - 1; ++d) n *= size[d];
    return n;
  }
  // Every element follows the one before it in the order of the space.
  bool dense(int t) const {
    int64_t expect = 1;
    for (int d = ndim - 1; d >= 0; --d) {
      if (stride[t][d] != expect) return false;
      expect *= size[d];
    }
    return true;
  }
  // One element for the whole space.
  bool uniform(int t) const {
    for (int d = 0; d < ndim; ++d)
      if (stride[t][d] != 0) return false;
    return true;
  }
};

inline void swap_dims(Space& s, int d, int e) {
  int64_t size = s.size[d];
  s.size[d] = s.size[e];
  s.size[e] = size;
  for (int t = 0; t < s.num_tensors; ++t) {
    int64_t stride = s.stride[t][d];
    s.stride[t][d] = s.stride[t][e];
    s.stride[t][e] = stride;
  }
}

inline bool mergeable(const Space& s, int outer) {
  for (int t = 0; t < s.num_tensors; ++t)
    if (s.stride[t][outer] != s.size[outer + 1] * s.stride[t][outer + 1]) return false;
  return true;
}

inline void drop_dim(Space& s, int d) {
  for (int e = d; e + 1 < s.ndim; ++e) swap_dims(s, e, e + 1);
  --s.ndim;
}

// tensors[0..n) have the same sizes. keep_row: the last dimension stays the row and is not merged (row operations);
// otherwise all dimensions may be reordered, by descending strides of tensor `lead`.
inline Space make_space(const llmopt::Tensor* tensors, int n, bool keep_row, int lead) {
  Space s;
  s.num_tensors = n;
  s.ndim = tensors[0].ndim;
  for (int d = 0; d < s.ndim; ++d) {
    s.size[d] = tensors[0].size[d];
    for (int t = 0; t < n; ++t) s.stride[t][d] = s.size[d] == 1 ? 0 : tensors[t].stride[d];
  }
  if (s.ndim == 0) {
    s.ndim = 1;
    s.size[0] = 1;
    for (int t = 0; t < n; ++t) s.stride[t][0] = 0;
  }
  int outer = s.ndim - (keep_row ? 1 : 0);  // dimensions that may be moved: [0, outer)
  for (int d = outer - 1; d >= 0; --d) {
    if (s.size[d] != 1 || s.ndim == 1) continue;
    drop_dim(s, d);
    --outer;
  }
  for (int i = 1; i < outer; ++i)
    for (int d = i; d > 0; --d) {
      int64_t a = s.stride[lead][d - 1], b = s.stride[lead][d];
      if ((a < 0 ? -a : a) >= (b < 0 ? -b : b)) break;
      swap_dims(s, d - 1, d);
    }
  for (int d = outer - 2; d >= 0; --d) {
    if (!mergeable(s, d)) continue;
    s.size[d + 1] *= s.size[d];
    drop_dim(s, d);
  }
  return s;
}

// A position among the rows of a space, with each tensor's offset there.
struct RowCursor {
  int64_t index[llmopt::kMaxDims];
  int64_t offset[kMaxSpaceTensors];

  void seek(const Space& s, int64_t row) {
    for (int t = 0; t < s.num_tensors; ++t) offset[t] = 0;
    for (int d = s.ndim - 2; d >= 0; --d) {
      index[d] = row % s.size[d];
      row /= s.size[d];
      for (int t = 0; t < s.num_tensors; ++t) offset[t] += index[d] * s.stride[t][d];
    }
  }
  // Rows from here on that differ only in the last of the outer dimensions.
  int64_t run(const Space& s) const { return s.ndim == 1 ? 1 : s.size[s.ndim - 2] - index[s.ndim - 2]; }
  // Goes on by n <= run() rows.
  void advance(const Space& s, int64_t n) {
    int64_t steps = n;
    for (int d = s.ndim - 2; d >= 0; --d) {
      index[d] += steps;
      const bool wraps = index[d] == s.size[d];
      const int64_t moved = wraps ? steps - s.size[d] : steps;
      for (int t = 0; t < s.num_tensors; ++t) offset[t] += moved * s.stride[t][d];
      if (!wraps) return;
      index[d] = 0;
      steps = 1;
    }
  }
  void next(const Space& s) { advance(s, 1); }
};

// The same for one tensor, starting where a cursor stands.
struct TensorCursor {
  int64_t index[llmopt::kMaxDims];
  int64_t offset;

  TensorCursor(const Space& s, const RowCursor& from, int t) : offset(from.offset[t]) {
    for (int d = 0; d < s.ndim - 1; ++d) index[d] = from.index[d];
  }
  void next(const Space& s, int t) {
    for (int d = s.ndim - 2; d >= 0; --d) {
      offset += s.stride[t][d];
      if (++index[d] < s.size[d]) return;
      offset -= s.size[d] * s.stride[t][d];
      index[d] = 0;
    }
  }
};

}  // namespace
