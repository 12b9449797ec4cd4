// Rows of x → the left operand of the GEMM over codes with one scale a column: 64 values at a time where a row is one
// plane of a multiple of them (after a norm, and from f16, by way of f32), by the general way (prepare.h) otherwise.
#pragma once
#include "cpu/linear/terms.h"
#include "cpu/linear_quantized/gemm.h"

namespace {

constexpr int64_t kTokensPrepared = 8;  // of a chunk

struct CodeTiles : QuantizedProblem {
  using QuantizedProblem::QuantizedProblem;

  int64_t row_bytes() const { return form.steps() * kStepK; }
  // A tile takes a line of each of 16 rows: a power of two of lines apart, or a multiple, they would share sets of L1.
  int64_t row_stride() const { return (row_bytes() / 64 | 1) * 64; }
  int64_t tile_tokens() const { return kTileHeight / planes; }
  int64_t row_tiles() const { return ceil_div(M, tile_tokens()); }
  int64_t table_size() const { return row_tiles() * kTileHeight; }
  Form wide() const { return {K, 8, form.group, form.offsets}; }

  Prepared tile(char* shared, int64_t i) const {
    float* tables = reinterpret_cast<float*>(shared + table_size() * row_stride()) + i * kTileHeight;
    return {shared + i * kTileHeight * row_stride(),
            tables,
            reinterpret_cast<int32_t*>(tables + table_size()),
            tables + 2 * table_size(),
            kTileHeight,
            kTileHeight * row_stride(),
            4,
            row_stride()};
  }
};

inline __m512i round_to_int(Vec a) { return _mm512_cvtps_epi32(a.v); }

// A row of whole steps of 64 values, as it lies.
//   largest(count)     the largest magnitude as bits, which order as integers: NaN above infinity above all numbers
//   codes(k, inverse)  64 values from k on times `inverse`, as signed bytes
struct FloatRow {
  const float* x;

  uint32_t largest(int64_t count) const {
    const __m512i magnitude = _mm512_set1_epi32(0x7FFFFFFF);
    __m512i most[4] = {_mm512_setzero_si512(), _mm512_setzero_si512(), _mm512_setzero_si512(), _mm512_setzero_si512()};
    for (int64_t k = 0; k < count; k += 64)
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

  uint32_t largest(int64_t count) const {
    const __m512i magnitude = _mm512_set1_epi16(0x7FFF);
    __m512i most[2] = {_mm512_setzero_si512(), _mm512_setzero_si512()};
    for (int64_t k = 0; k < count; k += 64)
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

// What quantize_groups does, for all of a row in one plane. Meanwhile what lies behind the row is fetched, from `next`
// on, which a core does not do by itself from one page to another.
template <class Row>
void round_row(const CodeTiles& p, Row x, const Prepared& tile, int64_t row, const char* next) {
  const uint32_t bits = x.largest(p.K);
  const bool is_number = bits < 0x7F800000u;
  float largest;
  __builtin_memcpy(&largest, &bits, 4);
  float scale = largest / 127.0f;
  const float inverse = inverse_scale(scale);
  if (inverse == 0.0f) scale = 0.0f;
  char* to = tile.quad(0, 0, row);
  const int64_t lines = itemsize(p.x.dtype);  // of 64 values
  __m512i sum = _mm512_setzero_si512();
  if (is_number) {
    for (int64_t k = 0; k < p.K; k += 64) {
      const __m512i codes = x.codes(k, vset(inverse));
      for (int64_t line = 0; line < lines; ++line, next += 64) __builtin_prefetch(next);
      sum = _mm512_dpbusd_epi32(sum, _mm512_set1_epi8(1), codes);
      _mm512_storeu_si512(to + k, codes);
    }
  } else {
    __builtin_memset(to, 0, static_cast<size_t>(p.K));
    scale = __builtin_nanf("");
  }
  const int32_t total = _mm512_reduce_add_epi32(sum);
  tile.scale[row] = scale;
  tile.start[row] = -p.form.zero_point() * total;
  tile.sum[row] = scale * static_cast<float>(total);
}

void prepare_tokens(const CodeTiles& p, int64_t chunk, const Scratch& scratch) {
  const int64_t end = min64(p.M, (chunk + 1) * kTokensPrepared);
  float* values = reinterpret_cast<float*>(scratch.local);
  const int64_t stride = p.x.stride[0] * itemsize(p.x.dtype);
  const bool whole_vectors = p.planes == 1 && p.K % 64 == 0;
  for (int64_t token = chunk * kTokensPrepared; token < end; ++token) {
    const int64_t i = token / p.tile_tokens(), row = token - i * p.tile_tokens();
    const Prepared tile = p.tile(scratch.shared, i);
    const char *x = p.x.data + token * stride, *next = x + stride;
    if (!whole_vectors) {
      quantize_tokens(p, tile, token - row, token, 1, 0, 1, values);
    } else if (p.norm == kNormNone && p.x.dtype == DType::bf16) {
      round_row(p, Bf16Row{reinterpret_cast<const uint16_t*>(x)}, tile, row, next);
    } else {
      const float* from = batch_values(p, row_norm(p, token), token, 0, 1, values);
      round_row(p, FloatRow{from}, tile, row, next);
    }
  }
}

}  // namespace
