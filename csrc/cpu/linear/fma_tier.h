// The op `linear` where FMA multiplies everything.
#pragma once
#include "cpu/linear/gemm.h"

namespace {

constexpr Kernel kLinear{"linear", linear_phases, linear_chunks, linear_workspace, linear_run, linear_first_read};

}  // namespace
