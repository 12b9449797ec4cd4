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

// Columns of a packed panel.
struct F16Columns {
  const uint16_t* at;
  __attribute__((always_inline)) void load(int64_t k, int64_t v, Vec& even, Vec& odd) const {
    even = vload_f16(at + k * kPanel + v), odd = vload_f16(at + (k + 1) * kPanel + v);
  }
};
struct BF16Columns {
  const uint16_t* at;  // pairs of k
  __attribute__((always_inline)) void load(int64_t k, int64_t v, Vec& even, Vec& odd) const {
    const uint16_t* pairs = at + k * kPanel + 2 * v;
    even = vload_bf16_even(pairs), odd = vload_bf16_odd(pairs);
  }
};

struct WidePanels : FloatPanels {
  explicit WidePanels(const Problem& p) : FloatPanels(p, kTilesToWiden) {}

  bool make_words(int64_t panel, int64_t k0, int64_t k, float* wide, char* to, float* scales) const {
    if (k % 4 != 0) return make_wide_words(*this, panel, k0, k, wide, to, scales);
    const auto* from = reinterpret_cast<const uint16_t*>(at(panel, k0));
    return p.weight == DType::f16 ? make_column_words(F16Columns{from}, kPanel, k, to, scales)
                                  : make_column_words(BF16Columns{from}, kPanel, k, to, scales);
  }
};

constexpr Kernel kByFma{"linear", linear_phases, linear_chunks, linear_workspace, linear_run, linear_first_read};
constexpr Kernel kLinear = WordKernel<Problem, runs_on_words, WidePanels, kByFma>::kernel("linear");

}  // namespace
