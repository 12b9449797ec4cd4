// The op `linear_quantized` by FMA over codes that become f32. Where bytes are not multiplied, several rows of
// activations that keep more than 8 bits are: the integer kernels would multiply up to three planes of each activation;
// they do so for one row, because its weights then come from DRAM and are used once. Where bytes are multiplied, only
// rows of exact steps are, so many that planes would take longer.
#pragma once
#include "cpu/linear/prepare.h"
#include "cpu/linear_quantized/code_panels.h"
#include "cpu/linear_quantized/gemm.h"

namespace {

// K blocks are whole groups, or steps of one that is longer than a block.
inline bool has_short_groups(const QuantizedProblem& p) { return p.form.group <= kMaxKBlock; }
#ifdef __AVX512VNNI__
constexpr int64_t kLeastFloatRows = 16;
inline bool keeps_floats(const QuantizedProblem& p) { return p.exact; }
#else
constexpr int64_t kLeastFloatRows = 2;
inline bool keeps_floats(const QuantizedProblem&) { return true; }
#endif
inline bool runs_on_floats(const QuantizedProblem& p) {
  return keeps_floats(p) && p.M >= kLeastFloatRows && may_widen(p, has_short_groups(p));
}
inline Schedule float_schedule(const QuantizedProblem& p, int threads) {
  return {p, threads, false, has_short_groups(p) ? p.form.group : kStepK};
}
static_assert(2 * kMaxKBlock * kPanel * 4 <= kWideBytes, "a K block is rounded up to whole groups");

int float_phases(const Step& s, int threads) {
  const QuantizedProblem p(s);
  return !runs_on_floats(p) ? linear_phases(s, threads) : p.rows_in_place() ? 1 : 2;
}

int64_t float_chunks(const Step& s, int phase, int threads) {
  const QuantizedProblem p(s);
  if (!runs_on_floats(p)) return linear_chunks(s, phase, threads);
  return phase == 0 && !p.rows_in_place() ? prepare_chunks(p, threads) : float_schedule(p, threads).chunks();
}

size_t float_workspace(const Step& s, int threads) {
  const QuantizedProblem p(s);
  if (!runs_on_floats(p)) return linear_workspace(s, threads);
  return p.rows_in_place() ? 0 : static_cast<size_t>(p.prepared_floats(p.Problem::all_tiles())) * sizeof(float);
}

void float_run(const Step& s, int phase, int64_t chunk, int threads, const Scratch& scratch) {
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

Span float_first_read(const Step& s, int phase, int threads, int thread) {
  return runs_on_floats(QuantizedProblem(s)) ? Span{} : linear_first_read(s, phase, threads, thread);
}

constexpr Kernel kByFloats{"linear_quantized", float_phases, float_chunks,
                           float_workspace,    float_run,    float_first_read};

}  // namespace
