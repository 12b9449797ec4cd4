// Activations of several vectors in step, known to the compiler by their number where they are common.
#pragma once
#include "cpu/bumps.h"

namespace {

template <int64_t kValue>
struct Constant {
  static constexpr int64_t value = kValue;
};
constexpr int64_t kActAny = -1;  // not known to the compiler

// f(act as a constant).
template <class F>
inline void with_activation(int64_t act, F f) {
  switch (act) {
    case kActNone:
      return f(Constant<kActNone>{});
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
// An activation of several vectors in step, with what it keeps in registers. kChains: how many vectors those leave room
// for, a multiple of two.
template <int64_t kAct, bool kHalf>
class Activation {
 public:
#ifdef LLMOPT_ISA_LOOKS_UP
  static constexpr int kChains = 4;
#else
  static constexpr int kChains = 2;
#endif

  explicit Activation(int64_t act) : act_(kAct == kActAny ? act : kAct) {}

  template <int N>
  inline __attribute__((always_inline)) Vecs<N> operator()(const Vecs<N>& x) const {
    if (kAct == kActNone) return x;
    if (kAct == kActSilu) return vsilu(x);
    if (kAct == kActGeluErf) return vgelu_erf(x);
    if (kAct == kActGeluTanh) return vgelu_tanh(x);
    return in_step<N>([this](Vec v) { return vactivate(act_, v); }, x);
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
