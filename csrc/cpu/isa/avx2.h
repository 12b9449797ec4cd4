// Vec for the AVX2 tier: 8 floats in a ymm register. Tails go through a small stack buffer.
#pragma once
#include <immintrin.h>

#include <cstdint>

namespace {

constexpr int kLanes = 8;
constexpr int kVecRegisters = 16;

struct Vec {
  __m256 v;
};
struct Mask {
  __m256 m;
};

inline __m256i tail_mask(int n) {
  const __m256i lane = _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7);
  return _mm256_cmpgt_epi32(_mm256_set1_epi32(n), lane);
}

inline Vec vzero() { return {_mm256_setzero_ps()}; }
inline Vec vset(float x) { return {_mm256_set1_ps(x)}; }
inline Vec vload(const float* p) { return {_mm256_loadu_ps(p)}; }
inline Vec vload_n(const float* p, int n) { return {_mm256_maskload_ps(p, tail_mask(n))}; }
inline void vstore(float* p, Vec a) { _mm256_storeu_ps(p, a.v); }
inline void vstore_n(float* p, Vec a, int n) { _mm256_maskstore_ps(p, tail_mask(n), a.v); }

inline Vec vadd(Vec a, Vec b) { return {_mm256_add_ps(a.v, b.v)}; }
inline Vec vsub(Vec a, Vec b) { return {_mm256_sub_ps(a.v, b.v)}; }
inline Vec vmul(Vec a, Vec b) { return {_mm256_mul_ps(a.v, b.v)}; }
inline Vec vdiv(Vec a, Vec b) { return {_mm256_div_ps(a.v, b.v)}; }
inline Vec vfma(Vec a, Vec b, Vec c) { return {_mm256_fmadd_ps(a.v, b.v, c.v)}; }
// a, kept from becoming part of an FMA with the sum behind it: all copies of a loop round alike.
inline __attribute__((always_inline)) Vec vrounded(Vec a) {
  asm("" : "+x"(a.v));
  return a;
}
// acc += a * b in the accumulator's own register. GCC 12 likes to turn the intrinsic into other forms of the
// instruction, with copies and spills of accumulators in loops that have no register to spare.
inline __attribute__((always_inline)) void vfma_acc(Vec& acc, Vec a, Vec b) {
#if defined(__GNUC__) && !defined(__clang__)
  asm("vfmadd231ps %2, %1, %0" : "+x"(acc.v) : "x"(a.v), "x"(b.v));
#else
  acc.v = _mm256_fmadd_ps(a.v, b.v, acc.v);
#endif
}
// Like the instruction: where either side is NaN the result is b.
inline Vec vmax(Vec a, Vec b) { return {_mm256_max_ps(a.v, b.v)}; }
inline Vec vmin(Vec a, Vec b) { return {_mm256_min_ps(a.v, b.v)}; }
inline Vec vsqrt(Vec a) { return {_mm256_sqrt_ps(a.v)}; }
inline Vec vabs(Vec a) { return {_mm256_andnot_ps(_mm256_set1_ps(-0.0f), a.v)}; }
inline Vec vneg(Vec a) { return {_mm256_xor_ps(a.v, _mm256_set1_ps(-0.0f))}; }
inline Vec vround(Vec a) { return {_mm256_round_ps(a.v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC)}; }
inline Vec vfloor(Vec a) { return {_mm256_floor_ps(a.v)}; }
inline Vec vcopysign(Vec magnitude, Vec sign) {
  const __m256 bit = _mm256_set1_ps(-0.0f);
  return {_mm256_or_ps(_mm256_andnot_ps(bit, magnitude.v), _mm256_and_ps(bit, sign.v))};
}
// Lanes 0..n-1 of a, zero in the others.
inline Vec vkeep(Vec a, int n) { return {_mm256_and_ps(a.v, _mm256_castsi256_ps(tail_mask(n)))}; }
// Each lane pair (2i, 2i+1) exchanged.
inline Vec vswap_pairs(Vec a) { return {_mm256_permute_ps(a.v, 0xB1)}; }
// Mantissa in [0.75, 1.5) and exponent with mantissa * 2^exponent = a, for finite a > 0, denormals included.
inline Vec vsplit(Vec a, Vec& exponent) {
  __m256 tiny = _mm256_cmp_ps(a.v, _mm256_set1_ps(1.17549435e-38f), _CMP_LT_OQ);
  __m256 scaled = _mm256_blendv_ps(a.v, _mm256_mul_ps(a.v, _mm256_set1_ps(8388608.0f)), tiny);
  __m256i bits = _mm256_castps_si256(scaled);
  __m256i e = _mm256_srai_epi32(_mm256_sub_epi32(bits, _mm256_set1_epi32(0x3F400000)), 23);
  exponent.v = _mm256_sub_ps(_mm256_cvtepi32_ps(e), _mm256_and_ps(tiny, _mm256_set1_ps(23.0f)));
  return {_mm256_castsi256_ps(_mm256_sub_epi32(bits, _mm256_slli_epi32(e, 23)))};
}
// a * 2^n for integral n of -254 to 254, in two half steps, so that results down to the denormals and up to inf come
// out right. Where n is NaN, a is.
inline Vec vscale2(Vec a, Vec n) {
  __m256i whole = _mm256_cvtps_epi32(n.v);
  __m256i half = _mm256_srai_epi32(whole, 1);
  __m256i rest = _mm256_sub_epi32(whole, half);
  const __m256i bias = _mm256_set1_epi32(127);
  __m256 f1 = _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_add_epi32(half, bias), 23));
  __m256 f2 = _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_add_epi32(rest, bias), 23));
  return {_mm256_mul_ps(_mm256_mul_ps(a.v, f1), f2)};
}
// The same for n from -inf on, 0 where n < least, whatever a is there.
inline Vec vscale2_from(Vec least, Vec a, Vec n) {
  const __m256 keep = _mm256_cmp_ps(n.v, least.v, _CMP_NLT_UQ);
  return vscale2({_mm256_and_ps(keep, a.v)}, {_mm256_and_ps(keep, n.v)});
}

inline Mask vlt(Vec a, Vec b) { return {_mm256_cmp_ps(a.v, b.v, _CMP_LT_OQ)}; }
inline Mask vle(Vec a, Vec b) { return {_mm256_cmp_ps(a.v, b.v, _CMP_LE_OQ)}; }
inline Mask veq(Vec a, Vec b) { return {_mm256_cmp_ps(a.v, b.v, _CMP_EQ_OQ)}; }
inline Vec vselect(Mask m, Vec yes, Vec no) { return {_mm256_blendv_ps(no.v, yes.v, m.m)}; }

inline float vreduce_add(Vec a) {
  __m128 s = _mm_add_ps(_mm256_castps256_ps128(a.v), _mm256_extractf128_ps(a.v, 1));
  s = _mm_add_ps(s, _mm_movehl_ps(s, s));
  return _mm_cvtss_f32(_mm_add_ss(s, _mm_shuffle_ps(s, s, 1)));
}
inline float vreduce_max(Vec a) {
  __m128 s = _mm_max_ps(_mm256_castps256_ps128(a.v), _mm256_extractf128_ps(a.v, 1));
  s = _mm_max_ps(s, _mm_movehl_ps(s, s));
  return _mm_cvtss_f32(_mm_max_ss(s, _mm_shuffle_ps(s, s, 1)));
}
inline float vreduce_min(Vec a) { return -vreduce_max(vneg(a)); }
// Lane i of the result is the sum of the lanes of a[i].
inline Vec vsum_lanes(const Vec* a) {
  __m256 c[2];
  for (int i = 0; i < 2; ++i)
    c[i] = _mm256_hadd_ps(_mm256_hadd_ps(a[4 * i].v, a[4 * i + 1].v), _mm256_hadd_ps(a[4 * i + 2].v, a[4 * i + 3].v));
  return {_mm256_add_ps(_mm256_permute2f128_ps(c[0], c[1], 0x20), _mm256_permute2f128_ps(c[0], c[1], 0x31))};
}

inline void copy_halves(uint16_t* to, const uint16_t* from, int n) {
  for (int i = 0; i < n; ++i) to[i] = from[i];
}
inline __m128i load_halves(const uint16_t* p) { return _mm_loadu_si128(reinterpret_cast<const __m128i*>(p)); }
inline void store_halves(uint16_t* p, __m128i h) { _mm_storeu_si128(reinterpret_cast<__m128i*>(p), h); }
inline Vec widen_bf16(__m128i h) { return {_mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(h), 16))}; }
// Round to nearest even; NaN stays NaN (quiet).
inline __m128i narrow_bf16(Vec a) {
  __m256i u = _mm256_castps_si256(a.v);
  __m256i lsb = _mm256_and_si256(_mm256_srli_epi32(u, 16), _mm256_set1_epi32(1));
  __m256i r = _mm256_srli_epi32(_mm256_add_epi32(u, _mm256_add_epi32(lsb, _mm256_set1_epi32(0x7FFF))), 16);
  __m256i nan = _mm256_castps_si256(_mm256_cmp_ps(a.v, a.v, _CMP_UNORD_Q));
  r = _mm256_blendv_epi8(r, _mm256_set1_epi32(0x7FC0), nan);
  return _mm_packus_epi32(_mm256_castsi256_si128(r), _mm256_extracti128_si256(r, 1));
}

inline Vec vload_f16(const uint16_t* p) { return {_mm256_cvtph_ps(load_halves(p))}; }
inline Vec vload_f16_n(const uint16_t* p, int n) {
  uint16_t b[8] = {};
  copy_halves(b, p, n);
  return vload_f16(b);
}
inline void vstore_f16(uint16_t* p, Vec a) { store_halves(p, _mm256_cvtps_ph(a.v, _MM_FROUND_TO_NEAREST_INT)); }
inline void vstore_f16_n(uint16_t* p, Vec a, int n) {
  uint16_t b[8];
  vstore_f16(b, a);
  copy_halves(p, b, n);
}
inline Vec vload_bf16(const uint16_t* p) { return widen_bf16(load_halves(p)); }
inline Vec vload_bf16_n(const uint16_t* p, int n) {
  uint16_t b[8] = {};
  copy_halves(b, p, n);
  return vload_bf16(b);
}
inline void vstore_bf16(uint16_t* p, Vec a) { store_halves(p, narrow_bf16(a)); }
inline void vstore_bf16_n(uint16_t* p, Vec a, int n) {
  uint16_t b[8];
  vstore_bf16(b, a);
  copy_halves(p, b, n);
}
// The even- and the odd-indexed of 16 bf16 values, widened: one register operation each, no shuffle.
inline Vec vload_bf16_even(const uint16_t* p) {
  return {_mm256_castsi256_ps(_mm256_slli_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)), 16))};
}
inline Vec vload_bf16_odd(const uint16_t* p) {
  // In assembly because the compiler would keep the values from vload_bf16_even and the mask in registers, three in
  // all, which a kernel with twelve sums does not have.
  alignas(32) static const uint32_t kMask[8] = {0xFFFF0000, 0xFFFF0000, 0xFFFF0000, 0xFFFF0000,
                                                0xFFFF0000, 0xFFFF0000, 0xFFFF0000, 0xFFFF0000};
  Vec r;
  asm("vmovups %1, %0\n\tvandps %2, %0, %0"
      : "=x"(r.v)
      : "m"(*reinterpret_cast<const uint16_t (*)[16]>(p)), "m"(kMask));
  return r;
}

// Transposes the kLanes x kLanes matrix whose rows are r[0..kLanes). Only moves bits, so any 32-bit type may be inside.
inline void vtranspose(Vec* r) {
  __m256 a[8], b[8];
#pragma GCC unroll 4
  for (int i = 0; i < 8; i += 2) {
    a[i] = _mm256_unpacklo_ps(r[i].v, r[i + 1].v);
    a[i + 1] = _mm256_unpackhi_ps(r[i].v, r[i + 1].v);
  }
#pragma GCC unroll 4
  for (int i = 0; i < 8; i += 4) {
    b[i] = _mm256_shuffle_ps(a[i], a[i + 2], 0x44);
    b[i + 1] = _mm256_shuffle_ps(a[i], a[i + 2], 0xEE);
    b[i + 2] = _mm256_shuffle_ps(a[i + 1], a[i + 3], 0x44);
    b[i + 3] = _mm256_shuffle_ps(a[i + 1], a[i + 3], 0xEE);
  }
#pragma GCC unroll 4
  for (int c = 0; c < 4; ++c) {
    r[c].v = _mm256_permute2f128_ps(b[c], b[4 + c], 0x20);
    r[4 + c].v = _mm256_permute2f128_ps(b[c], b[4 + c], 0x31);
  }
}

// Integers. A quad is four neighbouring k of one column in one 32-bit lane: weights as unsigned bytes, activations
// signed, |a| <= 127. quad_dot adds the four products to each lane, exactly.
struct IntVec {
  __m256i v;
};
inline IntVec iset(int32_t x) { return {_mm256_set1_epi32(x)}; }
inline Vec vfrom_int(IntVec a) { return {_mm256_cvtepi32_ps(a.v)}; }
// Integral lanes, |a| <= 32767.
inline __m128i code_words(Vec a) {
  const __m256i words = _mm256_cvtps_epi32(a.v);
  return _mm_packs_epi32(_mm256_castsi256_si128(words), _mm256_extracti128_si256(words, 1));
}
inline void vstore_s16(int16_t* p, Vec a) { _mm_storeu_si128(reinterpret_cast<__m128i*>(p), code_words(a)); }
// Integral lanes, |a| <= 127, as kLanes signed bytes.
inline void vstore_s8(int8_t* p, Vec a) {
  const __m128i halves = code_words(a);
  _mm_storel_epi64(reinterpret_cast<__m128i*>(p), _mm_packs_epi16(halves, halves));
}
// Two quads, `stride` bytes apart: as bytes, or as the 16-bit pairs (0, 2) and (1, 3) of isa/pairs.h. |a| is what these
// hold.
#define LLMOPT_STORES_QUADS
template <int kBytes>
inline void store_code_quads(char* to, int64_t stride, Vec a) {
  const __m128i halves = code_words(a);
  if (kBytes == 4) {
    const __m128i bytes = _mm_packs_epi16(halves, halves);
    _mm_storeu_si32(to, bytes);
    _mm_storeu_si32(to + stride, _mm_srli_si128(bytes, 4));
    return;
  }
  const __m128i pairs = _mm_shufflehi_epi16(_mm_shufflelo_epi16(halves, 0xD8), 0xD8);
  _mm_storel_epi64(reinterpret_cast<__m128i*>(to), pairs);
  _mm_storeh_pd(reinterpret_cast<double*>(to + stride), _mm_castsi128_pd(pairs));
}
inline Vec vload_s8(const int8_t* p) {
  return {_mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p))))};
}
inline Vec vload_s8_n(const int8_t* p, int n) {
  int8_t some[kLanes] = {};
  for (int i = 0; i < n; ++i) some[i] = p[i];
  return vload_s8(some);
}
inline int32_t quad_word(const char* p) {
  int32_t word;
  __builtin_memcpy(&word, p, 4);
  return word;
}
inline __m256i load_quads(const char* p) { return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)); }
inline __m256i low_nibbles(const char* p) { return _mm256_and_si256(load_quads(p), _mm256_set1_epi8(15)); }
inline __m256i high_nibbles(const char* p) {
  return _mm256_and_si256(_mm256_srli_epi16(load_quads(p), 4), _mm256_set1_epi8(15));
}
// Signed bytes that lie in a Vec, as code + 128.
inline __m256i code_quads(Vec bits) { return _mm256_xor_si256(_mm256_castps_si256(bits.v), _mm256_set1_epi8(-128)); }
inline void store_quads(char* p, __m256i quads) { _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), quads); }
inline __m256i lower_codes(__m256i quads, int32_t zero) {
  return _mm256_sub_epi8(quads, _mm256_set1_epi8(static_cast<char>(zero)));
}
// Signed byte i of every quad.
template <int i>
inline Vec quad_values(__m256i quads) {
  return {_mm256_cvtepi32_ps(_mm256_srai_epi32(_mm256_slli_epi32(quads, 24 - 8 * i), 24))};
}

constexpr bool kMultipliesBytes = false;
constexpr int kQuantizedRows = 6;  // MR: with two weight vectors, a broadcast and a product they fill the registers
using Bytes = __m256i;
inline Bytes even_bytes(Bytes b) { return _mm256_and_si256(b, _mm256_set1_epi16(255)); }
inline Bytes odd_bytes(Bytes b) { return _mm256_srli_epi16(b, 8); }
inline Bytes all_words(int32_t word) { return _mm256_set1_epi32(word); }
inline Bytes add_pairs(Bytes acc, Bytes w, Bytes a) { return _mm256_add_epi32(acc, _mm256_madd_epi16(w, a)); }
inline Bytes add_nibbles(Bytes acc, Bytes w, Bytes a) { return _mm256_add_epi16(acc, _mm256_maddubs_epi16(w, a)); }
inline IntVec add_words(IntVec acc, Bytes words) { return {add_pairs(acc.v, words, _mm256_set1_epi16(1))}; }

}  // namespace

#include "cpu/isa/pairs.h"
