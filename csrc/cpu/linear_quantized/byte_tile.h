// Tiles of tiers whose products take quads of bytes: panels of 8-bit codes, those of 4 bits after unpacking.
#pragma once
#include "cpu/linear_quantized/tile.h"

namespace {

// A panel that is in L2; the next one is fetched meanwhile. The f32 sums of more than kQuantizedRows rows lie in
// memory.
template <int kRows, bool kOffsets>
void quantized_tile(const QuantizedTileArgs& args) {
  constexpr int kVectorBytes = 4 * kLanes, kScaleBytes = kPanel * 4;
  const char *b = args.b, *ahead = args.ahead;
  constexpr bool kHeld = kVecRegisters == 32 && kRows <= kQuantizedRows;
  Vec held[kRows][2];
  each_sum<1, kRows>([&](int, int m, int v) __attribute__((always_inline)) {
    held[m][v] = vzero();
    if (!kHeld) vstore(args.sums + m * kPanel + v * kLanes, vzero());
  });
  RowPointers<kRows> rows(args.a, args.a_stride);
  auto fold = [&](int64_t group, IntVec(&acc)[kRows][2]) __attribute__((always_inline)) {
    const float *scale = args.scale + group * kRows, *sum = args.sum + group * kRows;
    const Vec w[2] = {load_factor<8>(b, 0), load_factor<8>(b, 1)};
    Vec offset[2] = {vzero(), vzero()};
    if (kOffsets) offset[0] = load_factor<8>(b + kScaleBytes, 0), offset[1] = load_factor<8>(b + kScaleBytes, 1);
    each_sum<1, kRows>([&](int, int m, int v) __attribute__((always_inline)) {
      float* at = args.sums + m * kPanel + v * kLanes;
      Vec total = kHeld ? held[m][v] : vload(at);
      total = vfma(vfrom_int(acc[m][v]), vmul(w[v], vset(scale[m])), total);
      if (kOffsets) total = vfma(offset[v], vset(sum[m]), total);
      held[m][v] = total;
      if (!kHeld) vstore(at, total);
    });
  };
  for (int64_t group = 0; group < args.groups; ++group) {
    IntVec acc[kRows][2];
#pragma GCC unroll 16
    for (int m = 0; m < kRows; ++m) acc[m][0] = acc[m][1] = iset(args.start[group * kRows + m]);
    auto multiply = [&](int at, const Quad& b0, const Quad& b1) __attribute__((always_inline)) {
#pragma GCC unroll 16
      for (int m = 0; m < kRows; ++m) {
        const auto x = quad_row(rows.row(m, at * kQuadBytes));
        quad_dot(acc[m][0], b0, x);
        quad_dot(acc[m][1], b1, x);
      }
    };
    for (int64_t step = args.steps; step > 0; --step, b += 4 * kVectorBytes) {
      __builtin_prefetch(ahead, 0, 2);
      __builtin_prefetch(ahead + args.ahead_stride / 2, 0, 2);
      ahead += args.ahead_stride;
      multiply(0, quad(load_quads(b)), quad(load_quads(b + kVectorBytes)));
      multiply(1, quad(load_quads(b + 2 * kVectorBytes)), quad(load_quads(b + 3 * kVectorBytes)));
      rows.advance(2 * kQuadBytes);
    }
    fold(group, acc);
    b += kOffsets ? 2 * kScaleBytes : kScaleBytes;
  }
  if (kHeld)
    each_sum<1, kRows>([&](int, int m, int v)
                           __attribute__((always_inline)) { vstore(args.sums + m * kPanel + v * kLanes, held[m][v]); });
}

// The kernel for a height of kRows or less; rows >= 1.
template <int kRows = kTallRows>
QuantizedTileFunction quantized_tile_function(int64_t rows, bool offsets) {
  if constexpr (kRows > 1) {
    if (rows < kRows) return quantized_tile_function<kRows - 1>(rows, offsets);
  }
  return offsets ? quantized_tile<kRows, true> : quantized_tile<kRows, false>;
}

QuantizedTileFunction code_tile_function(const Form& form, int64_t rows) {
  return quantized_tile_function(rows, form.offsets);
}
QuantizedTileFunction code_stream_function(const Form& form, int64_t rows, int64_t panels) {
  return form.bits == 8 ? quantized_stream_function<8>(rows, panels) : quantized_stream_function<4>(rows, panels);
}

// A panel as tiles read it.
inline const char* tile_codes(const Form& form, const char* packed, char* unpacked) {
  if (form.bits == 8) return packed;
  widen_codes(form, packed, unpacked);
  return unpacked;
}

}  // namespace
