// Register tiles of prefill. A vector holds one key's (or one output dimension's) values for kLanes query rows, so keys
// and values are read in place as scalars to broadcast, and a row's max and sum need no work across lanes.
#pragma once
#include "cpu/attention/problem.h"

namespace {

// Rows of scalars per tile; accumulators + one vector row + one broadcast must fit the registers.
constexpr int tile_rows(int nv) { return nv == kMaxNv ? 6 : 8; }

// s[i][:] = sum over d of k[i][d] * qt[d][:]  for MR keys.
template <int NV, int MR>
inline void score_tile(const float* k, int64_t k_stride, const float* qt, int64_t depth, float* s) {
  Vec acc[MR][NV];
#pragma GCC unroll 8
  for (int i = 0; i < MR; ++i)
#pragma GCC unroll 8
    for (int v = 0; v < NV; ++v) acc[i][v] = vzero();
  for (int64_t d = 0; d < depth; ++d) {
    Vec x[NV];
#pragma GCC unroll 8
    for (int v = 0; v < NV; ++v) x[v] = vload(qt + d * kLd + v * kLanes);
#pragma GCC unroll 8
    for (int i = 0; i < MR; ++i) {
      const Vec key = vset(k[i * k_stride + d]);
#pragma GCC unroll 8
      for (int v = 0; v < NV; ++v) acc[i][v] = vfma(key, x[v], acc[i][v]);
    }
  }
#pragma GCC unroll 8
  for (int i = 0; i < MR; ++i)
#pragma GCC unroll 8
    for (int v = 0; v < NV; ++v) vstore(s + i * kLd + v * kLanes, acc[i][v]);
}

// o[i][:] = o[i][:] * alpha[:] + sum over j of v[j][i] * pt[j][:]  for MR output dimensions.
template <int NV, int MR>
inline void value_tile(const float* value, int64_t v_stride, const float* pt, int64_t keys, const float* alpha,
                       float* o) {
  Vec acc[MR][NV];
#pragma GCC unroll 8
  for (int v = 0; v < NV; ++v) {
    const Vec a = vload(alpha + v * kLanes);
#pragma GCC unroll 8
    for (int i = 0; i < MR; ++i) acc[i][v] = vmul(a, vload(o + i * kLd + v * kLanes));
  }
  for (int64_t j = 0; j < keys; ++j) {
    Vec x[NV];
#pragma GCC unroll 8
    for (int v = 0; v < NV; ++v) x[v] = vload(pt + j * kLd + v * kLanes);
#pragma GCC unroll 8
    for (int i = 0; i < MR; ++i) {
      const Vec w = vset(value[j * v_stride + i]);
#pragma GCC unroll 8
      for (int v = 0; v < NV; ++v) acc[i][v] = vfma(w, x[v], acc[i][v]);
    }
  }
#pragma GCC unroll 8
  for (int i = 0; i < MR; ++i)
#pragma GCC unroll 8
    for (int v = 0; v < NV; ++v) vstore(o + i * kLd + v * kLanes, acc[i][v]);
}

// The last tile has fewer rows: the same code for each smaller MR.
template <int NV, int MR>
void score_edge(int rows, const float* k, int64_t k_stride, const float* qt, int64_t depth, float* s) {
  if (rows == MR) return score_tile<NV, MR>(k, k_stride, qt, depth, s);
  if constexpr (MR > 1) score_edge<NV, MR - 1>(rows, k, k_stride, qt, depth, s);
}
template <int NV, int MR>
void value_edge(int rows, const float* value, int64_t v_stride, const float* pt, int64_t keys, const float* alpha,
                float* o) {
  if (rows == MR) return value_tile<NV, MR>(value, v_stride, pt, keys, alpha, o);
  if constexpr (MR > 1) value_edge<NV, MR - 1>(rows, value, v_stride, pt, keys, alpha, o);
}

template <int NV>
void score_panel(const float* k, int64_t k_stride, int64_t keys, const float* qt, int64_t depth, float* s) {
  constexpr int kRows = tile_rows(NV);
  int64_t j = 0;
  for (; j + kRows <= keys; j += kRows) score_tile<NV, kRows>(k + j * k_stride, k_stride, qt, depth, s + j * kLd);
  if (j < keys)
    score_edge<NV, kRows - 1>(static_cast<int>(keys - j), k + j * k_stride, k_stride, qt, depth, s + j * kLd);
}
template <int NV>
void value_panel(const float* value, int64_t v_stride, int64_t v_dim, const float* pt, int64_t keys, const float* alpha,
                 float* o) {
  constexpr int kRows = tile_rows(NV);
  int64_t d = 0;
  for (; d + kRows <= v_dim; d += kRows) value_tile<NV, kRows>(value + d, v_stride, pt, keys, alpha, o + d * kLd);
  if (d < v_dim)
    value_edge<NV, kRows - 1>(static_cast<int>(v_dim - d), value + d, v_stride, pt, keys, alpha, o + d * kLd);
}

// Sᵀ = K Qᵀ for `keys` keys and nv vectors of query rows.
template <int NV = kMaxNv>
void scores(int nv, const float* k, int64_t k_stride, int64_t keys, const float* qt, int64_t depth, float* s) {
  if (nv == NV) return score_panel<NV>(k, k_stride, keys, qt, depth, s);
  if constexpr (NV > 1) scores<NV - 1>(nv, k, k_stride, keys, qt, depth, s);
}
// Oᵀ = alpha Oᵀ + Vᵀ Pᵀ.
template <int NV = kMaxNv>
void values(int nv, const float* value, int64_t v_stride, int64_t v_dim, const float* pt, int64_t keys,
            const float* alpha, float* o) {
  if (nv == NV) return value_panel<NV>(value, v_stride, v_dim, pt, keys, alpha, o);
  if constexpr (NV > 1) values<NV - 1>(nv, value, v_stride, v_dim, pt, keys, alpha, o);
}

}  // namespace
