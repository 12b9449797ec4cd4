// Moves a run of elements between a tensor of any dtype and stride and fp32 registers.
#pragma once
#include "cpu/vm/bytecode.h"

namespace {

template <class T>
inline void widen_integers(const char* p, int64_t stride, float* to, int64_t n) {
  const T* from = reinterpret_cast<const T*>(p);
  for (int64_t i = 0; i < n; ++i) to[i] = static_cast<float>(from[i * stride]);
}

template <DType d>
inline void widen_row(const char* p, float* to, int64_t n) {
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) vstore(to + i, vload_as(d, p, i, kLanes));
  if (i < n) vstore_n(to + i, vload_as(d, p, i, static_cast<int>(n - i)), static_cast<int>(n - i));
}

// Strided halves, a vector at a time through a small buffer.
inline void widen_halves(DType dtype, const char* p, int64_t stride, float* to, int64_t n) {
  const uint16_t* from = reinterpret_cast<const uint16_t*>(p);
  for (int64_t i = 0; i < n; i += kLanes) {
    const int lanes = static_cast<int>(min64(kLanes, n - i));
    uint16_t picked[kLanes] = {};
    for (int j = 0; j < lanes; ++j) picked[j] = from[(i + j) * stride];
    vstore_n(to + i, dtype == DType::f16 ? vload_f16(picked) : vload_bf16(picked), lanes);
  }
}

// to[0..n) = elements p[0], p[stride], ... as fp32. Integers beyond 2^24 are rounded; b8 gives 0 and 1.
inline void load_segment(DType dtype, const char* p, int64_t stride, float* to, int64_t n) {
  switch (dtype) {
    case DType::i64:
      return widen_integers<int64_t>(p, stride, to, n);
    case DType::i32:
      return widen_integers<int32_t>(p, stride, to, n);
    case DType::b8:
    case DType::u8:
      return widen_integers<uint8_t>(p, stride, to, n);
    case DType::s8:
      return widen_integers<int8_t>(p, stride, to, n);
    case DType::f32:
      return stride == 1 ? widen_row<DType::f32>(p, to, n) : widen_integers<float>(p, stride, to, n);
    case DType::f16:
      return stride == 1 ? widen_row<DType::f16>(p, to, n) : widen_halves(dtype, p, stride, to, n);
    default:
      return stride == 1 ? widen_row<DType::bf16>(p, to, n) : widen_halves(dtype, p, stride, to, n);
  }
}

template <DType d>
inline void narrow_row(char* p, Value from, int64_t n) {
  const Vec same = vload(from.data);
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) vstore_as(d, p, i, from.step ? vload(from.data + i) : same, kLanes);
  if (i == n) return;
  const int rest = static_cast<int>(n - i);
  vstore_as(d, p, i, from.step ? vload_n(from.data + i, rest) : same, rest);
}

// The reverse, for float dtypes and b8. from.step 0: one value for the whole run.
inline void store_segment(DType dtype, char* p, int64_t stride, Value from, int64_t n) {
  if (dtype == DType::b8) {
    for (int64_t i = 0; i < n; ++i) p[i * stride] = from.data[i & from.step] != 0.0f;
    return;
  }
  if (stride != 1) {
    for (int64_t i = 0; i < n; ++i) store_scalar(dtype, p, i * stride, from.data[i & from.step]);
    return;
  }
  if (dtype == DType::f32) return narrow_row<DType::f32>(p, from, n);
  if (dtype == DType::f16) return narrow_row<DType::f16>(p, from, n);
  narrow_row<DType::bf16>(p, from, n);
}

}  // namespace
