// What the launchers of group_norm take: addresses and sizes, no types of torch. Every plan is made by
// kernels/group_norm/cuda_plan.py, which also says how large the workspace is.
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

// x is [samples, pixels, channels], channels innermost. Weights and FiLM of x's type or of f32, as `affine` says.
struct Problem {
  const void* x;
  const void* weight;
  const void* bias;
  const void* scale;   // [samples, channels] or null, as shift and addend
  const void* shift;
  const void* addend;
  int64_t samples, channels, groups, pixels;
  Type type, affine, film;
  bool silu;
};

// How a problem is cut. A unit is one sample's `width` channels, of whole groups; `chunks` blocks share its pixels.
struct Plan {
  int width;       // channels of a unit
  int vector;      // channels of a thread: 16 bytes, or 1
  int rows;        // pixels that a block handles at a time: a power of 2
  int chunks;      // blocks of a unit: a cluster, or with `grid` any number
  int slots;       // of each thread's ring in shared memory: what fits is read from memory once
  bool grid;       // blocks meet across the whole grid, which must fit on the card; otherwise within clusters
  int64_t shared;  // bytes of dynamic shared memory
};

// y like x; mean and rstd [samples, groups] in f32; workspace: f32, only where `plan.grid`
int group_norm_forward(const Problem& problem, const Plan& plan, float eps, void* y, float* mean, float* rstd,
                       float* workspace, Stream stream);

// dx like x; dweight, dbias [channels] of type `affine`; dscale, dshift, daddend [samples, channels] of type `film`, or null.
// partial: f32 [2, samples, channels], summed over samples in their order
int group_norm_backward(const Problem& problem, const Plan& plan, const void* dy, const float* mean, const float* rstd,
                        void* dx, void* dweight, void* dbias, void* dscale, void* dshift, void* daddend, float* partial,
                        float* workspace, Stream stream);

}  // namespace semantica
