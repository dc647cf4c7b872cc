// GroupNorm + FiLM + activation on the CPU: y = act((x_hat * w + b) * (1 + scale) + shift), x_hat = x + addend normalised
// per group, forward and backward.
#pragma once

#include <cstdint>

#include "lanes.h"

namespace semantica {

struct GroupNormShape {
    int64_t batch, channels, spatial, groups;
    bool channels_last;
    bool silu;
    // of x, y, dy and dx; false: fp32
    bool bfloat16;
    int threads;
    Target target;
};

#ifdef SEMANTICA_LANES
// x, y in the layout of the shape; mean, rstd [batch, groups]; weight, bias [channels]; scale, shift, addend
// [batch, channels] or null. All but x and y are fp32.
void group_norm_forward(const GroupNormShape& shape, const void* x, void* y, float* mean, float* rstd,
                        const float* weight, const float* bias, const float* scale, const float* shift, const float* addend,
                        double eps);

// dweight, dbias [channels]; dscale, dshift [batch, channels] or null
void group_norm_backward(const GroupNormShape& shape, const void* dy, const void* x, const float* mean,
                         const float* rstd, const float* weight, const float* bias, const float* scale,
                         const float* shift, const float* addend, void* dx, float* dweight, float* dbias,
                         float* dscale, float* dshift);

bool group_norm_runs(Target target);
#endif

}  // namespace semantica
