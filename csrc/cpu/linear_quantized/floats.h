// Weights of 8 or 4 bits beside activations as they are: codes become f32 K block by K block and the rows pass over
// them by FMA. The integer kernels would multiply up to three planes of each activation. Where the CPU does not
// multiply bytes they do so for one row, because its weights then come from DRAM and are used once; where it does, they
// are faster but for many rows over small groups, whose integer sums are folded often.
#pragma once
#include "cpu/linear/blocked.h"
#include "cpu/linear/prepare.h"
#include "cpu/linear_quantized/gemm.h"

namespace {

// Measured where bytes are multiplied: groups up to which FMA is faster, by bits of a code, and for how many rows.
constexpr int64_t kSmallGroup8 = 32, kSmallGroup4 = 64, kLeastFloatRows = 64;

inline bool floats_pay(const QuantizedProblem& p) {
  if (!kMultipliesBytes) return p.M > 1;
  return p.planes > 2 && p.M >= kLeastFloatRows && p.form.group <= (p.form.bits == 4 ? kSmallGroup4 : kSmallGroup8);
}

// Whatever a tuning asks for, it asks of the integer kernels. Every K block has to begin with a step of its group.
inline bool runs_on_floats(const QuantizedProblem& p) {
  const LinearTuning& t = p.tuning;
  const bool tuned = t.family != LinearFamily::automatic || t.rows || t.k_block || t.span || t.tiles || t.ahead;
  const bool steps_align = p.form.group <= kMaxKBlock || p.form.group % kStepK == 0 || p.form.group == p.K;
  return !tuned && !p.rounds_inputs && floats_pay(p) && p.K > 0 && steps_align;
}
static_assert(2 * kMaxKBlock * kPanel * 4 <= kWideBytes, "a K block is rounded up to whole groups");

// K blocks begin with a group, or with a step of one that is longer than a block.
inline Schedule float_schedule(const QuantizedProblem& p, int threads) {
  return {p, threads, false, p.form.group <= kMaxKBlock ? p.form.group : kStepK};
}

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

int tier_phases(const Step& s, int threads) {
  const QuantizedProblem p(s);
  return !runs_on_floats(p) ? linear_phases(s, threads) : p.rows_in_place() ? 1 : 2;
}

int64_t tier_chunks(const Step& s, int phase, int threads) {
  const QuantizedProblem p(s);
  if (!runs_on_floats(p)) return linear_chunks(s, phase, threads);
  return phase == 0 && !p.rows_in_place() ? prepare_chunks(p, threads) : float_schedule(p, threads).chunks();
}

size_t tier_workspace(const Step& s, int threads) {
  const QuantizedProblem p(s);
  if (!runs_on_floats(p)) return linear_workspace(s, threads);
  return p.rows_in_place() ? 0 : static_cast<size_t>(p.prepared_floats(p.Problem::all_tiles())) * sizeof(float);
}

void tier_run(const Step& s, int phase, int64_t chunk, int threads, const Scratch& scratch) {
  const QuantizedProblem p(s);
  if (!runs_on_floats(p)) return linear_run(s, phase, chunk, threads, scratch);
  const bool in_place = p.rows_in_place();
  float* prepared = reinterpret_cast<float*>(scratch.shared);
  if (phase == 0 && !in_place) return prepare_chunk(p, chunk, threads, prepared);
  const float* rows = in_place ? reinterpret_cast<const float*>(p.x.data) : prepared;
  const Schedule schedule = float_schedule(p, threads);
  run_blocked(p, CodePanels(p), schedule, schedule.chunk(chunk), schedule.next_panel(chunk, threads),
              p.Problem::all_tiles(), rows, reinterpret_cast<float*>(scratch.local));
}

Span tier_first_read(const Step& s, int phase, int threads, int thread) {
  return runs_on_floats(QuantizedProblem(s)) ? Span{} : linear_first_read(s, phase, threads, thread);
}

}  // namespace
