// Quads of unsigned bytes by signed codes for tiers that cannot multiply bytes exactly: as two 16-bit pairs each, which
// leaves the signed ones 16 bits. Unsigned
// bytes below 16 they can: eight such products of a lane fit 16 bits.
// The tier gives Bytes, even_bytes, odd_bytes, all_words, add_pairs, add_nibbles and add_words.
#pragma once
#define LLMOPT_ISA_PAIRS

namespace {

constexpr int kQuadBytes = 8;        // one row's quad as quad_row reads it
constexpr int kNibbleQuadBytes = 4;  // one row's quad beside weights of 4 bits
// Pairs (0, 2) and (1, 3): two exact multiply-adds, where byte products would saturate.
struct Quad {
  Bytes even, odd;
};
inline Quad quad(Bytes bytes) { return {even_bytes(bytes), odd_bytes(bytes)}; }
inline Quad quad_row(const char* p) { return {all_words(quad_word(p)), all_words(quad_word(p + 4))}; }
template <class Code>  // int8_t or int16_t
inline void quad_pack(char* to, const Code* a) {
  const int16_t pairs[4] = {a[0], a[2], a[1], a[3]};
  __builtin_memcpy(to, pairs, 8);
}
// acc = plain(acc, w, a). In assembly because GCC piles up the products of a loop before it adds them, and spills.
#if defined(__GNUC__) && !defined(__clang__)
#define LLMOPT_ADD_PRODUCT(multiply, add, plain) \
  Bytes product;                                 \
  asm(multiply " %3, %2, %1\n\t" add " %1, %0, %0" : "+v"(acc), "=&v"(product) : "v"(w), "v"(a))
#else
#define LLMOPT_ADD_PRODUCT(multiply, add, plain) acc = plain(acc, w, a)
#endif
inline __attribute__((always_inline)) void multiply_add(Bytes& acc, Bytes w, Bytes a) {
  LLMOPT_ADD_PRODUCT("vpmaddwd", "vpaddd", add_pairs);
}
// Pairs of products of codes below 16 with signed bytes, in 16 bits a lane.
inline __attribute__((always_inline)) void multiply_add_nibbles(Bytes& acc, Bytes w, Bytes a) {
  LLMOPT_ADD_PRODUCT("vpmaddubsw", "vpaddw", add_nibbles);
}
#undef LLMOPT_ADD_PRODUCT
constexpr int64_t kNibbleSums = 8;  // quads whose products 16 bits hold: 8 * 2 * 15 * 127 < 2^15
inline __attribute__((always_inline)) void quad_dot(IntVec& acc, const Quad& w, const Quad& a) {
  multiply_add(acc.v, w.even, a.even);
  multiply_add(acc.v, w.odd, a.odd);
}

}  // namespace
