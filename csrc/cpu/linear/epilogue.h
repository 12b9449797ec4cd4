// The end of a tile: y = act(alpha * sums + bias) [* up] + residual, rounded once.
#pragma once
#include "cpu/activation.h"
#include "cpu/linear/problem.h"

namespace {

// f(activation, dtype of the results) as constants: with them, the loop over rows is a few instructions an output
// vector.
template <class F>
inline void with_activation_and_dtype(int64_t act, DType dtype, F f) {
  with_activation(act, [&](auto known) {
    if (dtype == DType::f32) return f(known, Constant<int64_t(DType::f32)>{});
    if (dtype == DType::f16) return f(known, Constant<int64_t(DType::f16)>{});
    f(known, Constant<int64_t(DType::bf16)>{});
  });
}

// Where the outputs of a panel go, from one row on, and what is the same in all of its rows.
struct PanelOutputs {
  char* y;                            // of the first row
  const char* residual;               // or none
  int64_t y_stride, residual_stride;  // bytes from row to row
  DType residual_dtype;
  bool gated;
  int first, second;  // columns in either vector of the panel
  int64_t act;
  Vec bias[2];

  PanelOutputs() = default;
  PanelOutputs(const Problem& p, int64_t panel, int64_t row0)
      : y_stride(p.y.stride[0] * itemsize(p.y.dtype)),
        residual_stride(p.residual.stride[0] * itemsize(p.residual.dtype)),
        residual_dtype(p.residual.dtype),
        gated(p.gated),
        act(p.act) {
    const int64_t width = p.gated ? kLanes : kPanel;  // outputs of a panel
    const int64_t n0 = panel * width;
    const int left = static_cast<int>(min64(width, p.outputs() - n0));
    first = left < kLanes ? left : kLanes, second = left - first;
    bias[0] = bias[1] = vset(-0.0f);  // changes nothing, not even a zero
    if (p.bias.data) {
      bias[0] = vload_as(p.bias.dtype, p.bias.data, n0, first);
      if (p.gated)
        bias[1] = vload_as(p.bias.dtype, p.bias.data, p.outputs() + n0, first);
      else if (second > 0)
        bias[1] = vload_as(p.bias.dtype, p.bias.data, n0 + kLanes, second);
    }
    y = p.y.data + row0 * y_stride + n0 * itemsize(p.y.dtype);
    residual = p.residual.data;
    if (residual) residual += row0 * residual_stride + n0 * itemsize(residual_dtype);
  }
  void advance(int64_t rows) {
    y += rows * y_stride;
    if (residual) residual += rows * residual_stride;
  }
};

// `rows` rows of outputs, in one pass, in registers. sum(m, v, bias): vector v of the panel in the m-th of them, with
// alpha and the bias.
template <int64_t kAct, DType kOut, class Sum>
inline __attribute__((always_inline)) void finish_rows(const PanelOutputs& o, int rows, Sum sum) {
  using Act = Activation<kAct, kOut != DType::f32>;
  const Act act(o.act);
  const Vec bias[2] = {o.bias[0], o.bias[1]};
  const int first = o.first, second = o.second;
  const int64_t y_stride = o.y_stride, residual_stride = o.residual_stride;
  const DType residual_dtype = o.residual_dtype;
  char* y = o.y;
  const char* residual = o.residual;
  auto with_residual = [&](int v, Vec out, int lanes) __attribute__((always_inline)) {
    if (!residual) return out;
    return vadd(vrounded(out), vload_as(residual_dtype, residual, v * kLanes, lanes));
  };
  auto next_row = [&]() __attribute__((always_inline)) {
    y += y_stride;
    if (residual) residual += residual_stride;
  };
  int m = 0;
  if (o.gated) {
    auto some = [&](auto count) __attribute__((always_inline)) {
      constexpr int kRows = decltype(count)::value;
      Vecs<kRows> x;
#pragma GCC unroll 4
      for (int i = 0; i < kRows; ++i) x.v[i] = sum(m + i, 0, bias[0]);
      x = act(x);
#pragma GCC unroll 4
      for (int i = 0; i < kRows; ++i, ++m, next_row())
        vstore_as(kOut, y, 0, with_residual(0, vmul(x.v[i], sum(m, 1, bias[1])), first), first);
    };
    while (m + Act::kChains <= rows) some(Constant<Act::kChains>{});
    while (m < rows) some(Constant<1>{});
    return;
  }
  auto some = [&](auto count) __attribute__((always_inline)) {
    constexpr int kRows = decltype(count)::value;
    Vecs<2 * kRows> x;
#pragma GCC unroll 4
    for (int i = 0; i < 2 * kRows; ++i) x.v[i] = sum(m + i / 2, i % 2, bias[i % 2]);
    x = act(x);
#pragma GCC unroll 2
    for (int i = 0; i < kRows; ++i, ++m, next_row()) {
      const Vec low = with_residual(0, x.v[2 * i], first), high = x.v[2 * i + 1];
      if (second == kLanes) {
        vstore_pair_as(kOut, y, 0, low, with_residual(1, high, kLanes));
        continue;
      }
      vstore_as(kOut, y, 0, low, first);
      if (second > 0) vstore_as(kOut, y, kLanes, with_residual(1, high, second), second);
    }
  };
  while (m + Act::kChains / 2 <= rows) some(Constant<Act::kChains / 2>{});
  while (m < rows) some(Constant<1>{});
}

// What the sums of a tile become: the `sum` of finish_rows.
struct TileSums {
  const float* at;  // [rows][kPanel]
  Vec alpha;

  inline __attribute__((always_inline)) Vec operator()(int m, int v, Vec bias) const {
    return vfma(vload(at + m * kPanel + v * kLanes), alpha, bias);
  }
  void advance(int64_t rows) { at += rows * kPanel; }
};

// sums: [rows][kPanel].
void finish_tile(const Problem& p, int64_t panel, int64_t row0, int rows, const float* sums) {
  const PanelOutputs outputs(p, panel, row0);
  const TileSums sum{sums, vset(p.alpha)};
  with_activation_and_dtype(p.act, p.y.dtype, [&](auto act, auto out) {
    finish_rows<decltype(act)::value, static_cast<DType>(decltype(out)::value)>(outputs, rows, sum);
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

}  // namespace
