// The inner loops of GroupNorm over one chunk. T is the storage type; all arithmetic is fp32, long sums are flushed to
// double. A chunk is a run of values (contiguous layout) or rows of channels (channels-last).
#pragma once

#include "lanes.h"

#ifdef SEMANTICA_LANES
namespace semantica {

// sum of d and of d * d, d = x - shift, over `count` values
struct Moments {
    double shift, sum, squares, count;
};

// what maps each channel's x to its result: u = (x - mean) * scale + offset; backward: also 1/std and the two group
// terms. In the order of the steps (see `position`), up to a whole number of steps.
struct Coefficients {
    const float *mean, *scale, *offset, *rstd, *term, *slope;
};

// values after which fp32 sums are flushed
constexpr int64_t FLUSH_VALUES = 4096;
constexpr int64_t FLUSH_ROWS = 64;
// what is summed before it joins the other fp32 sums: two short sums lose fewer digits than a long one
constexpr int64_t SHORT_VALUES = 256;
constexpr int64_t SHORT_ROWS = 8;
// vectors of channels whose sums are carried together, so that rows are read as they lie in memory
constexpr int64_t PANEL = 32;
// steps side by side, as an addition takes several cycles
constexpr int64_t ABREAST = 2;

template <class T>
INLINE void moments_of_run(const T* x, int64_t count, Moments* out) {
    constexpr int64_t vectors = Step<T>::VECTORS, width = Step<T>::WIDTH;
    // shifting by a nearby value keeps the sums small where |mean| >> std
    const int64_t few = count < 64 ? count : 64;
    double head = 0;
    over<T>(0, few, [&](int64_t i, int64_t part) BODY {
        const Step<T> a = load(x + i, part);
        for (int64_t j = 0; j < vectors; ++j) head += sum(a.v[j]);
    });
    const float shift = (float)(head / few);
    double total = 0, squares = 0;
    for (int64_t begin = 0; begin < count; begin += FLUSH_VALUES) {
        const int64_t end = begin + FLUSH_VALUES < count ? begin + FLUSH_VALUES : count;
        Lanes s[ABREAST * vectors] = {}, q[ABREAST * vectors] = {};
        int64_t i = begin;
        for (; i + ABREAST * width <= end; i += ABREAST * width)
            for (int64_t k = 0; k < ABREAST; ++k) {
                const Step<T> a = load(x + i + k * width);
                for (int64_t j = 0; j < vectors; ++j) {
                    const Lanes d = a.v[j] - shift;
                    s[k * vectors + j] += d;
                    q[k * vectors + j] += d * d;
                }
            }
        over<T>(i, end, [&](int64_t k, int64_t part) BODY {
            const Step<T> a = load(x + k, part);
            for (int64_t j = 0; j < vectors; ++j) {
                const Lanes d = first<T>(a.v[j] - shift, j, part);
                s[j] += d;
                q[j] += d * d;
            }
        });
        for (int64_t k = 0; k < ABREAST * vectors; ++k) {
            total += sum(s[k]);
            squares += sum(q[k]);
        }
    }
    *out = {shift, total, squares, (double)count};
}

template <bool silu>
INLINE Lanes activate(Lanes u) {
    if (!silu) return u;
    u = bounded_below(u);
    return u * sigmoid(u);
}

template <bool silu>
INLINE Lanes derivative(Lanes u) {
    if (!silu) return broadcast(1.0f);
    u = bounded_below(u);
    const Lanes s = sigmoid(u);
    return s * (1.0f + u * (1.0f - s));
}

template <class T, bool silu>
INLINE void apply_to_run(const T* x, T* y, int64_t count, float mean, float scale, float offset) {
    over<T>(0, count, [&](int64_t i, int64_t part) BODY {
        Step<T> a = load(x + i, part);
        for (Lanes& v : a.v) v = activate<silu>((v - mean) * scale + offset);
        store(y + i, a, part);
    });
}

// sums over a run of du and du * x_hat, du = dy * act'(u), which is kept in whole steps if asked for
template <class T, bool silu, bool keep>
INLINE void sums_of_run(const T* dy, const T* x, int64_t count, float mean, float rstd, float scale, float offset,
                        double* sum_du, double* sum_dux, float* kept) {
    *sum_du = *sum_dux = 0;
    for (int64_t begin = 0; begin < count; begin += FLUSH_VALUES) {
        const int64_t end = begin + FLUSH_VALUES < count ? begin + FLUSH_VALUES : count;
        Lanes p = {}, q = {};
        for (int64_t middle = begin; middle < end; middle += SHORT_VALUES) {
            const int64_t stop = middle + SHORT_VALUES < end ? middle + SHORT_VALUES : end;
            Lanes t = {}, w = {};
            over<T>(middle, stop, [&](int64_t i, int64_t part) BODY {
                // dy is zero beyond the end
                const Step<T> a = load(x + i, part), g = load(dy + i, part);
                for (int64_t j = 0; j < Step<T>::VECTORS; ++j) {
                    const Lanes d = a.v[j] - mean, du = g.v[j] * derivative<silu>(d * scale + offset);
                    if (keep) keep_lanes(kept + i, j, du);
                    t += du;
                    w += du * (d * rstd);
                }
            });
            p += t, q += w;
        }
        *sum_du += sum(p);
        *sum_dux += sum(q);
    }
}

// dx = du * scale - term - d * slope, d = x - mean; du is made anew from dy, or was kept
template <class T, bool silu, bool keep>
INLINE void gradient_of_run(const T* dy, const T* x, T* dx, int64_t count, float mean, float scale, float offset,
                            float term, float slope, const float* kept) {
    over<T>(0, count, [&](int64_t i, int64_t part) BODY {
        const Step<T> a = load(x + i, part), g = keep ? Step<T>{} : load(dy + i, part);
        Step<T> result;
        for (int64_t j = 0; j < Step<T>::VECTORS; ++j) {
            const Lanes d = a.v[j] - mean;
            const Lanes du = keep ? lanes(kept + i, j) : g.v[j] * derivative<silu>(d * scale + offset);
            result.v[j] = du * scale - term - d * slope;
        }
        store(dx + i, result, part);
    });
}

// per channel, over rows [rows][channels], in the order of the steps: shift, sum and squares
template <class T>
INLINE void moments_of_rows(const T* x, int64_t rows, int64_t channels, double* shift, double* total,
                            double* squares) {
    constexpr int64_t vectors = Step<T>::VECTORS;
    const int64_t few = rows < 8 ? rows : 8;
    Lanes head[PANEL], s[PANEL], q[PANEL];
    for (int64_t left = 0; left < channels; left += PANEL * LANES) {
        const int64_t right = left + PANEL * LANES < channels ? left + PANEL * LANES : channels;
        over<T>(left, right, [&](int64_t c, int64_t part) BODY {
            Lanes h[vectors] = {};
            for (int64_t r = 0; r < few; ++r) {
                const Step<T> a = load(x + r * channels + c, part);
                for (int64_t j = 0; j < vectors; ++j) h[j] += a.v[j];
            }
            for (int64_t j = 0; j < vectors; ++j) {
                head[(c - left) / LANES + j] = h[j] / (float)few;
                spread(shift + c + j * LANES, head[(c - left) / LANES + j], false);
            }
        });
        for (int64_t begin = 0; begin < rows; begin += FLUSH_ROWS) {
            const int64_t end = begin + FLUSH_ROWS < rows ? begin + FLUSH_ROWS : rows;
            for (int64_t k = 0; k < PANEL; ++k) s[k] = q[k] = Lanes{};
            for (int64_t middle = begin; middle < end; middle += SHORT_ROWS) {
                const int64_t stop = middle + SHORT_ROWS < end ? middle + SHORT_ROWS : end;
                over<T>(left, right, [&](int64_t c, int64_t part) BODY {
                    const int64_t k = (c - left) / LANES;
                    Lanes t[vectors] = {}, w[vectors] = {};
                    for (int64_t r = middle; r < stop; ++r) {
                        const Step<T> a = load(x + r * channels + c, part);
                        for (int64_t j = 0; j < vectors; ++j) {
                            const Lanes d = a.v[j] - head[k + j];
                            t[j] += d;
                            w[j] += d * d;
                        }
                    }
                    for (int64_t j = 0; j < vectors; ++j) s[k + j] += t[j], q[k + j] += w[j];
                });
            }
            over<T>(left, right, [&](int64_t c, int64_t) BODY {
                for (int64_t j = 0; j < vectors; ++j) {
                    spread(total + c + j * LANES, s[(c - left) / LANES + j], begin > 0);
                    spread(squares + c + j * LANES, q[(c - left) / LANES + j], begin > 0);
                }
            });
        }
    }
}

template <class T, bool silu>
INLINE void apply_to_rows(const T* x, T* y, int64_t rows, int64_t channels, const Coefficients& k) {
    for (int64_t r = 0; r < rows; ++r, x += channels, y += channels)
        over<T>(0, channels, [&](int64_t c, int64_t part) BODY {
            Step<T> a = load(x + c, part);
            for (int64_t j = 0; j < Step<T>::VECTORS; ++j) {
                const Lanes d = a.v[j] - lanes(k.mean + c, j);
                a.v[j] = activate<silu>(d * lanes(k.scale + c, j) + lanes(k.offset + c, j));
            }
            store(y + c, a, part);
        });
}

// in the order of the steps; du of each row is kept in whole steps if asked for
template <class T, bool silu, bool keep>
INLINE void sums_of_rows(const T* dy, const T* x, int64_t rows, int64_t channels, const Coefficients& k,
                         double* sum_du, double* sum_dux, float* kept) {
    constexpr int64_t vectors = Step<T>::VECTORS;
    const int64_t stride = whole_steps<T>(channels);
    Lanes p[PANEL], q[PANEL];
    for (int64_t left = 0; left < channels; left += PANEL * LANES) {
        const int64_t right = left + PANEL * LANES < channels ? left + PANEL * LANES : channels;
        for (int64_t begin = 0; begin < rows; begin += FLUSH_ROWS) {
            const int64_t end = begin + FLUSH_ROWS < rows ? begin + FLUSH_ROWS : rows;
            for (int64_t i = 0; i < PANEL; ++i) p[i] = q[i] = Lanes{};
            for (int64_t middle = begin; middle < end; middle += SHORT_ROWS) {
                const int64_t stop = middle + SHORT_ROWS < end ? middle + SHORT_ROWS : end;
                over<T>(left, right, [&](int64_t c, int64_t part) BODY {
                    const int64_t to = (c - left) / LANES;
                    Lanes t[vectors] = {}, w[vectors] = {};
                    for (int64_t r = middle; r < stop; ++r) {
                        const Step<T> a = load(x + r * channels + c, part), g = load(dy + r * channels + c, part);
                        for (int64_t j = 0; j < vectors; ++j) {
                            const Lanes d = a.v[j] - lanes(k.mean + c, j);
                            const Lanes u = d * lanes(k.scale + c, j) + lanes(k.offset + c, j);
                            const Lanes du = g.v[j] * derivative<silu>(u);
                            if (keep) keep_lanes(kept + r * stride + c, j, du);
                            t[j] += du;
                            w[j] += du * (d * lanes(k.rstd + c, j));
                        }
                    }
                    for (int64_t j = 0; j < vectors; ++j) p[to + j] += t[j], q[to + j] += w[j];
                });
            }
            over<T>(left, right, [&](int64_t c, int64_t) BODY {
                for (int64_t j = 0; j < vectors; ++j) {
                    spread(sum_du + c + j * LANES, p[(c - left) / LANES + j], begin > 0);
                    spread(sum_dux + c + j * LANES, q[(c - left) / LANES + j], begin > 0);
                }
            });
        }
    }
}

template <class T, bool silu, bool keep>
INLINE void gradient_of_rows(const T* dy, const T* x, T* dx, int64_t rows, int64_t channels, const Coefficients& k,
                             const float* kept) {
    const int64_t stride = whole_steps<T>(channels);
    for (int64_t r = 0; r < rows; ++r, x += channels, dy += channels, dx += channels)
        over<T>(0, channels, [&](int64_t c, int64_t part) BODY {
            const Step<T> a = load(x + c, part), g = keep ? Step<T>{} : load(dy + c, part);
            Step<T> result;
            for (int64_t j = 0; j < Step<T>::VECTORS; ++j) {
                const Lanes d = a.v[j] - lanes(k.mean + c, j), scale = lanes(k.scale + c, j);
                const Lanes du = keep ? lanes(kept + r * stride + c, j)
                                      : g.v[j] * derivative<silu>(d * scale + lanes(k.offset + c, j));
                result.v[j] = du * scale - lanes(k.term + c, j) - d * lanes(k.slope + c, j);
            }
            store(dx + c, result, part);
        });
}

}  // namespace semantica
#endif
