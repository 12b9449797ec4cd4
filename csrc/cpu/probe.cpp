// The probe family: what this machine can do at best, the yardstick of every other kernel. Each op runs t[last].size[0]
// chunks and leaves one float per chunk in t[last], so that all threads work and nothing is optimised away.
//
// probe_fma    t: sink f32 [chunks].  i: iterations.  kChains * 2 * kLanes flops per iteration and chunk, in registers.
// probe_bytes, probe_nibbles
//              t: sink f32 [chunks].  i: iterations.  kChains * 8 * kLanes operations (a multiply or an add) per
//              iteration and chunk: products of bytes with exact sums, in every tier but scalar; and those where one
//              operand is below 16, in tiers that multiply these faster (isa/pairs.h).
// probe_words  t: sink f32 [chunks].  i: iterations.  kChains * 4 * kLanes operations per iteration and chunk: products
//              of 16-bit words with exact sums, in tiers that do two of them where FMA does one.
// probe_tile_bf16, probe_tile_s8
//              t: sink f32 [chunks].  i: iterations.  kTileSums products of two tile registers of ones per iteration
//              and chunk: 16 * 16 * 32 * 2 flops each in bf16, 16 * 16 * 64 * 2 operations in s8; their operands are
//              loaded from L1, as those of any product are that has other numbers. Only in tiers with tiles.
// probe_read   t: buffer u8 [bytes], sink f32 [chunks].  Reads the buffer once, each chunk as four streams. The buffer
//              must hold floats without denormals and NaNs (zeros do), which cost time of their own.
#include "cpu/family.h"

namespace {

// Enough independent chains for two FMA units of latency five; with the operands they fit in 16 registers.
constexpr int kChains = 12;
constexpr int kStreams = 4;

int one_phase(const Step&, int) { return 1; }
int64_t sink_chunks(const Step& s, int, int) { return s.t[s.num_tensors - 1].size[0]; }
float* sink(const Step& s, int64_t chunk) { return reinterpret_cast<float*>(s.t[s.num_tensors - 1].data) + chunk; }

void fma_run(const Step& s, int, int64_t chunk, int, const Scratch&) {
  Vec acc[kChains];
#pragma GCC unroll 16
  for (int i = 0; i < kChains; ++i) acc[i] = vset(static_cast<float>(i));
  const Vec scale = vset(0.5f), step = vset(1.0f);
  for (int64_t n = s.i[0]; n > 0; --n)
#pragma GCC unroll 16
    for (int i = 0; i < kChains; ++i) acc[i] = vfma(acc[i], scale, step);
#pragma GCC unroll 16
  for (int i = 1; i < kChains; ++i) acc[0] = vadd(acc[0], acc[i]);
  *sink(s, chunk) = vreduce_add(acc[0]);
}

#ifndef LLMOPT_ISA_SCALAR
// The sink gets the sum over all lanes and chains.
template <class Multiply>
void integer_run(const Step& s, int64_t chunk, Multiply multiply) {
  IntVec acc[kChains];
#pragma GCC unroll 16
  for (int i = 0; i < kChains; ++i) acc[i] = iset(i);
  for (int64_t n = s.i[0]; n > 0; --n)
#pragma GCC unroll 16
    for (int i = 0; i < kChains; ++i) multiply(acc[i]);
  Vec sum = vzero();
#pragma GCC unroll 16
  for (int i = 0; i < kChains; ++i) sum = vadd(sum, vfrom_int(acc[i]));
  *sink(s, chunk) = vreduce_add(sum);
}

void bytes_run(const Step& s, int, int64_t chunk, int, const Scratch&) {
  const auto ones = iset(0x01010101).v;
  const Quad quads = quad(ones);
  integer_run(s, chunk, [&](IntVec& acc) __attribute__((always_inline)) { quad_dot(acc, quads, quads); });
}
#endif

#ifdef LLMOPT_ISA_WORDS
void words_run(const Step& s, int, int64_t chunk, int, const Scratch&) {
  const IntVec ones = iset(0x00010001);
  integer_run(s, chunk, [&](IntVec& acc) __attribute__((always_inline)) { word_dot(acc, ones, ones); });
}
#endif

#ifdef LLMOPT_ISA_PAIRS
void nibbles_run(const Step& s, int, int64_t chunk, int, const Scratch&) {
  const auto ones = iset(0x01010101).v;
  integer_run(s, chunk, [&](IntVec& acc) __attribute__((always_inline)) { multiply_add_nibbles(acc.v, ones, ones); });
}
#endif

#ifdef __AMX_TILE__
constexpr int kTileSums = 4;

// Four sums of two by two operands, as the GEMMs use the registers. The sink gets the first element of the first sum.
template <class First, class Multiply>
void tile_run(const Step& s, int64_t chunk, const Scratch& scratch, int16_t one, First first, Multiply multiply) {
  constexpr int kTile = kTileRows * kTileBytes;
  auto* ones = reinterpret_cast<int16_t*>(scratch.local);
  for (int i = 0; i < 4 * kTile / 2; ++i) ones[i] = one;
  const TileScope scope;
  _tile_zero(0);
  _tile_zero(1);
  _tile_zero(2);
  _tile_zero(3);
  for (int64_t n = s.i[0]; n > 0; --n) {
    before_tile_loads();
    _tile_loadd(4, scratch.local, kTileBytes);
    _tile_loadd(5, scratch.local + kTile, kTileBytes);
    _tile_loadd(6, scratch.local + 2 * kTile, kTileBytes);
    _tile_loadd(7, scratch.local + 3 * kTile, kTileBytes);
    multiply();
  }
  _tile_stored(0, scratch.local, kTileBytes);
  *sink(s, chunk) = first(scratch.local);
}

void tile_bf16_run(const Step& s, int, int64_t chunk, int, const Scratch& scratch) {
  const auto first = [](const char* tile) { return *reinterpret_cast<const float*>(tile); };
  tile_run(s, chunk, scratch, 0x3F80, first, [] {
    _tile_dpbf16ps(0, 4, 6);
    _tile_dpbf16ps(1, 4, 7);
    _tile_dpbf16ps(2, 5, 6);
    _tile_dpbf16ps(3, 5, 7);
  });
}

void tile_s8_run(const Step& s, int, int64_t chunk, int, const Scratch& scratch) {
  const auto first = [](const char* tile) { return static_cast<float>(*reinterpret_cast<const int32_t*>(tile)); };
  tile_run(s, chunk, scratch, 0x0101, first, [] {
    _tile_dpbssd(0, 4, 6);
    _tile_dpbssd(1, 4, 7);
    _tile_dpbssd(2, 5, 6);
    _tile_dpbssd(3, 5, 7);
  });
}
#endif

void read_run(const Step& s, int, int64_t chunk, int, const Scratch&) {
  const int64_t chunks = sink_chunks(s, 0, 0);
  const int64_t floats = s.t[0].size[0] / 4;
  constexpr int kUnroll = 2 * kStreams * kLanes;
  const int64_t length = floats / chunks / kUnroll * kUnroll / kStreams;
  const float* from = reinterpret_cast<const float*>(s.t[0].data) + chunk * length * kStreams;
  Vec acc[2 * kStreams];
#pragma GCC unroll 16
  for (int i = 0; i < 2 * kStreams; ++i) acc[i] = vzero();
  for (int64_t k = 0; k < length; k += 2 * kLanes)
#pragma GCC unroll 16
    for (int i = 0; i < kStreams; ++i) {
      acc[2 * i] = vadd(acc[2 * i], vload(from + i * length + k));
      acc[2 * i + 1] = vadd(acc[2 * i + 1], vload(from + i * length + k + kLanes));
    }
#pragma GCC unroll 16
  for (int i = 1; i < 2 * kStreams; ++i) acc[0] = vadd(acc[0], acc[i]);
  *sink(s, chunk) = vreduce_add(acc[0]);
}

const Kernel kKernels[] = {
    {"probe_fma", one_phase, sink_chunks, nullptr, fma_run},
    {"probe_read", one_phase, sink_chunks, nullptr, read_run},
#ifndef LLMOPT_ISA_SCALAR
    {"probe_bytes", one_phase, sink_chunks, nullptr, bytes_run},
#endif
#ifdef LLMOPT_ISA_WORDS
    {"probe_words", one_phase, sink_chunks, nullptr, words_run},
#endif
#ifdef LLMOPT_ISA_PAIRS
    {"probe_nibbles", one_phase, sink_chunks, nullptr, nibbles_run},
#endif
#ifdef __AMX_TILE__
    {"probe_tile_bf16", one_phase, sink_chunks, nullptr, tile_bf16_run},
    {"probe_tile_s8", one_phase, sink_chunks, nullptr, tile_s8_run},
#endif
};

}  // namespace

LLMOPT_EXPORT_FAMILY(probe, kKernels, sizeof(kKernels) / sizeof(kKernels[0]), 0)
