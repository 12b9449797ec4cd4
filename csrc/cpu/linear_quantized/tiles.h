// The op `linear_quantized` on AMX tiles, where that pays: weights with scales per group as bf16 terms, those with one
// scale a column as bytes.
#pragma once
#include "cpu/linear_quantized/code_tiles.h"
#include "cpu/linear_quantized/floats.h"
#include "cpu/linear_quantized/terms.h"

namespace {

enum class Tiles { none, codes, terms };

inline Tiles tiles_of(const CodeTiles& p) {
  return runs_on_terms(p) ? Tiles::terms : runs_on_codes(p) ? Tiles::codes : Tiles::none;
}

int tier_phases(const Step& s, int threads) {
  const CodeTiles p(s);
  const Tiles tiles = tiles_of(p);
  if (tiles == Tiles::none) return float_phases(s, threads);
  return tiles == Tiles::terms ? tile_phases(term_problem(s, p)) : 2;
}

int64_t tier_chunks(const Step& s, int phase, int threads) {
  const CodeTiles p(s);
  switch (tiles_of(p)) {
    case Tiles::none:
      return float_chunks(s, phase, threads);
    case Tiles::codes:
      return phase == 0 ? ceil_div(p.M, kTokensPrepared) : code_schedule(p, threads).chunks();
    case Tiles::terms:
      break;
  }
  const TileProblem t = term_problem(s, p);
  return phase + 1 < tile_phases(t) ? tile_prepare_chunks(t) : tile_schedule(t, threads).chunks();
}

size_t tier_workspace(const Step& s, int threads) {
  const CodeTiles p(s);
  switch (tiles_of(p)) {
    case Tiles::none:
      return float_workspace(s, threads);
    case Tiles::codes:
      return static_cast<size_t>(p.table_size() * (p.row_stride() + 3 * 4));
    case Tiles::terms:
      break;
  }
  return tile_workspace(term_problem(s, p));
}

void tier_run(const Step& s, int phase, int64_t chunk, int threads, const Scratch& scratch) {
  const CodeTiles p(s);
  switch (tiles_of(p)) {
    case Tiles::none:
      return float_run(s, phase, chunk, threads, scratch);
    case Tiles::codes:
      if (phase == 0) return prepare_tokens(p, chunk, scratch);
      return run_codes(p, code_schedule(p, threads), chunk, threads, scratch);
    case Tiles::terms:
      break;
  }
  const TileProblem t = term_problem(s, p);
  if (phase + 1 < tile_phases(t)) return prepare_tile_rows(t, chunk, scratch.shared);
  run_tiles(t, CodeWeights(p, t.terms), tile_schedule(t, threads), chunk, threads, scratch);
}

Span tier_first_read(const Step& s, int phase, int threads, int thread) {
  return tiles_of(CodeTiles(s)) == Tiles::none ? float_first_read(s, phase, threads, thread) : Span{};
}

constexpr Kernel kLinear{"linear_quantized", tier_phases, tier_chunks, tier_workspace, tier_run, tier_first_read};

}  // namespace
