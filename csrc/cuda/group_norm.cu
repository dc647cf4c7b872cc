// group_norm forward and backward, channels innermost: one read of x (and dy) where a unit fits in the shared memory of the
// blocks that share it, one and a part elsewhere. No atomics: every sum has one order, so every run has the same bits.
#include "stream.cuh"

namespace semantica {
namespace {

constexpr int THREADS = 512;

// what is behind the ring in dynamic shared memory: Q sums for each channel, by block and of the unit, and what follows
template <int Q>
struct Tables {
  float *scratch, *mine, *total, *offset, *factor, *term, *first, *second;

  __device__ __forceinline__ Tables(void* ring, int64_t ring_bytes, const Plan& plan, int groups) {
    scratch = reinterpret_cast<float*>(static_cast<char*>(ring) + ring_bytes);
    mine = scratch + Q * (plan.rows / 2) * plan.width;
    total = mine + Q * plan.width;
    offset = total + Q * plan.width;
    factor = offset + plan.width;
    term = factor + plan.width;
    // one for each group
    first = term + plan.width;
    second = first + groups;
  }
};

template <typename T, int V, int OPERANDS>
__device__ __forceinline__ int64_t bytes_of_ring(const Plan& plan) {
  return int64_t(sizeof(Pack<T, V>)) * OPERANDS * plan.slots * blockDim.x;
}

// 1 + scale; and shift
template <typename T>
__device__ __forceinline__ float scale_of(const Problem& p, int64_t i) {
  return p.scale ? 1.0f + fetch<T>(p.scale, p.film == Type::f32, i) : 1.0f;
}
template <typename T>
__device__ __forceinline__ float shift_of(const Problem& p, int64_t i) {
  return p.shift ? fetch<T>(p.shift, p.film == Type::f32, i) : 0.0f;
}
template <typename T>
__device__ __forceinline__ float addend_of(const Problem& p, int64_t i) {
  return p.addend ? fetch<T>(p.addend, p.film == Type::f32, i) : 0.0f;
}

// sum over a group's channels of values in shared memory, by one warp
__device__ __forceinline__ float over_group(const float* values, int channels) {
  float sum = 0;
  for (int c = threadIdx.x % 32; c < channels; c += 32) sum += values[c];
  return over_lanes(sum);
}

// offset: what is subtracted from each channel before sums are taken: near its group's mean, and less the addend, so that
// x - offset is x + addend - pivot. The same in all blocks of a unit.
template <typename T, int V>
__device__ __forceinline__ void find_pivots(const Problem& p, const Plan& plan, const Spot& spot, const T* unit,
                                            Tables<2>& tables, int channels) {
  int64_t film = spot.sample * p.channels + spot.first_channel;
  int pixels = plan.rows < PIVOT_PIXELS ? plan.rows : PIVOT_PIXELS;
  float sums[1][V] = {};
  if (spot.row < pixels) {
    int64_t pixel = spot.row * p.pixels / pixels;
    auto pack = *reinterpret_cast<const Pack<T, V>*>(unit + pixel * p.channels + spot.column * V);
    for (int v = 0; v < V; v++) sums[0][v] = widen(pack.at[v]) + addend_of<T>(p, film + spot.column * V + v);
  }
  over_rows<1, V>(sums, tables.scratch, plan, spot);
  if (spot.row == 0) {
    for (int v = 0; v < V; v++) tables.mine[spot.column * V + v] = sums[0][v];
  }
  __syncthreads();
  for (int g = threadIdx.x / 32; g < plan.width / channels; g += blockDim.x / 32) {
    float pivot = over_group(tables.mine + g * channels, channels) / float(pixels * channels);
    if (threadIdx.x % 32 == 0) tables.first[g] = pivot;
    for (int c = threadIdx.x % 32; c < channels; c += 32) {
      tables.offset[g * channels + c] = pivot - addend_of<T>(p, film + g * channels + c);
    }
  }
  __syncthreads();
}

template <typename T, int V>
__global__ void __launch_bounds__(THREADS, 1) forward(Problem p, Plan plan, float eps, T* y, float* mean, float* rstd,
                                                   float* workspace) {
  auto* slots = dynamic_shared<Pack<T, V>>();
  const Spot spot = spot_of(p, plan);
  const int channels = int(p.channels / p.groups);
  Tables<2> tables(slots, bytes_of_ring<T, V, 1>(plan), plan, plan.width / channels);
  const T* unit = static_cast<const T*>(p.x) + spot.sample * p.pixels * p.channels + spot.first_channel;
  find_pivots<T, V>(p, plan, spot, unit, tables, channels);

  const int place = spot.column * V;
  const int64_t start = (spot.begin + spot.row) * p.channels + place, stride = int64_t(plan.rows) * p.channels;
  const Ring<T, V, 1> ring{slots, {unit + start}, stride, plan.slots};
  float offset[V], sums[2][V] = {};
  for (int v = 0; v < V; v++) offset[v] = tables.offset[place + v];
  ring.forth(spot.items, [&](int i) {
    const auto pack = *ring.slot(i, 0);
    for (int v = 0; v < V; v++) {
      float t = widen(pack.at[v]) - offset[v];
      sums[0][v] += t;
      sums[1][v] = fmaf(t, t, sums[1][v]);
    }
  });
  over_rows<2, V>(sums, tables.scratch, plan, spot);
  if (spot.row == 0) {
    for (int q = 0; q < 2; q++) {
      for (int v = 0; v < V; v++) tables.mine[q * plan.width + place + v] = sums[q][v];
    }
  }
  __syncthreads();
  over_chunks<2>(tables.mine, tables.total, workspace, plan, spot);

  const int64_t film = spot.sample * p.channels + spot.first_channel;
  for (int g = threadIdx.x / 32; g < plan.width / channels; g += blockDim.x / 32) {
    const int c0 = g * channels;
    // in fp64: the difference of two sums, a few for each block
    double count = double(channels) * double(p.pixels);
    double m = over_group(tables.total + c0, channels) / count;
    double variance = over_group(tables.total + plan.width + c0, channels) / count - m * m;
    float r = float(1.0 / sqrt((variance > 0 ? variance : 0) + double(eps)));
    for (int c = c0 + int(threadIdx.x % 32); c < c0 + channels; c += 32) {
      float one_plus = scale_of<T>(p, film + c);
      float w = fetch<T>(p.weight, p.affine == Type::f32, spot.first_channel + c) * one_plus;
      float b = fetch<T>(p.bias, p.affine == Type::f32, spot.first_channel + c) * one_plus + shift_of<T>(p, film + c);
      tables.factor[c] = r * w;
      tables.term[c] = fmaf(-float(m), r * w, b);
    }
    if (threadIdx.x % 32 == 0 && spot.chunk == 0) {
      int64_t group = spot.sample * p.groups + (spot.first_channel + c0) / channels;
      mean[group] = float(tables.first[g] + m);
      rstd[group] = r;
    }
  }
  __syncthreads();

  float factor[V], term[V];
  for (int v = 0; v < V; v++) factor[v] = tables.factor[place + v], term[v] = tables.term[place + v];
  T* out = y + spot.sample * p.pixels * p.channels + spot.first_channel + start;
  ring.back(spot.items, [&](int i) {
    const auto pack = *ring.slot(i, 0);
    Pack<T, V> result;
    for (int v = 0; v < V; v++) {
      float z = fmaf(widen(pack.at[v]) - offset[v], factor[v], term[v]);
      result.at[v] = narrow<T>(p.silu ? z * sigmoid<T>(z) : z);
    }
    *reinterpret_cast<Pack<T, V>*>(out + i * stride) = result;
  });
  release(plan);
}

// gradient before the activation
template <typename T>
__device__ __forceinline__ float through_silu(float dy, float z) {
  float s = sigmoid<T>(z);
  return dy * s * fmaf(z, 1.0f - s, 1.0f);
}

template <typename T, int V>
__global__ void __launch_bounds__(THREADS, 1) backward(Problem p, Plan plan, const T* dy, const float* mean,
                                                    const float* rstd, T* dx, void* dscale, void* dshift, void* daddend,
                                                    float* partial, float* workspace) {
  auto* slots = dynamic_shared<Pack<T, V>>();
  const Spot spot = spot_of(p, plan);
  const int channels = int(p.channels / p.groups), groups = plan.width / channels;
  Tables<3> tables(slots, bytes_of_ring<T, V, 2>(plan), plan, groups);
  const int64_t film = spot.sample * p.channels + spot.first_channel;
  const int64_t group = spot.sample * p.groups + spot.first_channel / channels;
  for (int c = threadIdx.x; c < plan.width; c += blockDim.x) {
    float one_plus = scale_of<T>(p, film + c);
    tables.offset[c] = mean[group + c / channels] - addend_of<T>(p, film + c);
    tables.factor[c] = fetch<T>(p.weight, p.affine == Type::f32, spot.first_channel + c) * one_plus;
    tables.term[c] = fetch<T>(p.bias, p.affine == Type::f32, spot.first_channel + c) * one_plus + shift_of<T>(p, film + c);
  }
  __syncthreads();

  const int place = spot.column * V;
  const int64_t unit = spot.sample * p.pixels * p.channels + spot.first_channel;
  const int64_t start = (spot.begin + spot.row) * p.channels + place, stride = int64_t(plan.rows) * p.channels;
  const Ring<T, V, 2> ring{slots, {static_cast<const T*>(p.x) + unit + start, dy + unit + start}, stride, plan.slots};
  float offset[V], r[V], factor[V], term[V], sums[3][V] = {};
  for (int v = 0; v < V; v++) {
    offset[v] = tables.offset[place + v], factor[v] = tables.factor[place + v], term[v] = tables.term[place + v];
    r[v] = rstd[group + (place + v) / channels];
  }
  ring.forth(spot.items, [&](int i) {
    const auto x = *ring.slot(i, 0), g = *ring.slot(i, 1);
    for (int v = 0; v < V; v++) {
      float n = (widen(x.at[v]) - offset[v]) * r[v], d = widen(g.at[v]);
      if (p.silu) d = through_silu<T>(d, fmaf(n, factor[v], term[v]));
      sums[0][v] += d;
      sums[1][v] = fmaf(d, n, sums[1][v]);
      sums[2][v] += n;
    }
  });
  over_rows<3, V>(sums, tables.scratch, plan, spot);
  if (spot.row == 0) {
    for (int q = 0; q < 3; q++) {
      for (int v = 0; v < V; v++) tables.mine[q * plan.width + place + v] = sums[q][v];
    }
  }
  __syncthreads();
  over_chunks<3>(tables.mine, tables.total, workspace, plan, spot);

  // means over each group of the gradient of x_hat, and of its product with x_hat
  const float *along = tables.total, *across = tables.total + plan.width, *normal = tables.total + 2 * plan.width;
  for (int g = threadIdx.x / 32; g < groups; g += blockDim.x / 32) {
    float first = 0, second = 0;
    for (int c = g * channels + int(threadIdx.x % 32); c < (g + 1) * channels; c += 32) {
      first = fmaf(tables.factor[c], along[c], first);
      second = fmaf(tables.factor[c], across[c], second);
    }
    float count = float(channels) * float(p.pixels);
    first = over_lanes(first) / count, second = over_lanes(second) / count;
    if (threadIdx.x % 32 == 0) tables.first[g] = first, tables.second[g] = second;
  }
  __syncthreads();
  for (int c = threadIdx.x; spot.chunk == 0 && c < plan.width; c += blockDim.x) {
    float one_plus = scale_of<T>(p, film + c);
    float w = fetch<T>(p.weight, p.affine == Type::f32, spot.first_channel + c);
    float b = fetch<T>(p.bias, p.affine == Type::f32, spot.first_channel + c);
    partial[film + c] = one_plus * across[c];
    partial[p.samples * p.channels + film + c] = one_plus * along[c];
    if (dscale) put<T>(dscale, p.film == Type::f32, film + c, fmaf(w, across[c], b * along[c]));
    if (dshift) put<T>(dshift, p.film == Type::f32, film + c, along[c]);
    if (daddend) {
      int g = c / channels;
      float sum = tables.factor[c] * along[c] - float(p.pixels) * tables.first[g] - tables.second[g] * normal[c];
      put<T>(daddend, p.film == Type::f32, film + c, rstd[group + g] * sum);
    }
  }

  float first[V], second[V];
  for (int v = 0; v < V; v++) {
    first[v] = tables.first[(place + v) / channels], second[v] = tables.second[(place + v) / channels];
  }
  T* out = dx + unit + start;
  ring.back(spot.items, [&](int i) {
    const auto x = *ring.slot(i, 0), g = *ring.slot(i, 1);
    Pack<T, V> result;
    for (int v = 0; v < V; v++) {
      float n = (widen(x.at[v]) - offset[v]) * r[v], d = widen(g.at[v]);
      if (p.silu) d = through_silu<T>(d, fmaf(n, factor[v], term[v]));
      result.at[v] = narrow<T>(r[v] * (fmaf(factor[v], d, -first[v]) - n * second[v]));
    }
    *reinterpret_cast<Pack<T, V>*>(out + i * stride) = result;
  });
  release(plan);
}

// gradients of weight and bias: over samples, in their order
template <typename T>
__global__ void __launch_bounds__(256) over_samples(const float* partial, int64_t samples, int64_t channels, bool fp32,
                                                    void* dweight, void* dbias) {
  int64_t i = blockIdx.x * 256 + threadIdx.x;
  if (i >= 2 * channels) return;
  const float* part = partial + i / channels * samples * channels + i % channels;
  float sum = 0;
  for (int64_t s = 0; s < samples; s++) sum += part[s * channels];
  put<T>(i < channels ? dweight : dbias, fp32, i % channels, sum);
}

LaunchShape shape_of(const Problem& p, const Plan& plan) {
  LaunchShape shape{};
  shape.grid = unsigned(p.samples * (p.channels / plan.width) * plan.chunks);
  shape.block = unsigned(plan.width / plan.vector * plan.rows);
  shape.cluster = plan.grid ? 1 : unsigned(plan.chunks);
  shape.shared_bytes = size_t(plan.shared);
  shape.cooperative = plan.grid;
  return shape;
}

template <typename T, int V>
int run_forward(const Problem& p, const Plan& plan, float eps, void* y, float* mean, float* rstd, float* workspace,
                Stream stream) {
  return launch(forward<T, V>, shape_of(p, plan), stream, p, plan, eps, static_cast<T*>(y), mean, rstd, workspace);
}

template <typename T, int V>
int run_backward(const Problem& p, const Plan& plan, const void* dy, const float* mean, const float* rstd, void* dx,
                 void* dweight, void* dbias, void* dscale, void* dshift, void* daddend, float* partial, float* workspace,
                 Stream stream) {
  int error = launch(backward<T, V>, shape_of(p, plan), stream, p, plan, static_cast<const T*>(dy), mean, rstd,
                     static_cast<T*>(dx), dscale, dshift, daddend, partial, workspace);
  if (error) return error;
  LaunchShape shape{};
  shape.grid = unsigned((2 * p.channels + 255) / 256);
  shape.block = 256;
  return launch(over_samples<T>, shape, stream, static_cast<const float*>(partial), p.samples, p.channels,
                p.affine == Type::f32, dweight, dbias);
}

// calls `run` with the type and the vector width of a plan
#define BY_TYPE(run, ...)                                                                          \
  switch (problem.type) {                                                                          \
    case Type::f32: return plan.vector == 1 ? run<float, 1>(__VA_ARGS__) : run<float, 4>(__VA_ARGS__); \
    case Type::f16: return plan.vector == 1 ? run<__half, 1>(__VA_ARGS__) : run<__half, 8>(__VA_ARGS__); \
    default: return plan.vector == 1 ? run<__nv_bfloat16, 1>(__VA_ARGS__) : run<__nv_bfloat16, 8>(__VA_ARGS__); \
  }

}  // namespace

int group_norm_forward(const Problem& problem, const Plan& plan, float eps, void* y, float* mean, float* rstd,
                       float* workspace, Stream stream) {
  BY_TYPE(run_forward, problem, plan, eps, y, mean, rstd, workspace, stream)
}

int group_norm_backward(const Problem& problem, const Plan& plan, const void* dy, const float* mean, const float* rstd,
                        void* dx, void* dweight, void* dbias, void* dscale, void* dshift, void* daddend, float* partial,
                        float* workspace, Stream stream) {
  BY_TYPE(run_backward, problem, plan, dy, mean, rstd, dx, dweight, dbias, dscale, dshift, daddend, partial, workspace,
          stream)
}

}  // namespace semantica
