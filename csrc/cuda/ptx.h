// The only file with PTX and with plain loads and stores: memory accesses, asynchronous copies, tensor-core products.
// tests/cuda_emulator has a header of the same name, with which the kernels run on the host.
#pragma once
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>
#include <cstring>

#define LLMOPT_DEVICE __device__ __forceinline__

namespace llmopt::cuda::ptx {

// Memory that nothing writes while the kernel runs.
template <class V>
LLMOPT_DEVICE V load_global(const void* p) {
  return __ldg(static_cast<const V*>(p));
}

// The same for what is read once: it does not push other data out of L1.
LLMOPT_DEVICE void load_streamed(uint4& v, const void* p) {
  asm("ld.global.nc.L1::no_allocate.v4.u32 {%0,%1,%2,%3}, [%4];" : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w) : "l"(p));
}
LLMOPT_DEVICE void load_streamed(uint2& v, const void* p) {
  asm("ld.global.nc.L1::no_allocate.v2.u32 {%0,%1}, [%2];" : "=r"(v.x), "=r"(v.y) : "l"(p));
}
LLMOPT_DEVICE void load_streamed(uint32_t& v, const void* p) {
  asm("ld.global.nc.L1::no_allocate.u32 %0, [%1];" : "=r"(v) : "l"(p));
}

// What other blocks of this launch have written: from L2.
template <class V>
LLMOPT_DEVICE V load_fresh(const void* p) {
  return __ldcg(static_cast<const V*>(p));
}

template <class V>
LLMOPT_DEVICE void store_global(void* p, const V& v) {
  *static_cast<V*>(p) = v;
}

template <class V>
LLMOPT_DEVICE V load_shared(const void* p) {
  return *static_cast<const V*>(p);
}

template <class V>
LLMOPT_DEVICE void store_shared(void* p, const V& v) {
  *static_cast<V*>(p) = v;
}

LLMOPT_DEVICE unsigned char* dynamic_shared() {
  extern __shared__ __align__(128) unsigned char bytes[];
  return bytes;
}

// 16 bytes to shared memory, of which the first `bytes` are read and the rest are zeros.
LLMOPT_DEVICE void cp_async_16(void* shared, const void* global, int bytes) {
  const auto to = static_cast<uint32_t>(__cvta_generic_to_shared(shared));
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(to), "l"(global), "r"(bytes) : "memory");
}
LLMOPT_DEVICE void cp_async_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }
// Until at most kPending of this thread's groups are on their way.
template <int kPending>
LLMOPT_DEVICE void cp_async_wait() {
  asm volatile("cp.async.wait_group %0;" ::"n"(kPending) : "memory");
}

// Four 8x16-byte matrices; lane 8i + r names row r of matrix i. r[i]: bytes 4 (lane % 4) .. + 3 of row lane / 4.
LLMOPT_DEVICE void ldmatrix_x4(uint32_t (&r)[4], const void* row) {
  const auto from = static_cast<uint32_t>(__cvta_generic_to_shared(row));
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(from)
               : "memory");
}

// c[16,8] += a[16,32] b[8,32]^T in signed bytes. With g = lane / 4 and t = lane % 4:
//   a[0..3]: rows g, g+8, g, g+8 and inputs 4t.. of the first, first, second, second half; b[0..1]: column g likewise;
//   c[0..3]: (g, 2t), (g, 2t+1), (g+8, 2t), (g+8, 2t+1).
LLMOPT_DEVICE void mma_m16n8k32_s8(int (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  asm("mma.sync.aligned.m16n8k32.row.col.s32.s8.s8.s32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
      : "+r"(c[0]), "+r"(c[1]), "+r"(c[2]), "+r"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

LLMOPT_DEVICE int atomic_add(int32_t* p, int v) { return atomicAdd(p, v); }

LLMOPT_DEVICE float exp2(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

}  // namespace llmopt::cuda::ptx
