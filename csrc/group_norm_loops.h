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

// what maps one channel's x to its result: u = (x - mean) * scale + offset; backward: also 1/std and the two group terms
struct Coefficients {
    const float *mean, *scale, *offset, *rstd, *term, *slope;
};

// values after which fp32 sums are flushed
constexpr int64_t FLUSH_VALUES = 4096;
constexpr int64_t FLUSH_ROWS = 64;
// what is summed before it joins the other fp32 sums: two short sums lose fewer digits than a long one
constexpr int64_t SHORT_VALUES = 256;
constexpr int64_t SHORT_ROWS = 8;
// sums kept side by side, as an addition takes several cycles
constexpr int64_t RUN_WIDTH = 4;
// registers' worth of channels that one pass over the rows takes
constexpr int64_t ROW_WIDTH = 2;

template <class T>
INLINE void moments_of_run(const T* x, int64_t count, Moments* out) {
    // shifting by a nearby value keeps the sums small where |mean| >> std
    const int64_t few = count < 64 ? count : 64;
    double head = 0;
    for (int64_t i = 0; i < few; i += LANES) {
        const int64_t part = few - i < LANES ? few - i : LANES;
        head += sum(load(x + i, part));
    }
    const float shift = (float)(head / few);
    double total = 0, squares = 0;
    for (int64_t begin = 0; begin < count; begin += FLUSH_VALUES) {
        const int64_t end = begin + FLUSH_VALUES < count ? begin + FLUSH_VALUES : count;
        Lanes s[RUN_WIDTH] = {}, q[RUN_WIDTH] = {};
        int64_t i = begin;
        for (; i + RUN_WIDTH * LANES <= end; i += RUN_WIDTH * LANES)
            for (int64_t j = 0; j < RUN_WIDTH; ++j) {
                const Lanes d = load(x + i + j * LANES) - shift;
                s[j] += d;
                q[j] += d * d;
            }
        over(i, end, [&](int64_t k, int64_t part) BODY {
            const Lanes d = first(load(x + k, part) - shift, part);
            s[0] += d;
            q[0] += d * d;
        });
        total += sum((s[0] + s[1]) + (s[2] + s[3]));
        squares += sum((q[0] + q[1]) + (q[2] + q[3]));
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
    over(0, count, [&](int64_t i, int64_t part) BODY {
        store(y + i, activate<silu>((load(x + i, part) - mean) * scale + offset), part);
    });
}

// sums over a run of du and du * x_hat, du = dy * act'(u)
template <class T, bool silu>
INLINE void sums_of_run(const T* dy, const T* x, int64_t count, float mean, float rstd, float scale, float offset,
                        double* sum_du, double* sum_dux) {
    *sum_du = *sum_dux = 0;
    for (int64_t begin = 0; begin < count; begin += FLUSH_VALUES) {
        const int64_t end = begin + FLUSH_VALUES < count ? begin + FLUSH_VALUES : count;
        Lanes p = {}, q = {};
        for (int64_t middle = begin; middle < end; middle += SHORT_VALUES) {
            const int64_t stop = middle + SHORT_VALUES < end ? middle + SHORT_VALUES : end;
            Lanes t = {}, w = {};
            over(middle, stop, [&](int64_t i, int64_t part) BODY {
                const Lanes d = load(x + i, part) - mean;
                // dy is zero beyond the end
                const Lanes du = load(dy + i, part) * derivative<silu>(d * scale + offset);
                t += du;
                w += du * (d * rstd);
            });
            p += t, q += w;
        }
        *sum_du += sum(p);
        *sum_dux += sum(q);
    }
}

// dx = du * scale - term - d * slope, d = x - mean
template <class T, bool silu>
INLINE void gradient_of_run(const T* dy, const T* x, T* dx, int64_t count, float mean, float scale, float offset,
                            float term, float slope) {
    over(0, count, [&](int64_t i, int64_t part) BODY {
        const Lanes d = load(x + i, part) - mean;
        const Lanes du = load(dy + i, part) * derivative<silu>(d * scale + offset);
        store(dx + i, du * scale - term - d * slope, part);
    });
}

// per channel, over rows [rows][channels]: shift [C], sum and squares [C]
template <class T, int64_t width>
INLINE void moments_of_columns(const T* x, int64_t rows, int64_t channels, int64_t lanes, double* shift, double* total,
                               double* squares) {
    const int64_t few = rows < 8 ? rows : 8;
    Lanes head[width] = {};
    for (int64_t r = 0; r < few; ++r)
        for (int64_t j = 0; j < width; ++j) head[j] += load(x + r * channels + j * LANES, lanes);
    for (int64_t j = 0; j < width; ++j) head[j] /= (float)few;
    for (int64_t begin = 0; begin < rows; begin += FLUSH_ROWS) {
        const int64_t end = begin + FLUSH_ROWS < rows ? begin + FLUSH_ROWS : rows;
        Lanes s[width] = {}, q[width] = {};
        for (int64_t middle = begin; middle < end; middle += SHORT_ROWS) {
            const int64_t stop = middle + SHORT_ROWS < end ? middle + SHORT_ROWS : end;
            Lanes t[width] = {}, w[width] = {};
            for (int64_t r = middle; r < stop; ++r)
                for (int64_t j = 0; j < width; ++j) {
                    const Lanes d = load(x + r * channels + j * LANES, lanes) - head[j];
                    t[j] += d;
                    w[j] += d * d;
                }
            for (int64_t j = 0; j < width; ++j) s[j] += t[j], q[j] += w[j];
        }
        for (int64_t j = 0; j < width; ++j)
            for (int64_t i = 0; i < lanes; ++i) {
                const int64_t c = j * LANES + i;
                total[c] = (begin ? total[c] : 0) + s[j][i];
                squares[c] = (begin ? squares[c] : 0) + q[j][i];
            }
    }
    for (int64_t j = 0; j < width; ++j)
        for (int64_t i = 0; i < lanes; ++i) shift[j * LANES + i] = head[j][i];
}

template <class T>
INLINE void moments_of_rows(const T* x, int64_t rows, int64_t channels, double* shift, double* total,
                            double* squares) {
    int64_t c = 0;
    for (; c + ROW_WIDTH * LANES <= channels; c += ROW_WIDTH * LANES)
        moments_of_columns<T, ROW_WIDTH>(x + c, rows, channels, LANES, shift + c, total + c, squares + c);
    over(c, channels, [&](int64_t k, int64_t lanes) BODY {
        moments_of_columns<T, 1>(x + k, rows, channels, lanes, shift + k, total + k, squares + k);
    });
}

template <class T, bool silu>
INLINE void apply_to_rows(const T* x, T* y, int64_t rows, int64_t channels, const Coefficients& k) {
    for (int64_t r = 0; r < rows; ++r, x += channels, y += channels)
        over(0, channels, [&](int64_t c, int64_t lanes) BODY {
            const Lanes d = load(x + c, lanes) - load(k.mean + c, lanes);
            store(y + c, activate<silu>(d * load(k.scale + c, lanes) + load(k.offset + c, lanes)), lanes);
        });
}

template <class T, bool silu>
INLINE void sums_of_rows(const T* dy, const T* x, int64_t rows, int64_t channels, const Coefficients& k,
                         double* sum_du, double* sum_dux) {
    over(0, channels, [&](int64_t c, int64_t lanes) BODY {
        const Lanes mean = load(k.mean + c, lanes), scale = load(k.scale + c, lanes);
        const Lanes offset = load(k.offset + c, lanes), rstd = load(k.rstd + c, lanes);
        for (int64_t begin = 0; begin < rows; begin += FLUSH_ROWS) {
            const int64_t end = begin + FLUSH_ROWS < rows ? begin + FLUSH_ROWS : rows;
            Lanes p = {}, q = {};
            for (int64_t middle = begin; middle < end; middle += SHORT_ROWS) {
                const int64_t stop = middle + SHORT_ROWS < end ? middle + SHORT_ROWS : end;
                Lanes t = {}, w = {};
                for (int64_t r = middle; r < stop; ++r) {
                    const Lanes d = load(x + r * channels + c, lanes) - mean;
                    const Lanes du = load(dy + r * channels + c, lanes) * derivative<silu>(d * scale + offset);
                    t += du;
                    w += du * (d * rstd);
                }
                p += t, q += w;
            }
            for (int64_t i = 0; i < lanes; ++i) {
                sum_du[c + i] = (begin ? sum_du[c + i] : 0) + p[i];
                sum_dux[c + i] = (begin ? sum_dux[c + i] : 0) + q[i];
            }
        }
    });
}

template <class T, bool silu>
INLINE void gradient_of_rows(const T* dy, const T* x, T* dx, int64_t rows, int64_t channels, const Coefficients& k) {
    for (int64_t r = 0; r < rows; ++r, x += channels, dy += channels, dx += channels)
        over(0, channels, [&](int64_t c, int64_t lanes) BODY {
            const Lanes d = load(x + c, lanes) - load(k.mean + c, lanes), scale = load(k.scale + c, lanes);
            const Lanes du = load(dy + c, lanes) * derivative<silu>(d * scale + load(k.offset + c, lanes));
            store(dx + c, du * scale - load(k.term + c, lanes) - d * load(k.slope + c, lanes), lanes);
        });
}

}  // namespace semantica
#endif
