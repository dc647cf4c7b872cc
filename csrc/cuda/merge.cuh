// Pairs of numbers merged over the lanes of a warp, a block and a team, always in the same order.
#pragma once

#include "walk.cuh"

namespace semantica {

// mean and sum of squared deviations of n values; or two sums
struct Pair {
  float first, second, n;
};

// Chan, Golub and LeVeque, "Algorithms for computing the sample variance", 1983, eq. 1.5
struct Moments {
  static __device__ __forceinline__ Pair merge(const Pair& a, const Pair& b) {
    float n = a.n + b.n, share = n > 0 ? b.n * __frcp_rn(n) : 0.0f, delta = b.first - a.first;
    return {fmaf(delta, share, a.first), fmaf(delta * delta, a.n * share, a.second + b.second), n};
  }
};
struct Sums {
  static __device__ __forceinline__ Pair merge(const Pair& a, const Pair& b) {
    return {a.first + b.first, a.second + b.second, a.n + b.n};
  }
};

// in lane 0
template <typename Rule>
__device__ __forceinline__ Pair over_lanes(Pair pair) {
#pragma unroll
  for (int step = WARP / 2; step > 0; step /= 2) {
    Pair other{__shfl_xor_sync(ALL, pair.first, step), __shfl_xor_sync(ALL, pair.second, step),
               __shfl_xor_sync(ALL, pair.n, step)};
    pair = Rule::merge(pair, other);
  }
  return pair;
}
// among `lanes` (a power of 2) adjacent ones, in each
__device__ __forceinline__ float sum_over(float value, int lanes) {
  for (int step = lanes / 2; step > 0; step /= 2) value += __shfl_xor_sync(ALL, value, step);
  return value;
}

// From `per` pairs of each of the block's groups in `stage` to the team's in `total`, both in shared memory; `own` is what
// the blocks of a cluster read of each other until `release`. False where the other launch does the rest.
template <typename Rule>
__device__ __forceinline__ bool over_team(const Pair* stage, int per, Pair* own, Pair* total, float* workspace,
                                          const Plan& plan, const Spot& spot, int groups, int round, bool first,
                                          bool second) {
  const int lane = int(threadIdx.x) % WARP, size = plan.parts * plan.chunks;
  // two sets, by turns: a slow block may still read one when a fast one has come to the next round
  Pair* published = reinterpret_cast<Pair*>(workspace) + int64_t(round % 2) * plan.blocks * groups;
  Pair* mine = published + (int64_t(spot.slot) * size + spot.rank) * groups;
  if (!second) {
    __syncthreads();
    for (int g = int(threadIdx.x) / WARP; g < groups; g += int(blockDim.x) / WARP) {
      Pair pair{};
      for (int i = lane; i < per; i += WARP) pair = Rule::merge(pair, stage[g * per + i]);
      pair = over_lanes<Rule>(pair);
      if (lane == 0) *(plan.path == Path::resident ? own + g : mine + g) = pair;
    }
    if (first) return false;
    // in a team of one block every lane reads what it has written itself
    if (plan.path == Path::grid) {
      grid_sync();
    } else if (size > 1) {
      this_cluster().sync();
    }
  }
  for (int g = int(threadIdx.x) / WARP; g < groups; g += int(blockDim.x) / WARP) {
    Pair pair{};
    for (int r = lane; r < size; r += WARP) {
      if (plan.path != Path::resident) {
        const Pair* at = published + (int64_t(spot.slot) * size + r) * groups + g;
        pair = Rule::merge(pair, {__ldcg(&at->first), __ldcg(&at->second), __ldcg(&at->n)});
      } else {
        pair = Rule::merge(pair, size > 1 ? this_cluster().map_shared_rank(own, unsigned(r))[g] : own[g]);
      }
    }
    pair = over_lanes<Rule>(pair);
    if (lane == 0) total[g] = pair;
  }
  if (plan.path == Path::resident && size > 1) this_cluster().barrier_arrive();
  __syncthreads();
  return true;
}

// no block of a cluster may leave while another reads what it owns
__device__ __forceinline__ void release(const Plan& plan) {
  if (plan.path == Path::resident && plan.parts * plan.chunks > 1) this_cluster().barrier_wait();
}

}  // namespace semantica
