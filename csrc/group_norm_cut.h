// How group_norm cuts a tensor into units and chunks, and how threads share them.
#pragma once

#include <algorithm>
#include <cstdint>
#include <memory>

#include "group_norm.h"

#ifdef _OPENMP
#include <omp.h>
#endif

namespace semantica {
namespace {

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

// a tensor so small that a second thread would take longer to start
int team_of(const Cut& cut, int threads) { return cut.units * cut.bytes <= 1 << 16 ? 1 : threads; }

// whether each unit is one thread's own: it stays in that core's cache, and is read from memory once
bool unit_by_unit(const Cut& cut, int threads) {
    return threads == 1 || (cut.units >= threads && cut.bytes <= 1 << 20);
}

// reduce every chunk, finish each unit, apply to every chunk
template <class Reduce, class Finish, class Apply>
void sweep(const Cut& cut, int threads, Reduce reduce, Finish finish, Apply apply) {
    threads = team_of(cut, threads);
    if (unit_by_unit(cut, threads)) {
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

// Scratch for what the first pass over a unit works out and the second needs again, one unit's worth for each thread:
// none where a unit leaves the cache in between, or is shared by threads.
class Kept {
    const int64_t unit;
    std::unique_ptr<float[]> values;

   public:
    Kept(const Cut& cut, int threads, bool wanted, int64_t unit) : unit(unit) {
        threads = team_of(cut, threads);
        // x, dy, dx and the scratch in what a core's own cache holds
        const int64_t bytes = cut.bytes / 2 * 3 + unit * (int64_t)sizeof(float);
        if (wanted && unit_by_unit(cut, threads) && bytes <= 3 << 19) values.reset(new float[threads * unit]);
    }

    float* at(int64_t offset) const {
        if (!values) return nullptr;
#ifdef _OPENMP
        return &values[omp_get_thread_num() * unit + offset];
#else
        return &values[offset];
#endif
    }
};

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

}  // namespace
}  // namespace semantica
