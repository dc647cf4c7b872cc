// Starts the forward kernels of group_norm.
#include "forward.cuh"
#include "launching.h"

namespace semantica {

int group_norm_forward(const Problem& problem, const Plan& plan, float eps, void* y, Statistics statistics,
                       float* workspace, Stream stream) {
  return by_kind(problem, plan, [&](auto type, auto vector, auto last) {
    using T = decltype(type);
    constexpr int V = decltype(vector)::value;
    using W = Walk<T, V, 1>;
    if (!fits(problem, plan, sizeof(typename W::Item), 1, W::AHEAD, false)) return INVALID;
    return in_phases(plan, [&](Phase phase) {
      return launch(forward_kernel<T, V, decltype(last)::value>, shape_of(plan), stream, problem, plan, phase, eps,
                    static_cast<T*>(y), statistics.mean, statistics.rstd, workspace);
    });
  });
}

}  // namespace semantica
