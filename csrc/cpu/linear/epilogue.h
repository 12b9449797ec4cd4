// The end of a tile: y = act(alpha * sums + bias) [* up] + residual, rounded once.
#pragma once
#include "cpu/bumps.h"
#include "cpu/linear/problem.h"

namespace {

template <int64_t kValue>
struct Constant {
  static constexpr int64_t value = kValue;
};
constexpr int64_t kActAny = -1;  // not known to the compiler

// f(activation, dtype of the results) as constants: with them, the loop over rows is a few instructions an output
// vector.
template <class F>
inline void with_activation(int64_t act, F f) {
  switch (act) {
    case kActNone:
      return f(Constant<kActNone>{});
    case kActSilu:
      return f(Constant<kActSilu>{});
    case kActGeluErf:
      return f(Constant<kActGeluErf>{});
    case kActGeluTanh:
      return f(Constant<kActGeluTanh>{});
    default:
      return f(Constant<kActAny>{});
  }
}
template <class F>
inline void with_activation_and_dtype(int64_t act, DType dtype, F f) {
  with_activation(act, [&](auto known) {
    if (dtype == DType::f32) return f(known, Constant<int64_t(DType::f32)>{});
    if (dtype == DType::f16) return f(known, Constant<int64_t(DType::f16)>{});
    f(known, Constant<int64_t(DType::bf16)>{});
  });
}

template <int64_t kAct, DType kOut>
inline __attribute__((always_inline)) Vec activated(int64_t act, Vec x) {
  const int64_t known = kAct == kActAny ? act : kAct;
  return kOut == DType::f32 ? vactivate(known, x) : vactivate_half(known, x);
}

// The outputs of a panel in `rows` rows from row0 on. sum(m, v, bias): vector v of the panel in the m-th of them, with
// alpha and the bias. One pass, in registers.
template <int64_t kAct, DType kOut, class Sum>
void finish_rows(const Problem& p, int64_t panel, int64_t row0, int rows, Sum sum) {
  const int64_t width = p.gated ? kLanes : kPanel;  // outputs of a panel
  const int64_t n0 = panel * width, act = p.act;
  const int left = static_cast<int>(min64(width, p.outputs() - n0));
  const int first = left < kLanes ? left : kLanes, second = left - first;  // in either vector
  Vec bias[2] = {vset(-0.0f), vset(-0.0f)};                                // changes nothing, not even a zero
  if (p.bias.data) {
    bias[0] = vload_as(p.bias.dtype, p.bias.data, n0, first);
    if (p.gated)
      bias[1] = vload_as(p.bias.dtype, p.bias.data, p.outputs() + n0, first);
    else if (second > 0)
      bias[1] = vload_as(p.bias.dtype, p.bias.data, n0 + kLanes, second);
  }
  const Tensor& residual = p.residual;
  auto output = [&](int m, int v, int lanes) __attribute__((always_inline)) {
    Vec out = activated<kAct, kOut>(act, sum(m, v, bias[v]));
    if (p.gated) out = vmul(out, sum(m, 1, bias[1]));
    if (residual.data)
      out =
          vadd(out, vload_as(residual.dtype, residual.data, (row0 + m) * residual.stride[0] + n0 + v * kLanes, lanes));
    return out;
  };
  int64_t at = row0 * p.y.stride[0] + n0;
  if (left == kPanel) {
    for (int m = 0; m < rows; ++m, at += p.y.stride[0]) {
      const Vec low = output(m, 0, kLanes);
      vstore_pair_as(kOut, p.y.data, at, low, output(m, 1, kLanes));
    }
    return;
  }
  for (int m = 0; m < rows; ++m, at += p.y.stride[0]) {
    vstore_as(kOut, p.y.data, at, output(m, 0, first), first);
    if (second > 0) vstore_as(kOut, p.y.data, at + kLanes, output(m, 1, second), second);
  }
}

template <class Sum>
inline void finish(const Problem& p, int64_t panel, int64_t row0, int rows, Sum sum) {
  with_activation_and_dtype(p.act, p.y.dtype, [&](auto act, auto out) {
    finish_rows<decltype(act)::value, static_cast<DType>(decltype(out)::value)>(p, panel, row0, rows, sum);
  });
}

// sums: [rows][kPanel].
void finish_tile(const Problem& p, int64_t panel, int64_t row0, int rows, const float* sums) {
  const Vec alpha = vset(p.alpha);
  finish(p, panel, row0, rows, [=](int m, int v, Vec bias) __attribute__((always_inline)) {
    return vfma(vload(sums + m * kPanel + v * kLanes), alpha, bias);
  });
}

// Asks for the lines that finish_tile will write and add, early enough that its stores do not wait for them.
inline void fetch_outputs(const Problem& p, int64_t panel, int64_t row0, int rows) {
  const int64_t n0 = panel * (p.gated ? kLanes : kPanel);
  for (int64_t row = row0; row < row0 + rows; ++row) {
    __builtin_prefetch(p.y.data + (row * p.y.stride[0] + n0) * itemsize(p.y.dtype), 1);
    if (p.residual.data)
      __builtin_prefetch(p.residual.data + (row * p.residual.stride[0] + n0) * itemsize(p.residual.dtype));
  }
}

// A product on tiles that is finished but for its epilogue. That is done a few rows at a time between the steps of the
// next product: the core looks only some hundred instructions ahead, so the tiles would idle while it works on all
// rows.
struct WaitingRows {
  int64_t panel = 0, row = 0, left = 0;  // `row` is the next
  float* sums = nullptr;                 // of it, `planes` rows of them for each

  // f(n): the epilogue of the next n rows, at most so many.
  template <class F>
  void some(int64_t most, int planes, F f) {
    const int64_t rows = min64(most, left);
    if (rows == 0) return;
    f(static_cast<int>(rows));
    row += rows, left -= rows, sums += rows * planes * kPanel;
  }
};

}  // namespace
