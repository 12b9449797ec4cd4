// The VM's program form: the contract with pycompiler/llmopt/native/vm.py.
//   operands: inputs, then outputs, all presented with the same sizes (<= 6 dimensions, broadcast strides 0)
//   ints:   [num_inputs, num_outputs, num_registers, has_reduction, instruction words ...]
//   floats: the constants
// A word is op | dst << 8 | a << 16 | b << 24 | c << 32 | extra << 40; ops with fewer operands repeat a in b and c.
// Values are fp32 in registers; register numbers from num_registers on are the constants. Stores come after all loads.
#pragma once
#include "runtime/tensor.h"

namespace {

using llmopt::DType;
using llmopt::Scratch;
using llmopt::Step;
using llmopt::Tensor;

enum OpCode : int {
  kLoad = 0,   // dst = input a; extra = index of the last instruction that reads it
  kStore = 1,  // output b = register a
  // Unary: dst = f(a). For every op that computes, extra = 1 + the output that stores its value, 0 if none does.
  kCopy = 8,
  kNeg,
  kAbs,
  kSqrt,
  kRsqrt,
  kReciprocal,
  kExp,
  kExp2,
  kLog,
  kLog1p,
  kTanh,
  kSigmoid,
  kErf,
  kSilu,
  kGeluErf,
  kGeluTanh,
  kQuickGelu,
  kRelu,
  kRelu2,
  kSquare,
  kSin,
  kCos,
  kRound,
  kFloor,
  kLogicalNot,
  kRoundF16,
  kRoundBf16,
  kUnaryEnd,
  // Binary: dst = f(a, b).
  kAdd = 64,
  kSub,
  kMul,
  kDiv,
  kMaximum,
  kMinimum,
  kLt,
  kLe,
  kGt,
  kGe,
  kEq,
  kNe,
  kLogicalAnd,
  kLogicalOr,
  kBinaryEnd,
  // Ternary: dst = f(a, b, c).
  kWhere = 96,  // a != 0 ? b : c
  kMulAdd,      // a * b + c
  kTernaryEnd,
  // Row reductions: dst = the same value in the whole row.
  kSum = 112,
  kMean,
  kRowMax,
  kRowMin,
  kReduceEnd,
};

struct Instruction {
  int op, dst, a, b, c, extra;
};

inline Instruction decode(int64_t word) {
  auto byte = [&](int shift) { return static_cast<int>(word >> shift & 255); };
  return {byte(0), byte(8), byte(16), byte(24), byte(32), static_cast<int>(word >> 40 & 0xFFFF)};
}

// An operand of a loop over a block. A value that is the same in the whole block is one vector read again and again.
struct Value {
  const float* data;
  int64_t step;  // masks the element index: 0 for one vector, all ones otherwise
};

// The parts of a step, named.
struct Code {
  int inputs, outputs, registers;
  bool has_reduction;
  const int64_t* words;
  int length;
  const float* constants;
  int num_constants;
};
inline Code code_of(const Step& s) {
  return {static_cast<int>(s.i[0]),
          static_cast<int>(s.i[1]),
          static_cast<int>(s.i[2]),
          s.i[3] != 0,
          s.i + 4,
          s.num_ints - 4,
          s.f,
          s.num_floats};
}

}  // namespace
