// What contracts ask of operands.
#pragma once
#include "runtime/contracts.h"

namespace llmopt {

inline bool is_float(DType d) { return d == DType::f32 || d == DType::f16 || d == DType::bf16; }

// Whether an operand of so many dimensions is there; one without elements needs no memory.
inline bool given(const Tensor& t, int ndim) {
  if (t.ndim != ndim) return false;
  for (int d = 0; d < ndim; ++d)
    if (t.size[d] == 0) return true;
  return t.data != nullptr;
}
inline bool absent(const Tensor& t) { return t.data == nullptr; }

inline bool float_rows(const Tensor& t, int ndim) {
  return given(t, ndim) && is_float(t.dtype) && (t.size[ndim - 1] <= 1 || t.stride[ndim - 1] == 1);
}
inline bool float_vector(const Tensor& t, int64_t n) { return absent(t) || (float_rows(t, 1) && t.size[0] == n); }
inline bool same_sizes(const Tensor& a, const Tensor& b) {
  if (a.ndim != b.ndim) return false;
  for (int d = 0; d < a.ndim; ++d)
    if (a.size[d] != b.size[d]) return false;
  return true;
}
inline bool one_or(int64_t size, int64_t n) { return size == 1 || size == n; }
inline bool has(const Step& s, int tensors, int ints, int floats) {
  return s.num_tensors == tensors && s.num_ints >= ints && s.num_floats >= floats;
}

// Elements of the first n dimensions, whose order is that of the rows behind them.
inline int64_t positions(const Tensor& t, int n) {
  int64_t count = 1;
  for (int d = 0; d < n; ++d) count *= t.size[d];
  return count;
}

// Rows of floats with any dimensions in front: [..., K].
inline bool float_row_groups(const Tensor& t, int64_t rows, int64_t width) {
  return t.ndim >= 1 && float_rows(t, t.ndim) && t.size[t.ndim - 1] == width && positions(t, t.ndim - 1) == rows;
}

// nullptr when every index [...] i64 or i32 is below `limit`. Content can be looked at only where it exists already.
inline const char* indices_below(const Call& c, int operand, int64_t limit) {
  const Tensor& t = c.step.t[operand];
  if (!given(t, t.ndim) || (t.dtype != DType::i64 && t.dtype != DType::i32)) return "indices are not integers";
  if (!c.is_external[operand]) return "indices are made by the program itself, where they cannot be checked";
  const int64_t count = positions(t, t.ndim);
  for (int64_t m = 0; m < count; ++m) {
    const int64_t i = position_offset(t, t.ndim, m);
    const int64_t index = t.dtype == DType::i32 ? reinterpret_cast<const int32_t*>(t.data)[i]
                                                : reinterpret_cast<const int64_t*>(t.data)[i];
    if (index < 0 || index >= limit) {
      *c.fault = {index, limit};
      return kIndexRange;
    }
  }
  return nullptr;
}

inline constexpr const char* kWrongCount = "takes another number of operands or attributes";

}  // namespace llmopt
