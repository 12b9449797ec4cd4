// Activations of several vectors in step; common ones are known to the compiler.
#pragma once
#include "cpu/bumps.h"

namespace {

template <int64_t kValue>
struct Constant {
  static constexpr int64_t value = kValue;
};
constexpr int64_t kActAny = -1;  // not known to the compiler

// f(Constant<act>), for those that models have in linears.
template <class F>
inline void with_activation(int64_t act, F f) {
  switch (act) {
    case kActNone:
      return f(Constant<kActNone>{});
    case kActRelu:
      return f(Constant<kActRelu>{});
    case kActSilu:
      return f(Constant<kActSilu>{});
    case kActGeluErf:
      return f(Constant<kActGeluErf>{});
    case kActGeluTanh:
      return f(Constant<kActGeluTanh>{});
    default:
      return f(Constant<kActAny>{});
  }
}

// An activation of several vectors in step, with what it keeps in registers. kHalf: of results that are rounded to half
// precision. kChains: how many vectors the registers have room for, a multiple of two.
template <int64_t kAct, bool kHalf>
class Activation {
 public:
  static constexpr int kChains = kVecRegisters == 32 ? 4 : 2;

  explicit Activation(int64_t act) : act_(act) {}

  template <int N>
  inline __attribute__((always_inline)) Vecs<N> operator()(const Vecs<N>& x) const {
    if (kAct == kActNone) return x;
    if (kAct == kActSilu) return vsilu(x);
    if (kAct == kActGeluErf) return vgelu_erf(x);
    if (kAct == kActGeluTanh) return vgelu_tanh(x);
    return in_step<N>([this](Vec v) { return vactivate(kAct == kActAny ? act_ : kAct, v); }, x);
  }

 private:
  const int64_t act_;
};

#ifdef LLMOPT_ISA_LOOKS_UP
template <const Bump& kBump>
struct BumpActivation : LessBump {
  static constexpr int kChains = 2;
  explicit BumpActivation(int64_t) : LessBump(kBump) {}
};
template <>
struct Activation<kActSilu, true> : BumpActivation<kSiluBump> {
  using BumpActivation::BumpActivation;
};
template <>
struct Activation<kActGeluErf, true> : BumpActivation<kGeluErfBump> {
  using BumpActivation::BumpActivation;
};
template <>
struct Activation<kActGeluTanh, true> : BumpActivation<kGeluTanhBump> {
  using BumpActivation::BumpActivation;
};
#endif

}  // namespace
