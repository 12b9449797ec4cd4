// How a program's iteration space is cut into blocks, and which operands a block may use where they lie.
#pragma once
#include "cpu/chunks.h"
#include "cpu/iteration_space.h"
#include "cpu/vm/bytecode.h"

namespace {

constexpr int64_t kShortRow = 256;  // rows below share a block

// Elements of a block: its registers should stay in L1, and the cost of stepping through the program, some ten cycles
// an instruction, should vanish beside the work.
inline int64_t block_elements(const Code& code) {
  return code.registers <= 3 ? 2048 : code.registers <= 6 ? 1024 : 512;
}

// A block is `rows_per_block` whole rows, or piece number p of one row: elements [p * piece, ...).
struct Blocking {
  Space space;
  int64_t rows_per_block, piece, pieces, blocks;

  int64_t elements() const { return rows_per_block * piece; }  // of a full block
};

inline Blocking make_blocking(const Step& s, const Code& code) {
  Blocking b;
  b.space = make_space(s.t, code.inputs + code.outputs, code.has_reduction, code.inputs);
  const int64_t row = b.space.row(), rows = b.space.rows(), full = block_elements(code);
  b.rows_per_block = b.pieces = 1;
  b.piece = row;
  b.blocks = row == 0 ? 0 : rows;
  if (b.blocks == 0) return b;
  if (row < kShortRow) {
    b.rows_per_block = min64(rows, full / row);
    b.blocks = ceil_div(rows, b.rows_per_block);
    return b;
  }
  // Half a block more is no reason to cut a row: whole rows keep broadcast operands contiguous.
  if (code.has_reduction || row <= full + full / 2) return b;
  b.pieces = ceil_div(row, full);
  b.piece = full;
  b.blocks = rows * b.pieces;
  return b;
}

struct Extent {
  const char *begin, *end;
};
inline Extent extent_of(const Space& space, const Tensor& tensor, int t) {
  int64_t low = 0, high = 1;
  for (int d = 0; d < space.ndim; ++d) {
    const int64_t reach = (space.size[d] - 1) * space.stride[t][d];
    (reach < 0 ? low : high) += reach;
  }
  return {tensor.data + low * itemsize(tensor.dtype), tensor.data + high * itemsize(tensor.dtype)};
}

// Which operands may be used in place wherever a block of them is contiguous: inputs read where they lie, and outputs
// that the computing instruction writes itself. An output may be the same view as an input; then either is done only
// when no instruction reads the input after the output is written.
struct Placement {
  bool allowed[kMaxSpaceTensors];
  bool dense[kMaxSpaceTensors];

  Placement(const Step& s, const Code& code, const Space& space) {
    int last_read[kMaxSpaceTensors], defined[kMaxSpaceTensors], stored[kMaxSpaceTensors];
    for (int t = 0; t < space.num_tensors; ++t) {
      allowed[t] = s.t[t].dtype == DType::f32;
      dense[t] = space.dense(t);
      last_read[t] = defined[t] = stored[t] = -1;
    }
    for (int i = 0; i < code.length; ++i) {
      const Instruction in = decode(code.words[i]);
      if (in.op == kLoad)
        last_read[in.a] = in.extra;
      else if (in.op == kStore)
        stored[code.inputs + in.b] = i;
      else if (in.extra)
        defined[code.inputs + in.extra - 1] = i;
    }
    for (int o = code.inputs; o < space.num_tensors; ++o) {
      allowed[o] = allowed[o] && defined[o] >= 0;
      for (int i = 0; i < code.inputs; ++i)
        if (overlap(space, s, i, o)) allowed[o] = allowed[o] && same_view(space, s, i, o) && last_read[i] <= defined[o];
    }
    for (int o = code.inputs; o < space.num_tensors; ++o)
      for (int i = 0; i < code.inputs; ++i)
        if (overlap(space, s, i, o))
          allowed[i] = allowed[i] && same_view(space, s, i, o) && last_read[i] <= (allowed[o] ? defined[o] : stored[o]);
  }

 private:
  static bool overlap(const Space& space, const Step& s, int i, int o) {
    const Extent read = extent_of(space, s.t[i], i), written = extent_of(space, s.t[o], o);
    return read.begin < written.end && written.begin < read.end;
  }
  static bool same_view(const Space& space, const Step& s, int i, int o) {
    if (s.t[i].data != s.t[o].data || s.t[i].dtype != s.t[o].dtype) return false;
    for (int d = 0; d < space.ndim; ++d)
      if (space.stride[i][d] != space.stride[o][d]) return false;
    return true;
  }
};

}  // namespace
