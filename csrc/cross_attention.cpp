#include "cross_attention.h"

#include <algorithm>
#include <cmath>
#include <numeric>

#include "cross_attention_loops.h"

#ifdef _OPENMP
#include <omp.h>
#endif

#ifdef SEMANTICA_LANES
namespace semantica {
namespace {

// the loops of one storage type, compiled for one instruction set
template <class T>
struct Loops {
    // queries taken at a time, and numbers of an item
    int64_t rows, depth;
    void (*pack)(const Head&, const int64_t*, const T*, int64_t, const T*, int64_t);
    void (*attend)(const Head&, const Scratch&, int64_t, const T*, int64_t, T*, int64_t, float*, int64_t);
};

// ROWS x WIDTH sums stay in registers
#define VARIANT(NAME, TARGET, N, ROWS, WIDTH)                                                                        \
    template <class T>                                                                                               \
    struct NAME {                                                                                                    \
        TARGET static void pack_head(const Head& head, const int64_t* sizes, const T* k, int64_t k_row, const T* v,  \
                                     int64_t v_row) {                                                                \
            pack<T, N>(head, sizes, k, k_row, v, v_row);                                                             \
        }                                                                                                            \
        TARGET static void attend_rows(const Head& head, const Scratch& s, int64_t count, const T* q, int64_t q_row, \
                                       T* o, int64_t o_row, float* lse, int64_t lse_stride) {                        \
            int64_t i = 0;                                                                                           \
            for (; i + ROWS <= count; i += ROWS)                                                                     \
                attend<T, N, ROWS, WIDTH>(head, s, q + i * q_row, q_row, o + i * o_row, o_row,                       \
                                          lse ? lse + i : lse, lse_stride);                                          \
            for (; i < count; ++i)                                                                                   \
                attend<T, N, 1, WIDTH>(head, s, q + i * q_row, q_row, o + i * o_row, o_row, lse ? lse + i : lse,     \
                                       lse_stride);                                                                  \
        }                                                                                                            \
        static constexpr Loops<T> loops = {ROWS, N::DEPTH, pack_head, attend_rows};                                  \
    };

#define AVX512 __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma")))
VARIANT(Avx512, AVX512, Singles, 8, 3);
VARIANT(Avx512Bf16, AVX512, Pairs, 8, 3);

const Loops<float>& loops(Target, const float*) { return Avx512<float>::loops; }

const Loops<bf16>& loops(Target target, const bf16*) {
    return target == Target::avx512_bf16 ? Avx512Bf16<bf16>::loops : Avx512<bf16>::loops;
}

// what `forward` cuts its work into: queries of one sample whose q and o stay in the nearest caches over all heads
int64_t queries_together(const CrossAttentionShape& s, int64_t rows, int64_t threads) {
    constexpr int64_t values = 1 << 16;
    const int64_t fitting = values / (s.heads * s.dim), fair = ceil_of(s.queries * s.batch, 2 * threads);
    return ceil_of(std::max<int64_t>(1, std::min({fitting, fair, s.queries})), rows) * rows;
}

template <class T>
void forward(const CrossAttentionShape& s, const T* q, const T* k, const T* v, T* o, float* lse,
             const int64_t* lengths, const float* gates, const float* q_weight) {
    const Loops<T>& loop = loops(s.target, q);
    const int64_t streams = s.sizes.size(), wide = ceil_of(s.dim, LANES), steps = s.dim / loop.depth;
    // of all tokens; samples that have fewer use the beginning
    int64_t across = 0, deep = 0;
    for (const int64_t size : s.sizes) across += ceil_of(size, LANES), deep += ceil_of(size, loop.depth);
    const int64_t blocks = steps * across + deep * wide;
    std::vector<Block> tables(s.batch * s.heads * blocks);
    std::vector<int64_t> there(s.batch * streams);
    for (int64_t i = 0; i < (int64_t)there.size(); ++i) {
        const int64_t size = s.sizes[i % streams];
        there[i] = lengths ? std::clamp<int64_t>(lengths[i], 0, size) : size;
    }
    std::vector<float> weight;
    if (q_weight) {
        weight.resize(whole_steps<T>(s.dim));
        for (int64_t d = 0; d < s.dim; ++d) weight[position<T>(d)] = q_weight[d];
    }
    auto head_of = [&](int64_t sample, int64_t head) {
        Head h = {s.dim, streams, &there[sample * streams], nullptr, s.heads, q_weight ? weight.data() : nullptr,
                  1 / std::sqrt((float)s.dim), {}};
        if (gates) h.gates = gates + sample * streams * s.heads + head;
        h.tables.keys = &tables[(sample * s.heads + head) * blocks];
        h.tables.values = h.tables.keys + steps * across;
        for (int64_t i = 0; i < streams; ++i) {
            h.tables.across += ceil_of(h.lengths[i], LANES);
            h.tables.deep += ceil_of(h.lengths[i], loop.depth);
        }
        return h;
    };

    // so little that a second thread would take longer to start
    const int64_t work = s.batch * s.heads * s.queries * s.dim * LANES * across;
    const int threads = work <= 1 << 19 ? 1 : s.threads;
    const int64_t together = queries_together(s, loop.rows, threads);
    const int64_t parts = ceil_of(s.queries, together);
#pragma omp parallel num_threads(threads)
    {
        // two of each, as a query's items are whole vectors, and the map's last vector goes beyond its tokens
        const int64_t map_row = (deep * loop.depth + 2 * LANES) * 4, row = (wide + 1) * sizeof(Block);
        std::vector<Block> memory(loop.rows * (across + 1 + map_row / sizeof(Block) + 2 * (wide + 1)));
        Scratch scratch = {(char*)memory.data(), nullptr, nullptr, nullptr,
                           across * (int64_t)sizeof(Block), map_row, row, row};
        scratch.map = scratch.logits + loop.rows * scratch.logits_row;
        scratch.normal = scratch.map + loop.rows * scratch.map_row;
        scratch.queries = scratch.normal + loop.rows * scratch.normal_row;
#pragma omp for schedule(static)
        for (int64_t i = 0; i < s.batch * s.heads; ++i) {
            const int64_t sample = i / s.heads, head = i % s.heads;
            loop.pack(head_of(sample, head), s.sizes.data(), k + sample * s.k.batch + head * s.k.head, s.k.row,
                      v + sample * s.v.batch + head * s.v.head, s.v.row);
        }
#pragma omp for schedule(static)
        for (int64_t i = 0; i < s.batch * parts; ++i) {
            const int64_t sample = i / parts, begin = i % parts * together;
            const int64_t count = std::min(together, s.queries - begin), o_row = s.heads * s.dim;
            for (int64_t head = 0; head < s.heads; ++head)
                loop.attend(head_of(sample, head), scratch, count,
                            q + sample * s.q.batch + begin * s.q.row + head * s.q.head, s.q.row,
                            o + (sample * s.queries + begin) * o_row + head * s.dim, o_row,
                            lse ? lse + (sample * s.heads + head) * streams * s.queries + begin : nullptr, s.queries);
        }
    }
}

}  // namespace

void cross_attention_forward(const CrossAttentionShape& s, const void* q, const void* k, const void* v, void* o,
                             float* lse, const int64_t* lengths, const float* gates, const float* q_weight) {
    if (s.bfloat16)
        forward(s, (const bf16*)q, (const bf16*)k, (const bf16*)v, (bf16*)o, lse, lengths, gates, q_weight);
    else
        forward(s, (const float*)q, (const float*)k, (const float*)v, (float*)o, lse, lengths, gates, q_weight);
}

bool cross_attention_runs(Target target) {
    __builtin_cpu_init();
    const bool wide = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
    if (target == Target::avx512_bf16) return wide && __builtin_cpu_supports("avx512bf16");
    return target == Target::avx512 && wide;
}

}  // namespace semantica
#endif
