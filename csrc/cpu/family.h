// Included first by every kernel family: the tier's Vec shim and the name of the one symbol the object exports.
#pragma once
#include "runtime/tensor.h"

#define LLMOPT_CAT2(a, b, c, d) a##b##c##d
#define LLMOPT_CAT(a, b, c, d) LLMOPT_CAT2(a, b, c, d)
// LLMOPT_FAMILY_SYMBOL(linear) → llmopt_linear_<tier>
#define LLMOPT_FAMILY_SYMBOL(family) LLMOPT_CAT(llmopt_, family, _, LLMOPT_ISA)

#define LLMOPT_EXPORT_FAMILY(family, ...)                                  \
  extern "C" {                                                             \
  extern const llmopt::KernelFamily LLMOPT_FAMILY_SYMBOL(family);          \
  const llmopt::KernelFamily LLMOPT_FAMILY_SYMBOL(family) = {__VA_ARGS__}; \
  }

using namespace llmopt;  // of which an object sees the plain data of runtime/tensor.h only

#include LLMOPT_ISA_HEADER
#include "cpu/vec_math.h"
