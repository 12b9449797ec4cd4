// The op `linear` on AMX tiles, where that pays: float weights as terms (terms.h). Packed bf16 weights are their own
// only term.
#pragma once
#include "cpu/linear/gemm.h"
#include "cpu/linear/matmul.h"
#include "cpu/linear/terms.h"

namespace {

// Normalised rows are rounded to no less than what y keeps.
inline int terms_of(const Problem& p) {
  int terms = terms_of(p.weight) > terms_of(p.x.dtype) ? terms_of(p.weight) : terms_of(p.x.dtype);
  if (p.norm != kNormNone && terms_of(p.y.dtype) > terms) terms = terms_of(p.y.dtype);
  return terms;
}

// Fewer rows leave too much of a tile empty, or do not pay for splitting rows and weights. A tuning that names a family
// means one of the FMA kernels.
inline bool runs_on_tiles(const Problem& p) {
  constexpr int64_t kLeastRows[] = {0, 8, 20, 96}, kLeastSplitRows = 16;  // by terms of weights
  static_assert(kLeastRows[3] <= kMinBlockRows);
  const int of_weights = terms_of(p.weight);
  const int64_t least = of_weights == 1 && terms_of(p) > 1 ? kLeastSplitRows : kLeastRows[of_weights];
  return p.tuning.family == LinearFamily::automatic && p.K > 0 && p.M >= least;
}

inline TileProblem tile_problem(const Step& s) {
  const Problem p(s);
  return {s, kLinearInts, terms_of(p), terms_of(p.weight), terms_of(p) == 1 && p.K % kTileK == 0};
}

// Two k of one panel half, as f32.
template <DType kWeight>
inline void load_weights(const char* panel, int64_t k, int v, bool has_odd, Vec& even, Vec& odd) {
  if (kWeight == DType::bf16) {
    const uint16_t* from = reinterpret_cast<const uint16_t*>(panel) + k * kPanel + v * kPanel;
    even = vload_bf16_even(from), odd = vload_bf16_odd(from);
    return;
  }
  even = vload_as(kWeight, panel, k * kPanel + v * kLanes, kLanes);
  odd = has_odd ? vload_as(kWeight, panel, (k + 1) * kPanel + v * kLanes, kLanes) : vzero();
}

// Steps [step0, step1) of a packed panel as terms. False if a weight is not finite and rows have several terms.
template <DType kWeight, int kTerms>
bool split_weights(const TileProblem& p, const char* panel, int64_t step0, int64_t step1, char* to) {
  FiniteWords finite;
  const int64_t k1 = p.padded_k();
  for (int64_t step = step0; step < step1; ++step, to += kTerms * kTermBytes)
    for (int64_t pair = 0; pair < kTileK / 2; ++pair) {
      const int64_t k = step * kTileK + 2 * pair;
      char* at = to + pair * kPanel * 4;
#pragma GCC unroll 2
      for (int v = 0; v < 2; ++v, at += kTileBytes) {
        Vec even = vzero(), odd = vzero();
        if (k < k1) load_weights<kWeight>(panel, k, v, k + 1 < k1, even, odd);
#pragma GCC unroll 3
        for (int term = 0; term < kTerms; ++term) {
          const __m512i pairs = split_pairs(even, odd);
          _mm512_store_si512(at + term * kTermBytes, pairs);
          if (term == 0) finite.see(pairs);
        }
      }
    }
  return p.terms == 1 || finite.all();
}

using SplitFunction = bool (*)(const TileProblem&, const char*, int64_t, int64_t, char*);

inline SplitFunction split_function(DType weight) {
  return weight == DType::f32   ? split_weights<DType::f32, 3>
         : weight == DType::f16 ? split_weights<DType::f16, 2>
                                : split_weights<DType::bf16, 1>;
}

struct FloatWeights {
  const TileProblem& p;
  const SplitFunction split;
  const int64_t bytes;

  explicit FloatWeights(const TileProblem& problem)
      : p(problem), split(split_function(problem.weight)), bytes(panel_bytes(problem.K, problem.weight)) {}

  const char* packed(int64_t panel) const { return p.w.data + panel * bytes; }
  const char* terms(int64_t panel, int64_t step0, int64_t step1, char* to, bool& finite) const {
    if (p.in_place) return packed(panel) + step0 * kTermBytes;
    finite &= split(p, packed(panel), step0, step1, to);
    return to;
  }
  void lone_row(int64_t panel, int64_t m, float* sums, float* x) const;
};

// By the FMA kernel of one row, piece by piece of K.
void FloatWeights::lone_row(int64_t panel, int64_t m, float* sums, float* x) const {
  const RowNorm norm = row_norm(p, m);
  const char* b = packed(panel);
  for (int64_t k0 = 0; k0 < p.padded_k(); k0 += kLoneK) {
    const int64_t k = min64(kLoneK, p.padded_k() - k0);
    for (int64_t i = 0; i < k; i += kLanes) {
      Vec block[1];
      load_block(p, &norm, m, 1, k0 + i, block);
      vstore_n(x + i, block[0], static_cast<int>(min64(kLanes, k - i)));
    }
    const char* from = b + k0 * kPanel * itemsize(p.weight);
    stream_tile(p.weight, 1)({x, from, k / steps_of(p.weight), from, 0, sums, k0 > 0, 0});
  }
}

int tier_phases(const Step& s, int threads) {
  return runs_on_tiles(Problem(s)) ? tile_phases(tile_problem(s)) : linear_phases(s, threads);
}

int64_t tier_chunks(const Step& s, int phase, int threads) {
  if (!runs_on_tiles(Problem(s))) return linear_chunks(s, phase, threads);
  const TileProblem p = tile_problem(s);
  return phase + 1 < tile_phases(p) ? tile_prepare_chunks(p) : tile_schedule(p, threads).chunks();
}

size_t tier_workspace(const Step& s, int threads) {
  return runs_on_tiles(Problem(s)) ? tile_workspace(tile_problem(s)) : linear_workspace(s, threads);
}

void tier_run(const Step& s, int phase, int64_t chunk, int threads, const Scratch& scratch) {
  if (!runs_on_tiles(Problem(s))) return linear_run(s, phase, chunk, threads, scratch);
  const TileProblem p = tile_problem(s);
  if (phase + 1 < tile_phases(p)) return prepare_tile_rows(p, chunk, scratch.shared);
  run_tiles(p, FloatWeights(p), tile_schedule(p, threads), chunk, threads, scratch);
}

Span tier_first_read(const Step& s, int phase, int threads, int thread) {
  return runs_on_tiles(Problem(s)) ? Span{} : linear_first_read(s, phase, threads, thread);
}

constexpr Kernel kLinear{"linear", tier_phases, tier_chunks, tier_workspace, tier_run, tier_first_read};

}  // namespace
