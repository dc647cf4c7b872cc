// Elements of the three types as fp32, alone and as vectors of 16 bytes.
#pragma once

#include "device.cuh"

namespace semantica {

__device__ __forceinline__ float widen(float a) { return a; }
__device__ __forceinline__ float widen(__half a) { return __half2float(a); }
__device__ __forceinline__ float widen(__nv_bfloat16 a) { return __bfloat162float(a); }

template <typename T>
__device__ __forceinline__ T narrow(float a);
template <>
__device__ __forceinline__ float narrow<float>(float a) {
  return a;
}
template <>
__device__ __forceinline__ __half narrow<__half>(float a) {
  return __float2half_rn(a);
}
template <>
__device__ __forceinline__ __nv_bfloat16 narrow<__nv_bfloat16>(float a) {
  return __float2bfloat16_rn(a);
}

// V elements that are read and written at once
template <typename T, int V>
struct alignas(sizeof(T) * V) Pack {
  T at[V];
};

// one that may be of x's type or of fp32
template <typename T>
__device__ __forceinline__ float fetch(const void* from, bool fp32, int64_t i) {
  return fp32 ? __ldg(static_cast<const float*>(from) + i) : widen(static_cast<const T*>(from)[i]);
}
template <typename T>
__device__ __forceinline__ void put(void* to, bool fp32, int64_t i, float value) {
  if (fp32) {
    static_cast<float*>(to)[i] = value;
  } else {
    static_cast<T*>(to)[i] = narrow<T>(value);
  }
}

// 1 / (1 + exp(-z)); in 16 bits the faster exponential is as good
template <typename T>
__device__ __forceinline__ float sigmoid(float z) {
  float e = sizeof(T) == 4 ? expf(-z) : __expf(-z);
  return sizeof(T) == 4 ? 1.0f / (1.0f + e) : __fdividef(1.0f, 1.0f + e);
}

}  // namespace semantica
