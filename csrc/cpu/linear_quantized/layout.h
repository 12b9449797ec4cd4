// The packed form of quantised weights: panels of kPanel columns; a panel is its groups one after the other, so that a
// kernel reads one stream.
//   group   codes [steps][..], then scales [kPanel], then offsets [kPanel] when there are any
//   step    8 k, two quads; codes are unsigned: 8 bits are stored + 128
//     8 bits  [2 quads][kPanel][4]
//     4 bits  [kPanel][4]: the first quad in the low halves of the bytes, the second in the high halves
// Scales and offsets are f32 beside 8-bit codes. Beside 4-bit codes they are f16, divided by a power of two per column
// that puts the largest of the column at the top of f16's range, from kScaleTop on; these [kPanel] f32 end the panel.
// Groups are padded to whole steps; activations are zero there. Columns past N have scale and offset zero.
#pragma once
#include "cpu/linear/problem.h"

namespace {

constexpr int64_t kStepK = 8;
constexpr float kScaleTop = 1 << 14;
// Rows of a stream. Where registers are many, a tile that is alone may have more rows than its f32 sums find registers
// for, as long as the weights are read once. Where they are few, codes are unpacked beside the sums: the mask of 4 bits
// and the pairs of 8 take some, which leaves room for fewer rows than a tile over an unpacked panel has.
constexpr int kNibbleRows = kVecRegisters == 32 ? kQuantizedRows : 4;
constexpr int kLoneRows = kVecRegisters == 32 ? 2 * kQuantizedRows : 4;
constexpr int64_t kQuantizedSums = (kLoneRows > kQuantizedRows ? kLoneRows : kQuantizedRows) * kPanel * 4;  // bytes
// Tiles over long groups fold so seldom that their f32 sums may lie in memory, which leaves registers to the integers
// of more rows. Where 16-bit pairs are multiplied the sums lie in memory anyway.
constexpr int64_t kLongGroup = 64;
#ifdef LLMOPT_ISA_PAIRS
constexpr bool kCodesByRows = false;
constexpr int kTallRows = kQuantizedRows;
#else
constexpr bool kCodesByRows = true;
constexpr int kTallRows = kVecRegisters == 32 ? 2 * kQuantizedRows : kQuantizedRows;
#endif
static_assert(kTallRows * kPanel * 4 <= kQuantizedSums);

// As stream_panels, of the integer sums.
constexpr int quantized_stream_panels(int64_t rows) {
  constexpr int64_t kFit = kVecRegisters == 32 ? 2 * kQuantizedRows - 2 : kLoneRows;
  const int64_t fit = rows == 0 ? kMostStreams : kFit / rows;
  return static_cast<int>(fit < 1 ? 1 : fit < kMostStreams ? fit : kMostStreams);
}

constexpr bool quantized_sums_fit(int rows) {
  return rows == 0 || (rows * quantized_stream_panels(rows) <= kLoneRows && quantized_sums_fit(rows - 1));
}
static_assert(quantized_sums_fit(kLoneRows), "the sums of all panels lie in the memory of a lone tile");

struct Form {
  int64_t K, bits, group;
  bool offsets;

  int64_t groups() const { return K / group; }
  int64_t steps() const { return ceil_div(group, kStepK); }  // of one group
  int64_t step_bytes() const { return bits == 8 ? 2 * 4 * kPanel : 4 * kPanel; }
  int64_t code_bytes() const { return steps() * step_bytes(); }
  int64_t scale_bytes() const { return kPanel * (bits == 8 ? 4 : 2); }
  int64_t group_bytes() const { return code_bytes() + scale_bytes() * (offsets ? 2 : 1); }
  int64_t panel_bytes() const { return groups() * group_bytes() + (bits == 8 ? 0 : 4 * kPanel); }
  // Of a row's quad as its products read it.
  int64_t quad_bytes() const { return bits == 8 ? kQuadBytes : kNibbleQuadBytes; }
  // What a stored code has to be lowered by.
  int32_t zero_point() const { return bits == 8 ? 128 : offsets ? 0 : 8; }
};

// Where activations become 16-bit pairs, one plane of 16 bits takes the place of two of bytes and two that of three, as
// long as their sums fit 32 bits: 128 * 32767 * group < 2^31.
#ifdef LLMOPT_ISA_PAIRS
constexpr int64_t kMostWideGroup = 512;
#else
constexpr int64_t kMostWideGroup = 0;
#endif

// A linear step over such weights. A plane of a token is a row of its own to the micro-kernels.
struct QuantizedProblem : Problem {
  const Form form;
  const bool rounds_inputs, wide_planes;  // activations to signed bytes; planes have 16 bits
  const bool exact;                       // results as those of f32 weights, of whatever activations
  const int planes;
  const bool is_lone, streamed;  // all rows in one tile of a stream; panels are read straight through

  explicit QuantizedProblem(const Step& s)
      : Problem(s, kLinearQuantizedInts),
        form{K, s.i[6], s.i[7], s.i[8] != 0},
        rounds_inputs(s.i[9] == 1),
        wide_planes(!rounds_inputs && form.bits == 8 && form.group <= kMostWideGroup),
        exact(s.i[10] != 0),
        planes(static_cast<int>(wide_planes ? ceil_div(s.i[9], 2) : s.i[9])),
        is_lone(tuning.rows == 0 && tuning.family <= LinearFamily::stream && M * planes <= stream_rows()),
        streamed(!has_room() ||
                 (tuning.family == LinearFamily::automatic ? is_lone : tuning.family == LinearFamily::stream)) {}

  // Bytes of a panel in the form that tiles read in L2; 0 where they read it as it is packed.
  int64_t unpacked_bytes() const {
    const Form wide{K, 8, form.group, form.offsets};
#ifdef LLMOPT_ISA_PAIRS
    if (form.bits == 8) return wide.panel_bytes() + form.groups() * form.code_bytes();
#endif
    return form.bits == 8 ? 0 : wide.panel_bytes();
  }
  int64_t stream_rows() const { return form.bits == 8 ? kLoneRows : kNibbleRows; }
  bool has_room() const { return unpacked_bytes() + kQuantizedSums <= int64_t(kLocalBytes); }
  int64_t most_tokens() const {  // of a tile
    const int64_t most = streamed                   ? min64(kQuantizedRows, stream_rows())
                         : form.group >= kLongGroup ? kTallRows
                                                    : kQuantizedRows;
    return (tuning.rows ? min64(tuning.rows, most) : most) / planes;
  }
  RowTiles tiles_of(int64_t token0, int64_t tokens) const {
    return {token0, tokens, tokens == 0 ? 0 : is_lone ? 1 : ceil_div(tokens, most_tokens())};
  }
  RowTiles all_tiles() const { return tiles_of(0, M); }
  int64_t tiles() const { return all_tiles().count; }
  int64_t tallest_tile() const { return tiles() ? ceil_div(M, tiles()) * planes : 0; }  // in rows
  int64_t row_bytes() const { return form.groups() * form.steps() * 2 * form.quad_bytes(); }
  // Prepared rows lie one behind the other (prepared.h), an odd number of lines apart: they share no set of L1.
  bool by_rows() const { return kCodesByRows && !streamed; }
  int64_t row_stride() const { return by_rows() ? (ceil_div(row_bytes(), 64) | 1) * 64 : row_bytes(); }
};

}  // namespace
