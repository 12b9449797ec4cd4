// Rows of x → the left operand: normalised, rounded to planes of signed codes group by group, in the order the tiles
// read.
//   codes   [tiles][groups][steps][2 quads][rows] kQuadBytes each
//   then per tile three tables [groups][rows]: scale f32, start i32 (what the sums begin at, for the zero point of the
//   weights) and scaled sum f32 (scale * sum of codes, for their offsets).
// A row is a token, or one plane of it.
#pragma once
#include "cpu/linear/rows.h"
#include "cpu/linear_quantized/layout.h"

namespace {

struct Prepared {
  char* codes;
  float* scale;
  int32_t* start;
  float* sum;
  int64_t rows;                                   // of a table
  int64_t group_stride, quad_stride, row_stride;  // of codes, in bytes
  float unit = 1;                                 // `scale` and `sum` are stored times this

  char* quad(int64_t group, int64_t i, int64_t row) const {
    return codes + group * group_stride + i * quad_stride + row * row_stride;
  }
};

inline size_t prepared_bytes(const QuantizedProblem& p) {
  const int64_t rows = p.M * p.planes;
  return static_cast<size_t>(ceil_div(rows * p.row_bytes(), 64) * 64 + 3 * 4 * rows * p.form.groups());
}

// Streams multiply by f16 scales as they are packed, from kScaleTop on: in full, large activations would take their
// sums beyond f32.
inline float scale_unit(const QuantizedProblem& p) { return p.form.bits == 4 && p.streamed ? 1 / kScaleTop : 1.0f; }

inline Prepared prepared_tile(const QuantizedProblem& p, char* shared, int64_t tile) {
  const int64_t rows = p.M * p.planes, row0 = p.tile_row(tile) * p.planes, groups = p.form.groups();
  const int64_t tile_rows = p.tile_row(tile + 1) * p.planes - row0, quad_bytes = tile_rows * p.form.quad_bytes();
  float* tables = reinterpret_cast<float*>(shared + ceil_div(rows * p.row_bytes(), 64) * 64);
  return {shared + row0 * p.row_bytes(),
          tables + row0 * groups,
          reinterpret_cast<int32_t*>(tables + rows * groups) + row0 * groups,
          tables + 2 * rows * groups + row0 * groups,
          tile_rows,
          2 * p.form.steps() * quad_bytes,
          quad_bytes,
          p.form.quad_bytes(),
          scale_unit(p)};
}

// Small M has one tile: its groups are shared out so that all threads prepare it.
inline int64_t quantize_parts(const QuantizedProblem& p, int threads) {
  if (p.tiles() > 1) return 1;
  return max64(1, min64(min64(threads, p.form.groups()), p.M * p.K / 1024));
}

// Groups of a token that are rounded together: the chains of one group are long, those of several overlap.
constexpr int64_t kBatch = 16, kBatchValues = 16 << 10;
static_assert(kBatchValues * 4 < int64_t(kLocalBytes));

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

// Sums and maxima of a row are several chains: one would wait for itself.
constexpr int kRowChains = 4;

// The largest magnitude of `count` values. NaNs may hide behind it.
inline float largest_magnitude(const float* values, int64_t count) {
  Vec largest[kRowChains] = {vzero(), vzero(), vzero(), vzero()};
  int64_t k = 0;
  for (; k + kRowChains * kLanes <= count; k += kRowChains * kLanes)
#pragma GCC unroll 4
    for (int i = 0; i < kRowChains; ++i) largest[i] = vmax(vabs(vload(values + k + i * kLanes)), largest[i]);
  for (; k < count; k += kLanes) largest[0] = vmax(vabs(vload(values + k)), largest[0]);
  return vreduce_max(vmax(vmax(largest[0], largest[1]), vmax(largest[2], largest[3])));
}

template <int kBytes, class Code>
inline void pack_quad(char* to, const Code* codes) {
  if constexpr (kBytes == 4)
    __builtin_memcpy(to, codes, 4);
  else
    quad_pack(to, codes);
}

inline void store_codes(int8_t* to, Vec codes) { vstore_s8(to, codes); }
#ifdef LLMOPT_ISA_PAIRS
inline void store_codes(int16_t* to, Vec codes) { vstore_s16(to, codes); }
#endif

// One plane of a group: codes = round(values * inverse), a quad in kBytes, and what they leave over of these products
// back to `values` if another plane follows. Returns the sum of the codes: NaN if a value is NaN or Inf, whatever the
// scale.
template <class Code, int kBytes, bool kLast>
inline __attribute__((always_inline)) float round_plane(const Form& form, float inverse, float* values, char* to,
                                                        int64_t quad_stride) {
  Vec sum[kRowChains] = {vzero(), vzero(), vzero(), vzero()};
  auto round = [&](int64_t k, int chain) __attribute__((always_inline)) {
    const Vec x = vload(values + k), q = vround(vmul(x, vset(inverse)));
    sum[chain] = vadd(sum[chain], q);
    if (!kLast) vstore(values + k, vfma(x, vset(inverse), vneg(q)));
    return q;
  };
  Code codes[kLanes];
  const bool side_by_side = kBytes == 4 && quad_stride == kBytes;  // the codes of a row
  auto whole_vector = [&](int64_t k, int chain) __attribute__((always_inline)) {
    const Vec q = round(k, chain);
    if (side_by_side) return vstore_s8(reinterpret_cast<int8_t*>(to + k), q);
    char* at = to + k / 4 * quad_stride;
#ifdef LLMOPT_STORES_QUADS
    store_code_quads<kBytes>(at, quad_stride, q);
#else
    store_codes(codes, q);
#pragma GCC unroll 4
    for (int i = 0; i < kLanes / 4; ++i) pack_quad<kBytes>(at + i * quad_stride, codes + 4 * i);
#endif
  };
  // Vectors that have all their quads.
  const int64_t whole = min64(kStepK * form.steps(), ceil_div(form.group, kLanes) * kLanes) / kLanes * kLanes;
  int64_t k = 0;
  for (; k + kRowChains * kLanes <= whole; k += kRowChains * kLanes)
#pragma GCC unroll 4
    for (int i = 0; i < kRowChains; ++i) whole_vector(k + i * kLanes, i);
  for (; k < whole; k += kLanes) whole_vector(k, 0);
  if (k < form.group) {
    store_codes(codes, round(k, 0));
    for (int64_t i = 0; i < 2 * form.steps() - k / 4; ++i)
      pack_quad<kBytes>(to + (k / 4 + i) * quad_stride, codes + 4 * i);
  }
  return vreduce_add(vadd(vadd(sum[0], sum[1]), vadd(sum[2], sum[3])));
}

void clear_quads(const Form& form, int64_t first, char* to, int64_t quad_stride) {
  for (int64_t i = first; i < 2 * form.steps(); ++i) __builtin_memset(to + i * quad_stride, 0, form.quad_bytes());
}

// What rounding may leave over of a product, in codes: half a code and more, as products of some thousand codes were
// rounded to f32 before.
constexpr float kMostLeftOver = 0.5f + 1.0f / 512;

// A plane of several groups, which lie `stride` values apart.
template <class Code, int kBytes, bool kLast>
void round_groups(const QuantizedProblem& p, const Prepared& tile, int64_t row, int64_t group0, int64_t count,
                  const float* inverse, float* values, int64_t stride, float* sum) {
  const Form& form = p.form;
  const int64_t written = stride / 4;
  for (int64_t i = 0; i < count; ++i) {
    char* to = tile.quad(group0 + i, 0, row);
    sum[i] = round_plane<Code, kBytes, kLast>(form, inverse[i], values + i * stride, to, tile.quad_stride);
    clear_quads(form, sum[i] == sum[i] ? written : 0, to, tile.quad_stride);
  }
}

template <bool kLast>
auto groups_rounding(const QuantizedProblem& p) {
  if (p.form.bits == 4) return round_groups<int8_t, kNibbleQuadBytes, kLast>;
  if constexpr (kMostWideGroup > 0) {
    if (p.wide_planes) return round_groups<int16_t, kQuadBytes, kLast>;
  }
  return round_groups<int8_t, kQuadBytes, kLast>;
}

void quantize_groups(const QuantizedProblem& p, const Prepared& tile, const RowNorm& norm, int64_t token, int64_t row,
                     int64_t group0, int64_t count, float* memory) {
  const Form& form = p.form;
  const int64_t stride = ceil_div(form.group, kLanes) * kLanes;
  const float largest_code = p.wide_planes ? 32767.0f : 127.0f;
  float scale[kBatch], inverse[kBatch], sum[kBatch];
  float* values = batch_values(p, norm, token, group0, count, memory);
  for (int64_t i = 0; i < count; ++i) scale[i] = largest_magnitude(values + i * stride, stride);
  for (int64_t i = 0; i < count; ++i) {
    scale[i] /= largest_code;
    inverse[i] = inverse_scale(scale[i]);
    if (inverse[i] == 0.0f) scale[i] = 0.0f;
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

void quantize_tile(const QuantizedProblem& p, int64_t chunk, int threads, const Scratch& scratch) {
  const int64_t parts = quantize_parts(p, threads), tile = chunk / parts, part = chunk % parts;
  const int64_t group0 = part * p.form.groups() / parts, group1 = (part + 1) * p.form.groups() / parts;
  const int64_t token0 = p.tile_row(tile);
  quantize_tokens(p, prepared_tile(p, scratch.shared, tile), token0, token0, p.tile_row(tile + 1) - token0, group0,
                  group1, reinterpret_cast<float*>(scratch.local));
}

}  // namespace
