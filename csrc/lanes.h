// Sixteen floats at a time in GCC's and Clang's vector extension: one source, lowered to the registers of each target.
// Everything is inlined into functions that carry a target attribute, so nothing here may be compiled on its own.
#pragma once

#include <cstdint>
#include <cstring>

namespace semantica {

// which instructions the loops use; a target can be asked for only where it runs
enum class Target { baseline, avx2, avx512, avx512_bf16 };

}  // namespace semantica

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

// the storage type of bfloat16: the upper half of a float
struct bf16 {
    uint16_t bits;
};

INLINE Lanes broadcast(float value) { return Lanes{} + value; }

// What one step of a loop takes from memory, as fp32: VECTORS registers of values, WIDTH values in all. bfloat16 comes as
// its even and its odd values: a shift and a mask unpack them, where any other order would cost shuffles. Whatever
// goes with single values of a step (see `position`) is laid out in the same order.
template <class T>
struct Step;

template <>
struct Step<float> {
    static constexpr int64_t VECTORS = 1, WIDTH = LANES;
    Lanes v[VECTORS];
};

template <>
struct Step<bf16> {
    static constexpr int64_t VECTORS = 2, WIDTH = 2 * LANES;
    Lanes v[VECTORS];
};

// where value i of memory stands among the lanes of its step
template <class T>
inline int64_t position(int64_t i) {
    constexpr int64_t width = Step<T>::WIDTH, vectors = Step<T>::VECTORS;
    return i / width * width + i % vectors * LANES + i % width / vectors;
}

INLINE Step<float> load(const float* p) {
    Step<float> step;
    std::memcpy(&step, p, sizeof step);
    return step;
}

INLINE Step<bf16> load(const bf16* p) {
    WordLanes words;
    std::memcpy(&words, p, sizeof words);
    return {{(Lanes)(words << 16), (Lanes)(words & 0xffff0000u)}};
}

INLINE void store(float* p, const Step<float>& step) { std::memcpy(p, &step, sizeof step); }

// round to nearest even; a NaN stays one unless its low bits are set, which no arithmetic on bfloat16 gives
INLINE WordLanes rounded(Lanes v) {
    const WordLanes bits = (WordLanes)v;
    return bits + (0x7fffu + ((bits >> 16) & 1u));
}

INLINE void store(bf16* p, const Step<bf16>& step) {
    const WordLanes words = (rounded(step.v[0]) >> 16) | (rounded(step.v[1]) & 0xffff0000u);
    std::memcpy(p, &words, sizeof words);
}

// the first `count` values; the others are zero, and are not read
template <class T>
INLINE Step<T> load(const T* p, int64_t count) {
    if (count == Step<T>::WIDTH) return load(p);
    T part[Step<T>::WIDTH] = {};
    for (int64_t i = 0; i < count; ++i) part[i] = p[i];
    return load(part);
}

template <class T>
INLINE void store(T* p, const Step<T>& step, int64_t count) {
    if (count == Step<T>::WIDTH) return store(p, step);
    T part[Step<T>::WIDTH];
    store(part, step);
    for (int64_t i = 0; i < count; ++i) p[i] = part[i];
}

// the lanes of per-value numbers that belong to vector j of a step
INLINE Lanes lanes(const float* p, int64_t j) {
    Lanes v;
    std::memcpy(&v, p + j * LANES, sizeof v);
    return v;
}

INLINE void keep_lanes(float* p, int64_t j, Lanes v) { std::memcpy(p + j * LANES, &v, sizeof v); }

// a number of values, up to a whole number of steps
template <class T>
inline int64_t whole_steps(int64_t count) {
    constexpr int64_t width = Step<T>::WIDTH;
    return (count + width - 1) / width * width;
}

// body(first value, values) for each step: whole ones in a loop of their own, then what is left
template <class T, class Body>
INLINE void over(int64_t begin, int64_t end, Body body) {
    constexpr int64_t width = Step<T>::WIDTH;
    for (; begin + width <= end; begin += width) body(begin, width);
    if (begin < end) body(begin, end - begin);
}

// zero in vector j of a step for values from `count` on
template <class T>
INLINE Lanes first(Lanes v, int64_t j, int64_t count) {
    if (count == Step<T>::WIDTH) return v;
    const IntLanes lane = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
    return lane * (int32_t)Step<T>::VECTORS + (int32_t)j < (int32_t)count ? v : Lanes{};
}

INLINE double sum(Lanes v) {
    double total = 0;
    for (int i = 0; i < LANES; ++i) total += v[i];
    return total;
}

// the lanes as doubles, stored or added to what is there
INLINE void spread(double* to, Lanes v, bool add) {
    for (int64_t i = 0; i < LANES; ++i) to[i] = (add ? to[i] : 0) + v[i];
}

// exp(u) for |u| <= 87; relative error 3e-7 + 1e-8 |u|
INLINE Lanes exponential(Lanes u) {
    const Lanes magic = broadcast(12582912.0f);
    // exp(u) = 2^n 2^f, |f| <= 1/2: adding the magic number rounds, and leaves n in its low bits
    const Lanes shifted = u * 1.44269504f + magic;
    const Lanes f = u * 1.44269504f - (shifted - magic);
    // minimax polynomial of 2^f (relative error 1e-7), constant term exactly 1
    Lanes p = broadcast(1.3264727e-3f);
    p = p * f + 9.6715130e-3f;
    p = p * f + 5.5507336e-2f;
    p = p * f + 0.24022242f;
    p = p * f + 0.69314700f;
    p = p * f + 1.0f;
    return (Lanes)((IntLanes)p + ((IntLanes)shifted << 23));
}

// 1 / (1 + exp(-u)) for u >= -87
INLINE Lanes sigmoid(Lanes u) {
    // above 87 the exponent would leave its range, and the result is 1 to the last digit
    u = u > 87.0f ? broadcast(87.0f) : u;
    return 1.0f / (1.0f + exponential(-u));
}

// below -87 the exponential would overflow, and silu is zero to within a denormal number
INLINE Lanes bounded_below(Lanes u) { return u < -87.0f ? broadcast(-87.0f) : u; }

}  // namespace semantica
#endif
