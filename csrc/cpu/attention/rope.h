// Rows of queries, keys and values on their way in: widening, rotary embedding, writing new rows into the cache.
#pragma once
#include "cpu/attention/codes.h"

namespace {

template <DType T>
inline Vec load_lanes(const char* p, int64_t i) {
  if constexpr (T == DType::f32) return vload(reinterpret_cast<const float*>(p) + i);
  if constexpr (T == DType::f16) return vload_f16(reinterpret_cast<const uint16_t*>(p) + i);
  if constexpr (T == DType::s8) return vload_s8(reinterpret_cast<const int8_t*>(p) + i);
  return vload_bf16(reinterpret_cast<const uint16_t*>(p) + i);
}
// The last, with n lanes.
template <DType T>
inline Vec load_tail(const char* p, int64_t i, int n) {
  if constexpr (T == DType::s8) return vload_s8_n(reinterpret_cast<const int8_t*>(p) + i, n);
  return vload_as(T, p, i, n);
}

// Whole vectors are stored, so `to` has room for n rounded up to kLanes; what is past n becomes zero. (A masked store
// is slow on some CPUs and cannot be forwarded to the loads that follow.)
template <DType T>
inline void load_row_of(const char* p, int64_t n, float* to) {
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) vstore(to + i, load_lanes<T>(p, i));
  if (i < n) vstore(to + i, load_tail<T>(p, i, static_cast<int>(n - i)));
}
inline void load_row(DType d, const char* p, int64_t n, float* to) {
  if (d == DType::s8) return load_codes(p, n, to);
  if (d == DType::f32) return load_row_of<DType::f32>(p, n, to);
  if (d == DType::f16) return load_row_of<DType::f16>(p, n, to);
  load_row_of<DType::bf16>(p, n, to);
}
inline void store_row(DType d, char* p, int64_t n, const float* from) {
  if (d == DType::s8) return store_codes(p, n, from);
  for (int64_t i = 0; i < n; i += kLanes) {
    const int lanes = static_cast<int>(min64(kLanes, n - i));
    vstore_as(d, p, i, vload_n(from + i, lanes), lanes);
  }
}

// Rotates pairs (i, i + r/2), the Llama and NeoX convention.
inline void rotate_half(float* x, const float* cos, const float* sin, int64_t r) {
  const int64_t half = r / 2;
  char* out = reinterpret_cast<char*>(x);
  for (int64_t i = 0; i < half; i += kLanes) {
    const int n = static_cast<int>(min64(kLanes, half - i));
    const Vec a = vload(x + i), b = vload(x + half + i);
    const Vec ra = vsub(vmul(a, vload(cos + i)), vmul(b, vload(sin + i)));
    const Vec rb = vfma(b, vload(cos + half + i), vmul(a, vload(sin + half + i)));
    vstore_as(DType::f32, out, i, ra, n);
    vstore_as(DType::f32, out, half + i, rb, n);
  }
}
// Rotates pairs (2i, 2i + 1), the GPT-J convention.
inline void rotate_interleaved(float* x, const float* cos, const float* sin, int64_t r) {
  for (int64_t i = 0; i + 1 < r; i += 2) {
    const float a = x[i], b = x[i + 1];
    x[i] = a * cos[i] - b * sin[i];
    x[i + 1] = b * cos[i + 1] + a * sin[i + 1];
  }
}

// Rotates the first R dims of a row at position i of batch b; x has kLanes floats more than the row.
inline void rotate(const Problem& p, int64_t b, int64_t i, float* x) {
  if (p.rope_kind == kRopeNone) return;
  const int64_t r = p.cos->size[3];
  alignas(64) float cos[kMaxHeadDim + kLanes], sin[kMaxHeadDim + kLanes];
  load_row(p.cos->dtype, row_ptr(*p.cos, b, 0, i), r, cos);
  load_row(p.sin->dtype, row_ptr(*p.sin, b, 0, i), r, sin);
  if (p.rope_kind == kRopeHalf)
    rotate_half(x, cos, sin, r);
  else
    rotate_interleaved(x, cos, sin, r);
}

// What a product of a query and a key is scaled with to be the score (with a softcap: the argument of the tanh).
inline float score_scale(const Problem& p) { return p.softcap > 0 ? p.scale / p.softcap : p.scale; }

// One query row in fp32 (padded with zeros to whole vectors), rotated and scaled.
inline void load_query(const Problem& p, int64_t b, int64_t h, int64_t i, float* to) {
  load_row(p.q->dtype, row_ptr(*p.q, b, h, i), p.head_dim, to);
  rotate(p, b, i, to);
  const Vec scale = vset(score_scale(p));
  for (int64_t d = 0; d < p.head_dim; d += kLanes) vstore(to + d, vmul(vload(to + d), scale));
}

// The cache slot of new row j.
inline int64_t slot_of(const Problem& p, int64_t j) {
  if (!p.positions) return p.kv_len - p.new_len + j;
  return reinterpret_cast<const int64_t*>(p.positions->data)[j * p.positions->stride[0]];
}

// Writes those of the new rows [j0, j1) whose slot is in [slot0, slot1).
inline void write_new_rows(const Problem& p, int64_t b, int64_t kv_head, int64_t j0, int64_t j1, int64_t slot0,
                           int64_t slot1) {
  alignas(64) float row[kMaxHeadDim + kLanes];
  for (int64_t j = j0; j < j1; ++j) {
    const int64_t slot = slot_of(p, j);
    if (slot < slot0 || slot >= slot1) continue;
    if (p.k_new) {
      load_row(p.k_new->dtype, row_ptr(*p.k_new, b, kv_head, j), p.head_dim, row);
      rotate(p, b, j, row);
      store_row(p.k_cache->dtype, row_ptr(*p.k_cache, b, kv_head, slot), p.head_dim, row);
    }
    if (p.v_new) {
      load_row(p.v_new->dtype, row_ptr(*p.v_new, b, kv_head, j), p.v_dim, row);
      store_row(p.v_cache->dtype, row_ptr(*p.v_cache, b, kv_head, slot), p.v_dim, row);
    }
  }
}

}  // namespace
