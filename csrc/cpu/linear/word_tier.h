// The op `linear` where words are multiplied: many rows over weights of 16 bits that nobody tuned.
#pragma once
#include "cpu/linear/gemm.h"
#include "cpu/linear/words.h"

namespace {

constexpr int64_t kLeastWordRows = 40;  // fewer do not pay for making words of a panel

inline bool is_untuned(const LinearTuning& t) {
  return t.family == LinearFamily::automatic && !t.rows && !t.k_block && !t.span && !t.tiles && !t.ahead;
}

// Values of f32, coming or going, would lose bits.
inline bool runs_on_words(const Problem& p) {
  const bool is_f32 = p.weight == DType::f32 || p.x.dtype == DType::f32 || p.y.dtype == DType::f32;
  return !is_f32 && p.M >= kLeastWordRows && p.K > 0 && is_untuned(p.tuning) && WordProblem(p).has_room();
}

int tier_phases(const Step& s, int threads) { return runs_on_words(Problem(s)) ? 2 : linear_phases(s, threads); }

int64_t tier_chunks(const Step& s, int phase, int threads) {
  const Problem p(s);
  if (!runs_on_words(p)) return linear_chunks(s, phase, threads);
  const WordProblem w(p);
  return phase == 0 ? w.tiles.count : w.cut(threads).chunks();
}

size_t tier_workspace(const Step& s, int threads) {
  const Problem p(s);
  return runs_on_words(p) ? WordProblem(p).workspace() : linear_workspace(s, threads);
}

void tier_run(const Step& s, int phase, int64_t chunk, int threads, const Scratch& scratch) {
  const Problem p(s);
  if (!runs_on_words(p)) return linear_run(s, phase, chunk, threads, scratch);
  const WordProblem w(p);
  if (phase == 0) return prepare_words(w, chunk, scratch.shared);
  run_words(w, FloatPanels(p, w.tiles.count), w.cut(threads), chunk, threads, scratch);
}

Span tier_first_read(const Step& s, int phase, int threads, int thread) {
  return runs_on_words(Problem(s)) ? Span{} : linear_first_read(s, phase, threads, thread);
}

}  // namespace
