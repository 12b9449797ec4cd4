// What nvcc knows by itself, for g++: included in front of every kernel file.
#pragma once
#include <cmath>
#include <cstdint>
#include <cstring>

#include "emulator.h"

#define __global__
#define __device__
#define __forceinline__ inline __attribute__((always_inline))
#define __launch_bounds__(...)
#define __grid_constant__ &  // const T __grid_constant__ p: the launch hands over the address of its parameters

#define threadIdx (emulator::position().thread)
#define blockIdx (emulator::position().block)
#define blockDim (emulator::position().block_dim)
#define gridDim (emulator::position().grid_dim)

#define __syncthreads() emulator::barrier(__FILE__, __LINE__)

// clang-format off
struct alignas(8) int2 { int x, y; };
struct alignas(16) int4 { int x, y, z, w; };
struct alignas(8) uint2 { uint32_t x, y; };
struct alignas(16) uint4 { uint32_t x, y, z, w; };
struct alignas(8) float2 { float x, y; };
struct alignas(16) float4 { float x, y, z, w; };
// clang-format on

inline void __syncwarp(uint32_t mask = 0xffffffffu) {
  emulator::collective(emulator::kSyncWarp, mask, nullptr, nullptr, [](const void* const*, void* const*, uint32_t) {});
}

// A lane that asks for one outside the mask gets no value that means anything.
template <class T>
T __shfl_xor_sync(uint32_t mask, T value, int flip) {
  struct Operand {
    T value;
    int flip;
  } in{value, flip};
  T out;
  emulator::collective(emulator::kShuffle, mask, &in, &out, [](const void* const* in, void* const* out, uint32_t mask) {
    for (int l = 0; l < 32; ++l) {
      if (!(mask >> l & 1)) continue;
      const int from = (l ^ static_cast<const Operand*>(in[l])->flip) & 31;
      if (!(mask >> from & 1))
        emulator::fail("partial collective: lane %d asks for lane %d, not in mask %08x", l, from, mask);
      *static_cast<T*>(out[l]) = static_cast<const Operand*>(in[from])->value;
    }
  });
  return out;
}

inline int __dp4a(int a, int b, int c) {
  int8_t x[4], y[4];
  memcpy(x, &a, 4);
  memcpy(y, &b, 4);
  for (int i = 0; i < 4; ++i) c += x[i] * y[i];
  return c;
}

inline void __threadfence() { emulator::fence(); }
