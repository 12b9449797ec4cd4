// Rows in groups, one behind the other, each multiplied by a weight of its own, as tokens are by the experts they are
// routed to. An expert's rows are a linear of their own over slices of the operands, so they run on whatever kernel
// suits their number. That is known only while the program runs: phase 0 writes down who has how many rows and chunks,
// phase 1 prepares rows, phase 2 multiplies.
#pragma once
#include "cpu/linear/problem.h"

namespace {

constexpr int kEnds = 7, kTable = 8;  // operands behind those of a linear
constexpr int kGroupedOperands = 9;
static_assert(kEnds == kLinearOperands);

// One expert that has rows, as it stands in the table.
struct ExpertRows {
  int64_t expert, row0, rows;
  int64_t memory;                         // where its prepared rows lie in shared memory
  int64_t first_prepare, first_multiply;  // of its chunks, among those of all experts
};
static_assert(sizeof(ExpertRows) == kExpertRowInts * sizeof(int64_t));

// The table: the number of experts in it, those, and one more that begins where all chunks end.
struct ExpertTable {
  ExpertRows* entries;

  explicit ExpertTable(const Step& s) : entries(reinterpret_cast<ExpertRows*>(s.t[kTable].data) + 1) {}
  int64_t& count() const { return entries[-1].expert; }
  const ExpertRows& end() const { return entries[count()]; }
  // Who a chunk belongs to: the last expert whose first one is not behind it.
  const ExpertRows& owner(int64_t ExpertRows::* first, int64_t chunk) const {
    int64_t low = 0, high = count();
    while (high - low > 1) {
      const int64_t middle = (low + high) / 2;
      (entries[middle].*first <= chunk ? low : high) = middle;
    }
    return entries[low];
  }
};

// The linear of one expert. All operands are there, so that a kernel sees that it is not alone in its step.
struct ExpertStep {
  Tensor t[kGroupedOperands];
  Step step;

  ExpertStep(const Step& s, int64_t weight_bytes, int64_t expert, int64_t row0, int64_t rows) : step(s) {
    for (int i = 0; i < kGroupedOperands; ++i) t[i] = s.t[i];
    step.t = t;
    take_rows(t[0], row0, rows);
    take_rows(t[4], row0, rows);
    t[1].data += expert * weight_bytes;
    Tensor& bias = t[2];
    if (!bias.data) return;
    bias.data += expert * bias.stride[0] * itemsize(bias.dtype);
    bias.ndim = 1, bias.size[0] = bias.size[1], bias.stride[0] = bias.stride[1];
  }
  ExpertStep(const Step& s, int64_t weight_bytes, const ExpertRows& e)
      : ExpertStep(s, weight_bytes, e.expert, e.row0, e.rows) {}
  ExpertStep(const ExpertStep&) = delete;

  static void take_rows(Tensor& rows_of, int64_t row0, int64_t rows) {
    rows_of.data += row0 * rows_of.stride[0] * itemsize(rows_of.dtype);
    rows_of.size[0] = rows;
  }
};

// An end that goes back, or beyond the rows, leaves its expert without rows: nothing outside the operands is touched.
inline int64_t expert_end(const Step& s, int64_t expert, int64_t begin) {
  const int64_t end = reinterpret_cast<const int32_t*>(s.t[kEnds].data)[expert * s.t[kEnds].stride[0]];
  return end < begin ? begin : min64(end, s.t[0].size[0]);
}

// The kernels of a grouped op. kEach: the linear of one expert; kWeightBytes: of its packed weight.
template <const Kernel& kEach, int64_t (*kWeightBytes)(const Step&)>
struct Grouped {
  static constexpr int64_t kPadRows = 32;        // prepared rows are whole tiles of at most so many
  static constexpr int64_t kMeasuredRows = 160;  // from there on memory grows by the tile, whatever kernel it is for

  static int phases(const Step&, int) { return 3; }

  static int64_t chunks(const Step& s, int phase, int) {
    if (phase == 0) return 1;
    const ExpertRows& end = ExpertTable(s).end();
    return phase == 1 ? end.first_prepare : end.first_multiply;
  }

  static int64_t memory_of(const Step& s, int64_t rows, int threads) {
    const ExpertStep each(s, 0, 0, 0, rows);
    return ceil_div(static_cast<int64_t>(kEach.workspace(each.step, threads)), 64) * 64;
  }

  // Enough however the rows are shared out: memory for a row of a tile, of the kernel that needs most, times the rows
  // of all tiles there can be.
  static size_t workspace(const Step& s, int threads) {
    const int64_t rows = s.t[0].size[0], experts = min64(rows, s.t[kEnds].size[0]);
    if (experts == 0) return 0;
    int64_t a_row = 0;
    auto see = [&](int64_t m) {
      const int64_t bytes = ceil_div(memory_of(s, m, threads), ceil_div(m, kPadRows) * kPadRows);
      if (bytes > a_row) a_row = bytes;
    };
    for (int64_t m = 1; m <= min64(rows, kMeasuredRows); ++m) see(m);
    see(rows);
    return static_cast<size_t>(a_row * (rows + experts * (kPadRows - 1)));
  }

  static void write_table(const Step& s, int threads) {
    const ExpertTable table(s);
    ExpertRows next{};
    table.count() = 0;
    for (int64_t expert = 0; expert < s.t[kEnds].size[0]; ++expert) {
      const int64_t end = expert_end(s, expert, next.row0);
      next.expert = expert, next.rows = end - next.row0;
      if (next.rows == 0) continue;
      table.entries[table.count()++] = next;
      const ExpertStep each(s, 0, next);
      const int last = kEach.phases(each.step, threads) - 1;
      if (last > 0) next.first_prepare += kEach.chunks(each.step, 0, threads);
      next.first_multiply += kEach.chunks(each.step, last, threads);
      next.memory += memory_of(s, next.rows, threads);
      next.row0 = end;
    }
    table.entries[table.count()] = next;
    const Tensor& y = s.t[4];
    for (int64_t row = next.row0; row < y.size[0]; ++row)
      __builtin_memset(y.data + row * y.stride[0] * itemsize(y.dtype), 0,
                       static_cast<size_t>(y.size[1] * itemsize(y.dtype)));
  }

  static void run(const Step& s, int phase, int64_t chunk, int threads, const Scratch& scratch) {
    if (phase == 0) return write_table(s, threads);
    const auto first = phase == 1 ? &ExpertRows::first_prepare : &ExpertRows::first_multiply;
    const ExpertRows& owner = ExpertTable(s).owner(first, chunk);
    const ExpertStep each(s, kWeightBytes(s), owner);
    const Scratch own{scratch.shared + owner.memory, scratch.local, scratch.counters};
    const int each_phase = phase == 1 ? 0 : kEach.phases(each.step, threads) - 1;
    kEach.run(each.step, each_phase, chunk - owner.*first, threads, own);
  }
};

}  // namespace
