// The end of a tile: y = act(alpha * sums + bias) [* up] + residual, rounded once.
#pragma once
#include "cpu/linear/problem.h"

namespace {

// Applies f to the first `vectors` (1 or 2) vectors of every row. Rows are independent, so the long chains of an
// activation overlap.
template <class F>
inline void each_vector(float* sums, int rows, int vectors, F f) {
  for (int m = 0; m < rows; ++m)
    for (int v = 0; v < vectors; ++v) {
      float* at = sums + m * kPanel + v * kLanes;
      vstore(at, f(vload(at)));
    }
}

void activate(int64_t act, float* sums, int rows, int vectors) {
  switch (act) {
    case kActNone:
      return;
    case kActRelu:
      return each_vector(sums, rows, vectors, [](Vec x) { return vactivate(kActRelu, x); });
    case kActSilu:
      return each_vector(sums, rows, vectors, [](Vec x) { return vactivate(kActSilu, x); });
    case kActGeluErf:
      return each_vector(sums, rows, vectors, [](Vec x) { return vactivate(kActGeluErf, x); });
    case kActGeluTanh:
      return each_vector(sums, rows, vectors, [](Vec x) { return vactivate(kActGeluTanh, x); });
    default:
      return each_vector(sums, rows, vectors, [act](Vec x) { return vactivate(act, x); });
  }
}

// y = sums [* up] + residual from output n0 on. The dtype is known to the compiler: with it, the loop is a few
// instructions an output vector.
template <DType kOut>
void write_rows(const Problem& p, int64_t n0, int64_t row0, int rows, const int* count, const float* sums) {
  const bool whole = count[0] == kLanes && (p.gated || count[1] == kLanes);
  const int vectors = p.gated || count[1] == 0 ? 1 : 2;
  for (int m = 0; m < rows; ++m, sums += kPanel)
    for (int v = 0; v < vectors; ++v) {
      Vec out = vload(sums + v * kLanes);
      if (p.gated) out = vmul(out, vload(sums + kLanes));
      const int64_t n = n0 + v * kLanes;
      const int lanes = whole ? kLanes : count[v];
      if (p.residual.data)
        out = vadd(out, vload_as(p.residual.dtype, p.residual.data, (row0 + m) * p.residual.stride[0] + n, lanes));
      vstore_as(kOut, p.y.data, (row0 + m) * p.y.stride[0] + n, out, lanes);
    }
}

void finish_tile(const Problem& p, int64_t panel, int64_t row0, int rows, float* sums) {
  const int64_t width = p.gated ? kLanes : kPanel;  // outputs of a panel
  const int64_t n0 = panel * width;
  const int64_t left = min64(width, p.outputs() - n0);
  const int vectors = p.gated ? 1 : 2;
  int count[2];  // outputs in either vector
  for (int v = 0; v < 2; ++v) count[v] = static_cast<int>(max64(0, min64(kLanes, left - v * kLanes)));

  if (p.bias.data || p.alpha != 1.0f) {
    const Vec alpha = vset(p.alpha);
    Vec bias[2] = {vzero(), vzero()};
    for (int v = 0; v < 2 && p.bias.data; ++v)
      bias[v] = p.gated ? vload_as(p.bias.dtype, p.bias.data, v * p.outputs() + n0, count[0])
                        : vload_as(p.bias.dtype, p.bias.data, n0 + v * kLanes, count[v]);
    for (int m = 0; m < rows; ++m)
      for (int v = 0; v < 2; ++v) {
        float* at = sums + m * kPanel + v * kLanes;
        vstore(at, vfma(vload(at), alpha, bias[v]));
      }
  }
  activate(p.act, sums, rows, vectors);
  switch (p.y.dtype) {
    case DType::f32:
      return write_rows<DType::f32>(p, n0, row0, rows, count, sums);
    case DType::f16:
      return write_rows<DType::f16>(p, n0, row0, rows, count, sums);
    default:
      return write_rows<DType::bf16>(p, n0, row0, rows, count, sums);
  }
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

  // The operands of the next product pass through L1: sums that are not asked for again would be in L2 when their turn
  // comes, and wait behind the tiles' loads.
  void keep(int planes) const {
    for (int64_t r = 0; r < left * planes; ++r) {
      __builtin_prefetch(sums + r * kPanel);
      __builtin_prefetch(sums + r * kPanel + kLanes);
    }
  }

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
