// A unit of group_norm (see group_norm.h) walked twice: forth to sum over pixels, back to write results. Between the walks
// each thread's ring in shared memory holds what it read last, so that a unit that fits is read once; of one that does not,
// the walk back begins with what the ring and then the L2 cache still hold.
#pragma once

#include "group_norm.h"
#include "numbers.cuh"

namespace semantica {

namespace cg = cooperative_groups;

constexpr unsigned ALL = 0xffffffffu;
// pixels whose mean is subtracted before anything is summed, so that a large mean costs no digits
constexpr int PIVOT_PIXELS = 8;

// where a thread of a unit is
struct Spot {
  int64_t sample, unit, first_channel, begin, end;  // pixels [begin, end) are the block's
  int chunk, column, row, items;                    // items: of this thread, one pixel each
};

__device__ __forceinline__ Spot spot_of(const Problem& problem, const Plan& plan) {
  Spot spot;
  int64_t units = problem.channels / plan.width;
  spot.unit = blockIdx.x / plan.chunks;
  spot.chunk = int(blockIdx.x % plan.chunks);
  spot.sample = spot.unit / units;
  spot.first_channel = spot.unit % units * plan.width;
  int columns = plan.width / plan.vector;
  spot.column = int(threadIdx.x) % columns;
  spot.row = int(threadIdx.x) / columns;
  int64_t share = (problem.pixels + plan.chunks - 1) / plan.chunks;
  spot.begin = spot.chunk * share;
  spot.end = spot.begin + share < problem.pixels ? spot.begin + share : problem.pixels;
  int64_t left = spot.end - spot.begin - spot.row;
  spot.items = left > 0 ? int((left + plan.rows - 1) / plan.rows) : 0;
  return spot;
}

// the ring: slot s of a thread and operand; threads side by side, so that no two share a bank's turn
template <typename T, int V, int OPERANDS>
struct Ring {
  using Item = Pack<T, V>;
  // copies under way for each thread
  static constexpr int AHEAD = OPERANDS == 1 ? 6 : 4;

  Item* slots;
  const T* from[OPERANDS];
  int64_t stride;
  int count;

  __device__ __forceinline__ Item* slot(int item, int operand) const {
    return slots + ((item % count) * OPERANDS + operand) * int(blockDim.x) + int(threadIdx.x);
  }
  __device__ __forceinline__ void start(int item) const {
    for (int o = 0; o < OPERANDS; o++) {
      const T* source = from[o] + item * stride;
      if constexpr (sizeof(Item) == 16) {
        cp_async16(slot(item, o), source);
      } else {
        *slot(item, o) = *reinterpret_cast<const Item*>(source);
      }
    }
  }

  // forth: `visit(items)` for each of n in order; nobody else touches a thread's slots, so nobody waits for others
  template <typename Visit>
  __device__ __forceinline__ void forth(int n, Visit visit) const {
    for (int i = 0; i < AHEAD; i++) {
      if (i < n) start(i);
      cp_async_commit();
    }
    for (int i = 0; i < n; i++) {
      if (i + AHEAD < n) start(i + AHEAD);
      cp_async_commit();
      cp_async_wait<AHEAD>();
      visit(i);
    }
  }
  // back: the last `count` are there; the others come again
  template <typename Visit>
  __device__ __forceinline__ void back(int n, Visit visit) const {
    for (int i = n - 1; i >= 0; i--) {
      int next = i - AHEAD;
      if (next >= 0 && next < n - count) start(next);
      cp_async_commit();
      cp_async_wait<AHEAD>();
      visit(i);
    }
  }
};

// sums of each channel over the block's rows, by halves, in an order that depends on sizes alone; the first row has them
template <int Q, int V>
__device__ __forceinline__ void over_rows(float (&sums)[Q][V], float* scratch, const Plan& plan, const Spot& spot) {
  int place = spot.column * V;
  for (int half = plan.rows / 2; half > 0; half /= 2) {
    if (spot.row >= half && spot.row < 2 * half) {
      for (int q = 0; q < Q; q++) {
        for (int v = 0; v < V; v++) scratch[(q * half + spot.row - half) * plan.width + place + v] = sums[q][v];
      }
    }
    __syncthreads();
    if (spot.row < half) {
      for (int q = 0; q < Q; q++) {
        for (int v = 0; v < V; v++) sums[q][v] += scratch[(q * half + spot.row) * plan.width + place + v];
      }
    }
    __syncthreads();
  }
}

// sums of the unit: of all its blocks, in the order of their chunks. mine, total: [Q * width] in shared memory.
// Until the thread calls `release`, others may read `mine`.
template <int Q>
__device__ __forceinline__ void over_chunks(const float* mine, float* total, float* workspace, const Plan& plan,
                                            const Spot& spot) {
  int size = Q * plan.width;
  if (plan.chunks == 1) {
    for (int i = threadIdx.x; i < size; i += blockDim.x) total[i] = mine[i];
  } else if (plan.grid) {
    float* parts = workspace + int64_t(blockIdx.x) * size;
    for (int i = threadIdx.x; i < size; i += blockDim.x) parts[i] = mine[i];
    grid_sync();
    // each sum once, by whichever block: all read all would be chunks times the traffic
    float* sums = workspace + int64_t(gridDim.x) * size;
    int64_t count = int64_t(gridDim.x) / plan.chunks * size;
    for (int64_t i = blockIdx.x * int64_t(blockDim.x) + threadIdx.x; i < count; i += int64_t(gridDim.x) * blockDim.x) {
      const float* part = workspace + i / size * plan.chunks * size + i % size;
      double sum = 0;
      for (int c = 0; c < plan.chunks; c++) sum += part[int64_t(c) * size];
      sums[i] = float(sum);
    }
    grid_sync();
    for (int i = threadIdx.x; i < size; i += blockDim.x) total[i] = sums[spot.unit * size + i];
  } else {
#ifdef CLUSTERS
    auto cluster = cg::this_cluster();
    cluster.sync();
    for (int i = threadIdx.x; i < size; i += blockDim.x) {
      double sum = 0;
      for (int c = 0; c < plan.chunks; c++) {
        sum += cluster.map_shared_rank(const_cast<float*>(mine), unsigned(c))[i];
      }
      total[i] = float(sum);
    }
    cluster.barrier_arrive();
#endif
  }
  __syncthreads();
}

// no block of a cluster may leave while another reads its sums
__device__ __forceinline__ void release(const Plan& plan) {
#ifdef CLUSTERS
  if (plan.chunks > 1 && !plan.grid) cg::this_cluster().barrier_wait();
#endif
}

// sum over a warp, the same in every lane
__device__ __forceinline__ float over_lanes(float value) {
  for (int step = 16; step > 0; step /= 2) value += __shfl_xor_sync(ALL, value, step);
  return value;
}

}  // namespace semantica
