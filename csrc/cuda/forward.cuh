// y = act((x + addend - mean) * rstd * a + b), a = weight * (1 + scale), b = bias * (1 + scale) + shift.
//
// Statistics are of x less a pivot, about its group's mean, so that a large mean costs no digits: by Welford's recurrence
// in every thread, each element of its vector by itself, merged by Chan's rule in an order that depends on sizes alone.
#pragma once

#include "tables.cuh"

namespace semantica {

// Welford, "Note on a method for calculating corrected sums of squares and products", 1962
template <int V>
struct Welford {
  float mean[V], squares[V], n;

  __device__ __forceinline__ void add(const float (&x)[V]) {
    n += 1.0f;
    const float share = __frcp_rn(n);
#pragma unroll
    for (int v = 0; v < V; v++) {
      float delta = x[v] - mean[v];
      mean[v] = fmaf(delta, share, mean[v]);
      squares[v] = fmaf(delta, x[v] - mean[v], squares[v]);
    }
  }
  // merges each `fold` adjacent elements into the first of them
  __device__ __forceinline__ void fold(int fold) {
#pragma unroll
    for (int step = 1; step < V; step *= 2) {
      if (step < fold) {
#pragma unroll
        for (int v = 0; v + step < V; v += 2 * step) {
          Pair both = Moments::merge({mean[v], squares[v], n * float(step)},
                                     {mean[v + step], squares[v + step], n * float(step)});
          mean[v] = both.first, squares[v] = both.second;
        }
      }
    }
  }
};

// the average of 32 values from all over each group: the same in all blocks of a team
template <typename T>
__device__ __forceinline__ void find_pivots(const Problem& p, const Tables& tables, const Spot& spot, int groups) {
  const int depth = int(p.channels) / int(p.groups), lane = int(threadIdx.x) % WARP;
  for (int g = int(threadIdx.x) / WARP; g < groups; g += int(blockDim.x) / WARP) {
    const int64_t channel = (spot.group + g) * depth + lane % depth, pixel = lane * p.pixels / WARP;
    const int64_t at = p.channels_last ? (spot.sample * p.pixels + pixel) * p.channels + channel
                                       : (spot.sample * p.channels + channel) * p.pixels + pixel;
    const float sum = sum_over(widen(static_cast<const T*>(p.x)[at]) * (1.0f / WARP), WARP);
    if (lane == 0) tables.pivot[g] = sum;
  }
}

// from every thread's statistics to `per` pairs of each group in the table's stage
template <bool LAST, int V>
__device__ __forceinline__ void to_groups(Welford<V>& found, const Tables& tables, const Plan& plan, const Spot& spot,
                                          const Extent& extent, int per) {
  const int lane = int(threadIdx.x) % WARP, warp = int(threadIdx.x) / WARP;
  if constexpr (!LAST) {
    found.fold(V);
    Pair pair = over_lanes<Moments>({found.mean[0], found.squares[0], found.n * V});
    if (lane == 0) tables.stage[warp] = pair;
    return;
  }
  const int fold = fold_of(extent.depth, V), slots = V / fold, threads = plan.threads;
#pragma unroll
  for (int v = 0; v < V; v++) {
    found.mean[v] += tables.addend[channel_of<LAST, V>(plan, spot, {}, v)];
  }
  found.fold(fold);
  float* means = tables.scratch;
  float* squares = means + slots * threads;
#pragma unroll
  for (int v = 0; v < V; v++) {
    if (v % fold == 0) {
      means[v / fold * threads + int(threadIdx.x)] = found.mean[v];
      squares[v / fold * threads + int(threadIdx.x)] = found.squares[v];
    }
  }
  __syncthreads();
  // warps share a group's pairs of (slot, row); a line holds each slot of a group `repeat` times
  const int depth = extent.depth / fold, width = plan.width / fold, all = plan.repeat * depth * plan.rows;
  for (int job = warp; job < extent.groups * per; job += threads / WARP) {
    const int g = job / per;
    Pair pair{};
    for (int i = job % per * WARP + lane; i < all; i += per * WARP) {
      const int row = i % plan.rows, which = i / plan.rows;
      const int at = which / depth * width + g * depth + which % depth;
      const int from = at % slots * threads + row * plan.columns + at / slots;
      const int lines = row < spot.count ? (spot.count - row + plan.rows - 1) / plan.rows : 0;
      pair = Moments::merge(pair, {means[from], squares[from], float(lines) * float(fold)});
    }
    pair = over_lanes<Moments>(pair);
    if (lane == 0) tables.stage[job] = pair;
  }
}

template <typename T, int V, bool LAST>
__global__ void __launch_bounds__(512, 1)
    forward_kernel(Problem p, Plan plan, Phase phase, float eps, T* y, float* mean, float* rstd, float* workspace) {
  auto* slots = dynamic_shared<Pack<T, V>>();
  const Extent extent(p, plan);
  const int per = warps_per_group(plan, extent.groups);
  const Tables tables(reinterpret_cast<float*>(reinterpret_cast<char*>(slots) +
                                               slot_bytes(plan, items_of(p, plan), sizeof(Pack<T, V>), 1,
                                                          Walk<T, V, 1>::AHEAD)),
                      p, plan, false);
  // what was read last is read again first, by the second launch too
  const int block = int(phase == Phase::second ? gridDim.x - 1 - blockIdx.x : blockIdx.x);
  // constants of a thread's channels: one for each element of its vector, or one for all
  constexpr int W = LAST ? V : 1;

  for (int round = 0; round < plan.rounds; round++) {
    const Spot spot(p, plan, block, round);
    const Walk<T, V, 1> walk{spot, plan, slots, {static_cast<const T*>(p.x) + spot.origin}};
    const Cursor ahead = phase == Phase::second ? Cursor{} : walk.begin();
    tables.fill<T>(p, plan, spot);
    find_pivots<T>(p, tables, spot, extent.groups);
    __syncthreads();
    if (phase != Phase::second) {
      Welford<V> found{};
      float pivot[W];
#pragma unroll
      for (int v = 0; v < W; v++) pivot[v] = tables.pivot[LAST ? channel_of<LAST, V>(plan, spot, {}, v) / extent.depth : 0];
      walk.forth(ahead, [&](const Cursor& at, bool valid, const Pack<T, V>* slot) {
        if (!valid) return;
        float x[V];
        unpack<T>(*slot, x);
        const float addend = LAST ? 0.0f : tables.addend[at.line];
#pragma unroll
        for (int v = 0; v < V; v++) x[v] = LAST ? x[v] - pivot[v % W] : x[v] - pivot[0] + addend;
        found.add(x);
      });
      to_groups<LAST>(found, tables, plan, spot, extent, per);
    }
    if (!over_team<Moments>(tables.stage, per, tables.own, tables.total, workspace, plan, spot, extent.groups, round,
                            phase == Phase::first, phase == Phase::second)) {
      return;
    }

    for (int g = int(threadIdx.x); g < extent.groups && spot.items; g += int(blockDim.x)) {
      const Pair& found = tables.total[g];
      const float inverse = 1.0f / sqrtf(found.second / found.n + eps);
      tables.stage[g].first = inverse;
      if (spot.rank == 0) {
        mean[spot.group_at(p, g)] = tables.pivot[g] + found.first;
        rstd[spot.group_at(p, g)] = inverse;
      }
    }
    __syncthreads();
    float offset[W], factor[W], term[W];
    auto constants = [&](const Cursor& at) {
#pragma unroll
      for (int v = 0; v < W; v++) {
        const int c = channel_of<LAST, V>(plan, spot, at, v), g = LAST ? c / extent.depth : 0;
        offset[v] = tables.pivot[g] + (tables.total[g].first - tables.addend[c]);
        factor[v] = tables.stage[g].first * tables.a[c], term[v] = tables.b[c];
      }
    };
    if (LAST) constants({});
    T* out = y + spot.origin;
    walk.back(phase == Phase::whole, [&](const Cursor& at, const Pack<T, V>* slot) {
      float x[V];
      unpack<T>(*slot, x);
      if (!LAST) constants(at);
#pragma unroll
      for (int v = 0; v < V; v++) {
        // the mean goes first: exact where |mean| >> std, unlike x * factor + (term - mean * factor)
        x[v] = fmaf(x[v] - offset[v % W], factor[v % W], term[v % W]);
      }
      if (p.silu) {
#pragma unroll
        for (int v = 0; v < V; v++) x[v] *= sigmoid<T>(x[v]);
      }
      store<T>(out + walk.offset(at), x, plan.path != Path::resident);
    });
    release(plan);
    __syncthreads();
  }
}

}  // namespace semantica
