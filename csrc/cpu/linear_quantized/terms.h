// Quantised weights as terms of the bf16 GEMM on AMX tiles (linear/terms.h). Folding integer sums of short groups into
// f32 takes longer than multiplying them (three vector operations per sum and group on the one port that products
// leave); scaled weights need none. Weights and activations keep what their terms hold: 8 significant bits each where
// the scheme rounds activations and in bf16 models, else 16; denormals count as zero. A panel is unpacked once a chunk.
#pragma once
#include "cpu/linear/terms.h"
#include "cpu/linear_quantized/lone_rows.h"

namespace {

constexpr int64_t kLeastExactTermRows = 32;

// Fewer rows do not pay for unpacking the weights. Where activations are as they are, the other kernels multiply three
// bytes of each; where codes are nibbles, they unpack them too.
inline int64_t least_term_rows(const QuantizedProblem& p) {
  return p.exact ? kLeastExactTermRows : p.planes > 1 ? 24 : p.form.bits == 4 ? 40 : 64;
}

inline bool runs_on_terms(const QuantizedProblem& p) {
  if (p.tuning.family != LinearFamily::automatic || p.K == 0) return false;
  return p.form.groups() > 1 && p.form.group % kTileK == 0 && p.M >= least_term_rows(p);
}

inline TileProblem term_problem(const Step& s, const QuantizedProblem& p) {
  const int terms = p.exact ? 3 : p.planes == 1 || p.x.dtype == DType::bf16 ? 1 : 2;
  return {s, kLinearQuantizedInts, terms, terms, false};
}

// scale * code + offset, from the code as it is stored.
struct CodeValues {
  Vec scale, start;  // start: of the stored code 0

  CodeValues(const Form& form, const GroupFactors& f)
      : scale(f.scale), start(vfma(f.scale, vset(static_cast<float>(-form.zero_point())), f.offset)) {}
  Vec value(__m512i code) const { return vfma({_mm512_cvtepi32_ps(code)}, scale, start); }
};

// Two k of sixteen columns to their places in the terms.
template <int kTerms>
inline void store_terms(Vec even, Vec odd, char* to) {
  if (kTerms == 1) return _mm512_store_si512(to, word_pairs(even, odd));
#pragma GCC unroll 3
  for (int term = 0; term < kTerms; ++term) _mm512_store_si512(to + term * kTermBytes, split_pairs(even, odd));
}

// Four k, the codes of a column in one 32-bit word, from bit kShift of every byte on.
template <int kBits, int kShift, int kTerms>
inline void quad_terms(__m512i words, const CodeValues& f, char* to) {
  const __m512i mask = _mm512_set1_epi32((1 << kBits) - 1);
  auto value = [&](int i) __attribute__((always_inline)) {
    return f.value(_mm512_and_si512(_mm512_srli_epi32(words, 8 * i + kShift), mask));
  };
  store_terms<kTerms>(value(0), value(1), to);
  store_terms<kTerms>(value(2), value(3), to + kPanel * 4);
}

// Steps [step0, step1) of a packed panel.
template <int kBits, int kTerms>
void code_terms(const Form& form, const char* panel, int64_t step0, int64_t step1, char* to) {
  const int64_t steps_of_group = form.group / kTileK;
  for (int64_t step = step0; step < step1; ++step, to += kTerms * kTermBytes) {
    const int64_t group = step / steps_of_group;
    const char* codes = panel + group * form.group_bytes() + step % steps_of_group * (kTileK * kPanel * kBits / 8);
#pragma GCC unroll 2
    for (int v = 0; v < 2; ++v) {
      const CodeValues f(form, GroupFactors::load<kBits>(form, panel, group, v));
      constexpr int kQuadPairs = 2 * kPanel * 4;  // bytes of the terms of four k
      for (int quad = 0; quad < kTileK / 4; quad += 8 / kBits) {
        const __m512i words = _mm512_loadu_si512(codes + (quad * kBits / 8 * kPanel + v * kLanes) * 4);
        char* at = to + quad * kQuadPairs + v * kTileBytes;
        quad_terms<kBits, 0, kTerms>(words, f, at);
        if (kBits == 4) quad_terms<4, 4, kTerms>(words, f, at + kQuadPairs);
      }
    }
  }
}

template <int kBits>
auto code_terms_function(int terms) {
  return terms == 1 ? code_terms<kBits, 1> : terms == 2 ? code_terms<kBits, 2> : code_terms<kBits, 3>;
}

struct CodeWeights {
  const QuantizedProblem& p;
  const Form& form;
  const char* data;
  const int64_t bytes;
  void (*const unpack)(const Form&, const char*, int64_t, int64_t, char*);

  CodeWeights(const QuantizedProblem& problem, int terms)
      : p(problem),
        form(p.form),
        data(p.w.data),
        bytes(p.form.panel_bytes()),
        unpack(p.form.bits == 8 ? code_terms_function<8>(terms) : code_terms_function<4>(terms)) {}

  const char* packed(int64_t panel) const { return data + panel * bytes; }
  const char* terms(int64_t panel, int64_t step0, int64_t step1, char* to, bool&) const {
    unpack(form, packed(panel), step0, step1, to);
    return to;
  }
  // NaN, as where an activation that is none or infinite has no code; but exact steps compute it.
  void lone_row(int64_t panel, int64_t m, float* sums, float*) const {
    if (p.exact) return lone_code_row(p, panel, m, sums);
    for (int v = 0; v < kPanel; v += kLanes) vstore(sums + v, vset(__builtin_nanf("")));
  }
};

}  // namespace
