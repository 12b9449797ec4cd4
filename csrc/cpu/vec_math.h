// Elementary functions and typed loads over the tier's Vec. Everything is in an anonymous namespace: each object has
// its own copy, so the linker can never merge an AVX-512 body into the baseline.
#pragma once
#include "runtime/tensor.h"

namespace {

// 2^x. |x - round(x)| <= 1/2, minimax polynomial of degree 5 (relative error 8e-8 in theory); 0 and inf at the ends.
inline Vec vexp2(Vec x) {
  x = vmin(vset(160.0f), vmax(vset(-180.0f), x));
  Vec n = vround(x);
  Vec r = vsub(x, n);
  Vec p = vset(0.00132764711f);
  p = vfma(p, r, vset(0.00967554133f));
  p = vfma(p, r, vset(0.0555071328f));
  p = vfma(p, r, vset(0.240221197f));
  p = vfma(p, r, vset(0.693146967f));
  p = vfma(p, r, vset(1.00000007f));
  return vscale2(p, n);
}

// e^x for x of any size: the reduction keeps the low part of log2(e) so that the error stays near one ulp. NaN stays NaN.
inline Vec vexp(Vec x) {
  Vec clamped = vmin(vset(104.0f), vmax(vset(-120.0f), x));
  Vec n = vround(vmul(clamped, vset(1.44269504f)));
  Vec r = vfma(n, vset(-0.693145752f), clamped);
  r = vfma(n, vset(-1.42860677e-6f), r);
  Vec p = vset(0.00138888889f);
  p = vfma(p, r, vset(0.00833333333f));
  p = vfma(p, r, vset(0.0416666667f));
  p = vfma(p, r, vset(0.166666667f));
  p = vfma(p, r, vset(0.5f));
  p = vfma(p, r, vset(1.0f));
  p = vfma(p, r, vset(1.0f));
  return vselect(veq(x, x), vscale2(p, n), x);
}

inline Vec vsigmoid(Vec x) { return vdiv(vset(1.0f), vadd(vset(1.0f), vexp(vneg(x)))); }
inline Vec vsilu(Vec x) { return vdiv(x, vadd(vset(1.0f), vexp(vneg(x)))); }

// tanh: odd polynomial for |x| < 0.3 (the exponential form cancels there), 1 - 2/(e^2x + 1) elsewhere.
inline Vec vtanh(Vec x) {
  Vec ax = vabs(x);
  Vec e = vexp(vadd(ax, ax));
  Vec big = vsub(vset(1.0f), vdiv(vset(2.0f), vadd(e, vset(1.0f))));
  Vec s = vmul(x, x);
  Vec p = vset(-0.00886323553f);
  p = vfma(p, s, vset(0.0218694885f));
  p = vfma(p, s, vset(-0.0539682540f));
  p = vfma(p, s, vset(0.133333333f));
  p = vfma(p, s, vset(-0.333333333f));
  Vec small = vfma(vmul(x, s), p, x);
  Vec signed_big = vselect(vlt(x, vzero()), vneg(big), big);
  return vselect(vlt(ax, vset(0.3f)), small, vselect(veq(x, x), signed_big, x));
}

// erf by Abramowitz & Stegun 7.1.26 refined is only 1.5e-7; near 0 the Taylor series keeps relative accuracy.
inline Vec verf(Vec x) {
  Vec ax = vabs(x);
  Vec t = vdiv(vset(1.0f), vfma(vset(0.3275911f), ax, vset(1.0f)));
  Vec p = vset(1.061405429f);
  p = vfma(p, t, vset(-1.453152027f));
  p = vfma(p, t, vset(1.421413741f));
  p = vfma(p, t, vset(-0.284496736f));
  p = vfma(p, t, vset(0.254829592f));
  p = vmul(p, t);
  Vec big = vsub(vset(1.0f), vmul(p, vexp(vneg(vmul(ax, ax)))));
  Vec s = vmul(x, x);
  Vec q = vset(-0.000854832702f);
  q = vfma(q, s, vset(0.00522397762f));
  q = vfma(q, s, vset(-0.0268661706f));
  q = vfma(q, s, vset(0.112837917f));
  q = vfma(q, s, vset(-0.376126389f));
  q = vfma(q, s, vset(1.12837917f));
  Vec small = vmul(x, q);
  Vec signed_big = vselect(vlt(x, vzero()), vneg(big), big);
  return vselect(vlt(ax, vset(0.5f)), small, vselect(veq(x, x), signed_big, x));
}

inline Vec vgelu_erf(Vec x) {
  Vec half = vmul(x, vset(0.5f));
  return vfma(half, verf(vmul(x, vset(0.707106781f))), half);
}
inline Vec vgelu_tanh(Vec x) {
  Vec inner = vmul(vmul(x, vset(0.797884561f)), vfma(vmul(x, x), vset(0.044715f), vset(1.0f)));
  Vec half = vmul(x, vset(0.5f));
  return vfma(half, vtanh(inner), half);
}

// Activations an epilogue may apply. The numbers are the contract with pycompiler/llmopt/ops/activation.py.
enum Activation : int64_t {
  kActNone = 0, kActRelu = 1, kActSilu = 2, kActGeluErf = 3, kActGeluTanh = 4, kActSigmoid = 5, kActTanh = 6,
  kActQuickGelu = 7,  // x * sigmoid(1.702 x)
  kActRelu2 = 8,      // relu(x)^2
};
inline Vec vactivate(int64_t act, Vec x) {
  switch (act) {
    case kActRelu: return vselect(vlt(x, vzero()), vzero(), x);
    case kActSilu: return vsilu(x);
    case kActGeluErf: return vgelu_erf(x);
    case kActGeluTanh: return vgelu_tanh(x);
    case kActSigmoid: return vsigmoid(x);
    case kActTanh: return vtanh(x);
    case kActQuickGelu: return vdiv(x, vadd(vset(1.0f), vexp(vmul(x, vset(-1.702f)))));
    case kActRelu2: {
      Vec r = vselect(vlt(x, vzero()), vzero(), x);
      return vmul(r, r);
    }
    default: return x;
  }
}

inline int itemsize(llmopt::DType d) {
  switch (d) {
    case llmopt::DType::f32: case llmopt::DType::i32: return 4;
    case llmopt::DType::f16: case llmopt::DType::bf16: return 2;
    case llmopt::DType::i64: return 8;
    default: return 1;
  }
}

// Typed vector access: n lanes (n <= kLanes) at element `index` of a float tensor of dtype d, widened to / narrowed from f32.
inline Vec vload_as(llmopt::DType d, const char* p, int64_t index, int n) {
  if (d == llmopt::DType::f32) {
    const float* f = reinterpret_cast<const float*>(p) + index;
    return n == kLanes ? vload(f) : vload_n(f, n);
  }
  const uint16_t* h = reinterpret_cast<const uint16_t*>(p) + index;
  if (d == llmopt::DType::f16) return n == kLanes ? vload_f16(h) : vload_f16_n(h, n);
  return n == kLanes ? vload_bf16(h) : vload_bf16_n(h, n);
}
inline void vstore_as(llmopt::DType d, char* p, int64_t index, Vec a, int n) {
  if (d == llmopt::DType::f32) {
    float* f = reinterpret_cast<float*>(p) + index;
    if (n == kLanes) vstore(f, a);
    else vstore_n(f, a, n);
    return;
  }
  uint16_t* h = reinterpret_cast<uint16_t*>(p) + index;
  if (d == llmopt::DType::f16) {
    if (n == kLanes) vstore_f16(h, a);
    else vstore_f16_n(h, a, n);
    return;
  }
  if (n == kLanes) vstore_bf16(h, a);
  else vstore_bf16_n(h, a, n);
}
// One element, for edges and scalars.
inline float load_scalar(llmopt::DType d, const char* p, int64_t index) {
  float out[kLanes];
  vstore(out, vload_as(d, p, index, 1));
  return out[0];
}
inline void store_scalar(llmopt::DType d, char* p, int64_t index, float x) { vstore_as(d, p, index, vset(x), 1); }

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
inline int64_t min64(int64_t a, int64_t b) { return a < b ? a : b; }
inline int64_t max64(int64_t a, int64_t b) { return a > b ? a : b; }

}  // namespace
