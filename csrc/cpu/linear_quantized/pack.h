// pack_linear_quantized: codes, scales and offsets → panels.
#pragma once
#include "cpu/linear_quantized/layout.h"

namespace {

// One column of a panel: where its codes, scales and offsets come from. codes.data == nullptr past the last column.
struct QuantizedRow {
  Tensor codes, scales, offsets;
  int64_t row;
};

inline int quantized_weights(const Step& s) { return (s.num_tensors - 1) / 3; }

inline QuantizedRow quantized_row(const Step& s, int64_t panel, int column) {
  const int weights = quantized_weights(s);
  const bool interleave = s.i[2] != 0;
  int which = interleave ? column / kLanes : 0;
  int64_t row = interleave ? panel * kLanes + column % kLanes : panel * kPanel + column;
  while (!interleave && which < weights && row >= s.t[3 * which].size[0]) row -= s.t[3 * which++].size[0];
  if (which == weights || row >= s.t[3 * which].size[0]) return {};
  return {s.t[3 * which], s.t[3 * which + 1], s.t[3 * which + 2], row};
}

// The stored, unsigned form of a code.
inline uint8_t stored_code(const QuantizedRow& from, int64_t bits, int64_t k) {
  if (!from.codes.data) return 0;
  const uint8_t* row = reinterpret_cast<const uint8_t*>(from.codes.data) + from.row * from.codes.stride[0];
  if (bits == 8) return row[k * from.codes.stride[1]] ^ 0x80;
  return (row[k / 2 * from.codes.stride[1]] >> (k % 2 * 4)) & 15;
}

void pack_codes(const Form& form, const QuantizedRow& from, int64_t group, int column, uint8_t* to) {
  for (int64_t k = 0; k < form.steps() * kStepK; ++k) {
    const uint8_t code = k < form.group ? stored_code(from, form.bits, group * form.group + k) : 0;
    uint8_t* step = to + k / kStepK * form.step_bytes();
    const int64_t half = k % kStepK / 4, byte = column * 4 + k % 4;
    if (form.bits == 8)
      step[half * kPanel * 4 + byte] = code;
    else
      step[byte] = static_cast<uint8_t>(half == 0 ? code : step[byte] | code << 4);
  }
}

inline float factor_at(const Tensor& t, int64_t row, int64_t group) {
  if (!t.data) return 0.0f;
  return reinterpret_cast<const float*>(t.data)[row * t.stride[0] + group * t.stride[1]];
}

// The power of two that brings the largest scale or offset of a column to kScaleTop and below twice that; 1 where there
// is none.
inline float column_factor(const Form& form, const QuantizedRow& from) {
  float largest = 0.0f;
  for (int64_t g = 0; g < form.groups(); ++g) {
    const float scale = __builtin_fabsf(factor_at(from.scales, from.row, g));
    const float offset = __builtin_fabsf(factor_at(from.offsets, from.row, g));
    if (scale > largest) largest = scale;
    if (offset > largest) largest = offset;
  }
  uint32_t bits;
  __builtin_memcpy(&bits, &largest, 4);
  const uint32_t exponent = bits >> 23;  // 0: zero or too small to matter; 255: inf or NaN, which stay what they are
  if (exponent == 0 || exponent == 255) return 1.0f;
  bits = static_cast<uint32_t>(max64(1, static_cast<int64_t>(exponent) - 14)) << 23;
  float factor;
  __builtin_memcpy(&factor, &bits, 4);
  return factor;
}

int one_phase(const Step&, int) { return 1; }

int64_t pack_chunks(const Step& s, int, int) {
  int64_t n = 0;
  for (int i = 0; i < quantized_weights(s); ++i) n += s.t[3 * i].size[0];
  return ceil_div(n, kPanel);
}

void pack_run(const Step& s, int, int64_t panel, int, const Scratch&) {
  const int64_t bits = s.i[0], group = s.i[1];
  const Form form{s.t[0].size[1] * (bits == 8 ? 1 : 2), bits, group, s.t[2].data != nullptr};
  const Tensor& packed = s.t[s.num_tensors - 1];
  char* to = packed.data + panel * form.panel_bytes();
  QuantizedRow rows[kPanel];
  float factors[kPanel], inverse[kPanel];
  for (int c = 0; c < kPanel; ++c) {
    rows[c] = quantized_row(s, panel, c);
    factors[c] = bits == 8 ? 1.0f : column_factor(form, rows[c]);
    inverse[c] = 1.0f / factors[c];
  }
  const DType kept = bits == 8 ? DType::f32 : DType::f16;
  for (int64_t g = 0; g < form.groups(); ++g, to += form.group_bytes()) {
    for (int c = 0; c < kPanel; ++c) pack_codes(form, rows[c], g, c, reinterpret_cast<uint8_t*>(to));
    for (int part = 0; part < (form.offsets ? 2 : 1); ++part) {
      float values[kPanel];
      for (int c = 0; c < kPanel; ++c)
        values[c] = factor_at(part == 0 ? rows[c].scales : rows[c].offsets, rows[c].row, g) * inverse[c];
      char* at = to + form.code_bytes() + part * form.scale_bytes();
      for (int c = 0; c < kPanel; c += kLanes) vstore_as(kept, at, c, vload(values + c), kLanes);
    }
  }
  if (bits == 4) __builtin_memcpy(to, factors, sizeof(factors));
}

}  // namespace
