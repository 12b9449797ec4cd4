// rotary_table: cos and sin of position * frequency, written to both halves of a row.
//   operands: 0 frequencies f32 [B,S,R/2], 1 positions i64 or f32 [B,S,R/2] (stride 0 along R/2), 2 cos, 3 sin [B,S,R]
//   floats: [scale of cos and sin]
#pragma once
#include "cpu/rows/access.h"
#include "cpu/vm/transcendental.h"

namespace {

inline int64_t rotary_table_chunks(const Step& s, int, int threads) {
  const Tensor& cos = s.t[2];
  return chunk_count(cos.size[0] * cos.size[1], cos.size[2], threads);
}

inline void rotary_table_run(const Step& s, int, int64_t chunk, int threads, const Scratch&) {
  const Tensor &frequency = s.t[0], &position = s.t[1], &cos = s.t[2], &sin = s.t[3];
  const int64_t half = frequency.size[2];
  const RowRange rows = chunk_range(cos.size[0] * cos.size[1], cos.size[2], threads, chunk);
  const AnyFloat cos_as(cos.dtype), sin_as(sin.dtype);
  const Vec scale = vset(s.f[0]);
  auto start = [](const Tensor& t, int64_t b, int64_t p) { return at(t, b * t.stride[0] + p * t.stride[1]); };
  for (int64_t r = rows.begin; r < rows.end; ++r) {
    const int64_t b = r / cos.size[1], p = r % cos.size[1];
    const char* at_position = start(position, b, p);
    const Vec place =
        vset(position.dtype == DType::i64 ? static_cast<float>(*reinterpret_cast<const int64_t*>(at_position))
                                          : *reinterpret_cast<const float*>(at_position));
    const char* f = start(frequency, b, p);
    char *c = start(cos, b, p), *d = start(sin, b, p);
    for_lanes(half, [&](int64_t i, int n) {
      const Vec angle = vmul(place, vload_as(DType::f32, f, i, n));
      const Vec x = vmul(vcos(angle), scale), y = vmul(vsin(angle), scale);
      for (int64_t to = i; to <= i + half; to += half) {
        cos_as.store(c, to, x, n);
        sin_as.store(d, to, y, n);
      }
    });
  }
}

}  // namespace
