#include "group_norm.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <vector>

#include "group_norm_loops.h"

#ifdef _OPENMP
#include <omp.h>
#endif

#ifdef SEMANTICA_LANES
namespace semantica {
namespace {

// the loops of one storage type, compiled for one instruction set
template <class T>
struct Loops {
    void (*moments_of_run)(const T*, int64_t, Moments*);
    void (*apply_to_run)(const T*, T*, int64_t, float, float, float, bool);
    void (*sums_of_run)(const T*, const T*, int64_t, float, float, float, float, bool, double*, double*);
    void (*gradient_of_run)(const T*, const T*, T*, int64_t, float, float, float, float, float, bool);
    void (*moments_of_rows)(const T*, int64_t, int64_t, double*, double*, double*);
    void (*apply_to_rows)(const T*, T*, int64_t, int64_t, const Coefficients&, bool);
    void (*sums_of_rows)(const T*, const T*, int64_t, int64_t, const Coefficients&, bool, double*, double*);
    void (*gradient_of_rows)(const T*, const T*, T*, int64_t, int64_t, const Coefficients&, bool);
};

// a function template cannot carry an attribute that differs between its instances, so a macro makes the variants
#define VARIANT(NAME, TARGET)                                                                                        \
    template <class T>                                                                                               \
    struct NAME {                                                                                                    \
        TARGET static void moments_run(const T* x, int64_t n, Moments* out) { moments_of_run<T>(x, n, out); }        \
        TARGET static void apply_run(const T* x, T* y, int64_t n, float m, float s, float o, bool silu) {            \
            silu ? apply_to_run<T, true>(x, y, n, m, s, o) : apply_to_run<T, false>(x, y, n, m, s, o);               \
        }                                                                                                            \
        TARGET static void sums_run(const T* dy, const T* x, int64_t n, float m, float r, float s, float o,          \
                                    bool silu, double* p, double* q) {                                               \
            silu ? sums_of_run<T, true>(dy, x, n, m, r, s, o, p, q)                                                  \
                 : sums_of_run<T, false>(dy, x, n, m, r, s, o, p, q);                                                \
        }                                                                                                            \
        TARGET static void gradient_run(const T* dy, const T* x, T* dx, int64_t n, float m, float s, float o,        \
                                        float t, float l, bool silu) {                                               \
            silu ? gradient_of_run<T, true>(dy, x, dx, n, m, s, o, t, l)                                             \
                 : gradient_of_run<T, false>(dy, x, dx, n, m, s, o, t, l);                                           \
        }                                                                                                            \
        TARGET static void moments_rows(const T* x, int64_t n, int64_t c, double* k, double* s, double* q) {         \
            moments_of_rows<T>(x, n, c, k, s, q);                                                                    \
        }                                                                                                            \
        TARGET static void apply_rows(const T* x, T* y, int64_t n, int64_t c, const Coefficients& k, bool silu) {    \
            silu ? apply_to_rows<T, true>(x, y, n, c, k) : apply_to_rows<T, false>(x, y, n, c, k);                   \
        }                                                                                                            \
        TARGET static void sums_rows(const T* dy, const T* x, int64_t n, int64_t c, const Coefficients& k,           \
                                     bool silu, double* p, double* q) {                                              \
            silu ? sums_of_rows<T, true>(dy, x, n, c, k, p, q) : sums_of_rows<T, false>(dy, x, n, c, k, p, q);       \
        }                                                                                                            \
        TARGET static void gradient_rows(const T* dy, const T* x, T* dx, int64_t n, int64_t c,                       \
                                         const Coefficients& k, bool silu) {                                         \
            silu ? gradient_of_rows<T, true>(dy, x, dx, n, c, k) : gradient_of_rows<T, false>(dy, x, dx, n, c, k);   \
        }                                                                                                            \
        static constexpr Loops<T> loops = {moments_run,  apply_run,  sums_run,  gradient_run,                        \
                                           moments_rows, apply_rows, sums_rows, gradient_rows};                      \
    };

VARIANT(Baseline, )
#if defined(__x86_64__)
#define SEMANTICA_X86_VARIANTS 1
VARIANT(Avx2, __attribute__((target("avx2,fma"))))
VARIANT(Avx512, __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma"))))
#endif

template <class T>
const Loops<T>& loops(Target target) {
#ifdef SEMANTICA_X86_VARIANTS
    if (target == Target::avx512) return Avx512<T>::loops;
    if (target == Target::avx2) return Avx2<T>::loops;
#endif
    (void)target;
    return Baseline<T>::loops;
}

// How a tensor is cut. A unit is what shares statistics in memory: a group of a sample (contiguous) or a whole sample
// (channels-last). Each unit is cut into chunks the same way whatever the number of threads, and chunks are merged in
// order: the result does not depend on the threads.
struct Cut {
    int64_t units, chunks, bytes;
    // contiguous: whole channels per chunk, or spans of one channel
    int64_t channels_per_chunk = 0, spans = 1;
    // spatial positions per chunk
    int64_t positions;

    Cut(const GroupNormShape& s, int64_t item) {
        constexpr int64_t values = 32768, most = 64;
        if (s.channels_last) {
            units = s.batch;
            positions = std::max({values / s.channels, ceil(s.spatial, most), int64_t(1)});
            spans = chunks = ceil(s.spatial, positions);
            bytes = s.channels * s.spatial * item;
        } else {
            const int64_t width = s.channels / s.groups;
            units = s.batch * s.groups;
            channels_per_chunk = std::min(width, std::max(int64_t(1), values / s.spatial));
            positions = s.spatial > values ? std::max(values, ceil(s.spatial, most)) : s.spatial;
            spans = ceil(s.spatial, positions);
            chunks = ceil(width, channels_per_chunk) * spans;
            bytes = width * s.spatial * item;
        }
    }

    static int64_t ceil(int64_t a, int64_t b) { return (a + b - 1) / b; }
};

// the range of `count` that a thread of a team has
struct Share {
    int64_t begin, end;

    explicit Share(int64_t count) {
#ifdef _OPENMP
        const int64_t team = omp_get_num_threads(), me = omp_get_thread_num();
#else
        const int64_t team = 1, me = 0;
#endif
        begin = count * me / team, end = count * (me + 1) / team;
    }
};

// reduce every chunk, finish each unit, apply to every chunk
template <class Reduce, class Finish, class Apply>
void sweep(const Cut& cut, int threads, Reduce reduce, Finish finish, Apply apply) {
    // a unit that stays in one core's cache is read from memory once
    constexpr int64_t cache = 1 << 20, small = 1 << 16;
    if (cut.units * cut.bytes <= small) threads = 1;
    if (threads == 1 || (cut.units >= threads && cut.bytes <= cache)) {
#pragma omp parallel for num_threads(threads) schedule(static) if (threads > 1)
        for (int64_t u = 0; u < cut.units; ++u) {
            for (int64_t c = 0; c < cut.chunks; ++c) reduce(u, c);
            finish(u);
            for (int64_t c = cut.chunks; c-- > 0;) apply(u, c);
        }
        return;
    }
#pragma omp parallel num_threads(threads)
    {
        const Share mine(cut.units * cut.chunks);
        for (int64_t i = mine.begin; i < mine.end; ++i) reduce(i / cut.chunks, i % cut.chunks);
#pragma omp barrier
#pragma omp for schedule(static)
        for (int64_t u = 0; u < cut.units; ++u) finish(u);
        // what this core read last is still in its cache
        for (int64_t i = mine.end; i-- > mine.begin;) apply(i / cut.chunks, i % cut.chunks);
    }
}

// where a chunk of the contiguous layout lies: channels of its sample, and spatial positions
struct Place {
    int64_t sample, group, begin_channel, end_channel, begin, count;

    Place(const GroupNormShape& s, const Cut& cut, int64_t unit, int64_t chunk) {
        const int64_t width = s.channels / s.groups;
        sample = unit / s.groups, group = unit % s.groups;
        const int64_t first = chunk / cut.spans * cut.channels_per_chunk;
        begin_channel = group * width + first;
        end_channel = group * width + std::min(first + cut.channels_per_chunk, width);
        begin = chunk % cut.spans * cut.positions;
        count = std::min(cut.positions, s.spatial - begin);
    }

    int64_t offset(const GroupNormShape& s, int64_t channel) const {
        return (sample * s.channels + channel) * s.spatial + begin;
    }
};

// Chan, Golub & LeVeque 1979: counts, means and sums of squared deviations, merged in the order given
template <class Each>
void merge(Each each, double* mean, double* variance) {
    double count = 0, sum = 0;
    each([&](const Moments& m) { count += m.count, sum += m.count * m.shift + m.sum; });
    *mean = sum / count;
    double deviations = 0;
    each([&](const Moments& m) {
        const double inner = m.sum / m.count, outer = m.shift + inner - *mean;
        deviations += m.squares - m.sum * inner + m.count * outer * outer;
    });
    *variance = std::max(deviations / count, 0.0);
}

// a NaN from outside may carry any bits; the one that rounding to bfloat16 keeps has none in its lower half
float canonical(double value) { return value == value ? (float)value : std::numeric_limits<float>::quiet_NaN(); }

// Numbers of every channel of every sample, in the order in which the loops take them: channels-last loops in that of
// their steps, up to a whole number of steps; the others as they come.
template <class T>
struct Channels {
    const bool steps;
    const int64_t stride;

    explicit Channels(const GroupNormShape& s)
        : steps(s.channels_last),
          stride(steps ? Cut::ceil(s.channels, Step<T>::WIDTH) * Step<T>::WIDTH : s.channels) {}

    int64_t at(int64_t sample, int64_t channel) const {
        return sample * stride + (steps ? position<T>(channel) : channel);
    }
};

template <class T>
void forward(const GroupNormShape& s, const T* x, T* y, float* mean, float* rstd, const float* weight,
             const float* bias, const float* scale, const float* shift, double eps) {
    const Loops<T>& loop = loops<T>(s.target);
    const Cut cut(s, sizeof(T));
    const Channels<T> order(s);
    const int64_t width = s.channels / s.groups, all = s.batch * order.stride;
    std::vector<float> center(all), factor(all), offset(all);

    auto finish = [&](int64_t sample, int64_t group, double average, double variance) {
        const double inverse = 1 / std::sqrt(variance + eps);
        const float nearest = (float)average;
        mean[sample * s.groups + group] = nearest;
        rstd[sample * s.groups + group] = (float)inverse;
        for (int64_t c = group * width; c < (group + 1) * width; ++c) {
            const int64_t i = sample * s.channels + c, to = order.at(sample, c);
            const double film = scale ? 1 + (double)scale[i] : 1;
            const double slope = inverse * weight[c] * film;
            center[to] = nearest;
            factor[to] = canonical(slope);
            // what rounding took from the mean is given back
            offset[to] = canonical(bias[c] * film + (shift ? shift[i] : 0) + (nearest - average) * slope);
        }
    };

    if (!s.channels_last) {
        std::vector<Moments> parts(cut.units * cut.chunks);
        sweep(
            cut, s.threads,
            [&](int64_t u, int64_t c) {
                const Place p(s, cut, u, c);
                const int64_t count = (p.end_channel - p.begin_channel - 1) * s.spatial + p.count;
                loop.moments_of_run(x + p.offset(s, p.begin_channel), count, &parts[u * cut.chunks + c]);
            },
            [&](int64_t u) {
                double average, variance;
                merge(
                    [&](auto add) {
                        for (int64_t c = 0; c < cut.chunks; ++c) add(parts[u * cut.chunks + c]);
                    },
                    &average, &variance);
                finish(u / s.groups, u % s.groups, average, variance);
            },
            [&](int64_t u, int64_t c) {
                const Place p(s, cut, u, c);
                for (int64_t k = p.begin_channel; k < p.end_channel; ++k) {
                    const int64_t i = p.sample * s.channels + k, at = p.offset(s, k);
                    loop.apply_to_run(x + at, y + at, p.count, center[i], factor[i], offset[i], s.silu);
                }
            });
        return;
    }
    std::vector<double> parts(cut.units * cut.chunks * 3 * order.stride);
    auto rows = [&](int64_t c) { return std::min(cut.positions, s.spatial - c * cut.positions); };
    auto at = [&](int64_t u, int64_t c) { return (u * s.spatial + c * cut.positions) * s.channels; };
    sweep(
        cut, s.threads,
        [&](int64_t u, int64_t c) {
            double* part = &parts[(u * cut.chunks + c) * 3 * order.stride];
            loop.moments_of_rows(x + at(u, c), rows(c), s.channels, part, part + order.stride,
                                 part + 2 * order.stride);
        },
        [&](int64_t u) {
            for (int64_t g = 0; g < s.groups; ++g) {
                double average, variance;
                merge(
                    [&](auto add) {
                        for (int64_t c = 0; c < cut.chunks; ++c) {
                            const double* part = &parts[(u * cut.chunks + c) * 3 * order.stride];
                            for (int64_t k = g * width; k < (g + 1) * width; ++k) {
                                const double* p = part + order.at(0, k);
                                add({*p, p[order.stride], p[2 * order.stride], (double)rows(c)});
                            }
                        }
                    },
                    &average, &variance);
                finish(u, g, average, variance);
            }
        },
        [&](int64_t u, int64_t c) {
            const int64_t i = u * order.stride;
            const Coefficients k = {&center[i], &factor[i], &offset[i], nullptr, nullptr, nullptr};
            loop.apply_to_rows(x + at(u, c), y + at(u, c), rows(c), s.channels, k, s.silu);
        });
}

template <class T>
void backward(const GroupNormShape& s, const T* dy, const T* x, const float* mean, const float* rstd,
              const float* weight, const float* bias, const float* scale, const float* shift, T* dx, float* dweight,
              float* dbias, float* dscale, float* dshift) {
    const Loops<T>& loop = loops<T>(s.target);
    const Cut cut(s, 2 * sizeof(T));
    const Channels<T> order(s);
    const int64_t width = s.channels / s.groups, all = s.batch * order.stride;
    std::vector<float> center(all), factor(all), offset(all), inverse(all), term(all), slope(all);
    for (int64_t sample = 0; sample < s.batch; ++sample)
        for (int64_t c = 0; c < s.channels; ++c) {
            const int64_t i = sample * s.channels + c, unit = sample * s.groups + c / width;
            const int64_t to = order.at(sample, c);
            const float film = scale ? 1 + scale[i] : 1;
            center[to] = mean[unit];
            inverse[to] = rstd[unit];
            factor[to] = canonical(rstd[unit] * weight[c] * film);
            offset[to] = canonical(bias[c] * film + (shift ? shift[i] : 0));
        }
    // sums of du and of du * x_hat: [sample, span, channel]
    std::vector<double> sums(s.batch * cut.spans * order.stride), products(sums.size());
    std::vector<double> total(s.batch * s.channels), product(total.size());

    auto finish = [&](int64_t sample, int64_t group) {
        double plain = 0, weighted = 0;
        for (int64_t c = group * width; c < (group + 1) * width; ++c) {
            const int64_t i = sample * s.channels + c;
            for (int64_t span = 0; span < cut.spans; ++span) {
                const int64_t part = order.at(sample * cut.spans + span, c);
                total[i] += sums[part], product[i] += products[part];
            }
            if (dshift) dshift[i] = (float)total[i];
            if (dscale) dscale[i] = (float)(weight[c] * product[i] + bias[c] * total[i]);
            const double film = weight[c] * (scale ? 1 + (double)scale[i] : 1);
            plain += film * total[i], weighted += film * product[i];
        }
        const double r = rstd[sample * s.groups + group], count = (double)(width * s.spatial);
        for (int64_t c = group * width; c < (group + 1) * width; ++c) {
            const int64_t to = order.at(sample, c);
            term[to] = (float)(r * plain / count);
            slope[to] = (float)(r * r * weighted / count);
        }
    };

    if (!s.channels_last) {
        sweep(
            cut, s.threads,
            [&](int64_t u, int64_t c) {
                const Place p(s, cut, u, c);
                for (int64_t k = p.begin_channel; k < p.end_channel; ++k) {
                    const int64_t i = p.sample * s.channels + k, at = p.offset(s, k);
                    const int64_t part = (p.sample * cut.spans + c % cut.spans) * s.channels + k;
                    loop.sums_of_run(dy + at, x + at, p.count, center[i], inverse[i], factor[i], offset[i], s.silu,
                                     &sums[part], &products[part]);
                }
            },
            [&](int64_t u) { finish(u / s.groups, u % s.groups); },
            [&](int64_t u, int64_t c) {
                const Place p(s, cut, u, c);
                for (int64_t k = p.begin_channel; k < p.end_channel; ++k) {
                    const int64_t i = p.sample * s.channels + k, at = p.offset(s, k);
                    loop.gradient_of_run(dy + at, x + at, dx + at, p.count, center[i], factor[i], offset[i], term[i],
                                         slope[i], s.silu);
                }
            });
    } else {
        auto rows = [&](int64_t c) { return std::min(cut.positions, s.spatial - c * cut.positions); };
        auto at = [&](int64_t u, int64_t c) { return (u * s.spatial + c * cut.positions) * s.channels; };
        auto coefficients = [&](int64_t u) {
            const int64_t i = u * order.stride;
            return Coefficients{&center[i], &factor[i], &offset[i], &inverse[i], &term[i], &slope[i]};
        };
        sweep(
            cut, s.threads,
            [&](int64_t u, int64_t c) {
                const int64_t part = (u * cut.chunks + c) * order.stride;
                loop.sums_of_rows(dy + at(u, c), x + at(u, c), rows(c), s.channels, coefficients(u), s.silu,
                                  &sums[part], &products[part]);
            },
            [&](int64_t u) {
                for (int64_t g = 0; g < s.groups; ++g) finish(u, g);
            },
            [&](int64_t u, int64_t c) {
                loop.gradient_of_rows(dy + at(u, c), x + at(u, c), dx + at(u, c), rows(c), s.channels,
                                      coefficients(u), s.silu);
            });
    }
    for (int64_t c = 0; c < s.channels; ++c) {
        double w = 0, b = 0;
        for (int64_t i = c; i < s.batch * s.channels; i += s.channels) {
            const double film = scale ? 1 + (double)scale[i] : 1;
            w += film * product[i], b += film * total[i];
        }
        dweight[c] = (float)w, dbias[c] = (float)b;
    }
}

}  // namespace

void group_norm_forward(const GroupNormShape& s, const void* x, void* y, float* mean, float* rstd,
                        const float* weight, const float* bias, const float* scale, const float* shift, double eps) {
    if (s.bfloat16)
        forward(s, (const bf16*)x, (bf16*)y, mean, rstd, weight, bias, scale, shift, eps);
    else
        forward(s, (const float*)x, (float*)y, mean, rstd, weight, bias, scale, shift, eps);
}

void group_norm_backward(const GroupNormShape& s, const void* dy, const void* x, const float* mean,
                         const float* rstd, const float* weight, const float* bias, const float* scale,
                         const float* shift, void* dx, float* dweight, float* dbias, float* dscale, float* dshift) {
    if (s.bfloat16)
        backward(s, (const bf16*)dy, (const bf16*)x, mean, rstd, weight, bias, scale, shift, (bf16*)dx, dweight,
                 dbias, dscale, dshift);
    else
        backward(s, (const float*)dy, (const float*)x, mean, rstd, weight, bias, scale, shift, (float*)dx, dweight,
                 dbias, dscale, dshift);
}

bool group_norm_runs(Target target) {
#ifdef SEMANTICA_X86_VARIANTS
    __builtin_cpu_init();
    if (target == Target::avx512)
        return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
               __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
    if (target == Target::avx2) return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
#endif
    return target == Target::baseline;
}

}  // namespace semantica
#endif
