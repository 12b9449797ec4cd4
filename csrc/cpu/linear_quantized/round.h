// round_weight: weights → codes with a scale, and maybe an offset, per row and group; what they mean, and which ranges
// are tried, is in pycompiler/llmopt/quant/rounding.py, which does the same in PyTorch. kLanes groups are rounded at a
// time, each in its own lane, so that no sum goes across lanes.
#pragma once
#include "cpu/linear_quantized/layout.h"

namespace {

constexpr float kShares[] = {0.95f, 0.9f, 0.85f, 0.8f};  // of a group's range, tried where codes have 4 bits
constexpr int kFits = 3;
constexpr float kLeastNormal = 1.17549435e-38f;

struct Grid {
  Vec scale, offset;
};

inline Vec vlarger(Vec a, Vec b) { return vselect(vlt(a, b), b, a); }

template <int kBits, bool kSymmetric>
class Rounding {
 public:
  // values: [count][kLanes]
  Rounding(const float* values, int64_t count) : values_(values), count_(count) {}

  // only_span: the grid over all of the range, and no other.
  Grid best(bool only_span) const {
    Vec low = vload(values_), high = low;
    each([&](Vec v) { low = vmin(low, v), high = vmax(high, v); });
    const Vec largest = vlarger(high, vneg(low)), middle = vadd(half(high), half(low));
    if (kBits == 8 && kSymmetric) return {vdiv(largest, vset(127)), vzero()};
    if (kBits == 8) return {vsub(vdiv(high, vset(254)), vdiv(low, vset(254))), middle};
    const Vec longer = vdiv(vselect(vlt(vneg(low), high), high, low), vset(-8));  // -8 is a code and 8 is not
    const Vec step = vsub(vdiv(high, vset(15)), vdiv(low, vset(15)));
    auto of = [&](float share) -> Grid {
      if (kSymmetric) return {vmul(longer, vset(share)), vzero()};
      return {vmul(step, vset(share)), vfma(low, vset(share), vmul(middle, vset(1 - share)))};
    };
    Grid best = of(1);
    if (only_span) return {kept(best.scale), kept(best.offset)};
    Vec error = this->error(best);
    auto see = [&](Grid grid) {
      const Vec own = this->error(grid);
      const Mask better = vlt(own, error);  // never where it is NaN
      best = {vselect(better, grid.scale, best.scale), vselect(better, grid.offset, best.offset)};
      error = vselect(better, own, error);
    };
    for (float share : kShares) see(of(share));
    if (kSymmetric) see({vdiv(largest, vset(7)), vzero()});
    for (int fit = 0; fit < kFits; ++fit) see(fitted(best));
    return {kept(best.scale), kept(best.offset)};
  }

  // codes: [count][kLanes], -127 to 127 or 0 to 15, of quotients that are rounded once. Whether they stand for the
  // values as they are.
  bool codes_by(Grid grid, float* codes) const {
    const Mask none = veq(grid.scale, vzero());
    Vec off = vzero();
    each([&](Vec v) {
      const Vec quotient = vdiv(vsub(v, grid.offset), grid.scale);
      const Vec code = limited(vround(vselect(none, vzero(), quotient)));
      const Vec value = vfma(vsub(code, vset(kZero)), grid.scale, grid.offset);
      off = vadd(off, vselect(veq(value, v), vzero(), vset(1)));
      vstore(codes, code);
      codes += kLanes;
    });
    return vreduce_add(off) == 0.0f;
  }

 private:
  static constexpr float kZero = kBits == 4 && kSymmetric ? 8 : 0;

  template <class F>
  void each(F f) const {
    for (int64_t i = 0; i < count_; ++i) f(vload(values_ + i * kLanes));
  }
  static Vec half(Vec a) { return vmul(a, vset(0.5f)); }
  static Vec limited(Vec codes) {
    constexpr float kLow = kBits == 8 ? -127 : 0, kHigh = kBits == 8 ? 127 : 15;
    return vmin(vset(kHigh), vmax(vset(kLow), vadd(codes, vset(kZero))));
  }
  // While grids are tried, products with the inverse stand for quotients; scales too small for one round to code 0.
  static Vec inverse(Vec scale) { return vselect(vlt(vabs(scale), vset(kLeastNormal)), vzero(), vdiv(vset(1), scale)); }

  Vec error(Grid grid) const {
    const Vec inverse = this->inverse(grid.scale), zero = vset(kZero);
    Vec sum = vzero();
    each([&](Vec v) {
      const Vec shifted = vsub(v, grid.offset), code = limited(vround(vmul(shifted, inverse)));
      const Vec off = vsub(vmul(vsub(code, zero), grid.scale), shifted);
      sum = vfma(off, off, sum);
    });
    return sum;
  }

  // Scale and offset of least squared error for the codes that a grid gives. Values count from its offset on: sums of
  // their products keep their digits.
  Grid fitted(Grid grid) const {
    const Vec inverse = this->inverse(grid.scale), zero = vset(kZero);
    Vec codes = vzero(), squares = vzero(), values = vzero(), both = vzero();
    each([&](Vec v) {
      const Vec shifted = vsub(v, grid.offset);
      const Vec code = vsub(limited(vround(vmul(shifted, inverse))), zero);
      squares = vfma(code, code, squares), both = vfma(code, shifted, both);
      if (!kSymmetric) codes = vadd(codes, code), values = vadd(values, shifted);
    });
    if (kSymmetric) return {vdiv(both, squares), vzero()};
    const Vec one = vset(1 / static_cast<float>(count_)), mean_code = vmul(codes, one), mean = vmul(values, one);
    const Vec scale = vdiv(vsub(both, vmul(mean_code, values)), vsub(squares, vmul(mean_code, codes)));
    return {scale, vadd(grid.offset, vsub(mean, vmul(scale, mean_code)))};
  }

  // With the 11 significant bits that the packed form beside 4-bit codes keeps, ties to even.
  static Vec kept(Vec factors) {
    constexpr uint32_t kDropped = 13;
    constexpr float kUp = 18446744073709551616.0f;  // 2^64: makes denormals normal
    float of[kLanes];
    vstore(of, factors);
    for (float& factor : of) {
      const bool tiny = __builtin_fabsf(factor) < kLeastNormal;
      float f = tiny ? factor * kUp : factor;
      uint32_t bits;
      __builtin_memcpy(&bits, &f, 4);
      bits += (1u << (kDropped - 1)) - 1 + ((bits >> kDropped) & 1);
      bits &= ~((1u << kDropped) - 1);
      __builtin_memcpy(&f, &bits, 4);
      factor = tiny ? f / kUp : f;
    }
    return vload(of);
  }

  const float* values_;
  int64_t count_;
};

// Groups q to q + kLanes - 1 of a weight, those past its last one again: element i of each side by side.
inline void gather_groups(const Tensor& w, int64_t group, int64_t q, float* to) {
  const int64_t each = w.size[1] / group, last = w.size[0] * each - 1;
  int64_t from[kLanes];
  for (int lane = 0; lane < kLanes; ++lane) {
    const int64_t own = min64(q + lane, last);
    from[lane] = own / each * w.stride[0] + own % each * group;
  }
  Vec block[kLanes];
  for (int64_t i = 0; i < group; i += kLanes) {
    const int n = static_cast<int>(min64(kLanes, group - i));
    for (int lane = 0; lane < kLanes; ++lane) block[lane] = vload_as(w.dtype, w.data, from[lane] + i, n);
    vtranspose(block);
    for (int j = 0; j < n; ++j) vstore(to + (i + j) * kLanes, block[j]);
  }
}

// Codes [group][kLanes] of some groups as they are stored, one group behind the other.
template <int kBits>
void store_codes(const float* codes, int64_t group, int64_t groups, char* to) {
  Vec block[kLanes];
  float own[kLanes];
  for (int64_t i = 0; i < group; i += kLanes) {
    const int64_t n = min64(kLanes, group - i);
    for (int64_t j = 0; j < kLanes; ++j) block[j] = j < n ? vload(codes + (i + j) * kLanes) : vzero();
    vtranspose(block);
    for (int64_t lane = 0; lane < groups; ++lane) {
      vstore(own, block[lane]);
      uint8_t* out = reinterpret_cast<uint8_t*>(to) + (lane * group + i) * kBits / 8;
      for (int64_t j = 0; j < n * kBits / 8; ++j)
        out[j] =
            static_cast<uint8_t>(kBits == 8 ? static_cast<int>(own[j])
                                            : static_cast<int>(own[2 * j]) | static_cast<int>(own[2 * j + 1]) << 4);
    }
  }
}

inline int64_t groups_rounded(const Step& s) { return s.t[0].size[0] * (s.t[0].size[1] / s.i[1]); }

constexpr int64_t kRoundedValues = 32 << 10;  // of a chunk, at least
inline int64_t groups_a_chunk(const Step& s) { return max64(1, ceil_div(kRoundedValues, s.i[1] * kLanes)) * kLanes; }

int64_t round_chunks(const Step& s, int, int) { return ceil_div(groups_rounded(s), groups_a_chunk(s)); }

template <int kBits, bool kSymmetric>
void round_groups(const Step& s, int64_t q, char* local) {
  const int64_t group = s.i[1], groups = min64(kLanes, groups_rounded(s) - q);
  float* values = reinterpret_cast<float*>(local);
  gather_groups(s.t[0], group, q, values);
  const Rounding<kBits, kSymmetric> own(values, group);
  uint8_t* exact = reinterpret_cast<uint8_t*>(s.t[4].data);
  const Grid grid = own.best(exact != nullptr);
  vstore_n(reinterpret_cast<float*>(s.t[2].data) + q, grid.scale, static_cast<int>(groups));
  if (!kSymmetric) vstore_n(reinterpret_cast<float*>(s.t[3].data) + q, grid.offset, static_cast<int>(groups));
  const bool is_exact = own.codes_by(grid, values);  // in their place
  if (exact && !is_exact) __atomic_store_n(exact, 0, __ATOMIC_RELAXED);
  store_codes<kBits>(values, group, groups, s.t[1].data + q * group * kBits / 8);
}

void round_run(const Step& s, int, int64_t chunk, int, const Scratch& scratch) {
  const bool symmetric = !s.t[3].data;
  const auto round = s.i[0] == 8 ? (symmetric ? round_groups<8, true> : round_groups<8, false>)
                                 : (symmetric ? round_groups<4, true> : round_groups<4, false>);
  const int64_t each = groups_a_chunk(s), end = min64(groups_rounded(s), (chunk + 1) * each);
  for (int64_t q = chunk * each; q < end; q += kLanes) round(s, q, scratch.local);
}

}  // namespace
