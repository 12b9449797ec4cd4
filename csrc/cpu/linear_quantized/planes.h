// Rounding a group of values to planes of codes, in every tier and for every group.
#pragma once
#include "cpu/linear_quantized/prepared.h"

namespace {

// Sums and maxima of a row are several chains: one would wait for itself.
constexpr int kRowChains = 4;

// The largest magnitude of `count` values. NaNs may hide behind it.
inline float largest_magnitude(const float* values, int64_t count) {
  Vec largest[kRowChains] = {vzero(), vzero(), vzero(), vzero()};
  int64_t k = 0;
  for (; k + kRowChains * kLanes <= count; k += kRowChains * kLanes)
#pragma GCC unroll 4
    for (int i = 0; i < kRowChains; ++i) largest[i] = vmax(vabs(vload(values + k + i * kLanes)), largest[i]);
  for (; k < count; k += kLanes) largest[0] = vmax(vabs(vload(values + k)), largest[0]);
  return vreduce_max(vmax(vmax(largest[0], largest[1]), vmax(largest[2], largest[3])));
}

template <int kBytes, class Code>
inline void pack_quad(char* to, const Code* codes) {
  if constexpr (kBytes == 4)
    __builtin_memcpy(to, codes, 4);
  else
    quad_pack(to, codes);
}

inline void store_codes(int8_t* to, Vec codes) { vstore_s8(to, codes); }
#ifdef LLMOPT_ISA_PAIRS
inline void store_codes(int16_t* to, Vec codes) { vstore_s16(to, codes); }
#endif

// One plane of a group: codes = round(values * inverse), a quad in kBytes, and what they leave over of these products
// back to `values` if another plane follows. Returns the sum of the codes: NaN if a value is NaN or Inf, whatever the
// scale.
template <class Code, int kBytes, bool kLast>
inline __attribute__((always_inline)) float round_plane(const Form& form, float inverse, float* values, char* to,
                                                        int64_t quad_stride) {
  Vec sum[kRowChains] = {vzero(), vzero(), vzero(), vzero()};
  auto round = [&](int64_t k, int chain) __attribute__((always_inline)) {
    const Vec x = vload(values + k), q = vround(vmul(x, vset(inverse)));
    sum[chain] = vadd(sum[chain], q);
    if (!kLast) vstore(values + k, vfma(x, vset(inverse), vneg(q)));
    return q;
  };
  Code codes[kLanes];
  const bool side_by_side = kBytes == 4 && quad_stride == kBytes;  // the codes of a row
  auto whole_vector = [&](int64_t k, int chain) __attribute__((always_inline)) {
    const Vec q = round(k, chain);
    if (side_by_side) return vstore_s8(reinterpret_cast<int8_t*>(to + k), q);
    char* at = to + k / 4 * quad_stride;
#ifdef LLMOPT_STORES_QUADS
    store_code_quads<kBytes>(at, quad_stride, q);
#else
    store_codes(codes, q);
#pragma GCC unroll 4
    for (int i = 0; i < kLanes / 4; ++i) pack_quad<kBytes>(at + i * quad_stride, codes + 4 * i);
#endif
  };
  // Vectors that have all their quads.
  const int64_t whole = min64(kStepK * form.steps(), ceil_div(form.group, kLanes) * kLanes) / kLanes * kLanes;
  int64_t k = 0;
  for (; k + kRowChains * kLanes <= whole; k += kRowChains * kLanes)
#pragma GCC unroll 4
    for (int i = 0; i < kRowChains; ++i) whole_vector(k + i * kLanes, i);
  for (; k < whole; k += kLanes) whole_vector(k, 0);
  if (k < form.group) {
    store_codes(codes, round(k, 0));
    for (int64_t i = 0; i < 2 * form.steps() - k / 4; ++i)
      pack_quad<kBytes>(to + (k / 4 + i) * quad_stride, codes + 4 * i);
  }
  return vreduce_add(vadd(vadd(sum[0], sum[1]), vadd(sum[2], sum[3])));
}

void clear_quads(const Form& form, int64_t first, char* to, int64_t quad_stride) {
  for (int64_t i = first; i < 2 * form.steps(); ++i) __builtin_memset(to + i * quad_stride, 0, form.quad_bytes());
}

// What rounding may leave over of a product, in codes: half a code and more, as products of some thousand codes were
// rounded to f32 before.
constexpr float kMostLeftOver = 0.5f + 1.0f / 512;

// A plane of several groups, which lie `stride` values apart.
template <class Code, int kBytes, bool kLast>
void round_groups(const QuantizedProblem& p, const Prepared& tile, int64_t row, int64_t group0, int64_t count,
                  const float* inverse, float* values, int64_t stride, float* sum) {
  const Form& form = p.form;
  const int64_t written = stride / 4;
  for (int64_t i = 0; i < count; ++i) {
    char* to = tile.quad(group0 + i, 0, row);
    sum[i] = round_plane<Code, kBytes, kLast>(form, inverse[i], values + i * stride, to, tile.quad_stride);
    clear_quads(form, sum[i] == sum[i] ? written : 0, to, tile.quad_stride);
  }
}

template <bool kLast>
auto groups_rounding(const QuantizedProblem& p) {
  if (p.form.bits == 4) return round_groups<int8_t, kNibbleQuadBytes, kLast>;
  if constexpr (kMostWideGroup > 0) {
    if (p.wide_planes) return round_groups<int16_t, kQuadBytes, kLast>;
  }
  return round_groups<int8_t, kQuadBytes, kLast>;
}

}  // namespace
