// Vectors and 16-bit floats of CUDA, with its rounding: to nearest, ties to even, NaN kept; and its approximate functions.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

struct alignas(16) uint4 { unsigned x, y, z, w; };
inline uint4 make_uint4(unsigned x, unsigned y, unsigned z, unsigned w) { return {x, y, z, w}; }
struct alignas(16) float4 { float x, y, z, w; };

struct __nv_bfloat16 { uint16_t bits; };
struct __half { uint16_t bits; };
struct alignas(4) __nv_bfloat162 { __nv_bfloat16 x, y; };
struct alignas(4) __half2 { __half x, y; };

inline float __uint_as_float(unsigned bits) {
  float value;
  std::memcpy(&value, &bits, 4);
  return value;
}
inline unsigned __float_as_uint(float value) {
  unsigned bits;
  std::memcpy(&bits, &value, 4);
  return bits;
}

inline float __bfloat162float(__nv_bfloat16 a) { return __uint_as_float(unsigned(a.bits) << 16); }
inline __nv_bfloat16 __float2bfloat16_rn(float value) {
  unsigned bits = __float_as_uint(value);
  if (value != value) return {0x7fff};
  return {uint16_t((bits + 0x7fff + (bits >> 16 & 1)) >> 16)};
}

inline float __half2float(__half a) {
  unsigned sign = unsigned(a.bits & 0x8000) << 16, exponent = a.bits >> 10 & 31, fraction = a.bits & 0x3ff;
  if (exponent == 31) return __uint_as_float(sign | 0x7f800000 | fraction << 13);
  if (exponent) return __uint_as_float(sign | (exponent + 112) << 23 | fraction << 13);
  float tiny = float(fraction) * 0x1p-24f;
  return sign ? -tiny : tiny;
}
inline __half __float2half_rn(float value) {
  unsigned bits = __float_as_uint(value), sign = bits >> 16 & 0x8000, size = bits & 0x7fffffff;
  if (size > 0x7f800000) return {0x7fff};
  // half of the last step above the largest number rounds up to infinity
  if (size >= 0x477ff000) return {uint16_t(sign | 0x7c00)};
  if (size < 0x38800000) {
    // a denormal is a multiple of 2^-24: the addition rounds as the processor does, to even
    float sum = __uint_as_float(size) + 0.5f;
    return {uint16_t(sign | (__float_as_uint(sum) - 0x3f000000))};
  }
  unsigned odd = size >> 13 & 1;
  return {uint16_t(sign | (size - 0x38000000 + 0xfff + odd) >> 13)};
}

inline __nv_bfloat162 __floats2bfloat162_rn(float x, float y) { return {__float2bfloat16_rn(x), __float2bfloat16_rn(y)}; }
inline __half2 __floats2half2_rn(float x, float y) { return {__float2half_rn(x), __float2half_rn(y)}; }
// what is off by some units in the last place on a GPU is so here: up to the error that the CUDA C++ Programming Guide
// ("Mathematical Functions") allows, how far and which way hanging on the argument alone
inline float off_by(float exact, unsigned units, unsigned argument) {
  unsigned bits = __float_as_uint(exact), exponent = bits >> 23 & 255;
  if (exponent < 2 || exponent > 253) return exact;
  return __uint_as_float(bits + (argument * 2654435761u >> 16) % (2 * units + 1) - units);
}
inline float __frcp_rn(float x) { return 1.0f / x; }
// some C libraries declare it, with this specifier
inline float rsqrtf(float x) noexcept { return off_by(float(1.0 / std::sqrt(double(x))), 2, __float_as_uint(x)); }
// 2^(x * log2 e): the rounding of the product is the larger part of the error
inline float __expf(float x) { return off_by(std::exp2(x * 1.44269504f), 2, __float_as_uint(x)); }
inline float __fdividef(float a, float b) {
  // a divisor beyond 2^126 gives 0, or NaN
  if (std::fabs(b) > 0x1p126f && !std::isinf(b)) return std::isinf(a) ? NAN : 0.0f * a;
  return off_by(a / b, 2, __float_as_uint(a) ^ __float_as_uint(b));
}
