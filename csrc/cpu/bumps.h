// Activations for results of half precision: act(x) = max(x, 0) - bump(|x|), the bump from a table of cubic pieces. A
// piece costs four lookups and three products where an exponential of f32's accuracy and a division cost some thirty
// instructions, which is what bounds the epilogue of a product on tiles.
//   gelu:  |x| Φ(-|x|)      silu:  |x| σ(-|x|)
// The error is below 1e-5 and, near zero, below 2e-4 of the result (in front of a product with `up`).
#pragma once
#include "cpu/vec_math.h"

#ifdef LLMOPT_ISA_LOOKS_UP
namespace {

constexpr int kPieces = 32;

struct Bump {
  float pieces_per_unit = 0, top = 0;  // beyond `top` the bump stays what it is there: at most 2.3e-6
  // Piece i, around t = i / pieces_per_unit, is -(c0 + t (c1 + t (c2 + t c3))).
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
constexpr Bump make_bump(double (*f)(double), double pieces_per_unit) {
  const double nodes[4] = {-0.4619397662556434, -0.1913417161825449, 0.1913417161825449, 0.4619397662556434};
  Bump bump;
  bump.pieces_per_unit = static_cast<float>(pieces_per_unit);
  bump.top = static_cast<float>((kPieces - 0.51) / pieces_per_unit);
  for (int i = 0; i < kPieces; ++i) {
    double t[4] = {}, d[4] = {};
    for (int n = 0; n < 4; ++n) {
      t[n] = (i == 0 ? (n == 0 ? 0 : (nodes[n] + 0.5) / 2) : i + nodes[n]) / pieces_per_unit;
      d[n] = -f(t[n]);
    }
    for (int order = 1; order < 4; ++order)  // divided differences
      for (int n = 3; n >= order; --n) d[n] = (d[n] - d[n - 1]) / (t[n] - t[n - order]);
    // Newton's form, multiplied out.
    const double pairs = t[0] * t[1] + t[0] * t[2] + t[1] * t[2];
    bump.c[3][i] = static_cast<float>(d[3]);
    bump.c[2][i] = static_cast<float>(d[2] - d[3] * (t[0] + t[1] + t[2]));
    bump.c[1][i] = static_cast<float>(d[1] - d[2] * (t[0] + t[1]) + d[3] * pairs);
    bump.c[0][i] = static_cast<float>(d[0] - d[1] * t[0] + d[2] * t[0] * t[1] - d[3] * t[0] * t[1] * t[2]);
  }
  return bump;
}

constexpr Bump kGeluErfBump = make_bump(gelu_erf_bump, 5);
constexpr Bump kGeluTanhBump = make_bump(gelu_tanh_bump, 5);
constexpr Bump kSiluBump = make_bump(silu_bump, 2);

// A bump in registers.
class LessBump {
 public:
  explicit LessBump(const Bump& bump) : top_(vset(bump.top)), pieces_(vset(bump.pieces_per_unit)) {
    for (int i = 0; i < 4; ++i) c_[i][0] = vload(bump.c[i]), c_[i][1] = vload(bump.c[i] + kLanes);
  }

  // NaN stays NaN, and -inf becomes it, as in PyTorch.
  template <int N>
  inline __attribute__((always_inline)) Vecs<N> operator()(const Vecs<N>& x) const {
    const Vec big = vset(12582912.0f);  // 1.5 * 2^23: what is added to it is rounded, and its last bits are the integer
    const Vecs<N> magnitude = vabs(x), t = vmin(top_, magnitude);
    const Vecs<N> piece = vfma(t, pieces_, big);
    const auto c = [&](int i) __attribute__((always_inline)) {
      return in_step<N>([&](Vec at) { return vlookup(c_[i][0], c_[i][1], at); }, piece);
    };
    const Vecs<N> p = vfma(vfma(vfma(c(3), t, c(2)), t, c(1)), t, c(0));
    return vadd(vfma(magnitude, vset(0.5f), vmul(x, vset(0.5f))), p);
  }

 private:
  Vec c_[4][2], top_, pieces_;
};

}  // namespace
#endif
