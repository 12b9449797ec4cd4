// Half precision as the kernels use it.
#pragma once
struct __half {
  _Float16 value;
};
struct __half2 {
  __half x, y;
};
inline __half __float2half(float x) { return {static_cast<_Float16>(x)}; }
inline float __half2float(__half x) { return static_cast<float>(x.value); }
inline __half2 __float2half2_rn(float x) { return {__float2half(x), __float2half(x)}; }
inline __half2 __hsub2(__half2 a, __half2 b) {
  return {__float2half(__half2float(a.x) - __half2float(b.x)), __float2half(__half2float(a.y) - __half2float(b.y))};
}
inline float2 __half22float2(__half2 a) { return {__half2float(a.x), __half2float(a.y)}; }
