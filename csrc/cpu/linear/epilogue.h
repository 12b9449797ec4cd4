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

// The outputs of a panel in `rows` rows from row0 on, in one pass, in registers. sum(m, v, bias): vector v of the panel
// in the m-th of them, with alpha and the bias.
template <int64_t kAct, DType kOut, class Sum>
void finish_rows(const Problem& p, int64_t panel, int64_t row0, int rows, Sum sum) {
  const int64_t width = p.gated ? kLanes : kPanel;  // outputs of a panel
  const int64_t n0 = panel * width;
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
  using Act = Activation<kAct, kOut != DType::f32>;
  const Act act(p.act);
  const int64_t y_stride = p.y.stride[0], residual_stride = p.residual.stride[0];
  const DType residual_dtype = p.residual.dtype;
  char* const y = p.y.data;
  const char* const residual = p.residual.data;
  auto with_residual = [=](int m, int v, Vec out, int lanes) __attribute__((always_inline)) {
    if (!residual) return out;
    const int64_t at = (row0 + m) * residual_stride + n0 + v * kLanes;
    return vadd(vrounded(out), vload_as(residual_dtype, residual, at, lanes));
  };
  int m = 0;
  if (p.gated) {
    auto some = [&](auto count) __attribute__((always_inline)) {
      constexpr int kRows = decltype(count)::value;
      Vecs<kRows> x;
#pragma GCC unroll 4
      for (int i = 0; i < kRows; ++i) x.v[i] = sum(m + i, 0, bias[0]);
      x = act(x);
#pragma GCC unroll 4
      for (int i = 0; i < kRows; ++i, ++m) {
        const Vec out = with_residual(m, 0, vmul(x.v[i], sum(m, 1, bias[1])), first);
        vstore_as(kOut, y, (row0 + m) * y_stride + n0, out, first);
      }
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
    for (int i = 0; i < kRows; ++i, ++m) {
      const int64_t at = (row0 + m) * y_stride + n0;
      const Vec low = with_residual(m, 0, x.v[2 * i], first), high = x.v[2 * i + 1];
      if (second == kLanes) {
        vstore_pair_as(kOut, y, at, low, with_residual(m, 1, high, kLanes));
        continue;
      }
      vstore_as(kOut, y, at, low, first);
      if (second > 0) vstore_as(kOut, y, at + kLanes, with_residual(m, 1, high, second), second);
    }
  };
  while (m + Act::kChains / 2 <= rows) some(Constant<Act::kChains / 2>{});
  while (m < rows) some(Constant<1>{});
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

// A product on tiles that is finished but for its epilogue. That is done some rows at a time between the steps of the
// next product: the core looks only some hundred instructions ahead, so the tiles would idle while it works on all
// rows. Beside tile products a core does one vector instruction a cycle instead of two, lookups and shuffles apart,
// which have a port of their own: what an epilogue costs is the number of its other instructions.
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
