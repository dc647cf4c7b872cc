// Mistakes with memory: past an end, misaligned, unwritten, too much.
#pragma once

#include "faults.cuh"

__global__ void scale(const float* x, float* y, int n, int offset) {
  int i = blockIdx.x * 32 + threadIdx.x;
  if (i < n) y[i] = 2 * x[i + offset];
}
static void run_scale(int n, int offset) {
  std::vector<float> before(300), x(50, 1.0f), after(300), y(50);
  launch(scale, {2, 32}, nullptr, x.data(), y.data(), n, offset);
  for (float v : y) expect(v == 2, "scaled");
}
PROGRAM(global_past_the_end) { run_scale(fixed ? 50 : 51, 0); }
// by as much as a row has, so that it lies in no neighbour's memory by chance
PROGRAM(global_a_row_past) { run_scale(50, fixed ? 0 : 200); }

__global__ void shift(float* y, int size) {
  float* part = dynamic_shared<float>();
  part[threadIdx.x] = float(threadIdx.x);
  __syncthreads();
  int from = threadIdx.x + 1;
  y[threadIdx.x] = from < size ? part[from] : 0;
}
PROGRAM(shared_past_the_end) {
  std::vector<float> y(32);
  launch(shift, {1, 32, 1, 32 * sizeof(float)}, nullptr, y.data(), fixed ? 32 : 33);
  expect(y[3] == 4, "shifted");
}

// static arrays lie side by side on a GPU: the first one's end is the second one's beginning
__global__ void beside(float* y, int from) {
  SHARED(float, first, 32);
  SHARED(float, second, 32);
  first[threadIdx.x] = 1, second[threadIdx.x] = 2;
  __syncthreads();
  y[threadIdx.x] = first[from + threadIdx.x] + second[threadIdx.x];
}
PROGRAM(static_shared_past_the_end) {
  std::vector<float> y(32);
  launch(beside, {1, 32}, nullptr, y.data(), fixed ? 0 : 1);
}

__global__ void remote_end(float* y, int from) {
  auto cluster = cg::this_cluster();
  SHARED(float, part, 4);
  part[threadIdx.x] = 1;
  cluster.sync();
  y[blockIdx.x * 4 + threadIdx.x] = cluster.map_shared_rank(part, cluster.block_rank() ^ 1)[from + threadIdx.x];
  cluster.sync();
}
PROGRAM(remote_past_the_end) {
  std::vector<float> y(8);
  launch(remote_end, {2, 4, 2}, nullptr, y.data(), fixed ? 0 : 1);
}

__global__ void vector_load(const float* x, float* y, int offset) {
  float4 v = __ldcs(reinterpret_cast<const float4*>(x + offset));
  y[threadIdx.x] = v.x + v.w;
}
PROGRAM(misaligned) {
  static Aligned<float> x;
  std::vector<float> y(1);
  launch(vector_load, {1, 1}, nullptr, x.at, y.data(), fixed ? 4 : 2);
}

__global__ void cast_load(const float* x, float* y, int offset) {
  float4 v = *reinterpret_cast<const float4*>(x + offset);
  y[threadIdx.x] = v.x + v.w;
}
PROGRAM(misaligned_pointer) {
  static Aligned<float> x;
  std::vector<float> y(1);
  launch(cast_load, {1, 1}, nullptr, x.at, y.data(), fixed ? 4 : 2);
}

__global__ void unwritten(float* y, bool write) {
  SHARED(float, part, 32);
  if (write || threadIdx.x) part[threadIdx.x] = 1;
  __syncthreads();
  y[threadIdx.x] = part[threadIdx.x] + part[31 - threadIdx.x];
  // a maximum takes no notice of NaN
  y[32 + threadIdx.x] = fmaxf(part[threadIdx.x], part[31 - threadIdx.x]);
}
static void run_unwritten(int from, float right, const char* what) {
  std::vector<float> y(64);
  launch(unwritten, {1, 32}, nullptr, y.data(), fixed);
  for (int i = from; i < from + 32; i++) expect(y[i] == right, what);
}
PROGRAM(uninitialised) { run_unwritten(0, 2, "sum of what was written"); }
PROGRAM(uninitialised_under_a_maximum) { run_unwritten(32, 1, "maximum of what was written"); }

// written in this launch, read through the cache that is for what no one writes
__global__ void stale(float* part, float* y, bool read_only) {
  part[blockIdx.x * 32 + threadIdx.x] = 1;
  grid_sync();
  const float* from = part + (blockIdx.x ^ 1) * 32 + threadIdx.x;
  y[blockIdx.x * 32 + threadIdx.x] = read_only ? __ldg(from) : *from;
}
PROGRAM(read_only_but_written) {
  std::vector<float> part(64), y(64);
  launch(stale, {2, 32, 1, 0, true}, nullptr, part.data(), y.data(), !fixed);
  for (float v : y) expect(v == 1, "the neighbour's");
}

__global__ void deep(float* y, int used) {
  volatile float local[10000];
  for (int i = 0; i < used; i++) local[i] = float(i);
  __syncthreads();
  y[threadIdx.x] = local[0];
}
__global__ void shallow(float* y, int) {
  __syncthreads();
  y[threadIdx.x] = 0;
}
PROGRAM(too_many_locals) {
  std::vector<float> y(64);
  launch(fixed ? shallow : deep, {1, 64}, nullptr, y.data(), 10000);
}

__global__ void two_shared(float* y) {
  float* part = dynamic_shared<float>();
  SHARED(float, more, 256);
  part[0] = 1, *more = 1;
  y[0] = part[0] + *more;
}
PROGRAM(no_dynamic_memory) {
  std::vector<float> y(1);
  launch(two_shared, {1, 1, 1, fixed ? 16u : 0u}, nullptr, y.data());
}
PROGRAM(too_much_shared) {
  std::vector<float> y(1);
  launch(two_shared, {1, 1, 1, (227u << 10) - (fixed ? 1024u : 1008u)}, nullptr, y.data());
}

__global__ void nothing(float*) {}
PROGRAM(too_large) {
  float y;
  expect(launch(nothing, {1, 1025}, nullptr, &y) == 9, "threads of a block");
  expect(launch(nothing, {17, 32, 17}, nullptr, &y) == 9, "blocks of a cluster");
  expect(launch(nothing, {3, 32, 2}, nullptr, &y) == 9, "a grid of whole clusters");
  expect(launch(nothing, {1u << 31, 32}, nullptr, &y) == 9, "blocks of a grid");
  expect(launch(nothing, {0, 32}, nullptr, &y) == 9, "a grid of none");
  expect(launch(nothing, {1, 32, 1, (227 << 10) + 1}, nullptr, &y) == 1, "shared memory");
  expect(launch(nothing, {1000, 32, 1, 0, true}, nullptr, &y) == 720, "a cooperative grid");
  expect(launch(nothing, {16, 1024, 16, 227 << 10}, nullptr, &y) == 0, "the largest");
}
