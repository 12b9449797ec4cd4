// The elementwise VM: runs a short register program over blocks of a common iteration space, each value of a block an
// array of fp32 in L1. Programs with row reductions take a whole row as their block. vm/bytecode.h has the contract.
#include "cpu/family.h"
#include "cpu/vm/blocks.h"
#include "cpu/vm/bytecode.h"
#include "cpu/vm/ops.h"
#include "cpu/vm/segments.h"

namespace {

// Floats between two registers: whole vectors, and one line more so that registers do not meet in the same L1 sets.
inline int64_t register_stride(const Blocking& b) { return ceil_div(b.elements(), kLanes) * kLanes + 16; }
inline size_t scratch_bytes(const Code& code, const Blocking& b) {
  return sizeof(float) * static_cast<size_t>(code.registers * register_stride(b) + int64_t{code.num_constants} * kLanes);
}
inline bool fits_local(const Code& code, const Blocking& b) { return scratch_bytes(code, b) <= llmopt::kLocalBytes; }

// One block in the making.
struct Machine {
  const Step& s;
  const Code code;
  const Blocking& blocking;
  const Placement placement;
  float* registers;
  int64_t stride;
  Value value[256];
  // The block: rows [cursor ..., rows) and in each row elements [first, first + length).
  RowCursor cursor;
  int64_t rows, first, length, count;
  bool full_vectors;  // only then may a loop of whole vectors touch an operand's memory

  Machine(const Step& step, const Code& c, const Blocking& b, float* memory)
      : s(step), code(c), blocking(b), placement(step, c, b), registers(memory), stride(register_stride(b)) {
    float* constants = registers + code.registers * stride;
    for (int k = 0; k < code.num_constants; ++k) {
      vstore(constants + k * kLanes, vset(code.constants[k]));
      value[code.registers + k] = {constants + k * kLanes, 0};
    }
  }

  float* home(int r) const { return registers + r * stride; }
  char* address(int t) const {
    return s.t[t].data + (cursor.offset[t] + first * blocking.space.row_stride(t)) * itemsize(s.t[t].dtype);
  }
  float* in_place(int t) const {
    return placement.whole[t] && full_vectors ? reinterpret_cast<float*>(address(t)) : nullptr;
  }

  void load(const Instruction& in) {
    const int t = in.a;
    float* to = home(in.dst);
    if (float* here = in_place(t)) {
      value[in.dst] = {here, -1};
      return;
    }
    const int64_t row_stride = blocking.space.row_stride(t);
    if (row_stride == 0 && (rows == 1 || blocking.space.uniform(t))) {
      load_segment(s.t[t].dtype, address(t), 0, to, kLanes);
      value[in.dst] = {to, 0};
      return;
    }
    value[in.dst] = {to, -1};
    if (rows == 1) return load_segment(s.t[t].dtype, address(t), row_stride, to, length);
    TensorCursor row(blocking.space, cursor, t);
    const int item = itemsize(s.t[t].dtype);
    for (int64_t r = 0; r < rows; ++r, row.next(blocking.space, t))
      load_segment(s.t[t].dtype, s.t[t].data + row.offset * item, row_stride, to + r * length, length);
  }

  void store(const Instruction& in) {
    const int t = code.inputs + in.b;
    const Value from = value[in.a];
    if (from.data == in_place(t)) return;
    const int64_t row_stride = blocking.space.row_stride(t);
    // A row statistic leaves through a view that repeats one element along the row.
    const int64_t n = row_stride == 0 ? 1 : length;
    TensorCursor row(blocking.space, cursor, t);
    const int item = itemsize(s.t[t].dtype);
    for (int64_t r = 0; r < rows; ++r, row.next(blocking.space, t))
      store_segment(s.t[t].dtype, s.t[t].data + (row.offset + first * row_stride) * item, row_stride,
                    {from.data + (r * length & from.step), from.step}, n);
  }

  void compute(const Instruction& in) {
    const Value a = value[in.a], b = value[in.b], c = value[in.c];
    const bool one_vector = !(a.step | b.step | c.step);
    float* to = home(in.dst);
    if (in.op >= kSum) {
      vstore(to, vset(reduce_row(in.op, a, count)));
      value[in.dst] = {to, 0};
      return;
    }
    float* there = in.extra && !one_vector ? in_place(code.inputs + in.extra - 1) : nullptr;
    if (there) to = there;
    const int64_t n = one_vector ? kLanes : count;
    if (in.op < kAdd) kUnaryLoops[in.op - kCopy](to, a.data, n);
    else if (in.op < kWhere) kBinaryLoops[in.op - kAdd](to, a, b, n);
    else if (in.op == kWhere) where_loop(to, a, b, c, n);
    else mul_add_loop(to, a, b, c, n);
    value[in.dst] = {to, one_vector ? 0 : -1};
  }

  void run_block() {
    count = rows * length;
    full_vectors = count % kLanes == 0;
    for (int i = 0; i < code.length; ++i) {
      const Instruction in = decode(code.words[i]);
      if (in.op == kLoad) load(in);
      else if (in.op == kStore) store(in);
      else compute(in);
    }
  }
};

inline int64_t vm_chunks(const Step& s, int, int threads) {
  const Code code = code_of(s);
  const Blocking b = make_blocking(s, code);
  return chunk_count(b.blocks, b.elements(), threads);
}

// Rows too long for the private scratch keep their registers in the shared one, one set for each chunk.
inline size_t vm_workspace(const Step& s, int threads) {
  const Code code = code_of(s);
  const Blocking b = make_blocking(s, code);
  if (fits_local(code, b)) return 0;
  return scratch_bytes(code, b) * static_cast<size_t>(chunk_count(b.blocks, b.elements(), threads));
}

inline void vm_run(const Step& s, int, int64_t chunk, int threads, const Scratch& scratch) {
  const Code code = code_of(s);
  const Blocking b = make_blocking(s, code);
  char* memory = fits_local(code, b) ? scratch.local : scratch.shared + scratch_bytes(code, b) * static_cast<size_t>(chunk);
  const RowRange blocks = chunk_range(b.blocks, b.elements(), threads, chunk);
  Machine m(s, code, b, reinterpret_cast<float*>(memory));
  const int64_t total_rows = b.space.rows();
  m.cursor.seek(b.space, blocks.begin / b.pieces * b.rows_per_block);
  for (int64_t k = blocks.begin; k < blocks.end; ++k) {
    const int64_t piece = k % b.pieces, row = k / b.pieces * b.rows_per_block;
    m.rows = min64(b.rows_per_block, total_rows - row);
    m.first = piece * b.piece;
    m.length = min64(b.piece, b.space.row() - m.first);
    m.run_block();
    if (piece == b.pieces - 1)
      for (int64_t r = 0; r < m.rows; ++r) m.cursor.next(b.space);
  }
}

const llmopt::Kernel kKernels[] = {{"vm", one_phase, vm_chunks, vm_workspace, vm_run}};

}  // namespace

LLMOPT_EXPORT_FAMILY(vm, kKernels, sizeof(kKernels) / sizeof(kKernels[0]), 0)
