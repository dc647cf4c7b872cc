// With h = x_hat * a + b the argument of the activation and g = dy * act'(h), everything follows from sums over the pixels
// of each (sample, channel), G = sum g, H = sum g * x_hat, and X = sum x_hat:
//
//     dshift = G                         dscale = weight * H + bias * G
//     dbias = sum_b (1 + scale) * G      dweight = sum_b (1 + scale) * H
//     dx = rstd * (a * g - (A + x_hat * B))    A, B: a * G, a * H over the group, by the number of its values
//     daddend = sum dx = rstd * (a * G - pixels * A - B * X)
//
// (Wu & He, arXiv 1803.08494, eq. 1, differentiated.) x_hat and h are computed again from x, mean and rstd.
#pragma once

#include "tables.cuh"

namespace semantica {

constexpr int SUMS = 3;

template <typename T>
__device__ __forceinline__ float before_silu(float dy, float h) {
  // 1 - s would have few digits where h is large; exp(80) is far from overflow, and the gradient there is 0
  const float e = exponential<T>(fminf(-h, 80.0f)), s = reciprocal<T>(1.0f + e);
  return dy * s * fmaf(h, e * s, 1.0f);
}

// A thread's sums for each element of its vector. For fp32 results every 4 items are summed by themselves: one running sum
// of hundreds would be less exact than what it is for.
template <typename T, int V>
struct Running {
  static constexpr bool CAREFUL = sizeof(T) == 4;
  float now[SUMS][V] = {}, before[SUMS][CAREFUL ? V : 1] = {};
  int count = 0;

  __device__ __forceinline__ void add(const float (&x)[V], const float (&g)[V]) {
#pragma unroll
    for (int v = 0; v < V; v++) {
      now[0][v] += g[v], now[1][v] = fmaf(g[v], x[v], now[1][v]), now[2][v] += x[v];
    }
    if (CAREFUL && ++count == 4) settle();
  }
  __device__ __forceinline__ void settle() {
    if constexpr (CAREFUL) {
      for (int q = 0; q < SUMS; q++) {
        for (int v = 0; v < V; v++) before[q][v] += now[q][v], now[q][v] = 0;
      }
      count = 0;
    }
  }
  __device__ __forceinline__ float total(int q, int v) const { return CAREFUL ? before[q][v] + now[q][v] : now[q][v]; }
};

// channels_last: from sums in each thread's vector to the block's for each channel in the table
template <typename T, int V>
__device__ __forceinline__ void over_rows(const Running<T, V>& found, const Tables& tables, const Plan& plan) {
  // a channel is summed by this many lanes
  int lanes = WARP;
  while (lanes > 1 && lanes * plan.width > plan.threads) lanes /= 2;
  const int lane = int(threadIdx.x) % lanes, entries = plan.repeat * plan.rows;
#pragma unroll
  for (int q = 0; q < SUMS; q++) {
#pragma unroll
    for (int v = 0; v < V; v++) tables.scratch[v * plan.threads + int(threadIdx.x)] = found.total(q, v);
    __syncthreads();
    for (int first = 0; first < plan.width; first += plan.threads / lanes) {
      const int c = first + int(threadIdx.x) / lanes;
      float sum = 0;
      for (int i = lane; c < plan.width && i < entries; i += lanes) {
        const int at = i / plan.rows * plan.width + c;
        sum += tables.scratch[at % V * plan.threads + i % plan.rows * plan.columns + at / V];
      }
      sum = sum_over(sum, lanes);
      if (c < plan.width && lane == 0) tables.sums[q * plan.width + c] = sum;
    }
    __syncthreads();
  }
}

// the sums of one line of pixels, from a row of threads, to the table's scratch
template <typename T, int V>
__device__ __forceinline__ void put_line(const Running<T, V>& found, const Tables& tables, const Plan& plan,
                                         const Spot& spot, int line) {
  const int lanes = plan.columns < WARP ? plan.columns : WARP, pieces = pieces_of(plan);
#pragma unroll
  for (int q = 0; q < SUMS; q++) {
    float sum = 0;
#pragma unroll
    for (int v = 0; v < V; v++) sum += found.total(q, v);
    sum = sum_over(sum, lanes);
    if (spot.column % lanes == 0 && line < plan.width && spot.row < plan.rows) {
      tables.scratch[(q * plan.width + line) * pieces + spot.column / WARP] = sum;
    }
  }
}

__device__ __forceinline__ void over_pieces(const Tables& tables, const Plan& plan) {
  const int pieces = pieces_of(plan);
  __syncthreads();
  for (int i = int(threadIdx.x); i < SUMS * plan.width; i += int(blockDim.x)) {
    float sum = 0;
    for (int piece = 0; piece < pieces; piece++) sum += tables.scratch[i * pieces + piece];
    tables.sums[i] = sum;
  }
  __syncthreads();
}

// partial: [3, samples, chunks, channels]; means: [samples, groups, 2], A and B
template <typename T, int V, bool LAST>
__global__ void __launch_bounds__(512, 1)
    backward_kernel(Problem p, Plan plan, Phase phase, const T* dy, const float* mean, const float* rstd, T* dx,
                    float* partial, float* means, float* workspace) {
  auto* slots = dynamic_shared<Pack<T, V>>();
  const Extent extent(p, plan);
  const Tables tables(reinterpret_cast<float*>(reinterpret_cast<char*>(slots) +
                                               slot_bytes(plan, items_of(p, plan), sizeof(Pack<T, V>), 2,
                                                          Walk<T, V, 2>::AHEAD)),
                      p, plan, true);
  const int block = int(phase == Phase::second ? gridDim.x - 1 - blockIdx.x : blockIdx.x);
  constexpr int W = LAST ? V : 1;
  const float inverse_count = 1.0f / (float(p.channels / p.groups) * float(p.pixels));

  for (int round = 0; round < plan.rounds; round++) {
    const Spot spot(p, plan, block, round);
    const Walk<T, V, 2> walk{spot, plan, slots, {static_cast<const T*>(p.x) + spot.origin, dy + spot.origin}};
    const Cursor ahead = phase == Phase::second ? Cursor{} : walk.begin();
    tables.fill<T>(p, plan, spot);
    __syncthreads();

    float offset[W], inverse[W], factor[W], term[W];
    auto constants = [&](const Cursor& at) {
#pragma unroll
      for (int v = 0; v < W; v++) {
        const int c = channel_of<LAST, V>(plan, spot, at, v), g = LAST ? c / extent.depth : 0;
        offset[v] = __ldg(mean + spot.group_at(p, g)) - tables.addend[c];
        inverse[v] = __ldg(rstd + spot.group_at(p, g));
        factor[v] = tables.a[c], term[v] = tables.b[c];
      }
    };
    // x becomes x_hat, dy becomes g
    auto normalise = [&](const Pack<T, V>* slot, float (&x)[V], float (&g)[V]) {
      unpack<T>(slot[0], x);
      unpack<T>(slot[plan.threads], g);
#pragma unroll
      for (int v = 0; v < V; v++) {
        x[v] = (x[v] - offset[v % W]) * inverse[v % W];
      }
      if (p.silu) {
#pragma unroll
        for (int v = 0; v < V; v++) g[v] = before_silu<T>(g[v], fmaf(x[v], factor[v % W], term[v % W]));
      }
    };
    if (LAST) constants({});

    if (phase != Phase::second) {
      Running<T, V> found;
      walk.forth(ahead, [&](const Cursor& at, bool valid, const Pack<T, V>* slot) {
        if (valid) {
          float x[V], g[V];
          if (!LAST) constants(at);
          normalise(slot, x, g);
          found.add(x, g);
        }
        if (!LAST && at.step == spot.steps - 1) {
          put_line(found, tables, plan, spot, at.line);
          found = {};
        }
      });
      if (LAST) {
        over_rows(found, tables, plan);
      } else {
        over_pieces(tables, plan);
      }
      const int64_t plane = p.samples * plan.chunks * p.channels;
      const int64_t at = (int64_t(spot.sample) * plan.chunks + spot.chunk) * p.channels + spot.channel;
      for (int i = int(threadIdx.x); i < SUMS * plan.width && spot.items; i += int(blockDim.x)) {
        partial[i / plan.width * plane + at + i % plan.width] = tables.sums[i];
      }
      for (int g = int(threadIdx.x) / WARP; g < extent.groups; g += int(blockDim.x) / WARP) {
        Pair pair{};
        for (int c = g * extent.depth + int(threadIdx.x) % WARP; c < (g + 1) * extent.depth; c += WARP) {
          pair.first = fmaf(tables.a[c], tables.sums[c], pair.first);
          pair.second = fmaf(tables.a[c], tables.sums[plan.width + c], pair.second);
        }
        pair = over_lanes<Sums>(pair);
        if (threadIdx.x % WARP == 0) tables.stage[g] = pair;
      }
    }
    if (!over_team<Sums>(tables.stage, 1, tables.own, tables.total, workspace, plan, spot, extent.groups, round,
                         phase == Phase::first, phase == Phase::second)) {
      return;
    }

    for (int g = int(threadIdx.x); g < extent.groups && spot.items && spot.rank == 0; g += int(blockDim.x)) {
      means[2 * spot.group_at(p, g)] = tables.total[g].first * inverse_count;
      means[2 * spot.group_at(p, g) + 1] = tables.total[g].second * inverse_count;
    }
    float along[W], across[W];
#pragma unroll
    for (int v = 0; v < W; v++) {
      const int g = LAST ? channel_of<LAST, V>(plan, spot, {}, v) / extent.depth : 0;
      along[v] = tables.total[g].first * inverse_count, across[v] = tables.total[g].second * inverse_count;
    }
    T* out = dx + spot.origin;
    walk.back(phase == Phase::whole, [&](const Cursor& at, const Pack<T, V>* slot) {
      float x[V], g[V];
      if (!LAST) constants(at);
      normalise(slot, x, g);
#pragma unroll
      for (int v = 0; v < V; v++) {
        float bent = fmaf(x[v], across[v % W], along[v % W]);
        x[v] = inverse[v % W] * fmaf(factor[v % W], g[v], -bent);
      }
      store<T>(out + walk.offset(at), x, plan.path != Path::resident);
    });
    release(plan);
    __syncthreads();
  }
}

// Sums over chunks and samples, in their order. A block is 32 channels by 16 rows of threads, which share the samples, and
// what samples leave, the chunks.
template <typename T>
__global__ void __launch_bounds__(512)
    finish_kernel(Problem p, Gradients out, const float* rstd, const float* partial, const float* means, int chunks) {
  constexpr int ROWS = 16;
  SHARED(float, sums, SUMS * 512);
  const int lane = int(threadIdx.x) % WARP, row = int(threadIdx.x) / WARP;
  const int64_t c = int64_t(blockIdx.x) * WARP + lane, plane = p.samples * chunks * p.channels;
  const bool real = c < p.channels;
  int sharing = 1;
  while (sharing < ROWS && sharing * p.samples < ROWS) sharing *= 2;
  const float weight = real ? read<T>(p.weight, 0, c, 1.0f) : 0.0f, bias = real ? read<T>(p.bias, 0, c, 0.0f) : 0.0f;
  float dweight = 0, dbias = 0;
  for (int64_t base = 0; base < p.samples; base += ROWS / sharing) {
    const int64_t sample = base + row / sharing;
    const bool inside = real && sample < p.samples;
    for (int q = 0; q < SUMS; q++) {
      float sum = 0;
      for (int k = row % sharing; inside && k < chunks; k += sharing) {
        sum += partial[q * plane + (sample * chunks + k) * p.channels + c];
      }
      sums[q * 512 + int(threadIdx.x)] = sum;
    }
    __syncthreads();
    if (inside && row % sharing == 0) {
      float total[SUMS];
      for (int q = 0; q < SUMS; q++) {
        total[q] = 0;
        for (int k = 0; k < sharing; k++) total[q] += sums[q * 512 + int(threadIdx.x) + k * WARP];
      }
      const float g = total[0], h = total[1], factor = 1.0f + read<T>(p.scale, sample, c, 0.0f);
      const int64_t at = sample * p.channels + c, group = sample * p.groups + c / (p.channels / p.groups);
      dbias = fmaf(factor, g, dbias), dweight = fmaf(factor, h, dweight);
      if (out.dshift) write<T>(out.dshift, p.shift.f32, at, g);
      if (out.dscale) write<T>(out.dscale, p.scale.f32, at, fmaf(weight, h, bias * g));
      if (out.daddend) {
        float rest = fmaf(float(p.pixels), means[2 * group], means[2 * group + 1] * total[2]);
        write<T>(out.daddend, p.addend.f32, at, rstd[group] * fmaf(weight * factor, g, -rest));
      }
    }
    __syncthreads();
  }
  sums[int(threadIdx.x)] = dweight, sums[512 + int(threadIdx.x)] = dbias;
  __syncthreads();
  if (real && row == 0) {
    dweight = dbias = 0;
    for (int k = 0; k < ROWS; k++) dweight += sums[k * WARP + lane], dbias += sums[512 + k * WARP + lane];
    write<T>(out.dweight, p.weight.f32, c, dweight);
    write<T>(out.dbias, p.bias.f32, c, dbias);
  }
}

}  // namespace semantica
