// csrc/cuda/ptx.h on the host: the same functions, every access checked.
#pragma once
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#define LLMOPT_DEVICE inline __attribute__((always_inline))

namespace llmopt::cuda::ptx {

template <class V>
LLMOPT_DEVICE V load_global(const void* p) {
  emulator::access_global(p, sizeof(V), emulator::kReadOnly);
  return *static_cast<const V*>(p);
}
template <class V>
LLMOPT_DEVICE void load_streamed(V& v, const void* p) {
  v = load_global<V>(p);
}
template <class V>
LLMOPT_DEVICE V load_fresh(const void* p) {
  emulator::access_global(p, sizeof(V), emulator::kFresh);
  return *static_cast<const V*>(p);
}
template <class V>
LLMOPT_DEVICE void store_global(void* p, const V& v) {
  emulator::access_global(p, sizeof(V), emulator::kWrite);
  *static_cast<V*>(p) = v;
}
template <class V>
LLMOPT_DEVICE V load_shared(const void* p) {
  V v;
  emulator::read_shared(&v, p, sizeof(V));
  return v;
}
template <class V>
LLMOPT_DEVICE void store_shared(void* p, const V& v) {
  emulator::write_shared(p, &v, sizeof(V));
}
LLMOPT_DEVICE unsigned char* dynamic_shared() { return emulator::shared_memory(); }

LLMOPT_DEVICE void cp_async_16(void* shared, const void* global, int bytes) {
  emulator::copy_async(shared, global, bytes);
}
LLMOPT_DEVICE void cp_async_commit() { emulator::commit_async(); }
template <int kPending>
LLMOPT_DEVICE void cp_async_wait() {
  emulator::wait_async(kPending);
}

// A lane reads the row it names, then the warp exchanges the rows.
LLMOPT_DEVICE void ldmatrix_x4(uint32_t (&r)[4], const void* row) {
  uint32_t words[4];
  emulator::read_shared(words, row, 16);
  emulator::collective(emulator::kLoadMatrices, 0xffffffffu, words, r,
                       [](const void* const* in, void* const* out, uint32_t) {
                         for (int l = 0; l < 32; ++l)
                           for (int i = 0; i < 4; ++i)
                             static_cast<uint32_t*>(out[l])[i] = static_cast<const uint32_t*>(in[8 * i + l / 4])[l % 4];
                       });
}

struct Fragments {
  uint32_t a[4], b[2];
  int c[4];
};

inline void multiply(const void* const* in, void* const* out, uint32_t) {
  int8_t a[16][32], b[8][32];
  for (int l = 0; l < 32; ++l) {
    const auto& f = *static_cast<const Fragments*>(in[l]);
    const int g = l / 4, t = l % 4;
    for (int i = 0; i < 4; ++i) memcpy(&a[g + i % 2 * 8][t * 4 + i / 2 * 16], &f.a[i], 4);
    for (int i = 0; i < 2; ++i) memcpy(&b[g][t * 4 + i * 16], &f.b[i], 4);
  }
  for (int l = 0; l < 32; ++l)
    for (int i = 0; i < 4; ++i) {
      const int m = l / 4 + i / 2 * 8, n = l % 4 * 2 + i % 2;
      int sum = static_cast<const Fragments*>(in[l])->c[i];
      for (int k = 0; k < 32; ++k) sum += a[m][k] * b[n][k];
      static_cast<int*>(out[l])[i] = sum;
    }
}

LLMOPT_DEVICE void mma_m16n8k32_s8(int (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  const Fragments in{{a[0], a[1], a[2], a[3]}, {b[0], b[1]}, {c[0], c[1], c[2], c[3]}};
  emulator::collective(emulator::kMultiply, 0xffffffffu, &in, c, multiply);
}

// Blocks run one after another, threads until they wait: nothing comes in between.
LLMOPT_DEVICE int atomic_add(int32_t* p, int v) {
  emulator::access_atomic(p, 4);
  const int before = *p;
  *p = before + v;
  return before;
}

LLMOPT_DEVICE float exp2(float x) { return std::exp2(x); }

}  // namespace llmopt::cuda::ptx
