// Vec for the scalar tier: four floats in plain loops that any compiler can turn into the baseline's instructions.
#pragma once
#define LLMOPT_ISA_SCALAR
#include <cstdint>

namespace {

constexpr int kLanes = 4;
constexpr int kVecRegisters = 16;

struct Vec {
  float v[kLanes];
};
struct Mask {
  bool m[kLanes];
};

template <class F>
inline Vec each(F f) {
  Vec r;
  for (int i = 0; i < kLanes; ++i) r.v[i] = f(i);
  return r;
}
inline uint32_t float_bits(float x) {
  uint32_t u;
  __builtin_memcpy(&u, &x, 4);
  return u;
}
inline float bits_float(uint32_t u) {
  float x;
  __builtin_memcpy(&x, &u, 4);
  return x;
}

inline Vec vzero() { return Vec{{0, 0, 0, 0}}; }
inline Vec vset(float x) { return Vec{{x, x, x, x}}; }
inline Vec vload(const float* p) {
  return each([&](int i) { return p[i]; });
}
inline Vec vload_n(const float* p, int n) {
  return each([&](int i) { return i < n ? p[i] : 0.0f; });
}
inline void vstore(float* p, Vec a) {
  for (int i = 0; i < kLanes; ++i) p[i] = a.v[i];
}
inline void vstore_n(float* p, Vec a, int n) {
  for (int i = 0; i < n; ++i) p[i] = a.v[i];
}

inline Vec vadd(Vec a, Vec b) {
  return each([&](int i) { return a.v[i] + b.v[i]; });
}
inline Vec vsub(Vec a, Vec b) {
  return each([&](int i) { return a.v[i] - b.v[i]; });
}
inline Vec vmul(Vec a, Vec b) {
  return each([&](int i) { return a.v[i] * b.v[i]; });
}
inline Vec vdiv(Vec a, Vec b) {
  return each([&](int i) { return a.v[i] / b.v[i]; });
}
inline Vec vrounded(Vec a) { return a; }  // there is no FMA that a product could become part of
inline Vec vfma(Vec a, Vec b, Vec c) {
  return each([&](int i) { return a.v[i] * b.v[i] + c.v[i]; });
}
inline void vfma_acc(Vec& acc, Vec a, Vec b) { acc = vfma(a, b, acc); }
// Like the x86 instruction: where either side is NaN the result is b.
inline Vec vmax(Vec a, Vec b) {
  return each([&](int i) { return a.v[i] > b.v[i] ? a.v[i] : b.v[i]; });
}
inline Vec vmin(Vec a, Vec b) {
  return each([&](int i) { return a.v[i] < b.v[i] ? a.v[i] : b.v[i]; });
}
inline Vec vsqrt(Vec a) {
  return each([&](int i) { return __builtin_sqrtf(a.v[i]); });
}
inline Vec vabs(Vec a) {
  return each([&](int i) { return __builtin_fabsf(a.v[i]); });
}
inline Vec vneg(Vec a) {
  return each([&](int i) { return -a.v[i]; });
}
inline Vec vround(Vec a) {
  return each([&](int i) { return __builtin_nearbyintf(a.v[i]); });
}
inline Vec vfloor(Vec a) {
  return each([&](int i) { return __builtin_floorf(a.v[i]); });
}
inline Vec vcopysign(Vec magnitude, Vec sign) {
  return each([&](int i) { return __builtin_copysignf(magnitude.v[i], sign.v[i]); });
}
// Lanes 0..n-1 of a, zero in the others.
inline Vec vkeep(Vec a, int n) {
  return each([&](int i) { return i < n ? a.v[i] : 0.0f; });
}
// Each lane pair (2i, 2i+1) exchanged.
inline Vec vswap_pairs(Vec a) {
  return each([&](int i) { return a.v[i ^ 1]; });
}
// Mantissa in [0.75, 1.5) and exponent with mantissa * 2^exponent = a, for finite a > 0, denormals included.
inline Vec vsplit(Vec a, Vec& exponent) {
  Vec m;
  for (int i = 0; i < kLanes; ++i) {
    bool tiny = a.v[i] < 1.17549435e-38f;
    uint32_t bits = float_bits(tiny ? a.v[i] * 8388608.0f : a.v[i]);
    int32_t e = static_cast<int32_t>(bits - 0x3F400000u) >> 23;
    m.v[i] = bits_float(bits - (static_cast<uint32_t>(e) << 23));
    exponent.v[i] = static_cast<float>(e - (tiny ? 23 : 0));
  }
  return m;
}
// a * 2^n for integral n of -254 to 254. Where n is NaN, a is: the conversion is defined there too.
inline float scale2(float a, float n) { return __builtin_ldexpf(a, n == n ? static_cast<int>(n) : 0); }
inline Vec vscale2(Vec a, Vec n) {
  return each([&](int i) { return scale2(a.v[i], n.v[i]); });
}
// The same for n from -inf on, 0 where n < least, whatever a is there.
inline Vec vscale2_from(Vec least, Vec a, Vec n) {
  return each([&](int i) { return n.v[i] < least.v[i] ? 0.0f : scale2(a.v[i], n.v[i]); });
}

inline Mask vlt(Vec a, Vec b) {
  Mask r;
  for (int i = 0; i < kLanes; ++i) r.m[i] = a.v[i] < b.v[i];
  return r;
}
inline Mask vle(Vec a, Vec b) {
  Mask r;
  for (int i = 0; i < kLanes; ++i) r.m[i] = a.v[i] <= b.v[i];
  return r;
}
inline Mask veq(Vec a, Vec b) {
  Mask r;
  for (int i = 0; i < kLanes; ++i) r.m[i] = a.v[i] == b.v[i];
  return r;
}
inline Vec vselect(Mask m, Vec yes, Vec no) {
  return each([&](int i) { return m.m[i] ? yes.v[i] : no.v[i]; });
}

inline float vreduce_add(Vec a) { return (a.v[0] + a.v[1]) + (a.v[2] + a.v[3]); }
inline float vreduce_max(Vec a) {
  float m = a.v[0];
  for (int i = 1; i < kLanes; ++i) m = a.v[i] > m ? a.v[i] : m;
  return m;
}
inline float vreduce_min(Vec a) { return -vreduce_max(vneg(a)); }
// Lane i of the result is the sum of the lanes of a[i].
inline Vec vsum_lanes(const Vec* a) {
  return each([&](int i) { return vreduce_add(a[i]); });
}

// IEEE 754 binary16 → binary32, all cases.
inline float f16_to_f32(uint16_t h) {
  uint32_t sign = static_cast<uint32_t>(h & 0x8000) << 16;
  uint32_t exponent = (h >> 10) & 31, fraction = h & 1023;
  if (exponent == 31) return bits_float(sign | 0x7F800000u | (fraction << 13));
  if (exponent == 0) {
    float magnitude = static_cast<float>(fraction) * 5.9604644775390625e-8f;  // 2^-24
    return bits_float(sign | float_bits(magnitude));
  }
  return bits_float(sign | ((exponent + 112) << 23) | (fraction << 13));
}
// binary32 → binary16, round to nearest even; overflow gives inf, NaN stays NaN.
inline uint16_t f32_to_f16(float x) {
  uint32_t u = float_bits(x), sign = (u >> 16) & 0x8000;
  uint32_t magnitude = u & 0x7FFFFFFFu;
  if (magnitude > 0x7F800000u) return static_cast<uint16_t>(sign | 0x7E00);
  if (magnitude >= 0x477FF000u) return static_cast<uint16_t>(sign | 0x7C00);
  if (magnitude < 0x38800000u) {  // subnormal result: let the float adder round
    float shifted = bits_float(magnitude) + 0.5f;
    return static_cast<uint16_t>(sign | (float_bits(shifted) - 0x3F000000u));
  }
  uint32_t rounded = magnitude + 0xFFF + ((magnitude >> 13) & 1);
  return static_cast<uint16_t>(sign | ((rounded - 0x38000000u) >> 13));
}
inline uint16_t f32_to_bf16(float x) {
  uint32_t u = float_bits(x);
  if ((u & 0x7FFFFFFFu) > 0x7F800000u) return 0x7FC0;
  return static_cast<uint16_t>((u + 0x7FFF + ((u >> 16) & 1)) >> 16);
}

inline Vec vload_f16(const uint16_t* p) {
  return each([&](int i) { return f16_to_f32(p[i]); });
}
inline Vec vload_f16_n(const uint16_t* p, int n) {
  return each([&](int i) { return i < n ? f16_to_f32(p[i]) : 0.0f; });
}
inline void vstore_f16_n(uint16_t* p, Vec a, int n) {
  for (int i = 0; i < n; ++i) p[i] = f32_to_f16(a.v[i]);
}
inline void vstore_f16(uint16_t* p, Vec a) { vstore_f16_n(p, a, kLanes); }
inline Vec vload_bf16(const uint16_t* p) {
  return each([&](int i) { return bits_float(static_cast<uint32_t>(p[i]) << 16); });
}
inline Vec vload_bf16_n(const uint16_t* p, int n) {
  return each([&](int i) { return i < n ? bits_float(static_cast<uint32_t>(p[i]) << 16) : 0.0f; });
}
inline void vstore_bf16_n(uint16_t* p, Vec a, int n) {
  for (int i = 0; i < n; ++i) p[i] = f32_to_bf16(a.v[i]);
}
inline void vstore_bf16(uint16_t* p, Vec a) { vstore_bf16_n(p, a, kLanes); }
// The even- and the odd-indexed of 8 bf16 values, widened.
inline Vec vload_bf16_even(const uint16_t* p) {
  return each([&](int i) { return bits_float(static_cast<uint32_t>(p[2 * i]) << 16); });
}
inline Vec vload_bf16_odd(const uint16_t* p) { return vload_bf16_even(p + 1); }

// Transposes the kLanes x kLanes matrix whose rows are r[0..kLanes). Only moves bits, so any 32-bit type may be inside.
inline void vtranspose(Vec* r) {
  for (int i = 0; i < kLanes; ++i)
    for (int j = 0; j < i; ++j) {
      float upper = r[j].v[i];
      r[j].v[i] = r[i].v[j];
      r[i].v[j] = upper;
    }
}

// Integers. A quad is four neighbouring k of one column: weights as unsigned bytes, activations signed, |a| <= 127.
// quad_dot adds the four products to each lane, exactly.
struct IntVec {
  int32_t v[kLanes];
};
inline IntVec iset(int32_t x) { return IntVec{{x, x, x, x}}; }
inline Vec vfrom_int(IntVec a) {
  return each([&](int i) { return static_cast<float>(a.v[i]); });
}
// Integral lanes, |a| <= 127, as kLanes signed bytes.
inline void vstore_s8(int8_t* p, Vec a) {
  for (int i = 0; i < kLanes; ++i) p[i] = static_cast<int8_t>(a.v[i]);
}
inline Vec vload_s8_n(const int8_t* p, int n) {
  return each([&](int i) { return i < n ? static_cast<float>(p[i]) : 0.0f; });
}
inline Vec vload_s8(const int8_t* p) { return vload_s8_n(p, kLanes); }

constexpr bool kMultipliesBytes = false;
constexpr int kQuantizedRows = 4;  // MR
constexpr int kQuadBytes = 4;      // one row's quad as quad_row reads it
constexpr int kNibbleQuadBytes = 4;
struct Quads {
  uint8_t v[4 * kLanes];
};
inline Quads load_quads(const char* p) {
  Quads q;
  __builtin_memcpy(q.v, p, sizeof(q.v));
  return q;
}
inline Quads low_nibbles(const char* p) {
  Quads q = load_quads(p);
  for (uint8_t& byte : q.v) byte &= 15;
  return q;
}
inline Quads high_nibbles(const char* p) {
  Quads q = load_quads(p);
  for (uint8_t& byte : q.v) byte = static_cast<uint8_t>(byte >> 4);
  return q;
}
// Signed bytes that lie in a Vec, as code + 128.
inline Quads code_quads(Vec bits) {
  Quads q;
  __builtin_memcpy(q.v, bits.v, sizeof(q.v));
  for (uint8_t& byte : q.v) byte ^= 128;
  return q;
}
inline void store_quads(char* p, const Quads& q) { __builtin_memcpy(p, q.v, sizeof(q.v)); }
inline Quads lower_codes(Quads q, int32_t zero) {
  for (uint8_t& byte : q.v) byte = static_cast<uint8_t>(byte - zero);
  return q;
}
// Signed byte i of every quad.
template <int i>
inline Vec quad_values(const Quads& q) {
  return each([&](int lane) { return static_cast<float>(static_cast<int8_t>(q.v[4 * lane + i])); });
}

using Quad = Quads;
struct QuadRow {
  int32_t v[4];
};
inline Quad quad(const Quads& bytes) { return bytes; }
inline QuadRow quad_row(const char* p) {
  int8_t a[4];
  __builtin_memcpy(a, p, 4);
  return QuadRow{{a[0], a[1], a[2], a[3]}};
}
inline void quad_pack(char* to, const int8_t* a) { __builtin_memcpy(to, a, 4); }
inline void quad_dot(IntVec& acc, const Quad& w, const QuadRow& a) {
  for (int i = 0; i < kLanes; ++i)
    for (int j = 0; j < 4; ++j) acc.v[i] += w.v[4 * i + j] * a.v[j];
}

}  // namespace
