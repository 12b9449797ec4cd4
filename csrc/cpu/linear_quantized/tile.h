// Micro-kernels: sums[rows][kPanel] = tile of activation codes * panel of weight codes. Integer sums stay in registers
// for one group, then go times both scales into the f32 sums. Here: what they are given, and streams; the tiles of a
// tier are in byte_tile.h or pair_tile.h.
#pragma once
#include "cpu/linear_quantized/layout.h"

namespace {

struct QuantizedTileArgs {
  const char* a;  // [groups][steps][2 quads][rows], or rows that are a_stride apart
  int64_t a_stride;
  const float* scale;  // the tables of prepared.h
  const int32_t* start;
  const float* sum;
  const char* b;  // the panel
  int64_t groups, steps;
  bool offsets;
  const char* ahead;  // weights wanted next, up to ahead_end; from there on those at `next`
  const char *ahead_end, *next;
  int64_t ahead_stride;  // bytes to ask for in a step, where the panel is no stream
  float* sums;           // [panels][rows][kPanel]
  int64_t panel_bytes;   // from one panel of several to the next
};

// The f32 vectors beside the codes: f32 or f16.
template <int kBits>
inline Vec load_factor(const char* p, int vector) {
  if constexpr (kBits == 8) return vload(reinterpret_cast<const float*>(p) + vector * kLanes);
  return vload_f16(reinterpret_cast<const uint16_t*>(p) + vector * kLanes);
}

// Scale and offset of a group, of one half of a packed panel; those beside 4 bits times their column's factor.
struct GroupFactors {
  Vec scale, offset;  // offset: zero where there is none

  template <int kBits>
  static GroupFactors load(const Form& form, const char* panel, int64_t group, int v) {
    const char* scales = panel + group * form.group_bytes() + form.code_bytes();
    Vec scale = load_factor<kBits>(scales, v);
    Vec offset = form.offsets ? load_factor<kBits>(scales + form.scale_bytes(), v) : vzero();
    if (kBits == 4) {
      const Vec column = vload(reinterpret_cast<const float*>(panel + form.groups() * form.group_bytes()) + v * kLanes);
      scale = vmul(scale, column), offset = vmul(offset, column);
    }
    return {scale, offset};
  }
};

// What a stream asks for now, so far ahead of its products, and from the end of its panel on in the next one. Called in
// front of the products: a branch behind them would make GCC copy and spill the sums.
inline __attribute__((always_inline)) const char* fetch_step(const char*& ahead, const char*& ahead_end,
                                                             const QuantizedTileArgs& args, int64_t bytes) {
  const char* fetch = ahead;
  ahead += bytes;
  if (ahead >= ahead_end) {
    ahead = args.next + (ahead - ahead_end);
    ahead_end = reinterpret_cast<const char*>(UINTPTR_MAX);
  }
  return fetch;
}

// A stream: the weights come from DRAM and are used once, kPanels panels side by side. It folds as the tiles do;
// in a function of both GCC spills the sums of one.
template <int kBits, int kRows, int kPanels>
void quantized_stream(const QuantizedTileArgs& args) {
  constexpr int kVectorBytes = 4 * kLanes, kStepBytes = (kBits == 8 ? 4 : 2) * kVectorBytes;
  constexpr int kScaleBytes = kPanel * (kBits == 8 ? 4 : 2);
  const char *a = args.a, *b = args.b, *ahead = args.ahead, *ahead_end = args.ahead_end;
  const int64_t panel_bytes = args.panel_bytes;
  constexpr bool kHeld =
      kVecRegisters == 32 && kPanels * kRows + (kPanels > 1) <= kQuantizedRows;  // f32 sums in registers too
  Vec held[kPanels][kRows][2];
  each_sum<kPanels, kRows>([&](int p, int m, int v) __attribute__((always_inline)) {
    held[p][m][v] = vzero();
    if (!kHeld) vstore(args.sums + (p * kRows + m) * kPanel + v * kLanes, vzero());
  });
  auto fold = [&](int64_t group, int p, IntVec(&acc)[kRows][2]) __attribute__((always_inline)) {
    const char* factors = b + p * panel_bytes;
    __builtin_prefetch(ahead + p * panel_bytes);  // the scales are part of the stream
    const float *scale = args.scale + group * kRows, *sum = args.sum + group * kRows;
    const Vec w[2] = {load_factor<kBits>(factors, 0), load_factor<kBits>(factors, 1)};
    Vec offset[2] = {vzero(), vzero()};
    if (args.offsets) {
      offset[0] = load_factor<kBits>(factors + kScaleBytes, 0);
      offset[1] = load_factor<kBits>(factors + kScaleBytes, 1);
    }
    each_sum<1, kRows>([&](int, int m, int v) __attribute__((always_inline)) {
      float* at = args.sums + (p * kRows + m) * kPanel + v * kLanes;
      Vec total = kHeld ? held[p][m][v] : vload(at);
      total = vfma(vfrom_int(acc[m][v]), vmul(w[v], vset(scale[m])), total);
      if (args.offsets) total = vfma(offset[v], vset(sum[m]), total);
      held[p][m][v] = total;
      if (!kHeld) vstore(at, total);
    });
  };
  for (int64_t group = 0; group < args.groups; ++group) {
    IntVec acc[kPanels][kRows][2];
#pragma GCC unroll 4
    for (int p = 0; p < kPanels; ++p)
#pragma GCC unroll 16
      for (int m = 0; m < kRows; ++m) acc[p][m][0] = acc[p][m][1] = iset(args.start[group * kRows + m]);
    for (int64_t step = args.steps; step > 0; --step) {
      const char* fetch = fetch_step(ahead, ahead_end, args, kStepBytes);
#pragma GCC unroll 4
      for (int p = 0; p < kPanels; ++p) {
        const char *w = b + p * panel_bytes, *x = kPanels > 1 ? read_again(a) : a;
#pragma GCC unroll 4
        for (int line = 0; line < kStepBytes; line += 64) __builtin_prefetch(fetch + p * panel_bytes + line);
        auto multiply = [&](const Quad& w0, const Quad& w1) __attribute__((always_inline)) {
#pragma GCC unroll 16
          for (int m = 0; m < kRows; ++m) {
            const auto row = quad_row(x + m * kQuadBytes);
            quad_dot(acc[p][m][0], w0, row);
            quad_dot(acc[p][m][1], w1, row);
          }
          x = kPanels > 1 ? read_again(x + kRows * kQuadBytes) : x + kRows * kQuadBytes;
        };
        if constexpr (kBits == 8) {
          multiply(quad(load_quads(w)), quad(load_quads(w + kVectorBytes)));
          multiply(quad(load_quads(w + 2 * kVectorBytes)), quad(load_quads(w + 3 * kVectorBytes)));
        } else {
          multiply(quad(low_nibbles(w)), quad(low_nibbles(w + kVectorBytes)));
          multiply(quad(high_nibbles(w)), quad(high_nibbles(w + kVectorBytes)));
        }
      }
      a += 2 * kRows * kQuadBytes;
      b += kStepBytes;
    }
#pragma GCC unroll 4
    for (int p = 0; p < kPanels; ++p) fold(group, p, acc[p]);
    b += args.offsets ? 2 * kScaleBytes : kScaleBytes;
    ahead += args.offsets ? 2 * kScaleBytes : kScaleBytes;
  }
  if (kHeld)
    each_sum<kPanels, kRows>([&](int p, int m, int v) __attribute__((always_inline)) {
      vstore(args.sums + (p * kRows + m) * kPanel + v * kLanes, held[p][m][v]);
    });
}

using QuantizedTileFunction = void (*)(const QuantizedTileArgs&);

template <int kBits, int kRows, int kPanels = quantized_stream_panels(kRows)>
QuantizedTileFunction quantized_panels_function(int64_t panels) {
  if constexpr (kPanels > 1) {
    if (panels < kPanels) return quantized_panels_function<kBits, kRows, kPanels - 1>(panels);
  }
  return quantized_stream<kBits, kRows, kPanels>;
}

// panels: 1 to quantized_stream_panels(rows).
template <int kBits, int kRows = kBits == 4 ? kNibbleRows : kLoneRows>
QuantizedTileFunction quantized_stream_function(int64_t rows, int64_t panels) {
  if constexpr (kRows > 1) {
    if (rows < kRows) return quantized_stream_function<kBits, kRows - 1>(rows, panels);
  }
  return quantized_panels_function<kBits, kRows>(panels);
}

// A panel of 4-bit codes as one of 8-bit codes with f32 scales. Many tiles share the work.
void widen_codes(const Form& form, const char* from, char* to) {
  constexpr int kVectorBytes = 4 * kLanes;
  const float* factors = reinterpret_cast<const float*>(from + form.groups() * form.group_bytes());
  const Vec factor[2] = {vload(factors), vload(factors + kLanes)};
  for (int64_t group = 0; group < form.groups(); ++group) {
    for (int64_t step = 0; step < form.steps(); ++step, from += 2 * kVectorBytes, to += 4 * kVectorBytes)
#pragma GCC unroll 2
      for (int v = 0; v < 2; ++v) {
        store_quads(to + v * kVectorBytes, low_nibbles(from + v * kVectorBytes));
        store_quads(to + (2 + v) * kVectorBytes, high_nibbles(from + v * kVectorBytes));
      }
    for (int v = 0; v < (form.offsets ? 4 : 2); ++v, from += 2 * kLanes, to += 4 * kLanes)
      vstore(reinterpret_cast<float*>(to), vmul(load_factor<4>(from, 0), factor[v % 2]));
  }
}

}  // namespace
