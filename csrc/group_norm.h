// GroupNorm + FiLM + activation on the CPU: y = act((x_hat * w + b) * (1 + scale) + shift), forward and backward.
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
};

#ifdef SEMANTICA_LANES
// x, y in the layout of the shape; mean, rstd [batch, groups]; weight, bias [channels]; scale, shift [batch, channels]
// or null. All but x and y are fp32.
void group_norm_forward(const GroupNormShape& shape, const void* x, void* y, float* mean, float* rstd,
                        const float* weight, const float* bias, const float* scale, const float* shift, double eps);

// dweight, dbias [channels]; dscale, dshift [batch, channels] or null
void group_norm_backward(const GroupNormShape& shape, const void* dy, const void* x, const float* mean,
                         const float* rstd, const float* weight, const float* bias, const float* scale,
                         const float* shift, void* dx, float* dweight, float* dbias, float* dscale, float* dshift);

// the instruction set that the loops will use on this processor
const char* group_norm_target();
#endif

}  // namespace semantica
