// The op `linear_quantized` where words are multiplied: many rows of activations that keep more than 8 bits. The
// integer kernels would multiply three planes of each.
#pragma once
#include "cpu/linear/words.h"
#include "cpu/linear_quantized/floats.h"

namespace {

constexpr int64_t kLeastWordRows = 24;  // fewer do not pay for making words of a panel

inline bool runs_on_words(const QuantizedProblem& p) {
  return !p.exact && p.M >= kLeastWordRows && may_widen(p, p.K <= kWordBlock);
}

struct WordPanels : CodePanels {
  using CodePanels::CodePanels;

  bool make_words(int64_t panel, int64_t k0, int64_t k, float* wide, char* to, float* scales) const {
    return make_wide_words(*this, panel, k0, k, wide, to, scales);
  }
};

constexpr Kernel kLinear =
    WordKernel<QuantizedProblem, runs_on_words, WordPanels, kByFloats>::kernel("linear_quantized");

}  // namespace
