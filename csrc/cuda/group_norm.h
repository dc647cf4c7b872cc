// What the launchers of group_norm take: addresses, sizes and a plan, no types of torch. kernels/group_norm/cuda_plan.py
// makes the plans and says how large workspaces are.
#pragma once

#include <cstdint>

#ifdef SEMANTICA_CUDA_HOST
using Stream = void*;
#else
#include <cuda_runtime.h>
using Stream = cudaStream_t;
#endif

namespace semantica {

enum class Type : int { f32, f16, bf16 };

// numbers for each channel, [samples, channels] or [channels], in f32 or in x's type
struct Values {
  const void* at;  // null where there are none
  int64_t stride;  // elements from one sample's to the next one's; 0 where all samples share them
  bool f32;
};

struct Problem {
  const void* x;  // [samples, pixels, channels] where channels_last, else [samples, channels, pixels]
  Values weight, bias, scale, shift, addend;
  int64_t samples, channels, groups, pixels;
  Type type;
  bool channels_last, silu;
};

// resident: a team's blocks hold all that they read in shared memory; more than one are a cluster (sm_90 and newer).
// grid: a cooperative launch; blocks keep what fits and read the rest again.
// plain: two launches; all is read twice.
enum class Path : int { resident, grid, plain };

// A team is the blocks that find statistics together: `parts` of a group's channels by `chunks` of the pixels. A block has
// `rows` by `columns` threads, each with `vector` elements: side by side are channels where channels_last, else pixels.
struct Plan {
  Path path;
  int vector;   // elements of 16 bytes, or 1
  int threads;  // a multiple of 32, at least rows * columns
  int rows, columns;
  int width;   // channels of a block: whole groups, or a part of one
  int repeat;  // pixels side by side in a row of threads: more than 1 only where a block has all channels
  int parts, chunks;
  int kept;    // items of each thread that stay in shared memory between the two walks
  int rounds;  // in which the blocks of the grid path take teams, as many at a time as fit
  int blocks;
  int64_t shared;  // bytes of dynamic shared memory
};

struct Statistics {
  float *mean, *rstd;  // [samples, groups]
};

// y like x. workspace: f32, `Plan.workspace` of cuda_plan.py
int group_norm_forward(const Problem& problem, const Plan& plan, float eps, void* y, Statistics statistics,
                       float* workspace, Stream stream);

// dx like x; the others are contiguous, of the type of what they are gradients of, null where that is absent
struct Gradients {
  void *dx, *dweight, *dbias, *dscale, *dshift, *daddend;
};

// dy like x
int group_norm_backward(const Problem& problem, const Plan& plan, const void* dy, Statistics statistics,
                        Gradients gradients, float* workspace, Stream stream);

// How many clusters of so many blocks the current device runs at once, where each block has so many threads and bytes of
// dynamic shared memory: 0 where it has none so large, or so much of it is not free.
int group_norm_clusters(int blocks, int threads, int64_t shared, int* count);

}  // namespace semantica
