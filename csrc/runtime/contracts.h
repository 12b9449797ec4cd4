// What the kernels take for granted about their operands, checked once for every step of a run.
#pragma once
#include <cstddef>
#include <cstdint>
#include <cstring>

#include "runtime/tensor.h"

namespace llmopt {

constexpr int64_t kMaxHeadDim = 512;  // of attention: heads live in arrays of this length

// D of rows of keys or values: floats, or D signed bytes and the four of their scale.
static inline int64_t head_size(const Tensor& t) { return t.dtype == DType::s8 ? t.size[3] - 4 : t.size[3]; }

// An index that names no row, and how many rows there are.
struct IndexFault {
  int64_t index, limit;
};

// A resolved step before it runs. is_external[n]: operand n has its content already; arena operands are still to be
// written by earlier steps.
struct Call {
  const Step& step;
  const bool* is_external;
  int panel_width;    // of the tier's packed weights
  int tile_rows;      // of the op's largest register tile; 0 where it has none
  IndexFault* fault;  // set where the reason is kIndexRange
};

struct Contract {
  // Gives what is wrong with the operands, or nullptr. An op without a contract has no such function.
  const char* (*reason)(const Call&) = nullptr;
  bool looks_inside = false;  // at the content of operands, which changes where they do not
};

extern const char* const kIndexRange;  // the reason that is an IndexError in Python

// nullptr, or why an op cannot run with the tuning in its ints, the only part of the step that counts here.
const char* refuse_tuning(const char* op, const Call& call);

// The contract of an op; an empty one for ops that have none. linear_contract_of: of the linear families only.
Contract contract_of(const char* op);
Contract linear_contract_of(const char* op);

// A row of a table of contracts.
struct ContractOf {
  const char* op;
  Contract contract;
};

template <size_t kRows>
Contract find_contract(const ContractOf (&table)[kRows], const char* op) {
  for (const ContractOf& row : table)
    if (std::strcmp(row.op, op) == 0) return row.contract;
  return {};
}

}  // namespace llmopt
