// How a block walks its part of x twice: forth for sums over pixels, back to write results. Every thread copies what it
// will itself read into slots of its own in shared memory, so a walk needs no barrier. The first items stay in their slots
// from one walk to the other; the others pass through a ring and are read again, newest first, while L2 still has them.
// It is the first that stay, and not the last, for these left L2 anyway: what stays and what L2 holds do not overlap.
#pragma once

#include "numbers.cuh"

namespace semantica {

constexpr int WARP = 32;
constexpr unsigned ALL = 0xffffffffu;

// divisions of 64 bits are subroutines on a GPU
__host__ __device__ __forceinline__ int ceil_div(int a, int b) { return (a - 1) / b + 1; }
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

// pixels of a chunk, of which the last have fewer; pixels are fewer than 2^31
__host__ __device__ __forceinline__ int share_of(const Problem& p, const Plan& plan) {
  const int unit = p.channels_last ? plan.repeat : plan.vector;
  return ceil_div(int(p.pixels) / unit, plan.chunks) * unit;
}
// items of each thread
__host__ __device__ __forceinline__ int items_of(const Problem& p, const Plan& plan) {
  const int share = share_of(p, plan);
  if (p.channels_last) return ceil_div(share / plan.repeat, plan.rows);
  return ceil_div(plan.width, plan.rows) * ceil_div(share, plan.columns * plan.vector);
}

// Where a block and a thread are. A line is a pixel's channels (or those of `repeat` pixels), or a channel's pixels.
struct Spot {
  int sample, channel, group, part;   // the first channel and group of the block, and which part of that it has
  int slot, rank, chunk;              // of the team among those of the round; of the block in its team
  int64_t origin, stride;             // of the block's first element, and from line to line
  int count, inner, steps, items;     // lines of `inner` elements in `steps` steps; items of each thread
  int lines;                          // that the thread may touch: all or none
  int row, column;

  __device__ __forceinline__ Spot(const Problem& p, const Plan& plan, int block, int round) {
    const int size = plan.parts * plan.chunks, spans = int(p.channels) / (plan.width * plan.parts);
    slot = block / size;
    rank = block - slot * size;
    part = rank / plan.chunks;
    chunk = rank - part * plan.chunks;
    const int team = round * (plan.blocks / size) + slot;
    sample = team / spans;
    channel = (team - sample * spans) * plan.width * plan.parts + part * plan.width;
    const bool there = sample < p.samples;
    if (!there) sample = channel = 0;
    group = channel / (int(p.channels) / int(p.groups));
    row = int(threadIdx.x) / plan.columns;
    column = int(threadIdx.x) - row * plan.columns;

    const int share = share_of(p, plan), all = int(p.pixels);
    const int begin = int64_t(chunk) * share < all ? chunk * share : all;
    const int pixels = all - begin < share ? all - begin : share;
    items = items_of(p, plan);
    if (p.channels_last) {
      origin = (sample * p.pixels + begin) * p.channels + channel;
      stride = p.channels * plan.repeat;
      count = pixels / plan.repeat;
      inner = plan.width * plan.repeat;
      steps = 1;
    } else {
      origin = (sample * p.channels + channel) * p.pixels + begin;
      stride = p.pixels;
      count = plan.width;
      inner = pixels;
      steps = ceil_div(share, plan.columns * plan.vector);
    }
    // what has no team, and threads beyond the last row, walk along and touch nothing
    if (!there) items = count = 0;
    lines = row < plan.rows ? count : 0;
  }
  // of the block's group g, among all samples'
  __device__ __forceinline__ int64_t group_at(const Problem& p, int g) const { return sample * p.groups + group + g; }
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
    return slots + (which * OPERANDS + operand) * plan.threads + int(threadIdx.x);
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
#pragma unroll 1
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
    // registers are dear, and there are warps enough to wait for shared memory
#pragma unroll 1
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
