// The rows of x, normalised and rounded, where prepared.h has them.
#pragma once
#include "cpu/linear/rows.h"
#include "cpu/linear_quantized/planes.h"
#ifdef __AVX512VNNI__
#include "cpu/linear_quantized/lines.h"
#endif

namespace {

// Small M has one tile: its groups are shared out so that all threads prepare it.
inline int64_t quantize_parts(const QuantizedProblem& p, int threads) {
  if (p.tiles() > 1) return 1;
  return max64(1, min64(min64(threads, p.form.groups()), p.M * p.K / 1024));
}

// `count` values of a token from k0 on, whole vectors of them, normalised, to `values`.
template <DType kIn, bool kNormed>
void load_values(const QuantizedProblem& p, const RowNorm& norm, int64_t token, int64_t k0, int64_t count,
                 float* values) {
  for (int64_t k = k0; k < k0 + count; k += kLanes) {
    Vec x;
    load_rows<kIn>(p.x, token, 1, k, kLanes, &x);
    if (kNormed) normalize(p, &norm, 1, k, kLanes, &x);
    vstore(values + k - k0, x);
  }
}

template <bool kNormed>
auto values_loader(DType in) {
  return in == DType::f32   ? load_values<DType::f32, kNormed>
         : in == DType::f16 ? load_values<DType::f16, kNormed>
                            : load_values<DType::bf16, kNormed>;
}

// The groups of a batch, each padded with zeros to whole vectors: where they lie, or made in `memory`. Only planes that
// others follow are written back, so a lone plane may be rounded from x itself.
float* batch_values(const QuantizedProblem& p, const RowNorm& norm, int64_t token, int64_t group0, int64_t count,
                    float* memory) {
  const int64_t group = p.form.group, k0 = group0 * group;
  if (group % kLanes == 0) {
    const bool normed = p.norm != kNormNone;
    if (!normed && p.x.dtype == DType::f32 && p.planes == 1)
      return reinterpret_cast<float*>(p.x.data) + token * p.x.stride[0] + k0;
    (normed ? values_loader<true>(p.x.dtype) : values_loader<false>(p.x.dtype))(p, norm, token, k0, count * group,
                                                                                memory);
    return memory;
  }
  float* to = memory;
  for (int64_t i = 0; i < count; ++i)
    for (int64_t k = 0; k < group; k += kLanes, to += kLanes) {
      Vec x;
      load_block(p, &norm, token, 1, k0 + i * group + k, &x);
      vstore(to, group - k < kLanes ? vkeep(x, static_cast<int>(group - k)) : x);
    }
  return memory;
}

#ifdef __AVX512VNNI__
// Whether the fast way took them.
bool quantize_lines(const QuantizedProblem& p, const Prepared& tile, const RowNorm& norm, int64_t token, int64_t row,
                    int64_t group0, int64_t count, float* memory) {
  if (p.planes > 1 || p.form.group % 64 != 0) return false;
  const int64_t itemsize = llmopt::itemsize(p.x.dtype), offset = group0 * p.form.group * itemsize;
  const char *x = p.x.data + token * p.x.stride[0] * itemsize + offset, *next = x + p.x.stride[0] * itemsize;
  if (p.norm == kNormNone && p.x.dtype == DType::bf16)
    round_lines(p, tile, Bf16Row{reinterpret_cast<const uint16_t*>(x)}, row, group0, count, next);
  else
    round_lines(p, tile, FloatRow{batch_values(p, norm, token, group0, count, memory)}, row, group0, count, next);
  return true;
}
#endif

void quantize_groups(const QuantizedProblem& p, const Prepared& tile, const RowNorm& norm, int64_t token, int64_t row,
                     int64_t group0, int64_t count, float* memory) {
#ifdef __AVX512VNNI__
  if (quantize_lines(p, tile, norm, token, row, group0, count, memory)) return;
#endif
  const Form& form = p.form;
  const int64_t stride = ceil_div(form.group, kLanes) * kLanes;
  const float largest_code = p.wide_planes ? 32767.0f : 127.0f;
  float scale[kBatch], inverse[kBatch], sum[kBatch];
  float* values = batch_values(p, norm, token, group0, count, memory);
  for (int64_t i = 0; i < count; ++i) scale[i] = largest_magnitude(values + i * stride, stride);
  for (int64_t i = 0; i < count; ++i) {
    scale[i] /= largest_code;
    const bool is_lone =
        p.exact && scale[i] != 0.0f && !fits_planes(values + i * stride, stride, scale[i], largest_code);
    inverse[i] = is_lone ? 0.0f : inverse_scale(scale[i]);
    if (inverse[i] == 0.0f) scale[i] = is_lone ? __builtin_nanf("") : 0.0f;
  }
  for (int plane = 0; plane < p.planes; ++plane, ++row) {
    const bool last = plane + 1 == p.planes;
    (last ? groups_rounding<true>(p) : groups_rounding<false>(p))(p, tile, row, group0, count, inverse, values, stride,
                                                                  sum);
    for (int64_t i = 0; i < count; ++i) {
      const int64_t at = (group0 + i) * tile.rows + row;
      const bool is_number = sum[i] == sum[i];
      tile.scale[at] = is_number ? scale[i] * tile.unit : sum[i];
      tile.start[at] = -form.zero_point() * (is_number ? static_cast<int32_t>(sum[i]) : 0);
      tile.sum[at] = tile.scale[at] * sum[i];
      inverse[i] = largest_code / kMostLeftOver;
      scale[i] /= inverse[i];
    }
  }
}

// Tokens [token0, token0 + tokens) of a tile whose first token is `first`, groups [group0, group1).
void quantize_tokens(const QuantizedProblem& p, const Prepared& out, int64_t first, int64_t token0, int64_t tokens,
                     int64_t group0, int64_t group1, float* memory) {
  const int64_t batch = max64(1, min64(kBatch, kBatchValues / (p.form.group + kLanes)));
  for (int64_t token = token0; token < token0 + tokens; ++token) {
    const RowNorm norm = row_norm(p, token);
    for (int64_t g = group0; g < group1; g += batch)
      quantize_groups(p, out, norm, token, (token - first) * p.planes, g, min64(batch, group1 - g), memory);
  }
}

// The part-th of so many parts of a tile's groups. memory: to round in.
void quantize_tile(const QuantizedProblem& p, const CodeMemory& rows, int64_t tile, int64_t part, int64_t parts,
                   char* memory) {
  const int64_t group0 = part * p.form.groups() / parts, group1 = (part + 1) * p.form.groups() / parts;
  const int64_t token0 = rows.tiles.row(tile), tokens = rows.tiles.row(tile + 1) - token0;
  quantize_tokens(p, prepared_tile(p, rows, tile), token0, token0, tokens, group0, group1,
                  reinterpret_cast<float*>(memory));
}

}  // namespace
