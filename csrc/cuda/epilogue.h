// The end of a linear: y = act(value + bias) + residual, rounded once.
#pragma once
#include "cuda/memory.h"
#include "runtime/tensor.h"

namespace llmopt::cuda {

LLMOPT_DEVICE float activate(int act, float x) {
  switch (act) {
    case kActRelu:
      return x > 0.0f || x != x ? x : 0.0f;
    case kActSilu:
      return x / (1.0f + expf(-x));
    case kActGeluErf:
      return 0.5f * x * (1.0f + erff(x * 0.70710678f));
    case kActGeluTanh:
      return 0.5f * x * (1.0f + tanhf(0.79788456f * (x + 0.044715f * x * x * x)));
    case kActSigmoid:
      return 1.0f / (1.0f + expf(-x));
    case kActTanh:
      return tanhf(x);
    case kActQuickGelu:
      return x / (1.0f + expf(-1.702f * x));
    case kActRelu2:
      return x > 0.0f || x != x ? x * x : 0.0f;
    default:
      return x;
  }
}

template <class T>
struct Epilogue {
  Global<const T> bias, residual;
  Global<T> y;
  int64_t residual_stride, y_stride;
  int act;

  template <class Problem>
  LLMOPT_DEVICE explicit Epilogue(const Problem& p)
      : bias(global<T>(p.bias)),
        residual(global<T>(p.residual)),
        y(global<T>(p.y)),
        residual_stride(p.residual_stride),
        y_stride(p.y_stride),
        act(p.act) {}

  LLMOPT_DEVICE void finish(float value, int m, int n) const {
    if (bias) value += to_float(load(bias + n));
    value = activate(act, value);
    if (residual) value += to_float(load(residual + m * residual_stride + n));
    store(y + m * y_stride + n, from_float<T>(value));
  }

  // Whether every four columns from a multiple of four on are one access.
  LLMOPT_DEVICE bool wide() const {
    return y_stride % 4 == 0 && residual_stride % 4 == 0 && y.aligned(8) && bias.aligned(8) && residual.aligned(8);
  }

  // finish for columns n .. n + 3, n a multiple of four, where wide().
  LLMOPT_DEVICE void finish4(const float (&values)[4], int m, int n) const {
    Pack<T, 4> b{}, r{}, out;
    if (bias) b = unpack<T, 4>(load<uint2>(bias + n));
    if (residual) r = unpack<T, 4>(load<uint2>(residual + m * residual_stride + n));
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      float value = values[i];
      if (bias) value += to_float(b.at[i]);
      value = activate(act, value);
      if (residual) value += to_float(r.at[i]);
      out.at[i] = from_float<T>(value);
    }
    store(y + m * y_stride + n, pack<uint2>(out));
  }
};

}  // namespace llmopt::cuda
