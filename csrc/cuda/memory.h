// Pointers that know which memory they point into. Only the functions here follow them, so that the host emulator sees
// every access: its bounds, its alignment, who else touched the bytes, and how a warp's accesses fall together.
#pragma once
#include "cuda/ptx.h"

namespace llmopt::cuda {

template <class T>
struct Global {
  T* address;
  LLMOPT_DEVICE explicit Global(T* p) : address(p) {}
  LLMOPT_DEVICE Global operator+(int64_t n) const { return Global(address + n); }
  LLMOPT_DEVICE explicit operator bool() const { return address != nullptr; }
  LLMOPT_DEVICE bool aligned(int bytes) const { return reinterpret_cast<uintptr_t>(address) % bytes == 0; }
};

// The dtype of an operand is only known to the launcher, which chose this kernel by it.
template <class T>
LLMOPT_DEVICE Global<const T> global(const void* p) {
  return Global<const T>(static_cast<const T*>(p));
}
template <class T>
LLMOPT_DEVICE Global<T> global(void* p) {
  return Global<T>(static_cast<T*>(p));
}

template <class T>
struct Shared {
  T* address;
  LLMOPT_DEVICE explicit Shared(T* p) : address(p) {}
  LLMOPT_DEVICE Shared operator+(int n) const { return Shared(address + n); }
};

// The block's dynamic shared memory from byte `offset` on.
template <class T>
LLMOPT_DEVICE Shared<T> shared(int offset = 0) {
  return Shared<T>(reinterpret_cast<T*>(ptx::dynamic_shared() + offset));
}

template <class V, class T>
LLMOPT_DEVICE V load(Global<T> p) {
  return ptx::load_global<V>(p.address);
}
template <class T>
LLMOPT_DEVICE T load(Global<const T> p) {
  return ptx::load_global<T>(p.address);
}
template <class V, class T>
LLMOPT_DEVICE V load_streamed(Global<T> p) {
  V v;
  ptx::load_streamed(v, p.address);
  return v;
}
template <class V, class T>
LLMOPT_DEVICE V load_fresh(Global<T> p) {
  return ptx::load_fresh<V>(p.address);
}
template <class V, class T>
LLMOPT_DEVICE void store(Global<T> p, const V& v) {
  ptx::store_global(p.address, v);
}
template <class V, class T>
LLMOPT_DEVICE V load(Shared<T> p) {
  return ptx::load_shared<V>(p.address);
}
template <class V, class T>
LLMOPT_DEVICE void store(Shared<T> p, const V& v) {
  ptx::store_shared(p.address, v);
}
template <class T>
LLMOPT_DEVICE void copy_async(Shared<T> to, Global<const T> from, int bytes) {
  ptx::cp_async_16(to.address, from.address, bytes);
}
template <class T>
LLMOPT_DEVICE void load_matrices(uint32_t (&r)[4], Shared<T> row) {
  ptx::ldmatrix_x4(r, row.address);
}

LLMOPT_DEVICE float to_float(__half x) { return __half2float(x); }
LLMOPT_DEVICE float to_float(__nv_bfloat16 x) { return __bfloat162float(x); }
template <class T>
LLMOPT_DEVICE T from_float(float x);
template <>
LLMOPT_DEVICE __half from_float(float x) {
  return __float2half(x);
}
template <>
LLMOPT_DEVICE __nv_bfloat16 from_float(float x) {
  return __float2bfloat16(x);
}

// Four or eight elements as one access.
template <class T, int kCount>
struct alignas(sizeof(T) * kCount) Pack {
  T at[kCount];
};

template <class T, int kCount, class P>
LLMOPT_DEVICE Pack<T, kCount> unpack(const P& bits) {
  static_assert(sizeof(P) == sizeof(Pack<T, kCount>));
  Pack<T, kCount> out;
  memcpy(&out, &bits, sizeof out);
  return out;
}
template <class P, class T, int kCount>
LLMOPT_DEVICE P pack(const Pack<T, kCount>& values) {
  static_assert(sizeof(P) == sizeof(values));
  P out;
  memcpy(&out, &values, sizeof out);
  return out;
}

}  // namespace llmopt::cuda
