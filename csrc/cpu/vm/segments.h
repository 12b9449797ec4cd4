// Moves a run of elements between a tensor of any dtype and stride and fp32 registers.
#pragma once
#include "cpu/vm/bytecode.h"

namespace {

template <class T>
inline void widen_integers(const char* p, int64_t stride, float* to, int64_t n) {
  const T* from = reinterpret_cast<const T*>(p);
  for (int64_t i = 0; i < n; ++i) to[i] = static_cast<float>(from[i * stride]);
}

// to[0..n) = elements p[0], p[stride], ... as fp32. Integers beyond 2^24 are rounded; b8 gives 0 and 1.
inline void load_segment(DType dtype, const char* p, int64_t stride, float* to, int64_t n) {
  switch (dtype) {
    case DType::i64: return widen_integers<int64_t>(p, stride, to, n);
    case DType::i32: return widen_integers<int32_t>(p, stride, to, n);
    case DType::b8: case DType::u8: return widen_integers<uint8_t>(p, stride, to, n);
    case DType::s8: return widen_integers<int8_t>(p, stride, to, n);
    default: break;
  }
  if (dtype == DType::f32 && stride != 1) {
    const float* from = reinterpret_cast<const float*>(p);
    for (int64_t i = 0; i < n; ++i) to[i] = from[i * stride];
    return;
  }
  for (int64_t i = 0; i < n; i += kLanes) {
    const int lanes = static_cast<int>(min64(kLanes, n - i));
    if (stride == 1) {
      Vec v = vload_as(dtype, p, i, lanes);
      if (lanes == kLanes) vstore(to + i, v);
      else vstore_n(to + i, v, lanes);
      continue;
    }
    uint16_t picked[kLanes] = {};
    for (int j = 0; j < lanes; ++j) picked[j] = reinterpret_cast<const uint16_t*>(p)[(i + j) * stride];
    vstore_n(to + i, dtype == DType::f16 ? vload_f16(picked) : vload_bf16(picked), lanes);
  }
}

// The reverse, for float dtypes and b8. from.step 0: one value for the whole run.
inline void store_segment(DType dtype, char* p, int64_t stride, Value from, int64_t n) {
  if (dtype == DType::b8) {
    for (int64_t i = 0; i < n; ++i) p[i * stride] = from.data[i & from.step] != 0.0f;
    return;
  }
  const Vec same = vload(from.data);
  for (int64_t i = 0; i < n; i += kLanes) {
    const int lanes = static_cast<int>(min64(kLanes, n - i));
    Vec v = !from.step ? same : lanes == kLanes ? vload(from.data + i) : vload_n(from.data + i, lanes);
    if (stride == 1) {
      vstore_as(dtype, p, i, v, lanes);
      continue;
    }
    float lane[kLanes];
    vstore(lane, v);
    for (int j = 0; j < lanes; ++j) store_scalar(dtype, p, (i + j) * stride, lane[j]);
  }
}

}  // namespace
