// How a block walks its part of x twice: forth for sums over pixels, back to write results. Every thread copies what it
// will itself read into slots of its own in shared memory, so a walk needs no barrier. The first items stay in their slots
// from one walk to the other; the others pass through a ring and are read again, newest first, while L2 still has them.
// It is the first that stay, and not the last, for these left L2 anyway: what stays and what L2 holds do not overlap.
#pragma once

#include "numbers.cuh"

namespace semantica {

constexpr int WARP = 32;
constexpr unsigned ALL = 0xffffffffu;

__host__ __device__ __forceinline__ int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
__host__ __device__ __forceinline__ int larger(int a, int b) { return a > b ? a : b; }

// of a block: groups, or the one of which it has a part, and their channels
struct Extent {
  int groups, depth;
  __host__ __device__ Extent(const Problem& p, const Plan& plan) {
    depth = int(p.channels / p.groups);
    if (depth > plan.width) depth = plan.width;
    groups = plan.width / depth;
  }
};

// Where a block and a thread are. A line is a pixel's channels (or those of `repeat` pixels), or a channel's pixels.
struct Spot {
  int64_t team, sample, channel, group;  // the first channel and group of the block
  int slot, rank, chunk;                 // of the team among those of the round; of the block in its team
  int64_t origin, stride;                // of the block's first element, and from line to line
  int count, inner, steps, items;        // lines of `inner` elements in `steps` steps; items of each thread
  int lines;                             // that the thread may touch: all or none
  int row, column;

  __device__ __forceinline__ Spot(const Problem& p, const Plan& plan, unsigned block, int round) {
    const int size = plan.parts * plan.chunks;
    const int64_t spans = p.channels / (int64_t(plan.width) * plan.parts);
    slot = int(block) / size;
    rank = int(block) % size;
    chunk = rank % plan.chunks;
    team = int64_t(round) * (plan.blocks / size) + slot;
    const bool there = team < p.samples * spans;
    sample = there ? team / spans : 0;
    channel = there ? team % spans * plan.width * plan.parts + int64_t(rank / plan.chunks) * plan.width : 0;
    group = sample * p.groups + channel / (p.channels / p.groups);
    column = int(threadIdx.x) % plan.columns;
    row = int(threadIdx.x) / plan.columns;

    const int64_t unit = p.channels_last ? plan.repeat : plan.vector;
    const int64_t share = ceil_div(p.pixels / unit, plan.chunks) * unit;
    const int64_t begin = chunk * share < p.pixels ? chunk * share : p.pixels;
    const int64_t pixels = begin + share < p.pixels ? share : p.pixels - begin;
    if (p.channels_last) {
      origin = (sample * p.pixels + begin) * p.channels + channel;
      stride = p.channels * plan.repeat;
      count = int(pixels / plan.repeat);
      inner = plan.width * plan.repeat;
      steps = 1;
      items = int(ceil_div(share / plan.repeat, plan.rows));
    } else {
      origin = (sample * p.channels + channel) * p.pixels + begin;
      stride = p.pixels;
      count = plan.width;
      inner = int(pixels);
      steps = int(ceil_div(share, plan.columns * plan.vector));
      items = int(ceil_div(plan.width, plan.rows)) * steps;
    }
    // what has no team, and threads beyond the last row, walk along and touch nothing
    if (!there) items = count = 0;
    lines = row < plan.rows ? count : 0;
  }
};

struct Cursor {
  int line, step;
};

template <typename T, int V, int OPERANDS>
struct Walk {
  using Item = Pack<T, V>;
  // copies under way for each thread: enough to cover the latency of memory with 512 threads
  static constexpr int AHEAD = OPERANDS == 1 ? 8 : 4;

  const Spot& spot;
  const Plan& plan;
  Item* slots;
  const T* from[OPERANDS];

  __device__ __forceinline__ bool valid(const Cursor& at) const {
    return at.line < spot.lines && (at.step * plan.columns + spot.column) * V < spot.inner;
  }
  __device__ __forceinline__ int64_t offset(const Cursor& at) const {
    return at.line * spot.stride + (at.step * plan.columns + spot.column) * V;
  }
  __device__ __forceinline__ void next(Cursor& at) const {
    if (++at.step == spot.steps) at.step = 0, at.line += plan.rows;
  }
  __device__ __forceinline__ void previous(Cursor& at) const {
    if (at.step-- == 0) at.step = spot.steps - 1, at.line -= plan.rows;
  }
  __device__ __forceinline__ Item* slot(int item, int operand) const {
    int which = item < plan.kept ? item : plan.kept + (item - plan.kept) % AHEAD;
    return slots + (which * OPERANDS + operand) * int(blockDim.x) + int(threadIdx.x);
  }
  __device__ __forceinline__ void start(int item, const Cursor& at) const {
    if (!valid(at)) return;
#pragma unroll
    for (int o = 0; o < OPERANDS; o++) {
      const T* source = from[o] + offset(at);
      if constexpr (sizeof(Item) == 16) {
        cp_async16(slot(item, o), source);
      } else {
        *slot(item, o) = *source;
      }
    }
  }

  // the first copies; what follows until `forth` has their latency
  __device__ __forceinline__ Cursor begin() const {
    Cursor ahead{spot.row, 0};
    for (int i = 0; i < AHEAD; i++) {
      if (i < spot.items) start(i, ahead), next(ahead);
      cp_async_commit();
    }
    return ahead;
  }
  // visit(where, whether there is anything, slots of the operands) for every item in order; ahead: what `begin` returned
  template <typename Visit>
  __device__ __forceinline__ void forth(Cursor ahead, Visit visit) const {
    Cursor here{spot.row, 0};
    for (int i = 0; i < spot.items; i++) {
      cp_async_wait<AHEAD - 1>();
      visit(here, valid(here), slot(i, 0));
      next(here);
      // into the slot that has just been read, unless items stay
      if (i + AHEAD < spot.items) start(i + AHEAD, ahead), next(ahead);
      cp_async_commit();
    }
  }
  // the same from the last item to the first; `there`: this kernel has walked forth, and the ring holds the last items
  template <typename Visit>
  __device__ __forceinline__ void back(bool there, Visit visit) const {
    Cursor here{spot.row + (spot.items - 1) / spot.steps * plan.rows, (spot.items - 1) % spot.steps}, ahead = here;
    int next_item = spot.items - 1;
    for (int i = 0; i < AHEAD; i++) {
      if (next_item >= plan.kept) {
        if (!there) start(next_item, ahead);
        previous(ahead), next_item--;
      }
      cp_async_commit();
    }
    for (int i = spot.items - 1; i >= 0; i--) {
      cp_async_wait<AHEAD - 1>();
      if (valid(here)) visit(here, slot(i, 0));
      previous(here);
      if (next_item >= plan.kept) start(next_item, ahead), previous(ahead), next_item--;
      cp_async_commit();
    }
  }
};

}  // namespace semantica
