// The VM's arithmetic: one loop over a block for each op, picked from tables by opcode.
#pragma once
#include "cpu/vm/bytecode.h"
#include "cpu/vm/transcendental.h"

namespace {

using UnaryLoop = void (*)(float* to, const float* a, int64_t n);
using BinaryLoop = void (*)(float* to, Value a, Value b, int64_t n);

inline Vec truth(Mask m) { return vselect(m, vset(1.0f), vzero()); }
inline Vec flag_not(Vec a) { return truth(veq(a, vzero())); }
// torch's maximum and minimum give NaN where either side is NaN; the instruction gives its second operand.
inline Vec nan_max(Vec a, Vec b) { return vselect(veq(a, a), vmax(a, b), a); }
inline Vec nan_min(Vec a, Vec b) { return vselect(veq(a, a), vmin(a, b), a); }

inline Vec round_f16(Vec a) {
  uint16_t half[kLanes];
  vstore_f16(half, a);
  return vload_f16(half);
}
inline Vec round_bf16(Vec a) {
  uint16_t half[kLanes];
  vstore_bf16(half, a);
  return vload_bf16(half);
}

template <int kOp>
inline Vec unary(Vec a) {
  const Vec one = vset(1.0f);
  if constexpr (kOp == kCopy)
    return a;
  else if constexpr (kOp == kNeg)
    return vneg(a);
  else if constexpr (kOp == kAbs)
    return vabs(a);
  else if constexpr (kOp == kSqrt)
    return vsqrt(a);
  else if constexpr (kOp == kRsqrt)
    return vdiv(one, vsqrt(a));
  else if constexpr (kOp == kReciprocal)
    return vdiv(one, a);
  else if constexpr (kOp == kExp)
    return vexp(a);
  else if constexpr (kOp == kExp2)
    return vexp2(a);
  else if constexpr (kOp == kLog)
    return vlog(a);
  else if constexpr (kOp == kLog1p)
    return vlog1p(a);
  else if constexpr (kOp == kTanh)
    return vtanh(a);
  else if constexpr (kOp == kSigmoid)
    return vsigmoid(a);
  else if constexpr (kOp == kErf)
    return verf(a);
  else if constexpr (kOp == kSilu)
    return vsilu(a);
  else if constexpr (kOp == kGeluErf)
    return vgelu_erf(a);
  else if constexpr (kOp == kGeluTanh)
    return vgelu_tanh(a);
  else if constexpr (kOp == kQuickGelu)
    return vactivate(kActQuickGelu, a);
  else if constexpr (kOp == kRelu)
    return vactivate(kActRelu, a);
  else if constexpr (kOp == kRelu2)
    return vactivate(kActRelu2, a);
  else if constexpr (kOp == kSquare)
    return vmul(a, a);
  else if constexpr (kOp == kSin)
    return vsin(a);
  else if constexpr (kOp == kCos)
    return vcos(a);
  else if constexpr (kOp == kRound)
    return vround(a);
  else if constexpr (kOp == kFloor)
    return vfloor(a);
  else if constexpr (kOp == kLogicalNot)
    return flag_not(a);
  else if constexpr (kOp == kRoundF16)
    return round_f16(a);
  else
    return round_bf16(a);
}

template <int kOp>
inline Vec binary(Vec a, Vec b) {
  if constexpr (kOp == kAdd)
    return vadd(a, b);
  else if constexpr (kOp == kSub)
    return vsub(a, b);
  else if constexpr (kOp == kMul)
    return vmul(a, b);
  else if constexpr (kOp == kDiv)
    return vdiv(a, b);
  else if constexpr (kOp == kMaximum)
    return nan_max(a, b);
  else if constexpr (kOp == kMinimum)
    return nan_min(a, b);
  else if constexpr (kOp == kLt)
    return truth(vlt(a, b));
  else if constexpr (kOp == kLe)
    return truth(vle(a, b));
  else if constexpr (kOp == kGt)
    return truth(vlt(b, a));
  else if constexpr (kOp == kGe)
    return truth(vle(b, a));
  else if constexpr (kOp == kEq)
    return truth(veq(a, b));
  else if constexpr (kOp == kNe)
    return flag_not(truth(veq(a, b)));
  else if constexpr (kOp == kLogicalAnd)
    return vselect(veq(a, vzero()), vzero(), flag_not(flag_not(b)));
  else
    return vselect(veq(a, vzero()), flag_not(flag_not(b)), vset(1.0f));
}

template <int kOp>
inline void unary_loop(float* to, const float* a, int64_t n) {
  for (int64_t i = 0; i < n; i += kLanes) vstore(to + i, unary<kOp>(vload(a + i)));
}

template <int kOp>
inline void binary_loop(float* to, Value a, Value b, int64_t n) {
  if (a.step && b.step) {
    for (int64_t i = 0; i < n; i += kLanes) vstore(to + i, binary<kOp>(vload(a.data + i), vload(b.data + i)));
    return;
  }
  if (a.step) {
    const Vec same = vload(b.data);
    for (int64_t i = 0; i < n; i += kLanes) vstore(to + i, binary<kOp>(vload(a.data + i), same));
    return;
  }
  const Vec same = vload(a.data);
  if (!b.step) return vstore(to, binary<kOp>(same, vload(b.data)));
  for (int64_t i = 0; i < n; i += kLanes) vstore(to + i, binary<kOp>(same, vload(b.data + i)));
}

// The register of an operand that is one vector may be `to` itself, so it is read before the loop.
inline void where_loop(float* to, Value a, Value b, Value c, int64_t n) {
  const Vec a0 = vload(a.data), b0 = vload(b.data), c0 = vload(c.data);
  for (int64_t i = 0; i < n; i += kLanes) {
    Mask no = veq(a.step ? vload(a.data + i) : a0, vzero());
    vstore(to + i, vselect(no, c.step ? vload(c.data + i) : c0, b.step ? vload(b.data + i) : b0));
  }
}
inline void mul_add_loop(float* to, Value a, Value b, Value c, int64_t n) {
  const Vec a0 = vload(a.data), b0 = vload(b.data), c0 = vload(c.data);
  for (int64_t i = 0; i < n; i += kLanes)
    vstore(to + i,
           vfma(a.step ? vload(a.data + i) : a0, b.step ? vload(b.data + i) : b0, c.step ? vload(c.data + i) : c0));
}

// Index: opcode - kCopy.
const UnaryLoop kUnaryLoops[] = {
    unary_loop<kCopy>,       unary_loop<kNeg>,       unary_loop<kAbs>,   unary_loop<kSqrt>,  unary_loop<kRsqrt>,
    unary_loop<kReciprocal>, unary_loop<kExp>,       unary_loop<kExp2>,  unary_loop<kLog>,   unary_loop<kLog1p>,
    unary_loop<kTanh>,       unary_loop<kSigmoid>,   unary_loop<kErf>,   unary_loop<kSilu>,  unary_loop<kGeluErf>,
    unary_loop<kGeluTanh>,   unary_loop<kQuickGelu>, unary_loop<kRelu>,  unary_loop<kRelu2>, unary_loop<kSquare>,
    unary_loop<kSin>,        unary_loop<kCos>,       unary_loop<kRound>, unary_loop<kFloor>, unary_loop<kLogicalNot>,
    unary_loop<kRoundF16>,   unary_loop<kRoundBf16>};
static_assert(sizeof(kUnaryLoops) / sizeof(kUnaryLoops[0]) == kUnaryEnd - kCopy, "one loop for each unary op");

// Index: opcode - kAdd.
const BinaryLoop kBinaryLoops[] = {
    binary_loop<kAdd>,     binary_loop<kSub>, binary_loop<kMul>,        binary_loop<kDiv>,      binary_loop<kMaximum>,
    binary_loop<kMinimum>, binary_loop<kLt>,  binary_loop<kLe>,         binary_loop<kGt>,       binary_loop<kGe>,
    binary_loop<kEq>,      binary_loop<kNe>,  binary_loop<kLogicalAnd>, binary_loop<kLogicalOr>};
static_assert(sizeof(kBinaryLoops) / sizeof(kBinaryLoops[0]) == kBinaryEnd - kAdd, "one loop for each binary op");

inline float row_sum(const float* a, int64_t n) {
  Vec s0 = vzero(), s1 = vzero(), s2 = vzero(), s3 = vzero();
  int64_t i = 0;
  for (; i + 4 * kLanes <= n; i += 4 * kLanes) {
    s0 = vadd(s0, vload(a + i));
    s1 = vadd(s1, vload(a + i + kLanes));
    s2 = vadd(s2, vload(a + i + 2 * kLanes));
    s3 = vadd(s3, vload(a + i + 3 * kLanes));
  }
  for (; i + kLanes <= n; i += kLanes) s0 = vadd(s0, vload(a + i));
  if (i < n) s1 = vadd(s1, vload_n(a + i, static_cast<int>(n - i)));
  return vreduce_add(vadd(vadd(s0, s1), vadd(s2, s3)));
}

// The largest of sign * a[i], NaN if there is one.
inline float row_max(const float* a, int64_t n, float sign) {
  const Vec factor = vset(sign), lowest = vset(-__builtin_inff());
  Vec m0 = lowest, m1 = lowest;
  int64_t i = 0;
  for (; i + 2 * kLanes <= n; i += 2 * kLanes) {
    m0 = nan_max(m0, vmul(factor, vload(a + i)));
    m1 = nan_max(m1, vmul(factor, vload(a + i + kLanes)));
  }
  Vec best = nan_max(m0, m1);
  for (; i < n; ++i) best = nan_max(best, vset(sign * a[i]));
  const bool nan = vreduce_add(truth(veq(best, best))) != static_cast<float>(kLanes);
  return nan ? __builtin_nanf("") : vreduce_max(best);
}

inline float reduce_row(int op, const float* a, int64_t n) {
  switch (op) {
    case kSum:
      return row_sum(a, n);
    case kMean:
      return row_sum(a, n) / static_cast<float>(n);
    case kRowMax:
      return row_max(a, n, 1.0f);
    default:
      return -row_max(a, n, -1.0f);
  }
}

}  // namespace
