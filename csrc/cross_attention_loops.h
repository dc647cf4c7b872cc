// The inner loops of cross-attention: a few queries of one head against all its tokens. Both products are one loop over
// tables, which hold keys and values in the order in which it reads them; all sums are fp32.
#pragma once

#include <cmath>
#include <limits>
#include <type_traits>

#include "lanes.h"

#ifdef SEMANTICA_LANES
namespace semantica {

typedef uint16_t Halves __attribute__((vector_size(32)));

// one register of a table
struct alignas(64) Block {
    float v[LANES];
};

INLINE float widened(float value) { return value; }

INLINE float widened(bf16 value) {
    const uint32_t bits = (uint32_t)value.bits << 16;
    float wide;
    std::memcpy(&wide, &bits, sizeof wide);
    return wide;
}

// what an item of 4 bytes is, which the left side of a product gives one of at a time, and each lane of the right one
struct Singles {
    using Number = float;
    static constexpr int64_t DEPTH = 1;

    INLINE static Lanes add(Lanes sum, const char* item, Lanes table) {
        float value;
        std::memcpy(&value, item, sizeof value);
        return sum + table * value;
    }

    INLINE static void put(float* to, Lanes v) { std::memcpy(to, &v, sizeof v); }

    // an item of the numbers at x, so far apart, of which so many are there
    template <class T>
    INLINE static void set(float* to, const T* x, int64_t, int64_t) {
        *to = widened(*x);
    }
};

#if defined(__x86_64__)
// two bfloat16, multiplied each with each and summed in fp32
struct Pairs {
    using Number = bf16;
    static constexpr int64_t DEPTH = 2;

    INLINE static Lanes add(Lanes sum, const char* item, Lanes table) {
        struct __attribute__((packed, may_alias)) Word {
            uint32_t bits;
        };
        // an intrinsic cannot be inlined into functions that name no target
        __asm__("vdpbf16ps %2%{1to16%}, %1, %0" : "+v"(sum) : "v"(table), "m"(*(const Word*)item));
        return sum;
    }

    INLINE static void put(bf16* to, Lanes v) {
        Halves halves;
        __asm__("vcvtneps2bf16 %1, %0" : "=v"(halves) : "v"(v));
        std::memcpy(to, &halves, sizeof halves);
    }

    INLINE static void set(float* to, const bf16* x, int64_t apart, int64_t count) {
        const uint32_t bits = x->bits | (count > 1 ? (uint32_t)x[apart].bits << 16 : 0);
        std::memcpy(to, &bits, sizeof bits);
    }
};
#endif

// the tokens of one head of one sample: logits = items of a query . keys, o = items of the map . values
struct Tables {
    // [items of dim][vectors of tokens] and [items of tokens][vectors of dim]; each stream begins a new vector, or item
    Block *keys, *values;
    int64_t across, deep;
};

// what all queries of one head of one sample share
struct Head {
    int64_t dim, streams;
    // tokens that are there, of each stream
    const int64_t* lengths;
    // the factor of each stream, so far apart, or null
    const float* gates;
    int64_t gate_stride;
    // in the order of the steps (see `position`), or null
    const float* q_weight;
    float scale;
    Tables tables;
};

// memory of one thread, for as many queries as it takes at a time
struct Scratch {
    char *logits, *map, *normal, *queries;
    // bytes of a query in each
    int64_t logits_row, map_row, normal_row, queries_row;
};

// steps that are summed before they join the others: two short sums lose fewer digits than a long one
constexpr int64_t SHORT_STEPS = 128;

INLINE int64_t ceil_of(int64_t a, int64_t b) { return (a + b - 1) / b; }

template <int VALUE>
using Constant = std::integral_constant<int, VALUE>;

typedef float Eight __attribute__((vector_size(32)));
typedef float Four __attribute__((vector_size(16)));

// four partial results of sixteen values
template <class Join>
INLINE Four folded(Lanes v, Join join) {
    Eight halves[2];
    std::memcpy(halves, &v, sizeof v);
    const Eight half = join(halves[0], halves[1]);
    Four quarters[2];
    std::memcpy(quarters, &half, sizeof half);
    return join(quarters[0], quarters[1]);
}

INLINE float highest(Lanes v) {
    auto larger = [](auto a, auto b) BODY { return a > b ? a : b; };
    const Four f = folded(v, larger);
    return larger(larger(f[0], f[1]), larger(f[2], f[3]));
}

INLINE float total(Lanes v) {
    const Four f = folded(v, [](auto a, auto b) BODY { return a + b; });
    return (f[0] + f[1]) + (f[2] + f[3]);
}

// sixteen values in the order of memory, where a `Step` has even and odd ones
INLINE void put(float* to, Lanes v) { std::memcpy(to, &v, sizeof v); }

INLINE void put(bf16* to, Lanes v) {
    const Halves halves = __builtin_convertvector(rounded(v) >> 16, Halves);
    std::memcpy(to, &halves, sizeof halves);
}

template <class T>
INLINE void put(T* to, Lanes v, int64_t count) {
    if (count >= LANES) return put(to, v);
    T part[LANES];
    put(part, v);
    std::memcpy(to, part, count * sizeof(T));
}

// `fallback` in the lanes from `count` on
INLINE Lanes only(Lanes v, int64_t count, float fallback) {
    const IntLanes lane = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
    return lane < (int32_t)count ? v : broadcast(fallback);
}

// takes `take(row, vector, sum over steps of the row's item . that vector of the table)` of every vector, at most WIDTH at a
// time, and so many each time that none is left alone
template <class N, int ROWS, int WIDTH, class Take>
INLINE void product(const char* rows, int64_t row_bytes, const Block* table, int64_t across, int64_t steps, Take take) {
    auto tile = [&](int64_t from, auto width) BODY {
        constexpr int W = decltype(width)::value;
        auto add = [&](int64_t begin, Lanes(&sums)[ROWS][W]) BODY {
            const int64_t end = begin + SHORT_STEPS < steps ? begin + SHORT_STEPS : steps;
            const char* item = rows + begin * 4;
            const Block* at = table + begin * across + from;
            for (int64_t step = begin; step < end; ++step, item += 4, at += across) {
                Lanes right[W];
                for (int w = 0; w < W; ++w) right[w] = lanes(at->v, w);
                for (int r = 0; r < ROWS; ++r)
                    for (int w = 0; w < W; ++w) sums[r][w] = N::add(sums[r][w], item + r * row_bytes, right[w]);
            }
        };
        Lanes sums[ROWS][W] = {};
        add(0, sums);
        for (int64_t begin = SHORT_STEPS; begin < steps; begin += SHORT_STEPS) {
            Lanes more[ROWS][W] = {};
            add(begin, more);
            for (int r = 0; r < ROWS; ++r)
                for (int w = 0; w < W; ++w) sums[r][w] += more[r][w];
        }
        for (int r = 0; r < ROWS; ++r)
            for (int w = 0; w < W; ++w) take(r, from + w, sums[r][w]);
    };
    int64_t parts = ceil_of(across, WIDTH);
    for (int64_t from = 0; from < across; --parts) {
        const int64_t width = ceil_of(across - from, parts);
        if (width == 1)
            tile(from, Constant<1>{});
        else if (WIDTH < 3 || width == 2)
            tile(from, Constant<(WIDTH < 2 ? 1 : 2)>{});
        else
            tile(from, Constant<(WIDTH < 3 ? 1 : 3)>{});
        from += width;
    }
}

// Logits of ROWS queries become the map of every stream, times its gate; `lse` of stream s goes to lse[s * lse_stride].
// The rows go through each pass together, since each of them waits for its own sums.
template <class N, int ROWS>
INLINE void softmax(const Head& head, const Scratch& scratch, float* lse, int64_t lse_stride) {
    using Number = typename N::Number;
    constexpr float none = -std::numeric_limits<float>::infinity();
    float* logits[ROWS];
    Number* map[ROWS];
    for (int r = 0; r < ROWS; ++r) {
        logits[r] = (float*)(scratch.logits + r * scratch.logits_row);
        map[r] = (Number*)(scratch.map + r * scratch.map_row);
    }
    for (int64_t s = 0; s < head.streams; ++s) {
        const int64_t count = head.lengths[s], vectors = ceil_of(count, LANES), last = vectors - 1;
        Lanes top[ROWS], sums[ROWS] = {};
        float most[ROWS];
        if (count) {
            for (int r = 0; r < ROWS; ++r) {
                top[r] = only(lanes(logits[r], last), count - last * LANES, none);
                put(logits[r] + last * LANES, top[r]);
            }
            for (int64_t i = 0; i < last; ++i)
                for (int r = 0; r < ROWS; ++r) {
                    const Lanes v = lanes(logits[r], i);
                    top[r] = v > top[r] ? v : top[r];
                }
            for (int r = 0; r < ROWS; ++r) most[r] = highest(top[r]);
            for (int64_t i = 0; i < vectors; ++i)
                for (int r = 0; r < ROWS; ++r) {
                    const Lanes u = (lanes(logits[r], i) - most[r]) * head.scale;
                    const Lanes e = u < -87.0f ? Lanes{} : exponential(u);
                    put(logits[r] + i * LANES, e);
                    sums[r] += e;
                }
        }
        float sum[ROWS];
        for (int r = 0; r < ROWS; ++r) sum[r] = total(sums[r]);
        for (int r = 0; lse && r < ROWS; ++r)
            lse[s * lse_stride + r] = count ? most[r] * head.scale + std::log(sum[r]) : none;
        const float gate = head.gates ? head.gates[s * head.gate_stride] : 1;
        for (int64_t i = 0; i < vectors; ++i)
            for (int r = 0; r < ROWS; ++r) N::put(map[r] + i * LANES, lanes(logits[r], i) * (gate / sum[r]));
        for (int r = 0; r < ROWS; ++r) {
            logits[r] += vectors * LANES;
            // what the last vector wrote beyond its stream is overwritten by the next
            map[r] += ceil_of(count, N::DEPTH) * N::DEPTH;
        }
    }
}

// x / sqrt(mean(x^2) + 1e-6) * weight
template <class T>
INLINE void rms_norm(const T* x, const float* weight, int64_t dim, T* to) {
    Lanes squares = {};
    over<T>(0, dim, [&](int64_t i, int64_t part) BODY {
        for (const Lanes& v : load(x + i, part).v) squares += v * v;
    });
    const float inverse = 1 / std::sqrt(total(squares) / dim + 1e-6f);
    over<T>(0, dim, [&](int64_t i, int64_t part) BODY {
        Step<T> a = load(x + i, part);
        for (int64_t j = 0; j < Step<T>::VECTORS; ++j) a.v[j] = a.v[j] * inverse * lanes(weight + i, j);
        store(to + i, a, part);
    });
}

// ROWS queries of one head; `row` says how far apart they lie in q, and in o
template <class T, class N, int ROWS, int WIDTH>
INLINE void attend(const Head& head, const Scratch& s, const T* q, int64_t q_row, T* o, int64_t o_row, float* lse,
                   int64_t lse_stride) {
    if (head.q_weight) {
        for (int r = 0; r < ROWS; ++r)
            rms_norm(q + r * q_row, head.q_weight, head.dim, (T*)(s.normal + r * s.normal_row));
        q = (const T*)s.normal, q_row = s.normal_row / (int64_t)sizeof(T);
    }
    const char* rows = (const char*)q;
    int64_t row_bytes = q_row * sizeof(T);
    if (!std::is_same<T, typename N::Number>::value) {
        for (int r = 0; r < ROWS; ++r) {
            float* to = (float*)(s.queries + r * s.queries_row);
            for (int64_t d = 0; d < head.dim; ++d) to[d] = widened(q[r * q_row + d]);
        }
        rows = s.queries, row_bytes = s.queries_row;
    }
    const Tables& t = head.tables;
    product<N, ROWS, WIDTH>(rows, row_bytes, t.keys, t.across, head.dim / N::DEPTH, [&](int r, int64_t w, Lanes v) BODY {
        put((float*)(s.logits + r * s.logits_row) + w * LANES, v);
    });
    softmax<N, ROWS>(head, s, lse, lse_stride);
    const int64_t wide = ceil_of(head.dim, LANES);
    product<N, ROWS, WIDTH>(s.map, s.map_row, t.values, wide, t.deep, [&](int r, int64_t w, Lanes v) BODY {
        put(o + r * o_row + w * LANES, v, head.dim - w * LANES);
    });
}

// the tables of one head, of keys and values whose tokens lie so far apart
template <class T, class N>
INLINE void pack(const Head& head, const int64_t* sizes, const T* k, int64_t k_row, const T* v, int64_t v_row) {
    const Tables& t = head.tables;
    const int64_t wide = ceil_of(head.dim, LANES), steps = head.dim / N::DEPTH;
    Block* row = t.values;
    for (int64_t s = 0, vector = 0; s < head.streams; ++s) {
        const int64_t count = head.lengths[s];
        for (int64_t i = 0; i < count; i += LANES, ++vector) {
            const int64_t some = count - i < LANES ? count - i : LANES;
            for (int64_t step = 0; step < steps; ++step) {
                Block& to = t.keys[step * t.across + vector];
                to = {};
                for (int64_t lane = 0; lane < some; ++lane)
                    N::set(to.v + lane, k + (i + lane) * k_row + step * N::DEPTH, 1, N::DEPTH);
            }
        }
        for (int64_t i = 0; i < count; i += N::DEPTH, row += wide) {
            row[wide - 1] = {};
            for (int64_t d = 0; d < head.dim; ++d) N::set(row->v + d, v + i * v_row + d, v_row, count - i);
        }
        k += sizes[s] * k_row, v += sizes[s] * v_row;
    }
}

}  // namespace semantica
#endif
