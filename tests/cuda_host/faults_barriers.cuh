// Mistakes where threads meet: in a warp, a block, a cluster, the grid.
#pragma once

#include "faults.cuh"

// sums the block's values in shared memory, thread 0 writes
__global__ void block_sum(const float* x, float* y, bool wait) {
  SHARED(float, part, 64);
  part[threadIdx.x] = x[blockIdx.x * 64 + threadIdx.x];
  if (wait) __syncthreads();
  if (threadIdx.x == 0) {
    float sum = 0;
    for (int i = 0; i < 64; i++) sum += part[i];
    y[blockIdx.x] = sum;
  }
}
PROGRAM(missing_syncthreads) {
  std::vector<float> x(128, 1.0f), y(2);
  launch(block_sum, {2, 64}, nullptr, x.data(), y.data(), fixed);
  for (float sum : y) expect(sum == 64, "sum of a block");
}

// the second barrier of a loop: what one round still reads the next one overwrites
__global__ void reuse(const float* x, float* y, int rounds, bool wait) {
  SHARED(float, part, 64);
  for (int i = 0; i < rounds; i++) {
    part[threadIdx.x] = x[threadIdx.x] + float(i);
    __syncthreads();
    y[i * 64 + threadIdx.x] = part[63 - threadIdx.x];
    if (wait) __syncthreads();
  }
}
PROGRAM(missing_second_barrier) {
  std::vector<float> x(64), y(256);
  for (int i = 0; i < 64; i++) x[i] = float(i);
  launch(reuse, {1, 64}, nullptr, x.data(), y.data(), 4, fixed);
  for (int i = 0; i < 256; i++) expect(y[i] == float(63 - i % 64 + i / 64), "reversed");
}

__global__ void two_barriers(float* y, bool together) {
  SHARED(float, part, 64);
  part[threadIdx.x] = 1;
  if (together) {
    __syncthreads();
  } else if (threadIdx.x < 32) {
    __syncthreads();
  } else {
    __syncthreads();
  }
  y[threadIdx.x] = part[63 - threadIdx.x];
}
PROGRAM(divergent_syncthreads) {
  std::vector<float> y(64);
  launch(two_barriers, {1, 64}, nullptr, y.data(), fixed);
}

// half of the block never comes to one of the barriers, and waits elsewhere
__global__ void skipped(float* y, bool all) {
  SHARED(float, part, 64);
  part[threadIdx.x] = 1;
  if (all || threadIdx.x < 32) __syncthreads();
  named_barrier_sync(1, 64);
  y[threadIdx.x] = part[63 - threadIdx.x];
}
PROGRAM(skipped_barrier) {
  std::vector<float> y(64);
  launch(skipped, {1, 64}, nullptr, y.data(), fixed);
}

__global__ void named(float* y, unsigned count, unsigned others, unsigned lanes) {
  SHARED(float, part, 64);
  part[threadIdx.x] = float(threadIdx.x);
  if (threadIdx.x % 32 < lanes) named_barrier_sync(1, threadIdx.x < 32 ? count : others);
  else __syncwarp(~((1u << lanes) - 1));
  if (lanes == 32) y[threadIdx.x] = part[63 - threadIdx.x];
}
static void run_named(unsigned count, unsigned others, unsigned lanes) {
  std::vector<float> y(64);
  launch(named, {1, 64}, nullptr, y.data(), count, others, lanes);
  for (int i = 0; i < 64; i++) expect(y[i] == float(63 - i), "reversed");
}
PROGRAM(wrong_barrier_count) { run_named(fixed ? 64 : 96, fixed ? 64 : 96, 32); }
PROGRAM(barrier_counts_differ) { run_named(64, fixed ? 64 : 96, 32); }
PROGRAM(half_warps_at_a_barrier) { run_named(fixed ? 64 : 32, fixed ? 64 : 32, fixed ? 32 : 16); }

__global__ void warp_synchronous(float* y, bool wait) {
  SHARED(float, part, 32);
  part[threadIdx.x] = float(threadIdx.x);
  if (wait) __syncwarp();
  y[threadIdx.x] = part[threadIdx.x ^ 1];
}
PROGRAM(missing_syncwarp) {
  std::vector<float> y(32);
  launch(warp_synchronous, {1, 32}, nullptr, y.data(), fixed);
  for (int i = 0; i < 32; i++) expect(y[i] == float(i ^ 1), "neighbour's");
}

__global__ void half_shuffle(float* y, int from) {
  float value = float(threadIdx.x);
  if (threadIdx.x < 16) y[threadIdx.x] = __shfl_sync(0x0000ffffu, value, from);
}
PROGRAM(absent_lane) {
  std::vector<float> y(16);
  launch(half_shuffle, {1, 32}, nullptr, y.data(), fixed ? 15 : 16);
  for (float v : y) expect(v == 15, "broadcast");
}

// CUDA waits for those lanes of a mask that have not left, and what left has no value
__global__ void lane_left(float* y, int step) {
  if (threadIdx.x >= 16) return;
  y[threadIdx.x] = __shfl_xor_sync(0xffffffffu, float(threadIdx.x), step);
}
PROGRAM(lane_has_left) {
  std::vector<float> y(16);
  launch(lane_left, {1, 32}, nullptr, y.data(), fixed ? 1 : 16);
  expect(y[4] == 5, "exchanged");
}

__global__ void lane_elsewhere(float* y, bool all) {
  float v = float(threadIdx.x);
  if (all || threadIdx.x < 16) v = __shfl_xor_sync(0xffffffffu, v, 1);
  named_barrier_sync(1, 32);
  y[threadIdx.x] = v;
}
PROGRAM(lane_is_elsewhere) {
  std::vector<float> y(32);
  launch(lane_elsewhere, {1, 32}, nullptr, y.data(), fixed);
  expect(y[4] == 5, "exchanged");
}

__global__ void two_shuffles(float* y, bool same) {
  float v = float(threadIdx.x);
  if (same || threadIdx.x < 16) v = __shfl_xor_sync(0xffffffffu, v, 1);
  else v = __shfl_down_sync(0xffffffffu, v, 1);
  y[threadIdx.x] = v;
}
PROGRAM(shuffles_of_two_kinds) {
  std::vector<float> y(32);
  launch(two_shuffles, {1, 32}, nullptr, y.data(), fixed);
}

__global__ void segments(float* y, int width) {
  float v = float(threadIdx.x);
  y[threadIdx.x] = __shfl_down_sync(0xffffffffu, v, 3, width);
  y[32 + threadIdx.x] = __shfl_xor_sync(0xffffffffu, v, 16, width);
  y[64 + threadIdx.x] = __shfl_sync(0xffffffffu, v, 9, width);
}
PROGRAM(odd_segments) {
  std::vector<float> y(96);
  launch(segments, {1, 32}, nullptr, y.data(), fixed ? 8 : 12);
  for (int i = 0; i < 32; i++) {
    expect(y[i] == float(i % 8 < 5 ? i + 3 : i), "down");
    // to segments before its own, but not to those after
    expect(y[32 + i] == float(i < 16 ? i : i - 16), "xor");
    expect(y[64 + i] == float(i / 8 * 8 + 1), "one lane");
  }
}

// adds up the cluster's numbers
__global__ void remote_read(float* y, bool first, bool second, bool stay) {
  auto cluster = cg::this_cluster();
  SHARED(float, mine, 1);
  if (first) cluster.sync();
  if (threadIdx.x == 0) *mine = float(cluster.block_rank() + 1);
  if (second) cluster.sync();
  if (threadIdx.x == 0) {
    float sum = 0;
    for (unsigned r = 0; r < cluster.num_blocks(); r++) sum += *cluster.map_shared_rank(mine, r);
    y[blockIdx.x] = sum;
  }
  if (stay) cluster.sync();
}
static void run_remote(bool first, bool second, bool stay) {
  std::vector<float> y(8);
  launch(remote_read, {8, 32, 4}, nullptr, y.data(), first, second, stay);
  for (float sum : y) expect(sum == 10, "sum over the cluster");
}
PROGRAM(missing_cluster_sync) { run_remote(true, fixed, true); }
PROGRAM(mapped_before_the_start) { run_remote(false, fixed, true); }
PROGRAM(block_leaves_cluster) { run_remote(false, true, fixed); }

// the address is fetched in time, what it points to is not
__global__ void late_read(float* y, bool stay) {
  auto cluster = cg::this_cluster();
  SHARED(float, mine, 1);
  if (threadIdx.x == 0) *mine = float(cluster.block_rank());
  cluster.sync();
  const float* theirs = cluster.map_shared_rank(mine, cluster.block_rank() ^ 1);
  cluster.sync();
  // block 0 lets the other go ahead
  for (int i = 0; cluster.block_rank() == 0 && i < 50; i++) named_barrier_sync(1, 32);
  y[blockIdx.x * 32 + threadIdx.x] = *theirs;
  if (stay) cluster.sync();
}
PROGRAM(remote_read_after_exit) {
  std::vector<float> y(256);
  launch(late_read, {8, 32, 2}, nullptr, y.data(), fixed);
  for (int i = 0; i < 256; i++) expect(y[i] == float((i / 32 & 1) ^ 1), "the neighbour's");
}

__global__ void split_barrier(bool wait, bool again, bool all) {
  auto cluster = cg::this_cluster();
  if (all || threadIdx.x) cluster.barrier_arrive();
  if (again) cluster.barrier_arrive();
  if (wait && (all || threadIdx.x)) cluster.barrier_wait();
  if (!all && !threadIdx.x) named_barrier_sync(1, 32);
}
static void run_split(bool wait, bool again, bool all) { launch(split_barrier, {4, 32, 2}, nullptr, wait, again, all); }
PROGRAM(leaves_after_arriving) { run_split(fixed, false, true); }
PROGRAM(arrives_twice) { run_split(true, !fixed, true); }
PROGRAM(absent_from_the_cluster) { run_split(true, false, fixed); }

__global__ void last_block_wins(float* y, bool apart) { y[apart ? blockIdx.x : 0] = float(blockIdx.x); }
PROGRAM(blocks_race) {
  std::vector<float> y(4);
  launch(last_block_wins, {4, 1}, nullptr, y.data(), fixed);
}

__global__ void everybody(const float* x, float* part, float* y, bool wait) {
  if (threadIdx.x == 0) part[blockIdx.x] = x[blockIdx.x];
  if (wait) grid_sync();
  if (threadIdx.x == 0) {
    float sum = 0;
    for (unsigned i = 0; i < gridDim.x; i++) sum += part[i];
    y[blockIdx.x] = sum;
  }
}
static void run_everybody(bool cooperative, bool wait) {
  std::vector<float> x(4, 1.0f), part(4), y(4);
  launch(everybody, {4, 32, 1, 0, cooperative}, nullptr, x.data(), part.data(), y.data(), wait);
  for (float v : y) expect(v == 4, "sum over the grid");
}
PROGRAM(missing_grid_sync) { run_everybody(true, fixed); }
PROGRAM(grid_sync_alone) { run_everybody(fixed, true); }

// a block waits for another one that need not be there
__global__ void spin(volatile float* flag, bool wait) {
  while (wait && *flag == 0) {
  }
  if (!wait) flag[blockIdx.x] = 1;
}
PROGRAM(waits_in_a_loop) {
  std::vector<float> flag(2);
  launch(spin, {2, 1}, nullptr, flag.data(), !fixed);
}
