// Activations for results of half precision: act(x) = max(x, 0) - bump(|x|), the bump from a table of cubic pieces. A
// piece costs four lookups and three products where an exponential of f32's accuracy and a division cost some thirty
// instructions, which is what bounds the epilogue of a product on tiles.
//   gelu:  |x| Φ(-|x|)      silu:  |x| σ(-|x|)
// The error is below 1e-5 and, near zero, below 1e-4 of the result.
#pragma once
#include "cpu/vec_math.h"

#ifdef LLMOPT_ISA_LOOKS_UP
namespace {

constexpr int kPieces = 32;

struct Bump {
  float pieces_per_unit = 0, width = 0, top = 0;  // beyond `top` the bump stays what it is there: nothing
  // Piece i is c0 + r (c1 + r (c2 + r c3)) with r = |x| - i * width, from half a piece before to half a piece after it.
  alignas(64) float c[4][kPieces] = {};
};

constexpr double exponential(double x) {
  double term = 1, sum = 1;
  const double part = x / 64;
  for (int i = 1; i < 20; ++i) sum += term *= part / i;
  for (int i = 0; i < 6; ++i) sum *= sum;
  return sum;
}

// Φ(-t) = (1 - erf(t / √2)) / 2, by the series of positive terms (Abramowitz and Stegun, 7.1.6 and 26.2.11).
constexpr double gelu_erf_bump(double t) {
  double term = t, sum = t;
  for (int i = 1; i < 150; ++i) sum += term *= t * t / (2 * i + 1);
  return t * (0.5 - 0.3989422804014327 * exponential(-t * t / 2) * sum);
}
// x/2 (1 + tanh(u)) is x σ(2u).
constexpr double gelu_tanh_bump(double t) {
  return t / (1 + exponential(1.5957691216057308 * t * (1 + 0.044715 * t * t)));
}
constexpr double silu_bump(double t) { return t / (1 + exponential(t)); }

// Each piece passes through four points of the function, the Chebyshev nodes; the first, of which only the upper half
// is used, passes through zero, so that small results keep their digits.
constexpr Bump make_bump(double (*f)(double), double width) {
  Bump bump;
  bump.width = static_cast<float>(width);
  bump.pieces_per_unit = static_cast<float>(1 / width);
  bump.top = static_cast<float>((kPieces - 0.51) * width);
  const double nodes[4] = {-0.4619397662556434, -0.1913417161825449, 0.1913417161825449, 0.4619397662556434};
  for (int i = 0; i < kPieces; ++i) {
    double r[4] = {}, d[4] = {};
    for (int n = 0; n < 4; ++n) {
      r[n] = i == 0 ? (n == 0 ? 0 : (nodes[n] + 0.5) * width / 2) : nodes[n] * width;
      d[n] = f(i * width + r[n]);
    }
    for (int order = 1; order < 4; ++order)  // divided differences
      for (int n = 3; n >= order; --n) d[n] = (d[n] - d[n - 1]) / (r[n] - r[n - order]);
    // Newton's form, multiplied out.
    bump.c[3][i] = static_cast<float>(d[3]);
    bump.c[2][i] = static_cast<float>(d[2] - d[3] * (r[0] + r[1] + r[2]));
    bump.c[1][i] = static_cast<float>(d[1] - d[2] * (r[0] + r[1]) + d[3] * (r[0] * r[1] + r[0] * r[2] + r[1] * r[2]));
    bump.c[0][i] = static_cast<float>(d[0] - d[1] * r[0] + d[2] * r[0] * r[1] - d[3] * r[0] * r[1] * r[2]);
  }
  return bump;
}

constexpr Bump kGeluErfBump = make_bump(gelu_erf_bump, 0.1875);
constexpr Bump kGeluTanhBump = make_bump(gelu_tanh_bump, 0.1875);
constexpr Bump kSiluBump = make_bump(silu_bump, 0.5);

// NaN stays NaN, and -inf becomes it, as in PyTorch.
inline Vec vless_bump(const Bump& bump, Vec x) {
  const Vec big = vset(12582912.0f);  // 1.5 * 2^23: a number added to it is rounded, and its last bits are the integer
  const Vec magnitude = vabs(x), t = vmin(vset(bump.top), magnitude);
  const Vec piece = vfma(t, vset(bump.pieces_per_unit), big);
  const Vec r = vfma(vsub(piece, big), vset(-bump.width), t);
  Vec p = vfma(vlookup(bump.c[3], piece), r, vlookup(bump.c[2], piece));
  p = vfma(p, r, vlookup(bump.c[1], piece));
  p = vfma(p, r, vlookup(bump.c[0], piece));
  return vsub(vfma(magnitude, vset(0.5f), vmul(x, vset(0.5f))), p);
}

}  // namespace
#endif

namespace {

// vactivate for results that are rounded to half precision.
inline Vec vactivate_half(int64_t act, Vec x) {
#ifdef LLMOPT_ISA_LOOKS_UP
  if (act == kActSilu) return vless_bump(kSiluBump, x);
  if (act == kActGeluErf) return vless_bump(kGeluErfBump, x);
  if (act == kActGeluTanh) return vless_bump(kGeluTanhBump, x);
#endif
  return vactivate(act, x);
}

}  // namespace
