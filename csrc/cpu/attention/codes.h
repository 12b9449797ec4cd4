// Keys and values as signed bytes. A row [D + 4] is D codes, then the f32 scale of all of them: largest magnitude /
// 127, codes = round(x / scale), ties to even. A row with a NaN or Inf has scale NaN, and so reads as NaN.
#pragma once
#include "cpu/attention/problem.h"

namespace {

inline float code_scale(const char* row, int64_t n) {
  float scale;
  __builtin_memcpy(&scale, row + n, sizeof(scale));
  return scale;
}

// Rows of floats are padded to whole vectors, with zeros when they are loaded.
inline void load_codes(const char* row, int64_t n, float* to) {
  const Vec scale = vset(code_scale(row, n));
  const int8_t* codes = reinterpret_cast<const int8_t*>(row);
  for (int64_t i = 0; i < n; i += kLanes) {
    const int lanes = static_cast<int>(min64(kLanes, n - i));
    vstore(to + i, vkeep(vmul(scale, vload_s8_n(codes + i, lanes)), lanes));
  }
}

inline void store_codes(char* row, int64_t n, const float* from) {
  Vec largest = vzero(), zero = vzero();
  for (int64_t i = 0; i < n; i += kLanes) {
    const Vec x = vload_n(from + i, static_cast<int>(min64(kLanes, n - i)));
    largest = vmax(vabs(x), largest);
    zero = vfma(x, vzero(), zero);  // NaN where x is NaN or Inf
  }
  const float check = vreduce_add(zero), scale = vreduce_max(largest) / 127.0f;
  const bool is_number = check == check;
  const float inverse = is_number ? inverse_scale(scale) : 0.0f;
  for (int64_t i = 0; i < n; i += kLanes) {
    const int lanes = static_cast<int>(min64(kLanes, n - i));
    int8_t codes[kLanes] = {};
    if (inverse > 0.0f) vstore_s8(codes, vround(vmul(vload_n(from + i, lanes), vset(inverse))));
    for (int l = 0; l < lanes; ++l) row[i + l] = static_cast<char>(codes[l]);
  }
  const float kept = !is_number ? check : inverse > 0.0f ? scale : 0.0f;
  __builtin_memcpy(row + n, &kept, sizeof(kept));
}

}  // namespace
