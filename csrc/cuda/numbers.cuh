// Elements of the three types as fp32, alone or 16 bytes at a time, and numbers for each channel.
#pragma once

#include <cstring>
#include <type_traits>

#include "device.cuh"
#include "group_norm.h"

namespace semantica {

__device__ __forceinline__ float widen(float a) { return a; }
__device__ __forceinline__ float widen(__half a) { return __half2float(a); }
__device__ __forceinline__ float widen(__nv_bfloat16 a) { return __bfloat162float(a); }

template <typename T>
__device__ __forceinline__ T narrow(float a) {
  if constexpr (std::is_same_v<T, __half>) {
    return __float2half_rn(a);
  } else if constexpr (std::is_same_v<T, __nv_bfloat16>) {
    return __float2bfloat16_rn(a);
  } else {
    return a;
  }
}

// what a thread reads and writes at once
template <typename T, int V>
using Pack = std::conditional_t<V == 1, T, uint4>;

template <typename T>
__device__ __forceinline__ void unpack(const T& from, float (&to)[1]) {
  to[0] = widen(from);
}
template <typename T, int V>
__device__ __forceinline__ void unpack(const uint4& from, float (&to)[V]) {
  static_assert(V * sizeof(T) == 16);
  const unsigned words[4] = {from.x, from.y, from.z, from.w};
#pragma unroll
  for (int i = 0; i < 4; i++) {
    if constexpr (sizeof(T) == 4) {
      to[i] = __uint_as_float(words[i]);
    } else if constexpr (std::is_same_v<T, __half>) {
      __half2 pair;
      memcpy(&pair, &words[i], 4);
      to[2 * i] = __half2float(pair.x), to[2 * i + 1] = __half2float(pair.y);
    } else {
      // the upper half of an fp32 number
      to[2 * i] = __uint_as_float(words[i] << 16), to[2 * i + 1] = __uint_as_float(words[i] & 0xffff0000u);
    }
  }
}

template <typename T>
__device__ __forceinline__ unsigned two(float low, float high) {
  unsigned word;
  if constexpr (std::is_same_v<T, __half>) {
    __half2 pair = __floats2half2_rn(low, high);
    memcpy(&word, &pair, 4);
  } else {
    __nv_bfloat162 pair = __floats2bfloat162_rn(low, high);
    memcpy(&word, &pair, 4);
  }
  return word;
}

// leaving: first to leave the L2 cache, which is wanted for what will be read again
template <typename T>
__device__ __forceinline__ void store(T* to, const float (&from)[1], bool) {
  *to = narrow<T>(from[0]);
}
template <typename T, int V>
__device__ __forceinline__ void store(T* to, const float (&from)[V], bool leaving) {
  static_assert(V * sizeof(T) == 16);
  uint4 pack;
  if constexpr (sizeof(T) == 4) {
    pack = make_uint4(__float_as_uint(from[0]), __float_as_uint(from[1]), __float_as_uint(from[2]),
                      __float_as_uint(from[3]));
  } else {
    pack = make_uint4(two<T>(from[0], from[1]), two<T>(from[2], from[3]), two<T>(from[V - 4], from[V - 3]),
                      two<T>(from[V - 2], from[V - 1]));
  }
  if (leaving) {
    __stcs(reinterpret_cast<uint4*>(to), pack);
  } else {
    *reinterpret_cast<uint4*>(to) = pack;
  }
}

template <typename T>
__device__ __forceinline__ float read(const Values& values, int64_t sample, int64_t channel, float absent) {
  if (!values.at) return absent;
  int64_t i = sample * values.stride + channel;
  return values.f32 ? __ldg(static_cast<const float*>(values.at) + i) : widen(static_cast<const T*>(values.at)[i]);
}
template <typename T>
__device__ __forceinline__ void write(void* to, bool f32, int64_t i, float value) {
  if (f32) {
    static_cast<float*>(to)[i] = value;
  } else {
    static_cast<T*>(to)[i] = narrow<T>(value);
  }
}

// in 16 bits the faster one is as good
template <typename T>
__device__ __forceinline__ float exponential(float z) {
  return sizeof(T) == 4 ? expf(z) : __expf(z);
}
// 1 / z for z of at most 2^126, without a branch: two units off, for fp32 results mended by a step of Newton's
template <typename T>
__device__ __forceinline__ float reciprocal(float z) {
  const float r = __fdividef(1.0f, z);
  return sizeof(T) == 4 ? fmaf(r, fmaf(-z, r, 1.0f), r) : r;
}
// exp(80) is far from overflow, and z times the result is 0 there
template <typename T>
__device__ __forceinline__ float sigmoid(float z) {
  return reciprocal<T>(1.0f + exponential<T>(fminf(-z, 80.0f)));
}

}  // namespace semantica
