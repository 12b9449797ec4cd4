// Rounding where it is cheap: groups of a multiple of 64 values that become one plane of bytes, on AVX-512 with
// products of bytes.
#pragma once
#include "cpu/linear_quantized/prepared.h"

namespace {

static_assert(kQuadBytes == 4 && kNibbleQuadBytes == 4 && kMostWideGroup == 0, "a quad is four bytes of a code each");

inline __m512i round_to_int(Vec a) { return _mm512_cvtps_epi32(a.v); }

// Values as they lie, 64 at a time.
//   largest(k, count)  the largest magnitude from k on as bits, which order as integers: NaN above infinity above all
//                      numbers
//   codes(k, inverse)  64 values from k on times `inverse`, as signed bytes
struct FloatRow {
  const float* x;

  uint32_t largest(int64_t k, int64_t count) const {
    const __m512i magnitude = _mm512_set1_epi32(0x7FFFFFFF);
    __m512i most[4] = {_mm512_setzero_si512(), _mm512_setzero_si512(), _mm512_setzero_si512(), _mm512_setzero_si512()};
    for (const int64_t end = k + count; k < end; k += 64)
#pragma GCC unroll 4
      for (int i = 0; i < 4; ++i)
        most[i] = _mm512_max_epu32(most[i], _mm512_and_si512(_mm512_loadu_si512(x + k + 16 * i), magnitude));
    return _mm512_reduce_max_epu32(
        _mm512_max_epu32(_mm512_max_epu32(most[0], most[1]), _mm512_max_epu32(most[2], most[3])));
  }
  __m512i codes(int64_t k, Vec inverse) const {
    __m512i q[4];
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) q[i] = round_to_int(vmul(vload(x + k + 16 * i), inverse));
    // Packing works within quarters of a register: its result has four bytes of each vector in turn.
    const __m512i packed = _mm512_packs_epi16(_mm512_packs_epi32(q[0], q[1]), _mm512_packs_epi32(q[2], q[3]));
    const __m512i order = _mm512_set_epi32(15, 11, 7, 3, 14, 10, 6, 2, 13, 9, 5, 1, 12, 8, 4, 0);
    return _mm512_permutexvar_epi32(order, packed);
  }
};

struct Bf16Row {
  const uint16_t* x;

  uint32_t largest(int64_t k, int64_t count) const {
    const __m512i magnitude = _mm512_set1_epi16(0x7FFF);
    __m512i most[2] = {_mm512_setzero_si512(), _mm512_setzero_si512()};
    for (const int64_t end = k + count; k < end; k += 64)
#pragma GCC unroll 2
      for (int i = 0; i < 2; ++i)
        most[i] = _mm512_max_epu16(most[i], _mm512_and_si512(_mm512_loadu_si512(x + k + 32 * i), magnitude));
    const __m512i all = _mm512_max_epu16(most[0], most[1]);
    const __m512i upper = _mm512_set1_epi32(static_cast<int32_t>(0xFFFF0000u));
    return _mm512_reduce_max_epu32(_mm512_max_epu32(_mm512_slli_epi32(all, 16), _mm512_and_si512(all, upper)));
  }
  __m512i codes(int64_t k, Vec inverse) const {
    __m512i q[2];
#pragma GCC unroll 2
    for (int i = 0; i < 2; ++i) {
      const __m512i words = _mm512_loadu_si512(x + k + 32 * i);
      const __m512i even = round_to_int(vmul(even_words(words), inverse));
      const __m512i odd = round_to_int(vmul(odd_words(words), inverse));
      q[i] = _mm512_mask_blend_epi16(0xAAAAAAAAu, even, _mm512_slli_epi32(odd, 16));
    }
    return _mm512_permutexvar_epi64(_mm512_set_epi64(7, 5, 3, 1, 6, 4, 2, 0), _mm512_packs_epi16(q[0], q[1]));
  }
};

// Codes to quads `stride` bytes apart.
inline void store_line(char* to, int64_t stride, __m512i codes) {
  if (stride == kQuadBytes) return _mm512_storeu_si512(to, codes);
  alignas(64) char quads[64];
  _mm512_store_si512(quads, codes);
#pragma GCC unroll 16
  for (int i = 0; i < 16; ++i) __builtin_memcpy(to + i * stride, quads + i * kQuadBytes, kQuadBytes);
}

// As quantize_groups. Meanwhile what lies behind the groups is fetched, from `next` on, which a core does not do by
// itself from one page to another.
template <class Row>
void round_lines(const QuantizedProblem& p, const Prepared& tile, Row x, int64_t row, int64_t group0, int64_t count,
                 const char* next) {
  const int64_t group = p.form.group, lines = itemsize(p.x.dtype);  // of 64 values
  uint32_t largest[kBatch];
  float scale[kBatch], inverse[kBatch];
  for (int64_t i = 0; i < count; ++i) largest[i] = x.largest(i * group, group);
  for (int64_t i = 0; i < count; ++i) {
    __builtin_memcpy(scale + i, largest + i, 4);
    scale[i] /= 127.0f;
    inverse[i] = inverse_scale(scale[i]);
    if (inverse[i] == 0.0f) scale[i] = 0.0f;
  }
  for (int64_t i = 0; i < count; ++i) {
    char* to = tile.quad(group0 + i, 0, row);
    const bool is_number = largest[i] < 0x7F800000u;
    const Vec times = vset(inverse[i]);
    __m512i sum = _mm512_setzero_si512();
    for (int64_t k = 0; k < group; k += 64, to += 16 * tile.quad_stride) {
      const __m512i codes = is_number ? x.codes(i * group + k, times) : _mm512_setzero_si512();
      for (int64_t line = 0; line < lines; ++line, next += 64) __builtin_prefetch(next);
      sum = _mm512_dpbusd_epi32(sum, _mm512_set1_epi8(1), codes);
      store_line(to, tile.quad_stride, codes);
    }
    const int32_t total = _mm512_reduce_add_epi32(sum);
    const int64_t at = (group0 + i) * tile.rows + row;
    tile.scale[at] = is_number ? scale[i] * tile.unit : __builtin_nanf("");
    tile.start[at] = -p.form.zero_point() * total;
    tile.sum[at] = tile.scale[at] * static_cast<float>(total);
  }
}

}  // namespace
