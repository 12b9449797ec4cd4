// Scores over rows of codes where the CPU multiplies bytes: kLanes keys at a time, transposed so that a lane holds a
// key and no sum crosses lanes. A query is a sum of three signed bytes per element, 23 bits of its largest: exact to
// fp32.
#pragma once
#include "cpu/attention/codes.h"

namespace {

constexpr int kPlanes = 3;
constexpr int64_t kMaxQuads = kMaxHeadDim / 4;

// codes are zero past the head. A sum starts at -128 * sum of codes: keys enter as code + 128.
struct CodedQuery {
  char codes[kPlanes][kMaxQuads * kQuadBytes];
  int32_t start[kPlanes];
  float scale[kPlanes];
};

// q has n floats, padded with zeros to whole vectors; NaN or Inf makes every score NaN.
inline void code_query(const float* q, int64_t n, CodedQuery& to) {
  alignas(64) float rest[kMaxHeadDim];
  Vec largest = vzero();
  for (int64_t i = 0; i < n; i += kLanes) {
    vstore(rest + i, vload(q + i));
    largest = vmax(vabs(vload(q + i)), largest);
  }
  float scale = vreduce_max(largest) / 127.0f, inverse = inverse_scale(scale);
  for (int plane = 0; plane < kPlanes; ++plane) {
    Vec sum = vzero();
    for (int64_t i = 0; i < n; i += kLanes) {
      const Vec x = vload(rest + i), code = vround(vmul(x, vset(inverse)));
      int8_t codes[kLanes];
      vstore_s8(codes, code);
      for (int l = 0; l < kLanes; l += 4) quad_pack(to.codes[plane] + (i + l) / 4 * kQuadBytes, codes + l);
      sum = vadd(sum, code);
      vstore(rest + i, vfma(code, vset(-scale), x));
    }
    const float total = vreduce_add(sum);
    const bool is_number = total == total;
    to.start[plane] = is_number ? -128 * static_cast<int32_t>(total) : 0;
    to.scale[plane] = is_number && inverse == 0.0f ? 0.0f : is_number ? scale : total;
    scale *= 1.0f / 254.0f;
    inverse = inverse < 1e35f ? inverse * 254.0f : 0.0f;
  }
}

// s[r][0..kLanes) = scale * (q[r] . codes) for R queries and the keys in `keys` [quads], one in each lane. Not inlined:
// within its caller GCC keeps the sums in memory.
template <int R>
__attribute__((noinline)) void dot_keys(const Vec* keys, const float* scale, int64_t quads, const CodedQuery* q,
                                        float* s, int64_t s_ld) {
  IntVec acc[R][kPlanes];
#pragma GCC unroll 4
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 3
    for (int p = 0; p < kPlanes; ++p) acc[r][p] = iset(q[r].start[p]);
  for (int64_t i = 0; i < quads; ++i) {
    const Quad key = quad(code_quads(keys[i]));
#pragma GCC unroll 4
    for (int r = 0; r < R; ++r)
#pragma GCC unroll 3
      for (int p = 0; p < kPlanes; ++p) quad_dot(acc[r][p], key, quad_row(q[r].codes[p] + i * kQuadBytes));
  }
#pragma GCC unroll 4
  for (int r = 0; r < R; ++r) {
    Vec sum = vmul(vset(q[r].scale[2]), vfrom_int(acc[r][2]));
    sum = vfma(vset(q[r].scale[1]), vfrom_int(acc[r][1]), sum);
    sum = vfma(vset(q[r].scale[0]), vfrom_int(acc[r][0]), sum);
    vstore(s + r * s_ld, vmul(sum, vload(scale)));
  }
}
template <int R>
void dot_queries(int64_t rows, const Vec* keys, const float* scale, int64_t quads, const CodedQuery* q, float* s,
                 int64_t s_ld) {
  if (rows >= R) return dot_keys<R>(keys, scale, quads, q, s, s_ld);
  if constexpr (R > 1) dot_queries<R - 1>(rows, keys, scale, quads, q, s, s_ld);
}

// The bytes of kLanes rows, transposed four by four.
inline void transpose_rows(const char* const* row, int64_t bytes, Vec* quads) {
  for (int64_t d = 0; d < bytes; d += 4 * kLanes, quads += kLanes) {
    const int words = static_cast<int>(min64(kLanes, ceil_div(bytes - d, 4)));
    for (int l = 0; l < kLanes; ++l) quads[l] = vload_n(reinterpret_cast<const float*>(row[l] + d), words);
    vtranspose(quads);
  }
}

}  // namespace
