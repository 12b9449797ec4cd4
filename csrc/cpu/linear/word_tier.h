// The op `linear` where words are multiplied: many rows over weights of 16 bits.
#pragma once
#include "cpu/linear/gemm.h"
#include "cpu/linear/words.h"

namespace {

constexpr int64_t kLeastWordRows = 28;  // fewer do not pay for making words of a panel

// Values of f32, coming or going, would lose bits.
inline bool runs_on_words(const Problem& p) {
  const bool is_f32 = p.weight == DType::f32 || p.x.dtype == DType::f32 || p.y.dtype == DType::f32;
  return !is_f32 && p.M >= kLeastWordRows && p.K > 0 && p.tuning.is_default();
}

struct WidePanels : FloatPanels {
  explicit WidePanels(const Problem& p) : FloatPanels(p, kTilesToWiden) {}
};

constexpr Kernel kByFma{"linear", linear_phases, linear_chunks, linear_workspace, linear_run, linear_first_read};
constexpr Kernel kLinear = WordKernel<Problem, runs_on_words, WidePanels, kByFma>::kernel("linear");

}  // namespace
