// Sixteen floats at a time in GCC's and Clang's vector extension: one source, lowered to the registers of each target.
// Everything is inlined into functions that carry a target attribute, so nothing here may be compiled on its own.
#pragma once

#include <cstdint>
#include <cstring>

#if defined(__GNUC__) || defined(__clang__)
#define SEMANTICA_LANES 1
#define INLINE inline __attribute__((always_inline))
// the same for a lambda
#define BODY __attribute__((always_inline))
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

// round to nearest even; a NaN stays one unless its low bits are set, which no arithmetic on bfloat16 gives
INLINE void store(bf16* p, Lanes v) {
    const WordLanes bits = (WordLanes)v;
    const HalfLanes half = __builtin_convertvector((bits + (0x7fffu + ((bits >> 16) & 1u))) >> 16, HalfLanes);
    std::memcpy(p, &half, sizeof half);
}

// the first `count` lanes; the others are zero, and are not read
template <class T>
INLINE Lanes load(const T* p, int64_t count) {
    if (count == LANES) return load(p);
    T part[LANES] = {};
    for (int64_t i = 0; i < count; ++i) part[i] = p[i];
    return load(part);
}

template <class T>
INLINE void store(T* p, Lanes v, int64_t count) {
    if (count == LANES) return store(p, v);
    T part[LANES];
    store(part, v);
    for (int64_t i = 0; i < count; ++i) p[i] = part[i];
}

// body(first value, lanes) for each register's worth of values: whole ones in a loop of their own, then what is left
template <class Body>
INLINE void over(int64_t begin, int64_t end, Body body) {
    for (; begin + LANES <= end; begin += LANES) body(begin, LANES);
    if (begin < end) body(begin, end - begin);
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

// 1 / (1 + exp(-u)) for u >= -87; relative error 2e-7 + 1e-8 |u|, which stands where the result is far from 1
INLINE Lanes sigmoid(Lanes u) {
    const Lanes magic = broadcast(12582912.0f);
    // above 87 the exponent would leave its range, and the result is 1 to the last digit
    u = u > 87.0f ? broadcast(87.0f) : u;
    // exp(-u) = 2^n 2^f, |f| <= 1/2: adding the magic number rounds, and leaves n in its low bits
    const Lanes shifted = u * -1.44269504f + magic;
    const Lanes f = u * -1.44269504f - (shifted - magic);
    // minimax polynomial of 2^f (relative error 2e-8 in fp32), constant term exactly 1
    Lanes p = broadcast(1.5353362e-4f);
    p = p * f + 1.3398874e-3f;
    p = p * f + 9.6184369e-3f;
    p = p * f + 5.5503324e-2f;
    p = p * f + 0.24022648f;
    p = p * f + 0.69314718f;
    p = p * f + 1.0f;
    const Lanes e = (Lanes)((IntLanes)p + ((IntLanes)shifted << 23));
    return 1.0f / (1.0f + e);
}

// below -87 the exponential would overflow, and silu is zero to within a denormal number
INLINE Lanes bounded_below(Lanes u) { return u < -87.0f ? broadcast(-87.0f) : u; }

}  // namespace semantica
#endif
