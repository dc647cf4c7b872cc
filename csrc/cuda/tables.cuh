// What a block has in dynamic shared memory behind the slots of its walk.
#pragma once

#include "merge.cuh"

namespace semantica {

// launches of one kernel text: all of it, or up to and from where blocks meet
enum class Phase : int { whole, first, second };

// adjacent channels of a thread that are of one group in any block: merged before anything is written
__host__ __device__ __forceinline__ int fold_of(int depth, int vector) {
  int fold = 1;
  while (fold < vector && depth % (2 * fold) == 0) fold *= 2;
  return fold;
}

// warps that bring together one group's pairs
__host__ __device__ __forceinline__ int warps_per_group(const Plan& plan, int groups) {
  return larger(1, plan.threads / WARP / groups);
}
// parts of a row of threads that a warp sums by itself
__host__ __device__ __forceinline__ int pieces_of(const Plan& plan) { return larger(1, plan.columns / WARP); }

struct Tables {
  // of each channel: what makes a = weight * (1 + scale), b = bias * (1 + scale) + shift, and the addend
  float *a, *b, *addend;
  // forward: of each group, a value that is subtracted before anything else
  float* pivot;
  float* scratch;
  float* sums;  // backward: [3, width]
  Pair *stage, *own, *total;
  float* end;

  __host__ __device__ Tables(float* at, const Problem& p, const Plan& plan, bool backward) {
    const Extent extent(p, plan);
    a = at, b = a + plan.width, addend = b + plan.width, pivot = addend + plan.width;
    scratch = pivot + (backward ? 0 : extent.groups);
    int floats, per;
    if (backward) {
      floats = p.channels_last ? plan.vector * plan.threads : 3 * plan.width * pieces_of(plan);
      per = 1;
    } else {
      floats = p.channels_last ? 2 * (plan.vector / fold_of(extent.depth, plan.vector)) * plan.threads : 0;
      per = warps_per_group(plan, extent.groups);
    }
    sums = scratch + floats;
    stage = reinterpret_cast<Pair*>(sums + (backward ? 3 * plan.width : 0));
    own = stage + per * extent.groups;
    total = own + extent.groups;
    end = reinterpret_cast<float*>(total + extent.groups);
  }

  template <typename T>
  __device__ __forceinline__ void fill(const Problem& p, const Plan& plan, const Spot& spot) const {
    for (int c = int(threadIdx.x); c < plan.width; c += int(blockDim.x)) {
      float factor = 1.0f + read<T>(p.scale, spot.sample, spot.channel + c, 0.0f);
      a[c] = read<T>(p.weight, 0, spot.channel + c, 1.0f) * factor;
      b[c] = fmaf(read<T>(p.bias, 0, spot.channel + c, 0.0f), factor, read<T>(p.shift, spot.sample, spot.channel + c, 0.0f));
      addend[c] = read<T>(p.addend, spot.sample, spot.channel + c, 0.0f);
    }
  }
};

// bytes of slots of all threads
__host__ __device__ __forceinline__ int64_t slot_bytes(const Plan& plan, int items, int item_bytes, int operands, int ahead) {
  int slots = plan.kept < items ? plan.kept + ahead : plan.kept;
  // what follows is fp32
  return (int64_t(slots) * operands * item_bytes * plan.threads + 15) / 16 * 16;
}

// element v of a thread's vector is of this channel of the block: the line's, or one of those side by side
template <bool LAST, int V>
__device__ __forceinline__ int channel_of(const Plan& plan, const Spot& spot, const Cursor& at, int v) {
  if (!LAST) return at.line;
  const int c = spot.column * V + v;
  return c < plan.width ? c : c % plan.width;
}

}  // namespace semantica
