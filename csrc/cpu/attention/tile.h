// Register tiles of prefill. A vector holds one key's (or one output dimension's) values for kLanes query rows, so keys
// and values are read as scalars to broadcast, and a row's max and sum need no work across lanes.
//
// A kind of products has  template <int NV, int MR> void tile(int64_t row) const  for MR keys or dimensions from `row`
// on and NV vectors of query rows.
#pragma once
#include "cpu/attention/problem.h"

namespace {

// Rows of scalars per tile; accumulators + one vector row + one broadcast must fit the registers.
constexpr int tile_rows(int nv) { return nv == kMaxNv ? 6 : 8; }

// f(row, vector) of a tile's sums.
template <int NV, int MR, class F>
inline __attribute__((always_inline)) void each_of_tile(F f) {
#pragma GCC unroll 8
  for (int i = 0; i < MR; ++i)
#pragma GCC unroll 8
    for (int v = 0; v < NV; ++v) f(i, v);
}

inline __attribute__((always_inline)) void add_product(Vec& sum, Vec a, Vec b) { sum = vfma(a, b, sum); }

// One step of all sums of a tile: `row(i)`, the same in every lane, times `lanes(v)`.
template <class V, int NV, int MR, class Lanes, class Row>
inline __attribute__((always_inline)) void add_products(V (&sums)[MR][NV], Lanes lanes, Row row) {
  V x[NV];
#pragma GCC unroll 8
  for (int v = 0; v < NV; ++v) x[v] = lanes(v);
#pragma GCC unroll 8
  for (int i = 0; i < MR; ++i) {
    const V y = row(i);
#pragma GCC unroll 8
    for (int v = 0; v < NV; ++v) add_product(sums[i][v], x[v], y);
  }
}

// s[i][:] = sum over d of k[i][d] * qt[d][:].
struct Scores {
  const float* k;
  int64_t k_stride;
  const float* qt;
  int64_t depth;
  float* s;

  template <int NV, int MR>
  __attribute__((noinline)) void tile(int64_t row) const {
    const float* key_row = k + row * k_stride;
    Vec acc[MR][NV];
    each_of_tile<NV, MR>([&](int i, int v) __attribute__((always_inline)) { acc[i][v] = vzero(); });
    for (int64_t d = 0; d < depth; ++d)
      add_products(
          acc, [&](int v) __attribute__((always_inline)) { return vload(qt + d * kLd + v * kLanes); },
          [&](int i) __attribute__((always_inline)) { return vset(key_row[i * k_stride + d]); });
    each_of_tile<NV, MR>([&](int i, int v)
                             __attribute__((always_inline)) { vstore(s + (row + i) * kLd + v * kLanes, acc[i][v]); });
  }
};

// o[i][:] = o[i][:] * alpha[:] + sum over j of value[j][i] * pt[j][:].
struct Values {
  const float* value;
  int64_t v_stride;
  const float* pt;
  int64_t keys;
  const float* alpha;
  float* o;

  template <int NV, int MR>
  __attribute__((noinline)) void tile(int64_t row) const {
    float* out = o + row * kLd;
    Vec acc[MR][NV];
    each_of_tile<NV, MR>([&](int i, int v) __attribute__((always_inline)) {
      acc[i][v] = vmul(vload(alpha + v * kLanes), vload(out + i * kLd + v * kLanes));
    });
    const float* from = value + row;
    for (int64_t j = 0; j < keys; ++j, from += v_stride)
      add_products(
          acc, [&](int v) __attribute__((always_inline)) { return vload(pt + j * kLd + v * kLanes); },
          [&](int i) __attribute__((always_inline)) { return vset(from[i]); });
    each_of_tile<NV, MR>([&](int i, int v)
                             __attribute__((always_inline)) { vstore(out + i * kLd + v * kLanes, acc[i][v]); });
  }
};

// The last tile has fewer rows: the same code for each smaller MR.
template <int NV, int MR, class Products>
void edge_tile(const Products& products, int64_t row, int64_t rows) {
  if (rows == MR) return products.template tile<NV, MR>(row);
  if constexpr (MR > 1) edge_tile<NV, MR - 1>(products, row, rows);
}

// All `rows` keys or dimensions for nv vectors of query rows.
template <int NV = kMaxNv, class Products>
void multiply(int nv, const Products& products, int64_t rows) {
  if constexpr (NV > 1)
    if (nv < NV) return multiply<NV - 1>(nv, products, rows);
  constexpr int kRows = tile_rows(NV);
  int64_t row = 0;
  for (; row + kRows <= rows; row += kRows) products.template tile<NV, kRows>(row);
  if (row < rows) edge_tile<NV, kRows - 1>(products, row, rows - row);
}

}  // namespace
