// The AMX tier: Vec as in AVX-512, and tile registers of 16 rows by 64 bytes.
// A tile product is C[16][16] += A[16][k] * B[k][16]: A holds rows of k, B rows of k pairs (bf16) or quads (bytes).
#pragma once
#include "cpu/isa/avx512.h"

namespace {

constexpr int kTileRows = 16, kTileBytes = 64;

// The tile registers of this thread for as long as it lives, all of them whole. Registers 0..3 are sums, 4 and 5 hold
// A, 6 and 7 hold B.
struct TileScope {
  TileScope() {
    struct alignas(64) Config {
      uint8_t palette, start_row, reserved[14];
      uint16_t row_bytes[16];
      uint8_t rows[16];
    } config{};
    config.palette = 1;
    for (int t = 0; t < 8; ++t) {
      config.row_bytes[t] = kTileBytes;
      config.rows[t] = kTileRows;
    }
    // Not _tile_loadconfig: GCC 12 declares that it reads eight of the 64 bytes, so that stores to the others may go.
    asm volatile("ldtilecfg %0" : : "m"(config));
  }
  ~TileScope() { _tile_release(); }
  TileScope(const TileScope&) = delete;
  TileScope& operator=(const TileScope&) = delete;
};

// What was stored is in memory: the intrinsics that load tiles do not say that they read any.
inline void before_tile_loads() { asm volatile("" : : : "memory"); }

// Without arithmetic on whole vectors and stores of tiles for some 0.8 us, the next of them waits 0.3 us. One
// operation, whose result is nobody's, keeps them going.
inline __attribute__((always_inline)) void keep_vectors_awake() {
  asm volatile("vaddps %%zmm16, %%zmm16, %%zmm16" : : : "xmm16");
}

// 32 floats rounded to bf16, the words of `low` first. Denormals become zero.
inline __m512i tile_words(Vec low, Vec high) { return reinterpret_cast<__m512i>(_mm512_cvtne2ps_pbh(high.v, low.v)); }
#define LLMOPT_ISA_NARROWS_PAIRS
inline void vstore_bf16_pair(uint16_t* p, Vec a, Vec b) { _mm512_storeu_si512(p, tile_words(a, b)); }
inline Vec low_words(__m512i words) { return widen_bf16(_mm512_castsi512_si256(words)); }
inline Vec high_words(__m512i words) { return widen_bf16(_mm512_extracti64x4_epi64(words, 1)); }

// Two vectors in turn, rounded the same way.
inline __m512i word_pairs(Vec even, Vec odd) {
  const __m512i order = _mm512_set_epi16(31, 15, 30, 14, 29, 13, 28, 12, 27, 11, 26, 10, 25, 9, 24, 8, 23, 7, 22, 6, 21,
                                         5, 20, 4, 19, 3, 18, 2, 17, 1, 16, 0);
  return _mm512_permutexvar_epi16(order, tile_words(even, odd));
}

// The bf16 numbers that begin the elements of two vectors (cut off, not rounded), in turn, as B wants the pairs of a
// column; the vectors keep their rests.
inline __m512i split_pairs(Vec& even, Vec& odd) {
  const __m512i upper = _mm512_set1_epi32(static_cast<int32_t>(0xFFFF0000u));
  const __m512i low = _mm512_castps_si512(even.v), high = _mm512_castps_si512(odd.v);
  even.v = _mm512_sub_ps(even.v, _mm512_castsi512_ps(_mm512_and_si512(low, upper)));
  odd.v = _mm512_sub_ps(odd.v, _mm512_castsi512_ps(_mm512_and_si512(high, upper)));
  return _mm512_ternarylogic_epi32(_mm512_srli_epi32(low, 16), high, upper, 0xF8);  // low | (high & upper)
}

// Two vectors rounded to bf16 (ties away from zero), in turn: what B wants of two k. They become what was rounded.
inline __m512i round_pairs(Vec& even, Vec& odd) {
  const __m512i half = _mm512_set1_epi32(0x8000), upper = _mm512_set1_epi32(static_cast<int32_t>(0xFFFF0000u));
  const __m512i low = _mm512_and_si512(_mm512_add_epi32(_mm512_castps_si512(even.v), half), upper);
  const __m512i high = _mm512_and_si512(_mm512_add_epi32(_mm512_castps_si512(odd.v), half), upper);
  even.v = _mm512_castsi512_ps(low), odd.v = _mm512_castsi512_ps(high);
  return _mm512_or_si512(_mm512_srli_epi32(low, 16), high);
}

// Collects whether any of the words it has seen is an infinity or a NaN.
struct FiniteWords {
  __m512i largest = _mm512_setzero_si512();
  void see(__m512i words) { largest = _mm512_max_epu16(largest, _mm512_and_si512(words, _mm512_set1_epi16(0x7FFF))); }
  bool all() const { return _mm512_cmpge_epu16_mask(largest, _mm512_set1_epi16(0x7F80)) == 0; }
};

}  // namespace
