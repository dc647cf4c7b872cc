#include "group_norm.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <vector>

#include "group_norm_cut.h"
#include "group_norm_loops.h"

#ifdef SEMANTICA_LANES
namespace semantica {
namespace {

// the loops of one storage type, compiled for one instruction set
template <class T>
struct Loops {
    void (*moments_of_run)(const T*, int64_t, Moments*);
    void (*apply_to_run)(const T*, T*, int64_t, float, float, float, bool);
    void (*sums_of_run)(const T*, const T*, int64_t, float, float, float, float, bool, double*, double*, float*);
    void (*gradient_of_run)(const T*, const T*, T*, int64_t, float, float, float, float, float, bool, const float*);
    void (*moments_of_rows)(const T*, int64_t, int64_t, double*, double*, double*);
    void (*apply_to_rows)(const T*, T*, int64_t, int64_t, const Coefficients&, bool);
    void (*sums_of_rows)(const T*, const T*, int64_t, int64_t, const Coefficients&, bool, double*, double*, float*);
    void (*gradient_of_rows)(const T*, const T*, T*, int64_t, int64_t, const Coefficients&, bool, const float*);
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
                                    bool silu, double* p, double* q, float* k) {                                     \
            k      ? sums_of_run<T, true, true>(dy, x, n, m, r, s, o, p, q, k)                                       \
            : silu ? sums_of_run<T, true, false>(dy, x, n, m, r, s, o, p, q, k)                                      \
                   : sums_of_run<T, false, false>(dy, x, n, m, r, s, o, p, q, k);                                    \
        }                                                                                                            \
        TARGET static void gradient_run(const T* dy, const T* x, T* dx, int64_t n, float m, float s, float o,        \
                                        float t, float l, bool silu, const float* k) {                               \
            k      ? gradient_of_run<T, true, true>(dy, x, dx, n, m, s, o, t, l, k)                                  \
            : silu ? gradient_of_run<T, true, false>(dy, x, dx, n, m, s, o, t, l, k)                                 \
                   : gradient_of_run<T, false, false>(dy, x, dx, n, m, s, o, t, l, k);                               \
        }                                                                                                            \
        TARGET static void moments_rows(const T* x, int64_t n, int64_t c, double* k, double* s, double* q) {         \
            moments_of_rows<T>(x, n, c, k, s, q);                                                                    \
        }                                                                                                            \
        TARGET static void apply_rows(const T* x, T* y, int64_t n, int64_t c, const Coefficients& k, bool silu) {    \
            silu ? apply_to_rows<T, true>(x, y, n, c, k) : apply_to_rows<T, false>(x, y, n, c, k);                   \
        }                                                                                                            \
        TARGET static void sums_rows(const T* dy, const T* x, int64_t n, int64_t c, const Coefficients& k,           \
                                     bool silu, double* p, double* q, float* d) {                                    \
            d      ? sums_of_rows<T, true, true>(dy, x, n, c, k, p, q, d)                                            \
            : silu ? sums_of_rows<T, true, false>(dy, x, n, c, k, p, q, d)                                           \
                   : sums_of_rows<T, false, false>(dy, x, n, c, k, p, q, d);                                         \
        }                                                                                                            \
        TARGET static void gradient_rows(const T* dy, const T* x, T* dx, int64_t n, int64_t c,                       \
                                         const Coefficients& k, bool silu, const float* d) {                         \
            d      ? gradient_of_rows<T, true, true>(dy, x, dx, n, c, k, d)                                          \
            : silu ? gradient_of_rows<T, true, false>(dy, x, dx, n, c, k, d)                                         \
                   : gradient_of_rows<T, false, false>(dy, x, dx, n, c, k, d);                                       \
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
          stride(steps ? whole_steps<T>(s.channels) : s.channels) {}

    int64_t at(int64_t sample, int64_t channel) const {
        return sample * stride + (steps ? position<T>(channel) : channel);
    }
};

template <class T>
void forward(const GroupNormShape& s, const T* x, T* y, float* mean, float* rstd, const float* weight,
             const float* bias, const float* scale, const float* shift, const float* addend, double eps) {
    const Loops<T>& loop = loops<T>(s.target);
    const Cut cut(s, sizeof(T));
    const Channels<T> order(s);
    const int64_t width = s.channels / s.groups, all = s.batch * order.stride;
    std::vector<float> center(all), factor(all), offset(all);

    auto finish = [&](int64_t sample, int64_t group, double average, double variance) {
        const double inverse = 1 / std::sqrt(variance + eps);
        mean[sample * s.groups + group] = (float)average;
        rstd[sample * s.groups + group] = (float)inverse;
        for (int64_t c = group * width; c < (group + 1) * width; ++c) {
            const int64_t i = sample * s.channels + c, to = order.at(sample, c);
            const double film = scale ? 1 + (double)scale[i] : 1;
            const double slope = inverse * weight[c] * film;
            // of x itself: the addend moves the mean of its channel, and costs no pass
            const double middle = average - (addend ? addend[i] : 0);
            center[to] = canonical(middle);
            factor[to] = canonical(slope);
            // what rounding took from the mean is given back
            offset[to] = canonical(bias[c] * film + (shift ? shift[i] : 0) + (center[to] - middle) * slope);
        }
    };

    if (!s.channels_last) {
        // an addend differs from channel to channel: then each has moments of its own
        const int64_t runs = addend ? cut.channels_per_chunk : 1;
        std::vector<Moments> parts(cut.units * cut.chunks * runs);
        sweep(
            cut, s.threads,
            [&](int64_t u, int64_t c) {
                const Place p(s, cut, u, c);
                Moments* part = &parts[(u * cut.chunks + c) * runs];
                if (!addend) {
                    const int64_t count = (p.end_channel - p.begin_channel - 1) * s.spatial + p.count;
                    loop.moments_of_run(x + p.offset(s, p.begin_channel), count, part);
                    return;
                }
                for (int64_t k = p.begin_channel; k < p.end_channel; ++k, ++part) {
                    loop.moments_of_run(x + p.offset(s, k), p.count, part);
                    part->shift += addend[p.sample * s.channels + k];
                }
            },
            [&](int64_t u) {
                double average, variance;
                merge(
                    [&](auto add) {
                        for (int64_t i = u * cut.chunks * runs; i < (u + 1) * cut.chunks * runs; ++i)
                            // a group's last chunk may have fewer channels
                            if (parts[i].count > 0) add(parts[i]);
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
                                const double more = addend ? addend[u * s.channels + k] : 0;
                                add({*p + more, p[order.stride], p[2 * order.stride], (double)rows(c)});
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
              const float* weight, const float* bias, const float* scale, const float* shift, const float* addend,
              T* dx, float* dweight, float* dbias, float* dscale, float* dshift) {
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
            center[to] = canonical(mean[unit] - (addend ? addend[i] : 0));
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
            term[to] = canonical(r * plain / count);
            slope[to] = canonical(r * r * weighted / count);
        }
    };

    if (!s.channels_last) {
        const int64_t run = whole_steps<T>(cut.positions), chunk = cut.channels_per_chunk * run;
        const Kept kept(cut, s.threads, s.silu, cut.chunks * chunk);
        auto place = [&](const Place& p, int64_t c, int64_t k) {
            return kept.at(c * chunk + (k - p.begin_channel) * run);
        };
        sweep(
            cut, s.threads,
            [&](int64_t u, int64_t c) {
                const Place p(s, cut, u, c);
                for (int64_t k = p.begin_channel; k < p.end_channel; ++k) {
                    const int64_t i = p.sample * s.channels + k, at = p.offset(s, k);
                    const int64_t part = (p.sample * cut.spans + c % cut.spans) * s.channels + k;
                    loop.sums_of_run(dy + at, x + at, p.count, center[i], inverse[i], factor[i], offset[i], s.silu,
                                     &sums[part], &products[part], place(p, c, k));
                }
            },
            [&](int64_t u) { finish(u / s.groups, u % s.groups); },
            [&](int64_t u, int64_t c) {
                const Place p(s, cut, u, c);
                for (int64_t k = p.begin_channel; k < p.end_channel; ++k) {
                    const int64_t i = p.sample * s.channels + k, at = p.offset(s, k);
                    loop.gradient_of_run(dy + at, x + at, dx + at, p.count, center[i], factor[i], offset[i], term[i],
                                         slope[i], s.silu, place(p, c, k));
                }
            });
    } else {
        auto rows = [&](int64_t c) { return std::min(cut.positions, s.spatial - c * cut.positions); };
        auto at = [&](int64_t u, int64_t c) { return (u * s.spatial + c * cut.positions) * s.channels; };
        const Kept kept(cut, s.threads, s.silu, s.spatial * order.stride);
        auto place = [&](int64_t c) { return kept.at(c * cut.positions * order.stride); };
        auto coefficients = [&](int64_t u) {
            const int64_t i = u * order.stride;
            return Coefficients{&center[i], &factor[i], &offset[i], &inverse[i], &term[i], &slope[i]};
        };
        sweep(
            cut, s.threads,
            [&](int64_t u, int64_t c) {
                const int64_t part = (u * cut.chunks + c) * order.stride;
                loop.sums_of_rows(dy + at(u, c), x + at(u, c), rows(c), s.channels, coefficients(u), s.silu,
                                  &sums[part], &products[part], place(c));
            },
            [&](int64_t u) {
                for (int64_t g = 0; g < s.groups; ++g) finish(u, g);
            },
            [&](int64_t u, int64_t c) {
                loop.gradient_of_rows(dy + at(u, c), x + at(u, c), dx + at(u, c), rows(c), s.channels,
                                      coefficients(u), s.silu, place(c));
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
                        const float* weight, const float* bias, const float* scale, const float* shift,
                        const float* addend, double eps) {
    if (s.bfloat16)
        forward(s, (const bf16*)x, (bf16*)y, mean, rstd, weight, bias, scale, shift, addend, eps);
    else
        forward(s, (const float*)x, (float*)y, mean, rstd, weight, bias, scale, shift, addend, eps);
}

void group_norm_backward(const GroupNormShape& s, const void* dy, const void* x, const float* mean,
                         const float* rstd, const float* weight, const float* bias, const float* scale,
                         const float* shift, const float* addend, void* dx, float* dweight, float* dbias,
                         float* dscale, float* dshift) {
    if (s.bfloat16)
        backward(s, (const bf16*)dy, (const bf16*)x, mean, rstd, weight, bias, scale, shift, addend, (bf16*)dx,
                 dweight, dbias, dscale, dshift);
    else
        backward(s, (const float*)dy, (const float*)x, mean, rstd, weight, bias, scale, shift, addend, (float*)dx,
                 dweight, dbias, dscale, dshift);
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
