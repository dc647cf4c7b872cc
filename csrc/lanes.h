// Sixteen floats at a time in GCC's and Clang's vector extension: one source, lowered to the registers of each target.
// Everything is inlined into functions that carry a target attribute, so nothing here may be compiled on its own.
#pragma once

#include <cstdint>
#include <cstring>

#if defined(__GNUC__) || defined(__clang__)
#define SEMANTICA_LANES 1
#define INLINE inline __attribute__((always_inline))
#if !defined(__clang__)
// vectors are passed between inlined functions only: their calling convention never matters
#pragma GCC diagnostic ignored "-Wpsabi"
#endif

namespace semantica {

constexpr int64_t LANES = 16;
typedef float Lanes __attribute__((vector_size(64)));
typedef int32_t IntLanes __attribute__((vector_size(64)));
typedef uint32_t WordLanes __attribute__((vector_size(64)));
typedef uint16_t HalfLanes __attribute__((vector_size(32)));

// the storage type of bfloat16: the upper half of a float
struct bf16 {
    uint16_t bits;
};

INLINE Lanes broadcast(float value) { return Lanes{} + value; }

INLINE Lanes load(const float* p) {
    Lanes v;
    std::memcpy(&v, p, sizeof v);
    return v;
}

INLINE Lanes load(const bf16* p) {
    HalfLanes half;
    std::memcpy(&half, p, sizeof half);
    return (Lanes)(__builtin_convertvector(half, WordLanes) << 16);
}

INLINE void store(float* p, Lanes v) { std::memcpy(p, &v, sizeof v); }

// round to nearest even; a NaN keeps its sign and stays a NaN
INLINE void store(bf16* p, Lanes v) {
    WordLanes bits = (WordLanes)v;
    WordLanes rounded = bits + (0x7fffu + ((bits >> 16) & 1u));
    HalfLanes half = __builtin_convertvector((v == v ? rounded : (bits | 0x400000u)) >> 16, HalfLanes);
    std::memcpy(p, &half, sizeof half);
}

// the first `count` lanes; the others are zero, and are not read
template <class T>
INLINE Lanes load(const T* p, int64_t count) {
    if (count == LANES) return load(p);
    T part[LANES] = {};
    std::memcpy(part, p, count * sizeof(T));
    return load(part);
}

template <class T>
INLINE void store(T* p, Lanes v, int64_t count) {
    if (count == LANES) return store(p, v);
    T part[LANES];
    store(part, v);
    std::memcpy(p, part, count * sizeof(T));
}

// zero from lane `count` on
INLINE Lanes first(Lanes v, int64_t count) {
    if (count == LANES) return v;
    const IntLanes lane = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
    return lane < (int32_t)count ? v : Lanes{};
}

INLINE double sum(Lanes v) {
    double total = 0;
    for (int i = 0; i < LANES; ++i) total += v[i];
    return total;
}

// 1 / (1 + exp(-u)) for u >= -87, to two units in the last place
// exp: reduction by multiples of log 2 in two parts, then the polynomial of Cephes' expf (Moshier, public domain)
INLINE Lanes sigmoid(Lanes u) {
    const Lanes magic = broadcast(12582912.0f);
    Lanes turns = u * -1.44269504f;
    turns = turns < -126.0f ? broadcast(-126.0f) : turns;
    const Lanes shifted = turns + magic;
    const Lanes n = shifted - magic;
    // below the clamp the argument would leave the polynomial's range
    const Lanes bounded = u > 87.3365f ? broadcast(87.3365f) : u;
    const Lanes r = (-bounded - n * 0.693359375f) + n * 2.12194440e-4f;
    Lanes p = broadcast(1.9875691500e-4f);
    p = p * r + 1.3981999507e-3f;
    p = p * r + 8.3334519073e-3f;
    p = p * r + 4.1665795894e-2f;
    p = p * r + 1.6666665459e-1f;
    p = p * r + 5.0000001201e-1f;
    p = p * (r * r) + r + 1.0f;
    // the low bits of the shifted number are n: adding them to the exponent multiplies by 2^n
    const Lanes e = (Lanes)((IntLanes)p + ((IntLanes)shifted << 23));
    return 1.0f / (1.0f + e);
}

// below -87 the exponential would overflow, and silu is zero to within a denormal number
INLINE Lanes bounded_below(Lanes u) { return u < -87.0f ? broadcast(-87.0f) : u; }

}  // namespace semantica
#endif
