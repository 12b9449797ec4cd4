// Logarithms and sine/cosine over Vec, for the elementwise VM and rotary tables.
#pragma once
#include "cpu/family.h"

namespace {

// ln x within 1.2 ulp: x = m * 2^e with m in [2/3, 4/3], polynomial in m - 1. -inf at 0, NaN below.
inline Vec vlog(Vec x) {
  Vec e;
  Vec m = vsplit(x, e);
  const Mask high = vlt(vset(1.33333333f), m);
  e = vselect(high, vadd(e, vset(1.0f)), e);
  m = vsub(vselect(high, vmul(m, vset(0.5f)), m), vset(1.0f));
  Vec s = vmul(m, m);
  Vec r = vset(-0.130310059f), t = vset(0.140869141f);
  r = vfma(r, s, vset(-0.121483512f));
  t = vfma(t, s, vset(0.139814854f));
  r = vfma(r, s, vset(-0.166846126f));
  t = vfma(t, s, vset(0.200120345f));
  r = vfma(r, s, vset(-0.249996200f));
  r = vfma(t, m, r);
  r = vfma(r, m, vset(0.333331972f));
  r = vfma(r, m, vset(-0.5f));
  r = vfma(r, s, m);
  r = vfma(e, vset(0.693147182f), r);
  const Vec inf = vset(__builtin_inff());
  r = vselect(vlt(x, inf), r, x);  // inf and NaN stay what they are
  r = vselect(veq(x, vzero()), vneg(inf), r);
  return vselect(vlt(x, vzero()), vset(__builtin_nanf("")), r);
}

// ln(1 + x): the rounding error of 1 + x is given back to first order.
inline Vec vlog1p(Vec x) {
  Vec u = vadd(x, vset(1.0f));
  Vec lost = vsub(x, vsub(u, vset(1.0f)));
  Vec r = vadd(vlog(u), vdiv(lost, u));
  r = vselect(veq(u, vset(1.0f)), x, r);
  return vselect(vlt(vset(0.0f), u), vselect(vlt(u, vset(__builtin_inff())), r, u), vlog(u));
}

// x mod pi/2 for one |x| of any size by exact integer arithmetic: the 24-bit mantissa times 96 bits of 2/pi.
// Returns the remainder in [-pi/4, pi/4] and the quadrant in *quadrant. |x| must be above 1e3; inf and NaN give NaN.
inline float reduce_exactly(float x, int* quadrant) {
  static constexpr uint32_t kTwoOverPi[] = {0,          0xA2F9836E, 0x4E441529, 0xFC2757D1,
                                            0xF534DDC0, 0xDB629599, 0x3C439041, 0xFE5163AB};
  uint32_t bits;
  __builtin_memcpy(&bits, &x, 4);
  const int exponent = static_cast<int>(bits >> 23 & 255);
  *quadrant = 0;
  if (exponent == 255) return x - x;
  const uint64_t mantissa = (bits & 0x7FFFFF) | 0x800000;
  // The window of 2/pi that begins at the bit which, times this x, weighs 2; bits before it only add whole turns.
  const int shift = exponent - 150 + 30;
  const int first = shift / 32, up = shift % 32;
  uint64_t word[3];
  for (int i = 0; i < 3; ++i) {
    uint64_t pair = static_cast<uint64_t>(kTwoOverPi[first + i]) << 32 | kTwoOverPi[first + i + 1];
    word[i] = pair << up >> 32;
  }
  // The product's 64 bits below weight 4: two of quadrant, 62 of fraction.
  uint64_t low = mantissa * word[2], mid = mantissa * word[1], high = mantissa * word[0];
  uint64_t turn = (high << 32) + mid + (low >> 32);
  int q = static_cast<int>(turn >> 62 & 3);
  int64_t fraction = static_cast<int64_t>(turn << 2);  // signed: at or above one half counts from the next quadrant
  if (fraction < 0) ++q;
  double r = static_cast<double>(fraction) * (1.5707963267948966 / 18446744073709551616.0);
  if (bits >> 31) {
    q = -q;
    r = -r;
  }
  *quadrant = q & 3;
  return static_cast<float>(r);
}

// x = n * pi/2 + r. Up to 1e5 the products n * part are exact with 8-bit parts, with and without fused arithmetic;
// n is below 2^16 there. Lanes beyond go through reduce_exactly.
inline Vec reduce_half_pi(Vec x, Vec& n) {
  n = vround(vmul(x, vset(0.636619772f)));
  Vec r = vfma(n, vset(-1.5703125f), x);
  r = vfma(n, vset(-4.825592041015625e-4f), r);
  r = vfma(n, vset(-1.2665987014770508e-6f), r);
  r = vfma(n, vset(-9.92093580e-10f), r);
  if (vreduce_max(vselect(vle(vabs(x), vset(1e5f)), vzero(), vset(1.0f))) == 0.0f) return r;
  float xs[kLanes], ns[kLanes], rs[kLanes];
  vstore(xs, x);
  vstore(ns, n);
  vstore(rs, r);
  for (int i = 0; i < kLanes; ++i) {
    if (__builtin_fabsf(xs[i]) <= 1e5f) continue;
    int quadrant;
    rs[i] = reduce_exactly(xs[i], &quadrant);
    ns[i] = static_cast<float>(quadrant);
  }
  n = vload(ns);
  return vload(rs);
}

// sin(r + n * pi/2) for |r| <= pi/4.
inline Vec sin_quadrant(Vec r, Vec n) {
  Vec s = vmul(r, r);
  Vec p = vset(-1.95152959e-4f);
  p = vfma(p, s, vset(8.33216087e-3f));
  p = vfma(p, s, vset(-1.66666546e-1f));
  Vec sine = vfma(vmul(p, s), r, r);
  Vec c = vset(2.44331571e-5f);
  c = vfma(c, s, vset(-1.38873162e-3f));
  c = vfma(c, s, vset(4.16666456e-2f));
  c = vfma(c, s, vset(-0.5f));
  Vec cosine = vfma(c, s, vset(1.0f));
  Vec half = vmul(n, vset(0.5f));
  Vec odd = vsub(half, vfloor(half));  // 0 or 1/2
  Vec quarter = vmul(vfloor(half), vset(0.5f));
  Vec flip = vsub(quarter, vfloor(quarter));  // 0 or 1/2: the third and fourth quadrants change sign
  Vec v = vselect(veq(odd, vzero()), sine, cosine);
  return vselect(veq(flip, vzero()), v, vneg(v));
}

inline Vec vsin(Vec x) {
  Vec n;
  Vec r = reduce_half_pi(x, n);
  return sin_quadrant(r, n);
}
inline Vec vcos(Vec x) {
  Vec n;
  Vec r = reduce_half_pi(x, n);
  return sin_quadrant(r, vadd(n, vset(1.0f)));
}

}  // namespace
