// Elementary functions, those of activations also of several vectors in step, and typed loads over the tier's Vec.
// Everything is in an anonymous namespace: each object has its own copy, so the linker can never merge an AVX-512 body
// into the baseline.
#pragma once
#include "cpu/vecs.h"
#include "runtime/tensor.h"

namespace {

// Exponentials: 0 and inf at the ends, NaN stays NaN (the argument order of vmin lets it through). Scaling into
// denormals, or from there to zero, takes 140 to 160 cycles on an Intel core, so results whose power of two is below
// `least` are 0 without being scaled: -150 where all of them are, -125 in the forms called normal, which have 0 in
// place of denormals.

// 2^x, within 2 ulp. |x - round(x)| <= 1/2 and a polynomial of degree 5 that is minimax in ulps (1.1 by itself).
template <class V>
inline V vexp2_series(V r) {
  V p = vset(0.00132245652f);
  p = vfma(p, r, vset(0.00967172161f));
  p = vfma(p, r, vset(0.05550896f));
  p = vfma(p, r, vset(0.24022238f));
  p = vfma(p, r, vset(0.693146825f));
  return vfma(p, r, vset(1.0f));
}
template <class V>
inline V vexp2_from(float least, V x) {
  const V n = vround(x);
  return vscale2_from(vset(least), vexp2_series(vsub(x, n)), n);
}
inline Vec vexp2(Vec x) { return vexp2_from(-150.0f, vmin(vset(160.0f), x)); }
// For x < 160 or NaN; any x with AVX-512.
template <class V>
inline V vexp2_normal(V x) {
  return vexp2_from(-125.0f, x);
}

// e^x, within 1 ulp: ln 2 in two parts keeps the reduced argument exact, the minimax polynomial of degree 6 is good
// to 3e-9.
template <class V>
inline V vexp_series(V x, V n) {
  V r = vfma(n, vset(-0.693145752f), x);
  r = vfma(n, vset(-1.42860677e-6f), r);
  V p = vset(0.00138206338f);
  p = vfma(p, r, vset(0.00836867373f));
  p = vfma(p, r, vset(0.0416682661f));
  p = vfma(p, r, vset(0.166665211f));
  p = vfma(p, r, vset(0.49999994f));
  p = vfma(p, r, vset(1.0f));
  return vfma(p, r, vset(1.0f));
}
// For |x| < 120 or NaN.
inline Vec vexp_bounded(Vec x) {
  const Vec n = vround(vmul(x, vset(1.44269504f)));
  return vscale2(vexp_series(x, n), n);
}
template <class V>
inline V vexp_from(float least, V x) {
  x = vmin(vset(104.0f), x);
  const V n = vround(vmul(x, vset(1.44269504f)));
  return vscale2_from(vset(least), vexp_series(x, n), n);
}
inline Vec vexp(Vec x) { return vexp_from(-150.0f, x); }
template <class V>
inline V vexp_normal(V x) {
  return vexp_from(-125.0f, x);
}

inline Vec vsigmoid(Vec x) { return vdiv(vset(1.0f), vadd(vset(1.0f), vexp_normal(vneg(x)))); }
template <class V>
inline V vsilu(V x) {
  return vdiv(x, vadd(vset(1.0f), vexp_normal(vneg(x))));
}

// tanh: minimax odd polynomial below 0.625, where the exponential form cancels; 1 - 2/(e^2|x| + 1) elsewhere.
inline Vec vtanh(Vec x) {
  Vec ax = vabs(x);
  Vec top = vmin(vset(20.0f), ax);  // the result is 1 from 9 on; NaN passes
  Vec e = vexp_bounded(vadd(top, top));
  Vec big = vsub(vset(1.0f), vdiv(vset(2.0f), vadd(e, vset(1.0f))));
  Vec s = vmul(x, x);
  Vec p = vset(-0.0056922962f);
  p = vfma(p, s, vset(0.0206281673f));
  p = vfma(p, s, vset(-0.0537365153f));
  p = vfma(p, s, vset(0.133314058f));
  p = vfma(p, s, vset(-0.333332807f));
  Vec small = vfma(vmul(ax, s), p, ax);
  return vcopysign(vselect(vlt(ax, vset(0.625f)), small, big), x);
}

// erf: odd polynomial below 0.927734375, 1 - e^q(|x|) above; both within 1 ulp when the products are fused.
inline Vec verf(Vec x) {
  Vec ax = vabs(x);
  Vec s = vmul(x, x);
  Vec t = vmin(vset(4.0f), ax);  // the result is 1 from 4 on, the polynomial turns around at 10; NaN passes
  Vec t2 = vmul(t, t);
  Vec q = vfma(vset(-1.72853470e-5f), t, vset(3.83197126e-4f));
  Vec u = vfma(vset(-3.88396438e-3f), t, vset(2.42546219e-2f));
  q = vfma(q, t2, u);
  q = vfma(q, t, vset(-1.06777877e-1f));
  q = vfma(q, t, vset(-6.34846687e-1f));
  q = vfma(q, t, vset(-1.28717512e-1f));
  q = vfma(q, t, vneg(t));
  Vec big = vsub(vset(1.0f), vexp_bounded(q));
  Vec p = vset(-5.96761703e-4f);
  p = vfma(p, s, vset(4.99119423e-3f));
  p = vfma(p, s, vset(-2.67681349e-2f));
  p = vfma(p, s, vset(1.12819925e-1f));
  p = vfma(p, s, vset(-3.76125336e-1f));
  p = vfma(p, s, vset(1.28379166e-1f));
  Vec small = vfma(p, ax, ax);
  return vcopysign(vselect(vlt(ax, vset(0.927734375f)), small, big), x);
}

// max(x, 0) - |x| Φ(-|x|) with Φ(-t) = 2^(t p(t)) / 2, where p of degree 9 moves t Φ(-t) by less than 3e-8, and by less
// than 4e-6 of itself up to t = 6: no range is apart, as with erf, and nothing cancels in the negative tail. p goes on
// downwards: from 16 on Φ is zero.
template <class V>
inline V vgelu_erf(V x) {
  V half = vmul(x, vset(0.5f));      // half + |half| is max(x, 0), and NaN for -inf, as in PyTorch
  V t = vmin(vset(16.0f), vabs(x));  // NaN passes
  V t2 = vmul(t, t);
  V p = vfma(vset(-1.76020016e-8f), t, vset(5.6765208e-7f));
  V u = vfma(vset(-7.80733353e-6f), t, vset(5.78009676e-5f));
  V w = vfma(vset(-2.14420914e-4f), t, vset(-1.38115196e-4f));
  p = vfma(vfma(p, t2, u), t2, w);
  p = vfma(p, t, vset(7.12080114e-3f));
  p = vfma(p, t, vset(-5.25642745e-2f));
  p = vfma(p, t, vset(-4.59177613e-1f));
  p = vfma(p, t, vset(-1.1511097f));
  return vfma(vmul(t, vset(-0.5f)), vexp2_normal(vmul(p, t)), vadd(half, vabs(half)));
}
// x/2 (1 + tanh t) is x * sigmoid(2t): cheaper, and relative accuracy in the negative tail as well.
template <class V>
inline V vgelu_tanh(V x) {
  V t = vmul(vmul(x, vset(-1.59576912f)), vfma(vmul(x, x), vset(0.044715f), vset(1.0f)));
  return vdiv(x, vadd(vset(1.0f), vexp_normal(t)));
}

inline Vec vactivate(int64_t act, Vec x) {
  switch (act) {
    case kActRelu:
      return vselect(vlt(x, vzero()), vzero(), x);
    case kActSilu:
      return vsilu(x);
    case kActGeluErf:
      return vgelu_erf(x);
    case kActGeluTanh:
      return vgelu_tanh(x);
    case kActSigmoid:
      return vsigmoid(x);
    case kActTanh:
      return vtanh(x);
    case kActQuickGelu:
      return vdiv(x, vadd(vset(1.0f), vexp_normal(vmul(x, vset(-1.702f)))));
    case kActRelu2: {
      Vec r = vselect(vlt(x, vzero()), vzero(), x);
      return vmul(r, r);
    }
    default:
      return x;
  }
}

// Typed vector access: n lanes (n <= kLanes) at element `index` of a float tensor of dtype d, widened to / narrowed
// from f32.
inline Vec vload_as(DType d, const char* p, int64_t index, int n) {
  if (d == DType::f32) {
    const float* f = reinterpret_cast<const float*>(p) + index;
    return n == kLanes ? vload(f) : vload_n(f, n);
  }
  const uint16_t* h = reinterpret_cast<const uint16_t*>(p) + index;
  if (d == DType::f16) return n == kLanes ? vload_f16(h) : vload_f16_n(h, n);
  return n == kLanes ? vload_bf16(h) : vload_bf16_n(h, n);
}
inline void vstore_as(DType d, char* p, int64_t index, Vec a, int n) {
  if (d == DType::f32) {
    float* f = reinterpret_cast<float*>(p) + index;
    if (n == kLanes)
      vstore(f, a);
    else
      vstore_n(f, a, n);
    return;
  }
  uint16_t* h = reinterpret_cast<uint16_t*>(p) + index;
  if (d == DType::f16) {
    if (n == kLanes)
      vstore_f16(h, a);
    else
      vstore_f16_n(h, a, n);
    return;
  }
  if (n == kLanes)
    vstore_bf16(h, a);
  else
    vstore_bf16_n(h, a, n);
}
#ifndef LLMOPT_ISA_NARROWS_PAIRS
inline void vstore_bf16_pair(uint16_t* p, Vec a, Vec b) {
  vstore_bf16(p, a);
  vstore_bf16(p + kLanes, b);
}
#endif
// Two vectors, one behind the other.
inline void vstore_pair_as(DType d, char* p, int64_t index, Vec a, Vec b) {
  if (d == DType::bf16) return vstore_bf16_pair(reinterpret_cast<uint16_t*>(p) + index, a, b);
  vstore_as(d, p, index, a, kLanes);
  vstore_as(d, p, index + kLanes, b, kLanes);
}
// One element, for edges and scalars.
inline float load_scalar(DType d, const char* p, int64_t index) {
  float out[kLanes];
  vstore(out, vload_as(d, p, index, 1));
  return out[0];
}
inline void store_scalar(DType d, char* p, int64_t index, float x) { vstore_as(d, p, index, vset(x), 1); }

// What values are multiplied with to become codes. Below the smallest normal number the reciprocal of a scale is
// infinite: such values count as zero.
inline float inverse_scale(float scale) { return scale >= 1.17549435e-38f ? 1.0f / scale : 0.0f; }

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
inline int64_t min64(int64_t a, int64_t b) { return a < b ? a : b; }
inline int64_t max64(int64_t a, int64_t b) { return a > b ? a : b; }

}  // namespace
