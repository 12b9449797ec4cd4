// Steps through a program for one block after the other.
#pragma once
#include "cpu/vm/blocks.h"
#include "cpu/vm/ops.h"
#include "cpu/vm/segments.h"

namespace {

// What a register holds for a block: one value as a vector of equal lanes (constants, and row statistics when the block
// is one row), one value for each row, or one for each element.
enum Kind : int { kOne = 0, kPerRow = 1, kFull = 2 };

struct Register {
  const float* data;
  const float* spread;  // of a kPerRow register: the same per element, once something has asked for it
  Kind kind;
};

// Floats between two registers: whole vectors, and one line more, so that registers do not meet in the same L1 sets and
// the last row of a block may be filled in whole vectors.
inline int64_t register_stride(const Blocking& b) { return ceil_div(b.elements(), kLanes) * kLanes + 16; }
// Blocks of several rows keep room to spread each register.
inline int64_t register_count(const Code& code, const Blocking& b) {
  return code.registers * (b.rows_per_block > 1 ? 2 : 1);
}
inline size_t scratch_bytes(const Code& code, const Blocking& b) {
  const int64_t floats = register_count(code, b) * register_stride(b) + int64_t{code.num_constants} * kLanes;
  return sizeof(float) * static_cast<size_t>(floats);
}

class Machine {
 public:
  Machine(const Step& step, const Code& code, const Blocking& blocking, float* memory)
      : s_(step),
        code_(code),
        b_(blocking),
        placement_(step, code, blocking.space),
        memory_(memory),
        stride_(register_stride(blocking)) {
    for (int t = 0; t < blocking.space.num_tensors; ++t) item_[t] = itemsize(step.t[t].dtype);
    float* constants = memory + register_count(code, blocking) * stride_;
    for (int k = 0; k < code.num_constants; ++k) {
      vstore(constants + k * kLanes, vset(code.constants[k]));
      register_[code.registers + k] = {constants + k * kLanes, nullptr, kOne};
    }
  }

  // Runs blocks [begin, end).
  void run(int64_t begin, int64_t end) {
    const int64_t total_rows = b_.space.rows(), row_length = b_.space.row();
    int64_t piece = begin % b_.pieces, row = begin / b_.pieces * b_.rows_per_block;
    cursor_.seek(b_.space, row);
    for (int64_t k = begin; k < end; ++k) {
      rows_ = min64(b_.rows_per_block, total_rows - row);
      first_ = piece * b_.piece;
      length_ = min64(b_.piece, row_length - first_);
      run_block();
      if (++piece < b_.pieces) continue;
      piece = 0;
      row += rows_;
      for (int64_t left = rows_, n; left > 0; left -= n) {
        n = min64(left, cursor_.run(b_.space));
        cursor_.advance(b_.space, n);
      }
    }
  }

 private:
  void run_block() {
    count_ = rows_ * length_;
    whole_vectors_ = count_ % kLanes == 0;
    one_run_ = rows_ == 1 || rows_ <= cursor_.run(b_.space);
    for (int t = 0; t < b_.space.num_tensors; ++t) {
      address_[t] = s_.t[t].data + (cursor_.offset[t] + first_ * row_stride(t)) * item_[t];
      contiguous_[t] = is_contiguous(t);
      // Loops go in whole vectors, so what is used in place must be made of them.
      in_place_[t] = placement_.allowed[t] && whole_vectors_ && contiguous_[t] ? address_[t] : nullptr;
    }
    for (int i = 0; i < code_.length; ++i) {
      const Instruction in = decode(code_.words[i]);
      if (in.op == kLoad)
        load(in);
      else if (in.op == kStore)
        store(in);
      else if (in.op >= kSum)
        reduce(in);
      else
        compute(in);
    }
  }

  float* home(int r) const { return memory_ + r * stride_; }
  float* spread_home(int r) const { return memory_ + (code_.registers + r) * stride_; }
  int64_t row_stride(int t) const { return b_.space.row_stride(t); }
  // Stride from row to row within a run; asked for only where there are rows.
  int64_t run_stride(int t) const { return b_.space.stride[t][b_.space.ndim - 2]; }
  bool is_contiguous(int t) const {
    if (row_stride(t) != 1) return false;
    return rows_ == 1 || placement_.dense[t] || (one_run_ && run_stride(t) == length_);
  }
  float* in_place(int t) const { return reinterpret_cast<float*>(in_place_[t]); }

  // Calls f(row, address) for the rows of the block.
  template <class F>
  void for_rows(int t, F f) const {
    if (one_run_) {
      const int64_t step = rows_ == 1 ? 0 : run_stride(t) * item_[t];
      for (int64_t r = 0; r < rows_; ++r) f(r, address_[t] + r * step);
      return;
    }
    TensorCursor row(b_.space, cursor_, t);
    for (int64_t r = 0; r < rows_; ++r, row.next(b_.space, t)) f(r, s_.t[t].data + row.offset * item_[t]);
  }

  void load(const Instruction& in) {
    const int t = in.a;
    const DType dtype = s_.t[t].dtype;
    float* to = home(in.dst);
    Register& out = register_[in.dst];
    out = {to, nullptr, kFull};
    if (float* here = in_place(t)) {
      out.data = here;
    } else if (row_stride(t) == 0 && (rows_ == 1 || b_.space.uniform(t))) {
      load_segment(dtype, address_[t], 0, to, kLanes);
      out.kind = kOne;
    } else if (row_stride(t) == 0) {
      for_rows(t, [&](int64_t r, const char* p) { load_segment(dtype, p, 0, to + r, 1); });
      out.kind = kPerRow;
    } else if (contiguous_[t]) {
      load_segment(dtype, address_[t], 1, to, count_);
    } else if (dtype == DType::f32 && row_stride(t) == 1) {
      for_rows(t, [&](int64_t r, const char* p) { widen_row<DType::f32>(p, to + r * length_, length_); });
    } else {
      for_rows(t, [&](int64_t r, const char* p) { load_segment(dtype, p, row_stride(t), to + r * length_, length_); });
    }
  }

  void store(const Instruction& in) {
    const int t = code_.inputs + in.b;
    const DType dtype = s_.t[t].dtype;
    const Register& from = register_[in.a];
    if (from.kind == kFull && contiguous_[t]) {
      if (from.data != in_place(t)) store_segment(dtype, address_[t], 1, {from.data, -1}, count_);
      return;
    }
    // A row statistic leaves through a view that repeats one element along the row.
    const int64_t n = row_stride(t) == 0 ? 1 : length_;
    for_rows(t, [&](int64_t r, char* p) {
      if (from.kind == kFull) return store_segment(dtype, p, row_stride(t), {from.data + r * length_, -1}, n);
      float lanes[kLanes];
      vstore(lanes, from.kind == kOne ? vload(from.data) : vset(from.data[r]));
      store_segment(dtype, p, row_stride(t), {lanes, 0}, n);
    });
  }

  // Register r as an operand of an instruction whose result is of kind `wanted`.
  Value operand(int r, Kind wanted) {
    Register& from = register_[r];
    if (from.kind == kOne) return {from.data, 0};
    if (from.kind == wanted) return {from.data, -1};
    if (!from.spread) {
      float* to = spread_home(r);
      // Whole vectors: what goes past a row's end is written again by the next row.
      for (int64_t row = 0; row < rows_; ++row) {
        const Vec v = vset(from.data[row]);
        for (int64_t i = 0; i < length_; i += kLanes) vstore(to + row * length_ + i, v);
      }
      from.spread = to;
    }
    return {from.spread, -1};
  }

  void compute(const Instruction& in) {
    Kind kind = register_[in.a].kind;
    if (register_[in.b].kind > kind) kind = register_[in.b].kind;
    if (register_[in.c].kind > kind) kind = register_[in.c].kind;
    const Value a = operand(in.a, kind), b = operand(in.b, kind), c = operand(in.c, kind);
    const int64_t n = kind == kFull ? count_ : kind == kPerRow ? rows_ : kLanes;
    float* to = kind == kFull && in.extra ? in_place(code_.inputs + in.extra - 1) : nullptr;
    if (!to) to = home(in.dst);
    if (in.op < kAdd)
      kUnaryLoops[in.op - kCopy](to, a.data, n);
    else if (in.op < kWhere)
      kBinaryLoops[in.op - kAdd](to, a, b, n);
    else if (in.op == kWhere)
      where_loop(to, a, b, c, n);
    else
      mul_add_loop(to, a, b, c, n);
    register_[in.dst] = {to, nullptr, kind};
  }

  void reduce(const Instruction& in) {
    const Register from = register_[in.a];
    float* to = home(in.dst);
    if (from.kind == kFull) {
      const bool single = rows_ == 1;
      if (single)
        vstore(to, vset(reduce_row(in.op, from.data, length_)));
      else
        for (int64_t r = 0; r < rows_; ++r) to[r] = reduce_row(in.op, from.data + r * length_, length_);
      register_[in.dst] = {to, nullptr, single ? kOne : kPerRow};
      return;
    }
    // A row of equal values: its sum is a multiple, its mean and extremes are the value.
    const Vec factor = vset(in.op == kSum ? static_cast<float>(length_) : 1.0f);
    const int64_t n = from.kind == kPerRow ? rows_ : kLanes;
    for (int64_t i = 0; i < n; i += kLanes) vstore(to + i, vmul(vload(from.data + i), factor));
    register_[in.dst] = {to, nullptr, from.kind};
  }

  const Step& s_;
  const Code code_;
  const Blocking& b_;
  const Placement placement_;
  float* const memory_;
  const int64_t stride_;
  Register register_[256];
  // The block: rows [cursor ..., rows_) and in each row elements [first_, first_ + length_).
  RowCursor cursor_;
  int64_t rows_, first_, length_, count_;
  bool whole_vectors_;
  bool one_run_;  // the block's rows are one stride apart
  // Of each operand, for the block: where it begins, whether it is contiguous, where it is used as it lies (or
  // nullptr).
  char* address_[kMaxSpaceTensors];
  bool contiguous_[kMaxSpaceTensors];
  char* in_place_[kMaxSpaceTensors];
  int item_[kMaxSpaceTensors];
};

}  // namespace
