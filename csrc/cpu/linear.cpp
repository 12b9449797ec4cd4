// The linear family: weights packed once into panels, then y = act(alpha * norm(x) @ W^T + bias) [* up] + residual.
//
// pack_linear   t: w_0 .. w_{n-2} [N_i, K] any strides, one float dtype; packed u8 [bytes].
//               i: interleave (0: columns one after the other; 1: two weights of equal N, gate and up, side by side in
//               each panel).
//               packed holds ceil(N / NR) * NR * K * itemsize bytes, with K rounded up to a pair in bf16.
// linear        t: x [M, K], packed w, bias [N] | none, residual [M, Nout] | none, y [M, Nout], norm weight [K] | none,
//               norm bias [K] | none; last dimensions contiguous, row strides free, any float dtype each.
//               i: N, K, weight dtype, activation, gated, norm kind (0 none, 1 RMS, 2 layer), tuning (linear/tuning.h).
//               f: eps, alpha, norm weight offset.
//               gated: N counts gate and up, Nout = N / 2, y = act(gate) * up + residual. y may be the residual, which
//               x is not. f16 and bf16 in many rows may be multiplied as 16-bit fixed point (linear/words.h).
// grouped_linear  rows [end of the expert before, own end) of x and y are a linear with an expert's weight and bias;
//               those from the last end on are zeros.
//               t: as of linear, without residual and norm; packed w: E of them one behind the other, bias [E, N] or
//               none; then ends i32 [E] and a table of the step's own i64 [E + 2, kExpertRowInts].
//               i, f: as of linear, without tuning.
// matmul        t: x [batch.., M, K], w [batch.., N, K], bias [N] | none, y [batch.., M, N], any float dtype each; last
//               dimensions of x and y contiguous, all other strides free (0 where one matrix serves several places).
#include "cpu/family.h"
#include "cpu/linear/gemm.h"
#include "cpu/linear/grouped.h"
#include "cpu/linear/matmul.h"
#include "cpu/linear/pack.h"
#ifdef __AMX_TILE__
#include "cpu/linear/tiles.h"
#elif defined(LLMOPT_ISA_WORDS)
#include "cpu/linear/word_tier.h"
#else
#include "cpu/linear/fma_tier.h"
#endif

namespace {
inline int64_t weight_bytes(const Step& s) {
  const Problem p(s);
  return p.panels() * panel_bytes(p.K, p.weight);
}
using Experts = Grouped<kLinear, weight_bytes>;
using Products = Matmul<kLinear>;
const Kernel kKernels[] = {
    {"pack_linear", one_phase, pack_chunks, nullptr, pack_run},
    kLinear,
    {"grouped_linear", Experts::phases, Experts::chunks, Experts::workspace, Experts::run},
    {"matmul", Products::phases, Products::chunks, Products::workspace, Products::run},
};
}  // namespace

LLMOPT_EXPORT_FAMILY(linear, kKernels, sizeof(kKernels) / sizeof(kKernels[0]), kPanel, kMaxRows)
