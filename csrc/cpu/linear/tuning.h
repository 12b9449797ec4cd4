// How a linear is cut where a measurement said so. 0 in a field leaves it to the kernel's own rules (Schedule).
// In a step, behind the op's own ints: the number of rows, then per row the largest M it is for and the fields of
// LinearTuning in order; M ascends. runtime/contracts_linear.cpp refuses what does not fit.
#pragma once
#include "runtime/tensor.h"

namespace llmopt {

enum class LinearFamily : int64_t {
  automatic = 0,
  stream = 1,   // panels are read straight through, as weights come that are used once
  blocked = 2,  // panels stay in L2 while the tiles pass over them
  unpack = 3,   // blocked, and panels of 16 or 4 bits are widened first
};

struct LinearTuning {
  LinearFamily family;
  int64_t rows;     // of a register tile, at most
  int64_t k_block;  // of a panel that stays in L2
  int64_t span;     // panels of a chunk
  int64_t tiles;    // register tiles of a chunk
  int64_t ahead;    // bytes a stream asks for its weights before it needs them

  bool is_default() const {
    return family == LinearFamily::automatic && !rows && !k_block && !span && !tiles && !ahead;
  }
};
constexpr int kTuningRowInts = 7;
constexpr int kLinearInts = 6, kLinearQuantizedInts = 11;  // of the ops themselves
constexpr int kLinearOperands = 7;
constexpr int kExpertRowInts = 6;  // of a grouped linear's table (linear/grouped.h)

static inline LinearTuning tuning_row(const int64_t* row) {
  return {static_cast<LinearFamily>(row[1]), row[2], row[3], row[4], row[5], row[6]};
}

// The row of a step for a height; all zero where there is none.
static inline LinearTuning tuning_of(const Step& s, int own_ints, int64_t M) {
  if (s.num_ints <= own_ints) return {};
  const int64_t* row = s.i + own_ints + 1;
  for (int64_t n = s.i[own_ints]; n > 0; --n, row += kTuningRowInts)
    if (M <= row[0]) return tuning_row(row);
  return {};
}

// What the scratch memory of a thread holds while panels stay in L2.
constexpr int64_t kMaxSpan = 8;
constexpr int64_t kMaxKBlock = 2048;                              // of the kernel's own rules
constexpr int64_t kSumBytes = 512 << 10;                          // of sums that wait between K blocks
constexpr int64_t kWideBytes = int64_t(kLocalBytes) - kSumBytes;  // of widened panels
constexpr int64_t kMaxAhead = 64 << 10;

}  // namespace llmopt
