// Vec for the AVX-512 tiers: 16 floats in a zmm register. Tails are masked loads and stores.
#pragma once
// GCC 12 warns about the operand its own intrinsics leave undefined on purpose.
#pragma GCC diagnostic push
#pragma GCC diagnostic ignored "-Wuninitialized"
#include <immintrin.h>
#pragma GCC diagnostic pop

#include <cstdint>

namespace {

constexpr int kLanes = 16;
constexpr int kVecRegisters = 32;

struct Vec {
  __m512 v;
};
struct Mask {
  __mmask16 m;
};

inline __mmask16 tail_mask(int n) { return static_cast<__mmask16>((1u << n) - 1); }

inline Vec vzero() { return {_mm512_setzero_ps()}; }
inline Vec vset(float x) { return {_mm512_set1_ps(x)}; }
inline Vec vload(const float* p) { return {_mm512_loadu_ps(p)}; }
inline Vec vload_n(const float* p, int n) { return {_mm512_maskz_loadu_ps(tail_mask(n), p)}; }
inline void vstore(float* p, Vec a) { _mm512_storeu_ps(p, a.v); }
inline void vstore_n(float* p, Vec a, int n) { _mm512_mask_storeu_ps(p, tail_mask(n), a.v); }

inline Vec vadd(Vec a, Vec b) { return {_mm512_add_ps(a.v, b.v)}; }
inline Vec vsub(Vec a, Vec b) { return {_mm512_sub_ps(a.v, b.v)}; }
inline Vec vmul(Vec a, Vec b) { return {_mm512_mul_ps(a.v, b.v)}; }
inline Vec vdiv(Vec a, Vec b) { return {_mm512_div_ps(a.v, b.v)}; }
inline Vec vfma(Vec a, Vec b, Vec c) { return {_mm512_fmadd_ps(a.v, b.v, c.v)}; }
// a, kept from becoming part of an FMA with the sum behind it: all copies of a loop round alike.
inline __attribute__((always_inline)) Vec vrounded(Vec a) {
  asm("" : "+v"(a.v));
  return a;
}
// acc += a * b in the accumulator's own register. GCC 12 likes to turn the intrinsic into other forms of the
// instruction, with copies and spills of accumulators in loops that have no register to spare.
inline __attribute__((always_inline)) void vfma_acc(Vec& acc, Vec a, Vec b) {
#if defined(__GNUC__) && !defined(__clang__)
  asm("vfmadd231ps %2, %1, %0" : "+v"(acc.v) : "v"(a.v), "v"(b.v));
#else
  acc.v = _mm512_fmadd_ps(a.v, b.v, acc.v);
#endif
}
// Like the instruction: where either side is NaN the result is b.
inline Vec vmax(Vec a, Vec b) { return {_mm512_max_ps(a.v, b.v)}; }
// The larger of two magnitudes; NaN is larger than all.
inline Vec vmax_magnitude(Vec a, Vec b) {
  return {_mm512_castsi512_ps(_mm512_max_epu32(_mm512_castps_si512(a.v), _mm512_castps_si512(b.v)))};
}
inline Vec vmin(Vec a, Vec b) { return {_mm512_min_ps(a.v, b.v)}; }
inline Vec vsqrt(Vec a) { return {_mm512_sqrt_ps(a.v)}; }
inline Vec vabs(Vec a) { return {_mm512_abs_ps(a.v)}; }
inline Vec vneg(Vec a) { return {_mm512_xor_ps(a.v, _mm512_set1_ps(-0.0f))}; }
inline Vec vround(Vec a) { return {_mm512_roundscale_ps(a.v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC)}; }
inline Vec vfloor(Vec a) { return {_mm512_roundscale_ps(a.v, _MM_FROUND_TO_NEG_INF | _MM_FROUND_NO_EXC)}; }
inline Vec vcopysign(Vec magnitude, Vec sign) {
  const __m512 bit = _mm512_set1_ps(-0.0f);
  return {_mm512_or_ps(_mm512_andnot_ps(bit, magnitude.v), _mm512_and_ps(bit, sign.v))};
}
// Lanes 0..n-1 of a, zero in the others.
inline Vec vkeep(Vec a, int n) { return {_mm512_maskz_mov_ps(tail_mask(n), a.v)}; }
// Each lane pair (2i, 2i+1) exchanged.
inline Vec vswap_pairs(Vec a) { return {_mm512_permute_ps(a.v, 0xB1)}; }
// Mantissa in [0.75, 1.5) and exponent with mantissa * 2^exponent = a, for finite a > 0, denormals included.
inline Vec vsplit(Vec a, Vec& exponent) {
  __m512 m = _mm512_getmant_ps(a.v, _MM_MANT_NORM_p75_1p5, _MM_MANT_SIGN_zero);
  exponent.v = _mm512_sub_ps(_mm512_getexp_ps(a.v), _mm512_getexp_ps(m));
  return {m};
}
// a * 2^n for integral n of -254 to 254 (any n here: 0 and inf at the ends). Where n is NaN, a is.
inline Vec vscale2(Vec a, Vec n) { return {_mm512_scalef_ps(a.v, n.v)}; }
// The same for n from -inf on, 0 where n < least, whatever a is there.
inline Vec vscale2_from(Vec least, Vec a, Vec n) {
  return {_mm512_maskz_scalef_ps(_mm512_cmp_ps_mask(n.v, least.v, _CMP_NLT_UQ), a.v, n.v)};
}

inline Mask vlt(Vec a, Vec b) { return {_mm512_cmp_ps_mask(a.v, b.v, _CMP_LT_OQ)}; }
inline Mask vle(Vec a, Vec b) { return {_mm512_cmp_ps_mask(a.v, b.v, _CMP_LE_OQ)}; }
inline Mask veq(Vec a, Vec b) { return {_mm512_cmp_ps_mask(a.v, b.v, _CMP_EQ_OQ)}; }
inline Vec vselect(Mask m, Vec yes, Vec no) { return {_mm512_mask_blend_ps(m.m, no.v, yes.v)}; }

// Element i of a table of 32, i being the last five bits of a lane.
#define LLMOPT_ISA_LOOKS_UP
inline Vec vlookup(Vec first, Vec second, Vec i) {
  return {_mm512_permutex2var_ps(first.v, _mm512_castps_si512(i.v), second.v)};
}

inline float vreduce_add(Vec a) { return _mm512_reduce_add_ps(a.v); }
inline float vreduce_max(Vec a) { return _mm512_reduce_max_ps(a.v); }
inline float vreduce_min(Vec a) { return _mm512_reduce_min_ps(a.v); }
// Lane i of the result is the sum of the lanes of a[i].
inline Vec vsum_lanes(const Vec* a) {
  __m512 c[4];
  for (int i = 0; i < 4; ++i) {
    __m512 b[2];
    for (int h = 0; h < 2; ++h) {
      __m512 x = a[4 * i + 2 * h].v, y = a[4 * i + 2 * h + 1].v;
      b[h] = _mm512_add_ps(_mm512_unpacklo_ps(x, y), _mm512_unpackhi_ps(x, y));
    }
    __m512d x = _mm512_castps_pd(b[0]), y = _mm512_castps_pd(b[1]);
    c[i] = _mm512_add_ps(_mm512_castpd_ps(_mm512_unpacklo_pd(x, y)), _mm512_castpd_ps(_mm512_unpackhi_pd(x, y)));
  }
  __m512 d0 = _mm512_add_ps(_mm512_shuffle_f32x4(c[0], c[1], 0x44), _mm512_shuffle_f32x4(c[0], c[1], 0xEE));
  __m512 d1 = _mm512_add_ps(_mm512_shuffle_f32x4(c[2], c[3], 0x44), _mm512_shuffle_f32x4(c[2], c[3], 0xEE));
  return {_mm512_add_ps(_mm512_shuffle_f32x4(d0, d1, 0x88), _mm512_shuffle_f32x4(d0, d1, 0xDD))};
}

inline Vec vload_f16(const uint16_t* p) {
  return {_mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)))};
}
inline Vec vload_f16_n(const uint16_t* p, int n) {
  return {_mm512_cvtph_ps(_mm256_maskz_loadu_epi16(tail_mask(n), p))};
}
inline void vstore_f16(uint16_t* p, Vec a) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_cvtps_ph(a.v, _MM_FROUND_TO_NEAREST_INT));
}
inline void vstore_f16_n(uint16_t* p, Vec a, int n) {
  _mm256_mask_storeu_epi16(p, tail_mask(n), _mm512_cvtps_ph(a.v, _MM_FROUND_TO_NEAREST_INT));
}
inline Vec widen_bf16(__m256i h) { return {_mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(h), 16))}; }
// Round to nearest even; NaN stays NaN (quiet). The upper halves are picked by one permutation.
inline __m256i narrow_bf16(Vec a) {
  const __m512i upper = _mm512_set_epi16(0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 31, 29, 27, 25, 23, 21, 19, 17,
                                         15, 13, 11, 9, 7, 5, 3, 1);
  __m512i u = _mm512_castps_si512(a.v);
  __mmask16 odd = _mm512_test_epi32_mask(u, _mm512_set1_epi32(0x10000));
  __m512i r = _mm512_add_epi32(u, _mm512_set1_epi32(0x7FFF));
  r = _mm512_mask_add_epi32(r, odd, r, _mm512_set1_epi32(1));
  __mmask16 nan = _mm512_cmp_ps_mask(a.v, a.v, _CMP_UNORD_Q);
  r = _mm512_mask_mov_epi32(r, nan, _mm512_set1_epi32(0x7FC00000));
  return _mm512_castsi512_si256(_mm512_permutexvar_epi16(upper, r));
}
inline Vec vload_bf16(const uint16_t* p) { return widen_bf16(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p))); }
inline Vec vload_bf16_n(const uint16_t* p, int n) { return widen_bf16(_mm256_maskz_loadu_epi16(tail_mask(n), p)); }
inline void vstore_bf16(uint16_t* p, Vec a) { _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), narrow_bf16(a)); }
inline void vstore_bf16_n(uint16_t* p, Vec a, int n) { _mm256_mask_storeu_epi16(p, tail_mask(n), narrow_bf16(a)); }
// The even- and the odd-indexed of 32 bf16 values, widened: one register operation each, no shuffle.
inline Vec even_words(__m512i words) { return {_mm512_castsi512_ps(_mm512_slli_epi32(words, 16))}; }
inline Vec odd_words(__m512i words) { return {_mm512_castsi512_ps(_mm512_maskz_mov_epi16(0xAAAAAAAAu, words))}; }
inline Vec vload_bf16_even(const uint16_t* p) { return even_words(_mm512_loadu_si512(p)); }
inline Vec vload_bf16_odd(const uint16_t* p) { return {_mm512_castsi512_ps(_mm512_maskz_loadu_epi16(0xAAAAAAAAu, p))}; }

// Transposes the kLanes x kLanes matrix whose rows are r[0..kLanes). Only moves bits, so any 32-bit type may be inside.
inline void vtranspose(Vec* r) {
  __m512 a[16], b[16];
#pragma GCC unroll 8
  for (int i = 0; i < 16; i += 2) {
    a[i] = _mm512_unpacklo_ps(r[i].v, r[i + 1].v);
    a[i + 1] = _mm512_unpackhi_ps(r[i].v, r[i + 1].v);
  }
#pragma GCC unroll 4
  for (int i = 0; i < 16; i += 4) {
    for (int j = 0; j < 2; ++j) {
      __m512d lo = _mm512_castps_pd(a[i + j]), hi = _mm512_castps_pd(a[i + j + 2]);
      b[i + 2 * j] = _mm512_castpd_ps(_mm512_unpacklo_pd(lo, hi));
      b[i + 2 * j + 1] = _mm512_castpd_ps(_mm512_unpackhi_pd(lo, hi));
    }
  }
  // b[4 * g + c] holds, per 128-bit lane q, column 4 * q + c of rows 4 * g .. 4 * g + 3.
#pragma GCC unroll 4
  for (int c = 0; c < 4; ++c) {
    __m512 low01 = _mm512_shuffle_f32x4(b[c], b[4 + c], 0x88), high01 = _mm512_shuffle_f32x4(b[c], b[4 + c], 0xDD);
    __m512 low23 = _mm512_shuffle_f32x4(b[8 + c], b[12 + c], 0x88);
    __m512 high23 = _mm512_shuffle_f32x4(b[8 + c], b[12 + c], 0xDD);
    r[c].v = _mm512_shuffle_f32x4(low01, low23, 0x88);
    r[4 + c].v = _mm512_shuffle_f32x4(high01, high23, 0x88);
    r[8 + c].v = _mm512_shuffle_f32x4(low01, low23, 0xDD);
    r[12 + c].v = _mm512_shuffle_f32x4(high01, high23, 0xDD);
  }
}

// 2^x within 8e-5 of itself, for results that are rounded to fewer bits; 0 below 2^-126.
inline Vec vexp2_rough(Vec x) {
  const Vec r{_mm512_reduce_ps(x.v, _MM_FROUND_TO_NEG_INF | _MM_FROUND_NO_EXC)};  // x - floor(x)
  Vec p = vfma(r, vset(0.0780245166f), vset(0.226067239f));
  p = vfma(p, r, vset(0.695833468f));
  p = vfma(p, r, vset(0.99992523f));
  return vscale2_from(vset(-126.0f), p, x);  // takes floor(x)
}

// Integers. A quad is four neighbouring k of one column in one 32-bit lane: weights as unsigned bytes, activations
// signed, |a| <= 127. quad_dot adds the four products to each lane, exactly.
struct IntVec {
  __m512i v;
};
inline IntVec iset(int32_t x) { return {_mm512_set1_epi32(x)}; }
inline Vec vfrom_int(IntVec a) { return {_mm512_cvtepi32_ps(a.v)}; }
// Integral lanes, |a| <= 127, as kLanes signed bytes.
inline void vstore_s8(int8_t* p, Vec a) {
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm512_cvtsepi32_epi8(_mm512_cvtps_epi32(a.v)));
}
// Integral lanes, |a| <= 32767.
inline void vstore_s16(int16_t* p, Vec a) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_cvtsepi32_epi16(_mm512_cvtps_epi32(a.v)));
}
inline Vec vload_s8(const int8_t* p) {
  return {_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))))};
}
inline Vec vload_s8_n(const int8_t* p, int n) {
  return {_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_maskz_loadu_epi8(tail_mask(n), p)))};
}
inline int32_t quad_word(const char* p) {
  int32_t word;
  __builtin_memcpy(&word, p, 4);
  return word;
}
inline __m512i load_quads(const char* p) { return _mm512_loadu_si512(p); }
inline __m512i low_nibbles(const char* p) { return _mm512_and_si512(load_quads(p), _mm512_set1_epi8(15)); }
inline __m512i high_nibbles(const char* p) {
  return _mm512_and_si512(_mm512_srli_epi16(load_quads(p), 4), _mm512_set1_epi8(15));
}
// Signed bytes that lie in a Vec, as code + 128.
inline __m512i code_quads(Vec bits) { return _mm512_xor_si512(_mm512_castps_si512(bits.v), _mm512_set1_epi8(-128)); }
inline void store_quads(char* p, __m512i quads) { _mm512_storeu_si512(p, quads); }
inline __m512i lower_codes(__m512i quads, int32_t zero) {
  return _mm512_sub_epi8(quads, _mm512_set1_epi8(static_cast<char>(zero)));
}
// Signed byte i of every quad.
template <int i>
inline Vec quad_values(__m512i quads) {
  return {_mm512_cvtepi32_ps(_mm512_srai_epi32(_mm512_slli_epi32(quads, 24 - 8 * i), 24))};
}

#ifdef __AVX512VNNI__
constexpr int kQuantizedRows = 7;  // MR: integer and f32 sums, two weight vectors and a broadcast fill the registers
constexpr int kQuadBytes = 4;      // one row's quad as quad_row reads it
constexpr int kNibbleQuadBytes = 4;
struct Quad {
  __m512i bytes;
};
inline Quad quad(__m512i bytes) { return {bytes}; }
constexpr bool kMultipliesBytes = true;
inline Quad quad_row(const char* p) { return {_mm512_set1_epi32(quad_word(p))}; }
inline void quad_pack(char* to, const int8_t* a) { __builtin_memcpy(to, a, 4); }
// GCC copies and spills accumulators around the intrinsic.
inline __attribute__((always_inline)) void quad_dot(IntVec& acc, const Quad& w, const Quad& a) {
#if defined(__GNUC__) && !defined(__clang__)
  asm("vpdpbusd %2, %1, %0" : "+v"(acc.v) : "v"(w.bytes), "v"(a.bytes));
#else
  acc.v = _mm512_dpbusd_epi32(acc.v, w.bytes, a.bytes);
#endif
}
// A pair of words is two neighbouring k of one column in one 32-bit lane; word_dot adds their two products.
#define LLMOPT_ISA_WORDS
inline IntVec load_pairs(const char* p) { return {_mm512_loadu_si512(p)}; }
inline IntVec all_pairs(const char* p) { return iset(quad_word(p)); }
// Two k of integral lanes, |a| <= 32767, as pairs.
inline void store_pairs(char* p, Vec even, Vec odd) {
  const __m512i low = _mm512_cvtps_epi32(even.v), high = _mm512_slli_epi32(_mm512_cvtps_epi32(odd.v), 16);
  _mm512_storeu_si512(p, _mm512_mask_mov_epi16(low, 0xAAAAAAAAu, high));
}
// The magnitudes of words where they are larger, and the larger one of each pair.
inline IntVec most_words(IntVec most, IntVec pairs) { return {_mm512_max_epi16(most.v, _mm512_abs_epi16(pairs.v))}; }
inline Vec larger_word(IntVec magnitudes) {
  const __m512i odd = _mm512_srli_epi32(magnitudes.v, 16),
                even = _mm512_and_si512(magnitudes.v, _mm512_set1_epi32(0xFFFF));
  return {_mm512_cvtepi32_ps(_mm512_max_epi32(odd, even))};
}
inline __attribute__((always_inline)) void word_dot(IntVec& acc, IntVec w, IntVec a) {
#if defined(__GNUC__) && !defined(__clang__)
  __m512i sum = acc.v;  // of an array that an asm writes to, GCC keeps no element in a register
  asm("vpdpwssd %2, %1, %0" : "+v"(sum) : "v"(w.v), "v"(a.v));
  acc.v = sum;
#else
  acc.v = _mm512_dpwssd_epi32(acc.v, w.v, a.v);
#endif
}
#else
constexpr int kQuantizedRows = 6;  // MR: streams fold beside pairs of weights
constexpr bool kMultipliesBytes = false;
using Bytes = __m512i;
inline Bytes even_bytes(Bytes b) { return _mm512_and_si512(b, _mm512_set1_epi16(255)); }
inline Bytes odd_bytes(Bytes b) { return _mm512_srli_epi16(b, 8); }
inline Bytes all_words(int32_t word) { return _mm512_set1_epi32(word); }
inline Bytes add_pairs(Bytes acc, Bytes w, Bytes a) { return _mm512_add_epi32(acc, _mm512_madd_epi16(w, a)); }
inline Bytes add_nibbles(Bytes acc, Bytes w, Bytes a) { return _mm512_add_epi16(acc, _mm512_maddubs_epi16(w, a)); }
inline IntVec add_words(IntVec acc, Bytes words) { return {add_pairs(acc.v, words, _mm512_set1_epi16(1))}; }
#endif

}  // namespace

#ifndef __AVX512VNNI__
#include "cpu/isa/pairs.h"
#endif
