// Integer expressions over the sizes that change from call to call, in postfix form.
#pragma once
#include <cstdint>
#include <stdexcept>
#include <vector>

namespace llmopt {

// Codes: the contract with pycompiler/llmopt/sizes.py. kConst and kSymbol are followed by their operand.
enum ExprCode : int64_t { kConst = 0, kSymbol = 1, kAdd = 2, kMul = 3, kFloorDiv = 4, kMod = 5, kMax = 6, kMin = 7 };

// Whether its value is another one in another call.
inline bool has_symbol(const std::vector<int64_t>& code) {
  for (size_t i = 0; i < code.size(); ++i) {
    if (code[i] == kSymbol) return true;
    if (code[i] == kConst) ++i;
  }
  return false;
}

inline int64_t floor_div(int64_t a, int64_t b) {
  if (b == 0) throw std::domain_error("a size expression divides by zero");
  int64_t q = a / b;
  return (a % b != 0 && (a < 0) != (b < 0)) ? q - 1 : q;
}

inline int64_t evaluate(const std::vector<int64_t>& code, const std::vector<int64_t>& symbols,
                        std::vector<int64_t>& stack) {
  stack.clear();
  for (size_t i = 0; i < code.size(); ++i) {
    if (code[i] == kConst) {
      stack.push_back(code[++i]);
      continue;
    }
    if (code[i] == kSymbol) {
      stack.push_back(symbols[code[++i]]);
      continue;
    }
    int64_t b = stack.back();
    stack.pop_back();
    int64_t& a = stack.back();
    switch (code[i]) {
      case kAdd:
        a += b;
        break;
      case kMul:
        a *= b;
        break;
      case kFloorDiv:
        a = floor_div(a, b);
        break;
      case kMod:
        a -= floor_div(a, b) * b;
        break;
      case kMax:
        a = a > b ? a : b;
        break;
      default:
        a = a < b ? a : b;
        break;
    }
  }
  return stack.back();
}

}  // namespace llmopt
