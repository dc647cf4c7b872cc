// Starts the backward kernels of group_norm.
#include "backward.cuh"
#include "launching.h"

namespace semantica {

int group_norm_backward(const Problem& problem, const Plan& plan, const void* dy, Statistics statistics,
                        Gradients gradients, float* workspace, Stream stream) {
  float* partial = workspace;
  float* means = partial + SUMS * problem.samples * plan.chunks * problem.channels;
  float* published = means + 2 * problem.samples * problem.groups;
  return by_kind(problem, plan, [&](auto type, auto vector, auto last) {
    using T = decltype(type);
    constexpr int V = decltype(vector)::value;
    using W = Walk<T, V, 2>;
    if (!fits(problem, plan, sizeof(typename W::Item), 2, W::AHEAD, true)) return INVALID;
    const int error = in_phases(plan, [&](Phase phase) {
      return launch(backward_kernel<T, V, decltype(last)::value>, shape_of(plan), stream, problem, plan, phase,
                    static_cast<const T*>(dy), statistics.mean, statistics.rstd, static_cast<T*>(gradients.dx), partial,
                    means, published);
    });
    if (error) return error;
    LaunchShape shape{};
    shape.grid = unsigned(ceil_div(int(problem.channels), WARP));
    shape.block = 512;
    return launch(finish_kernel<T>, shape, stream, problem, gradients, statistics.rstd, partial, means, plan.chunks);
  });
}

int group_norm_clusters(int blocks, int threads, int64_t shared, int* count) {
  LaunchShape shape{};
  shape.grid = shape.cluster = unsigned(blocks);
  shape.block = unsigned(threads);
  shape.shared_bytes = size_t(shared);
  // any of the kernels will do: registers of all leave room for one block of 512 threads
  return clusters_at_once(backward_kernel<float, 4, true>, shape, count);
}

}  // namespace semantica
