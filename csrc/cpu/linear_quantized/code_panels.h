// Packed codes as f32, K block by K block: for rows whose activations keep more than 8 bits.
#pragma once
#include "cpu/linear/blocked.h"
#include "cpu/linear_quantized/tile.h"

namespace {

struct CodePanels {
  const Problem& p;
  const Form form;
  const int64_t bytes;  // of a panel
  const bool widened = true;

  explicit CodePanels(const QuantizedProblem& problem)
      : p(problem), form(problem.form), bytes(problem.form.panel_bytes()) {}

  bool is_f32() const { return true; }
  int64_t steps(int64_t k) const { return k; }
  TileFunction tile(int rows) const { return blocked_tile(rows); }
  // Where a block begins, as far as fetching it ahead is concerned.
  const char* at(int64_t panel, int64_t k) const { return p.w.data + panel * bytes + block_bytes(k); }
  int64_t block_bytes(int64_t k) const { return k * bytes / form.K; }
  void widen(int64_t panel, int64_t k0, int64_t k, float* to) const {
    (form.bits == 8 ? float_codes<8> : float_codes<4>)(form, p.w.data + panel * bytes, k0, k0 + k, to);
  }

 private:
  // [k0, k1) of a packed panel as scale * code + offset.
  template <int kBits>
  static void float_codes(const Form& form, const char* panel, int64_t k0, int64_t k1, float* to) {
    constexpr int kVectorBytes = 4 * kLanes;
    for (int64_t k = k0; k < k1;) {
      const int64_t group = k / form.group, end = min64(k1, (group + 1) * form.group);
      const char* codes = panel + group * form.group_bytes();
      const GroupFactors factors[2] = {GroupFactors::load<kBits>(form, panel, group, 0),
                                       GroupFactors::load<kBits>(form, panel, group, 1)};
      for (; k < end; k += kStepK, to += kStepK * kPanel) {
        const char* step = codes + (k - group * form.group) / kStepK * form.step_bytes();
        const int64_t count = end - k;  // of the step's; more than kStepK where more steps follow
#pragma GCC unroll 2
        for (int quad = 0; quad < 2; ++quad)
#pragma GCC unroll 2
          for (int v = 0; v < 2; ++v) {
            const char* at = step + v * kVectorBytes + (kBits == 8 ? quad * 2 * kVectorBytes : 0);
            const auto stored = kBits == 8 ? load_quads(at) : quad == 0 ? low_nibbles(at) : high_nibbles(at);
            const auto quads = lower_codes(stored, form.zero_point());
            auto store = [&](int i, Vec code) __attribute__((always_inline)) {
              if (4 * quad + i < count)
                vstore(to + (4 * quad + i) * kPanel + v * kLanes, vfma(code, factors[v].scale, factors[v].offset));
            };
            store(0, quad_values<0>(quads));
            store(1, quad_values<1>(quads));
            store(2, quad_values<2>(quads));
            store(3, quad_values<3>(quads));
          }
      }
      if (k > end) to -= (k - end) * kPanel, k = end;
    }
  }
};

// Whether rows may pass over such panels block by block. A block begins with a step of a group: where blocks do so
// anyway, or wherever a group is whole steps.
// Whatever a tuning asks for, it asks of the integer kernels.
inline bool may_widen(const QuantizedProblem& p, bool blocks_align) {
  const bool steps_align = blocks_align || p.form.group % kStepK == 0 || p.form.group == p.K;
  return p.tuning.is_default() && !p.rounds_inputs && p.K > 0 && steps_align;
}

}  // namespace
