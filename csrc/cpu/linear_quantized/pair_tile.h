// Micro-kernels of tiers that multiply 16-bit pairs (isa/pairs.h). A panel of 8-bit codes is widened to pairs once for
// all its tiles. One of 4-bit codes is multiplied as bytes, in sums of 16 bits that go to 32 after kNibbleSums quads:
// twice as many products an instruction.
#pragma once
#include "cpu/linear_quantized/tile.h"

namespace {

// A group's integer sums times its scales, and its offsets, added to the f32 sums. Half by half: the integers leave few
// registers.
template <int kBits, int kRows, bool kOffsets>
inline __attribute__((always_inline)) void fold_half(const QuantizedTileArgs& args, int64_t group, int half,
                                                     const IntVec (&acc)[kRows][2], const char* factors, float* sums) {
  constexpr int kScaleBytes = kPanel * (kBits == 8 ? 4 : 2);
  const float *scale = args.scale + group * kRows, *sum = args.sum + group * kRows;
  const Vec w = load_factor<kBits>(factors, half);
  const Vec offset = kOffsets ? load_factor<kBits>(factors + kScaleBytes, half) : vzero();
#pragma GCC unroll 16
  for (int m = 0; m < kRows; ++m) {
    float* at = sums + m * kPanel + half * kLanes;
    Vec total = vfma(vfrom_int(acc[m][half]), vmul(w, vset(scale[m])), vload(at));
    if (kOffsets) total = vfma(offset, vset(sum[m]), total);
    vstore(at, total);
  }
}
template <int kBits, int kRows>
inline __attribute__((always_inline)) void fold_sums(const QuantizedTileArgs& args, int64_t group,
                                                     const IntVec (&acc)[kRows][2], const char* factors, float* sums) {
#pragma GCC unroll 2
  for (int half = 0; half < 2; ++half) {
    if (args.offsets)
      fold_half<kBits, kRows, true>(args, group, half, acc, factors, sums);
    else
      fold_half<kBits, kRows, false>(args, group, half, acc, factors, sums);
  }
}

template <int kPanels, int kRows>
inline void clear_sums(float* sums) {
  each_sum<kPanels, kRows>([&](int p, int m, int v) __attribute__((always_inline)) {
    vstore(sums + (p * kRows + m) * kPanel + v * kLanes, vzero());
  });
}

// b: [groups][steps][2 quads][even pairs, odd pairs][kPanel] of 32 bits, and f32 factors behind each group.
template <int kRows>
void pair_tile(const QuantizedTileArgs& args) {
  constexpr int kVectorBytes = 4 * kLanes;
  const char *a = args.a, *b = args.b, *ahead = args.ahead;
  clear_sums<1, kRows>(args.sums);
  for (int64_t group = 0; group < args.groups; ++group) {
    IntVec acc[kRows][2];
#pragma GCC unroll 16
    for (int m = 0; m < kRows; ++m) acc[m][0] = acc[m][1] = iset(args.start[group * kRows + m]);
    auto multiply = [&](int at) __attribute__((always_inline)) {
      const Bytes w0 = load_quads(b), w1 = load_quads(b + kVectorBytes);
      b += 2 * kVectorBytes;
#pragma GCC unroll 16
      for (int m = 0; m < kRows; ++m) {
        const Bytes x = all_words(quad_word(a + m * kQuadBytes + at));
        multiply_add(acc[m][0].v, w0, x);
        multiply_add(acc[m][1].v, w1, x);
      }
    };
    for (int64_t step = args.steps; step > 0; --step) {
      __builtin_prefetch(ahead, 0, 2);
      __builtin_prefetch(ahead + args.ahead_stride / 2, 0, 2);
      ahead += args.ahead_stride;
#pragma GCC unroll 2
      for (int quad = 0; quad < 2; ++quad, a += kRows * kQuadBytes) {
        multiply(0);
        multiply(4);
      }
    }
    fold_sums<8, kRows>(args, group, acc, b, args.sums);
    b += kPanel * 4 * (args.offsets ? 2 : 1);
  }
}

// b: as a panel of 8-bit codes, but its codes are below 16. kOneBlock: groups of at most kNibbleSums quads.
template <int kRows, bool kOneBlock>
void nibble_tile(const QuantizedTileArgs& args) {
  constexpr int kVectorBytes = 4 * kLanes;
  const char *a = args.a, *b = args.b, *ahead = args.ahead;
  clear_sums<1, kRows>(args.sums);
  Bytes words[kRows][2];
  auto multiply_block = [&](int64_t steps) __attribute__((always_inline)) {
    each_sum<1, kRows>([&](int, int m, int v) __attribute__((always_inline)) { words[m][v] = iset(0).v; });
#pragma GCC unroll 1
    for (int64_t step = steps; step > 0; --step) {
      __builtin_prefetch(ahead, 0, 2);
      __builtin_prefetch(ahead + args.ahead_stride / 2, 0, 2);
      ahead += args.ahead_stride;
#pragma GCC unroll 2
      for (int quad = 0; quad < 2; ++quad) {
        const Bytes w0 = load_quads(b), w1 = load_quads(b + kVectorBytes);
#pragma GCC unroll 16
        for (int m = 0; m < kRows; ++m) {
          const Bytes x = all_words(quad_word(a + m * kNibbleQuadBytes));
          multiply_add_nibbles(words[m][0], w0, x);
          multiply_add_nibbles(words[m][1], w1, x);
        }
        a += kRows * kNibbleQuadBytes, b += 2 * kVectorBytes;
      }
    }
  };
  constexpr int64_t kBlock = kNibbleSums / 2;
  for (int64_t group = 0; group < args.groups; ++group) {
    const int32_t* start = args.start + group * kRows;
    IntVec acc[kRows][2];
    if (!kOneBlock)
      each_sum<1, kRows>([&](int, int m, int v) __attribute__((always_inline)) { acc[m][v] = iset(start[m]); });
    int64_t left = args.steps;
    for (;; left -= kBlock) {
      if (!kOneBlock) asm volatile("" : "+m"(acc));  // so that all registers are for the products
      multiply_block(min64(left, kBlock));
      if (kOneBlock || left <= kBlock) break;
      each_sum<1, kRows>([&](int, int m, int v)
                             __attribute__((always_inline)) { acc[m][v] = add_words(acc[m][v], words[m][v]); });
    }
    start = read_again(start);  // loaded from here on: before the products there are no registers for it
    each_sum<1, kRows>([&](int, int m, int v) __attribute__((always_inline)) {
      acc[m][v] = add_words(kOneBlock ? iset(start[m]) : acc[m][v], words[m][v]);
    });
    fold_sums<8, kRows>(args, group, acc, b, args.sums);
    b += kPanel * 4 * (args.offsets ? 2 : 1);
  }
}

// As quantized_stream, of 4-bit codes.
template <int kRows, int kPanels>
void nibble_stream(const QuantizedTileArgs& args) {
  constexpr int kVectorBytes = 4 * kLanes, kStepBytes = 2 * kVectorBytes;
  const char *a = args.a, *b = args.b, *ahead = args.ahead, *ahead_end = args.ahead_end;
  const int64_t panel_bytes = args.panel_bytes, factor_bytes = kPanel * 2 * (args.offsets ? 2 : 1);
  clear_sums<kPanels, kRows>(args.sums);
  for (int64_t group = 0; group < args.groups; ++group) {
    IntVec acc[kPanels][kRows][2];
    each_sum<kPanels, kRows>([&](int p, int m, int v) __attribute__((always_inline)) {
      acc[p][m][v] = iset(args.start[group * kRows + m]);
    });
    for (int64_t left = args.steps; left > 0; left -= kNibbleSums / 2) {
      Bytes words[kPanels][kRows][2];
      each_sum<kPanels, kRows>([&](int p, int m, int v) __attribute__((always_inline)) { words[p][m][v] = iset(0).v; });
#pragma GCC unroll 1
      for (int64_t step = min64(left, kNibbleSums / 2); step > 0; --step) {
        const char* fetch = fetch_step(ahead, ahead_end, args, kStepBytes);
#pragma GCC unroll 4
        for (int p = 0; p < kPanels; ++p) {
          const char *w = b + p * panel_bytes, *x = kPanels > 1 ? read_again(a) : a;
          __builtin_prefetch(fetch + p * panel_bytes);
          if (kStepBytes > 64) __builtin_prefetch(fetch + p * panel_bytes + 64);
          auto multiply = [&](Bytes w0, Bytes w1) __attribute__((always_inline)) {
#pragma GCC unroll 16
            for (int m = 0; m < kRows; ++m) {
              const Bytes row = all_words(quad_word(x + m * kNibbleQuadBytes));
              multiply_add_nibbles(words[p][m][0], w0, row);
              multiply_add_nibbles(words[p][m][1], w1, row);
            }
            x += kRows * kNibbleQuadBytes;
          };
          multiply(low_nibbles(w), low_nibbles(w + kVectorBytes));
          multiply(high_nibbles(w), high_nibbles(w + kVectorBytes));
        }
        a += 2 * kRows * kNibbleQuadBytes, b += kStepBytes;
      }
      each_sum<kPanels, kRows>([&](int p, int m, int v) __attribute__((always_inline)) {
        acc[p][m][v] = add_words(acc[p][m][v], words[p][m][v]);
      });
    }
#pragma GCC unroll 4
    for (int p = 0; p < kPanels; ++p) {
      __builtin_prefetch(ahead + p * panel_bytes);  // the scales are part of the stream
      fold_sums<4, kRows>(args, group, acc[p], b + p * panel_bytes, args.sums + p * kRows * kPanel);
    }
    b += factor_bytes, ahead += factor_bytes;
  }
}

// The kernels for a height of kRows or less; rows >= 1.
template <int kRows = kQuantizedRows>
QuantizedTileFunction pair_tile_function(const Form& form, int64_t rows) {
  if constexpr (kRows > 1) {
    if (rows < kRows) return pair_tile_function<kRows - 1>(form, rows);
  }
  if (form.bits == 8) return pair_tile<kRows>;
  return 2 * form.steps() <= kNibbleSums ? nibble_tile<kRows, true> : nibble_tile<kRows, false>;
}

template <int kRows, int kPanels = quantized_stream_panels(kRows)>
QuantizedTileFunction nibble_panels_function(int64_t panels) {
  if constexpr (kPanels > 1) {
    if (panels < kPanels) return nibble_panels_function<kRows, kPanels - 1>(panels);
  }
  return nibble_stream<kRows, kPanels>;
}

template <int kRows = kNibbleRows>
QuantizedTileFunction nibble_stream_function(int64_t rows, int64_t panels) {
  if constexpr (kRows > 1) {
    if (rows < kRows) return nibble_stream_function<kRows - 1>(rows, panels);
  }
  return nibble_panels_function<kRows>(panels);
}

QuantizedTileFunction code_tile_function(const Form& form, int64_t rows) { return pair_tile_function(form, rows); }
QuantizedTileFunction code_stream_function(const Form& form, int64_t rows, int64_t panels) {
  return form.bits == 8 ? quantized_stream_function<8>(rows, panels) : nibble_stream_function(rows, panels);
}

// A panel of 8-bit codes as 16-bit pairs.
void widen_pairs(const Form& form, const char* from, char* to) {
  constexpr int kVectorBytes = 4 * kLanes;
  for (int64_t group = 0; group < form.groups(); ++group) {
    for (int64_t i = 2 * form.steps(); i > 0; --i, from += 2 * kVectorBytes, to += 4 * kVectorBytes)
#pragma GCC unroll 2
      for (int v = 0; v < 2; ++v) {
        const Quad pairs = quad(load_quads(from + v * kVectorBytes));
        store_quads(to + v * kVectorBytes, pairs.even);
        store_quads(to + (2 + v) * kVectorBytes, pairs.odd);
      }
    for (int v = 0; v < (form.offsets ? 4 : 2); ++v, from += kVectorBytes, to += kVectorBytes)
      store_quads(to, load_quads(from));
  }
}

// A panel as tiles read it.
inline const char* tile_codes(const Form& form, const char* packed, char* unpacked) {
  (form.bits == 8 ? widen_pairs : widen_codes)(form, packed, unpacked);
  return unpacked;
}

}  // namespace
