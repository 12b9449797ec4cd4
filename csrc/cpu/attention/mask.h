// Masks: a row of biases for attention, and the analysis that tells attention which keys it need not look at.
#pragma once
#include "cpu/attention/codes.h"

namespace {

// bias[k] for keys [j0, j0 + n) of one row: -inf for a dead key, else what to add to the score.
inline void load_bias(const Problem& p, MaskUse use, int64_t b, int64_t h, int64_t i, int64_t j0, int64_t n,
                      float* bias) {
  if (use == MaskUse::none) {
    for (int64_t k = 0; k < n; ++k) bias[k] = 0.0f;
    return;
  }
  const Tensor& t = *p.mask;
  const int64_t first = row_index(t, b, h, i) + j0 * t.stride[3];
  if (is_bool(t.dtype)) {
    const char* m = t.data + first;
    if (t.stride[3] == 1)
      for (int64_t k = 0; k < n; ++k) bias[k] = m[k] ? 0.0f : kNegInf;
    else
      for (int64_t k = 0; k < n; ++k) bias[k] = *m ? 0.0f : kNegInf;
    return;
  }
  const Vec dead = vset(use == MaskUse::holes ? dead_bias(t.dtype) : kNegInf);
  const Vec same = vset(load_scalar(t.dtype, t.data, first));
  for (int64_t k = 0; k < n; k += kLanes) {
    const int lanes = static_cast<int>(min64(kLanes, n - k));
    const Vec x = t.stride[3] == 0 ? same : vload_as(t.dtype, t.data, first + k, lanes);
    vstore_n(bias + k, vselect(vle(x, dead), vset(kNegInf), x), lanes);
  }
}

// Which keys of a block of values hold a NaN or an infinity: 0 * NaN would carry a dead key's value into the output.
// Writes their indices to `bad` and returns how many.
inline int64_t find_nonfinite(DType d, const char* value, int64_t v_stride, int64_t v_dim, int64_t keys, int32_t* bad) {
  int64_t count = 0;
  if (d == DType::s8) {
    for (int64_t j = 0; j < keys; ++j)
      if (code_scale(value + j * v_stride, v_dim) * 0.0f != 0.0f) bad[count++] = static_cast<int32_t>(j);
    return count;
  }
  auto row_zero = [&](int64_t j, Vec acc) {
    for (int64_t c = 0; c < v_dim; c += kLanes)
      acc = vfma(vload_as(d, value, j * v_stride + c, static_cast<int>(min64(kLanes, v_dim - c))), vzero(), acc);
    return acc;
  };
  Vec all = vzero();
  for (int64_t j = 0; j < keys; ++j) all = row_zero(j, all);
  if (vreduce_add(all) == 0.0f) return 0;
  for (int64_t j = 0; j < keys; ++j)
    if (vreduce_add(row_zero(j, vzero())) != 0.0f) bad[count++] = static_cast<int32_t>(j);
  return count;
}

struct MaskRow {
  int64_t lo, hi;
  bool dense;
};

inline uint64_t load_word(const char* p) {
  uint64_t w;
  __builtin_memcpy(&w, p, 8);
  return w;
}

// Rows of bytes, eight at a time. Every true byte is nonzero; nothing is assumed about its value.
inline MaskRow scan_bool(const char* m, int64_t n) {
  constexpr uint64_t kOnes = 0x0101010101010101ull, kHighs = 0x8080808080808080ull;
  int64_t lo = 0, hi = n;
  while (lo + 8 <= n && !load_word(m + lo)) lo += 8;
  while (lo < n && !m[lo]) ++lo;
  if (lo == n) return {0, 0, true};
  while (hi - 8 > lo && !load_word(m + hi - 8)) hi -= 8;
  while (!m[hi - 1]) --hi;
  int64_t j = lo;
  for (; j + 8 <= hi; j += 8) {
    const uint64_t w = load_word(m + j);
    if ((w - kOnes) & ~w & kHighs) return {lo, hi, false};
  }
  for (; j < hi; ++j)
    if (!m[j]) return {lo, hi, false};
  return {lo, hi, true};
}

// Rows of biases. `any` and `all` look at 8 vectors before they reduce.
template <class Test>
inline int64_t vectors_while_zero(const Tensor& t, int64_t first, int64_t n, Test test) {
  constexpr int64_t kStep = 8 * kLanes;
  int64_t j = 0;
  for (; j + kStep <= n; j += kStep) {
    Vec any = vzero();
    for (int64_t k = 0; k < kStep; k += kLanes) any = vmax(any, test(vload_as(t.dtype, t.data, first + j + k, kLanes)));
    if (vreduce_max(any) != 0.0f) break;
  }
  return j;
}
inline MaskRow scan_bias(const Tensor& t, int64_t first, int64_t n) {
  const Vec dead = vset(dead_bias(t.dtype)), one = vset(1.0f);
  auto live = [&](Vec x) { return vselect(vle(x, dead), vzero(), one); };  // NaN is live
  auto nonzero = [&](Vec x) { return vselect(veq(x, vzero()), vzero(), one); };
  auto live_at = [&](int64_t j) { return !(load_scalar(t.dtype, t.data, first + j) <= dead_bias(t.dtype)); };
  int64_t lo = vectors_while_zero(t, first, n, live), hi = n;
  while (lo < n && !live_at(lo)) ++lo;
  if (lo == n) return {0, n, false};
  constexpr int64_t kStep = 8 * kLanes;
  while (hi - kStep > lo && vectors_while_zero(t, first + hi - kStep, kStep, live) == kStep) hi -= kStep;
  while (!live_at(hi - 1)) --hi;
  int64_t j = lo + vectors_while_zero(t, first + lo, hi - lo, nonzero);
  for (; j < hi; ++j)
    if (load_scalar(t.dtype, t.data, first + j) != 0.0f) return {lo, hi, false};
  return {lo, hi, true};
}

// Every key of the row has the same mask value.
inline MaskRow scan_constant(const Tensor& t, int64_t first, int64_t n) {
  if (is_bool(t.dtype)) return t.data[first] ? MaskRow{0, n, true} : MaskRow{0, 0, true};
  return {0, n, load_scalar(t.dtype, t.data, first) == 0.0f};
}

// op mask_bounds. t: 0 mask [B,H,Sq,Skv], 1 bounds i32 [B,H,Sq,4] = {first live key, one past the last, dense, 0}.
constexpr int64_t kBytesPerChunk = 32768;

inline int64_t rows_per_chunk(const Step& s) {
  return max64(1, kBytesPerChunk / max64(1, s.t[0].size[3] * itemsize(s.t[0].dtype)));
}
inline int64_t bounds_rows(const Step& s) { return s.t[1].size[0] * s.t[1].size[1] * s.t[1].size[2]; }

int bounds_phases(const Step&, int) { return 1; }
int64_t bounds_chunks(const Step& s, int, int) { return ceil_div(bounds_rows(s), rows_per_chunk(s)); }
void bounds_run(const Step& s, int, int64_t chunk, int, const Scratch&) {
  const Tensor &mask = s.t[0], &bounds = s.t[1];
  const int64_t per = rows_per_chunk(s), end = min64(bounds_rows(s), (chunk + 1) * per), n = mask.size[3];
  for (int64_t row = chunk * per; row < end; ++row) {
    const int64_t i = row % bounds.size[2], h = row / bounds.size[2] % bounds.size[1],
                  b = row / (bounds.size[2] * bounds.size[1]);
    const int64_t first = row_index(mask, b, h, i);
    MaskRow r{0, 0, true};
    if (n > 0 && mask.stride[3] == 0)
      r = scan_constant(mask, first, n);
    else if (n > 0)
      r = is_bool(mask.dtype) ? scan_bool(mask.data + first, n) : scan_bias(mask, first, n);
    int32_t* to = reinterpret_cast<int32_t*>(row_ptr(bounds, b, h, i));
    to[0] = static_cast<int32_t>(r.lo), to[1] = static_cast<int32_t>(r.hi), to[2] = r.dense, to[3] = 0;
  }
}

}  // namespace
