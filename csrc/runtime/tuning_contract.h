// What a tuning of a linear may ask for, so that its kernel stays inside its code and its scratch memory for every M.
#pragma once
#include <algorithm>

#include "cpu/linear/tuning.h"
#include "runtime/contracts.h"

namespace llmopt {

// nullptr, or what is wrong with the rows behind an op's own ints; check(tuning) judges one of them.
template <class F>
const char* each_tuning(const Call& c, int own_ints, F check) {
  const Step& s = c.step;
  if (s.num_ints == own_ints) return nullptr;
  const int64_t rows = s.i[own_ints];
  if (rows < 0 || rows > s.num_ints || s.num_ints != own_ints + 1 + rows * kTuningRowInts)
    return "the tuning has another number of fields";
  int64_t last = -1;
  for (const int64_t* row = s.i + own_ints + 1; row < s.i + s.num_ints; row += kTuningRowInts) {
    if (row[0] <= last) return "the rows of the tuning do not ascend in M";
    last = row[0];
    if (const char* reason = check(tuning_row(row))) return reason;
  }
  return nullptr;
}

// What linear and linear_quantized share.
inline const char* any_tuning(const Call& c, const LinearTuning& t) {
  if (t.family < LinearFamily::automatic || t.family > LinearFamily::unpack) return "there is no such kernel family";
  if (t.rows < 0 || t.rows > c.tile_rows) return "the tuning asks for more rows than a register tile has";
  if (t.k_block < 0 || t.k_block % 4) return "a K block is a multiple of 4";
  if (t.span < 0 || t.tiles < 0 || t.span > INT32_MAX || t.tiles > INT32_MAX) return "a chunk has 1 to 2^31 panels";
  if (t.family != LinearFamily::stream && t.span > kMaxSpan) return "more panels than stay in L2";
  if (t.ahead < 0 || t.ahead > kMaxAhead || t.ahead % 64) return "the prefetch distance is whole lines up to 64 KiB";
  return nullptr;
}

inline const char* float_tuning(const Call& c, const LinearTuning& t) {
  if (const char* reason = any_tuning(c, t)) return reason;
  const bool is_f32 = static_cast<DType>(c.step.i[2]) == DType::f32;
  if (t.family == LinearFamily::unpack && is_f32) return "only weights of 16 or 4 bits can be unpacked";
  if (t.family == LinearFamily::stream) return nullptr;
  const int64_t k = c.step.i[1] + c.step.i[1] % 2, k_block = t.k_block ? t.k_block : kMaxKBlock;
  const int64_t span = std::max<int64_t>(1, t.span), panel = c.panel_width * int64_t{4};
  if (!is_f32 && t.family != LinearFamily::blocked && std::min(k, k_block) > kWideBytes / (span * panel))
    return "the unpacked panels do not fit their scratch memory";
  if (k_block < k && t.tiles > kSumBytes / (span * c.tile_rows * panel))
    return "the sums between K blocks do not fit their scratch memory";
  return nullptr;
}

// wide_bytes: of a panel with 8-bit codes.
inline const char* quantized_tuning(const Call& c, const LinearTuning& t, int64_t wide_bytes) {
  if (const char* reason = any_tuning(c, t)) return reason;
  const int64_t bits = c.step.i[6], planes = c.step.i[9];
  if (t.rows && t.rows < planes) return "a register tile has at least the planes of one token";
  if (t.k_block) return "panels of codes are not cut along K";
  if (t.family == LinearFamily::blocked && bits == 4) return "panels of 4-bit codes stay in L2 unpacked only";
  if (t.family != LinearFamily::unpack) return nullptr;
  if (bits == 8) return "only weights of 16 or 4 bits can be unpacked";
  const int64_t sums = 2 * c.tile_rows * c.panel_width * 4;
  return wide_bytes + sums > int64_t(kLocalBytes) ? "the unpacked panels do not fit their scratch memory" : nullptr;
}

}  // namespace llmopt
