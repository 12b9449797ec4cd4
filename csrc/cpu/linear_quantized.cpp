// The linear_quantized family: linear over weights of 8 or 4 bits. A weight element is scale * code + offset, with one
// scale and offset per output and group of inputs; activations are rounded to signed bytes per token and group.
//
// pack_linear_quantized
//   t: per weight codes [N_i, K] s8 or [N_i, K / 2] u8 (two codes a byte, the even input in the low half), scales
//      [N_i, groups] f32, offsets [N_i, groups] f32 | none (all or no weights have them); packed u8 [bytes].
//   i: bits, group, interleave (as in pack_linear).  layout.h has the layout and its size.
// round_weight
//   t: w [N, K] of floats, codes as pack_linear_quantized takes them, scales [N, groups] f32, offsets [N, groups] f32 |
//      none (the grid is symmetric), exact u8 [1] | none; last strides 1, results dense. Where exact is given, only the
//      grid over the whole range of a group is tried, and exact becomes 0 unless codes stand for w as it is.
//   i: bits, group.  w is finite.
// linear_quantized
//   t: as in linear.  i: N, K, u8, activation, gated, norm kind, bits, group, has offsets, planes, exact,
//   tuning (linear/tuning.h).
//   f: as in linear.
// grouped_linear_quantized
//   What grouped_linear is to linear.
//
//   planes: activations are a sum of that many signed bytes, each 1/254 of the one before: 1 rounds them to 8 bits, 2
//   keep 15 bits of the largest in a group, 3 keep 23.  Integer sums are exact for groups of at most 65536.  Beside
//   8-bit codes in groups of at most 512, tiers that multiply 16-bit pairs make 2 planes one of 16 bits, and 3 two of
//   them. On AMX many rows are multiplied in bf16 instead where scales are per group (linear_quantized/terms.h).
//   Several rows that keep more than 8 bits are multiplied in f32 in tiers that do not multiply bytes
//   (linear_quantized/floats.h), many of them as 16-bit fixed point where the tier has that (linear/words.h),
//   which keeps 11 to 13 bits of ordinary values.
//
//   exact: results as by `linear` over f32 weights. 3 planes, but no words, all three terms on AMX, and rows that
//   planes cannot stand for by FMA (linear_quantized/lone_rows.h).
#include "cpu/family.h"
#include "cpu/linear/grouped.h"
#include "cpu/linear_quantized/gemm.h"
#include "cpu/linear_quantized/pack.h"
#include "cpu/linear_quantized/round.h"
#ifdef __AMX_TILE__
#include "cpu/linear_quantized/tiles.h"
#elif defined(LLMOPT_ISA_WORDS)
#include "cpu/linear_quantized/word_tier.h"
#else
#include "cpu/linear_quantized/floats.h"
namespace {
constexpr const Kernel& kLinear = kByFloats;
}
#endif

namespace {
inline int64_t weight_bytes(const Step& s) {
  const QuantizedProblem p(s);
  return p.panels() * p.form.panel_bytes();
}
using Experts = Grouped<kLinear, weight_bytes>;
const Kernel kKernels[] = {
    {"round_weight", one_phase, round_chunks, nullptr, round_run},
    {"pack_linear_quantized", one_phase, pack_chunks, nullptr, pack_run},
    kLinear,
    {"grouped_linear_quantized", Experts::phases, Experts::chunks, Experts::workspace, Experts::run},
};
}  // namespace

LLMOPT_EXPORT_FAMILY(linear_quantized, kKernels, sizeof(kKernels) / sizeof(kKernels[0]), kPanel, kQuantizedRows)
