// Programs with one mistake each, and the same without it: PROGRAM [SEED], with "fixed" as third argument.
#include "device.cuh"

#include <cstdio>
#include <cstdlib>
#include <map>
#include <string>
#include <vector>

namespace cg = cooperative_groups;

namespace {

bool fixed = false;
int failures = 0;

void expect(bool right, const char* what) {
  if (!right && !failures++) std::printf("wrong: %s\n", what);
}

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

void missing_syncthreads() {
  std::vector<float> x(128, 1.0f), y(2);
  launch(block_sum, {2, 64}, nullptr, x.data(), y.data(), fixed);
  for (float sum : y) expect(sum == 64, "sum of a block");
}

__global__ void remote_read(float* y, bool wait, bool stay) {
  auto cluster = cg::this_cluster();
  SHARED(float, mine, 1);
  if (threadIdx.x == 0) *mine = float(cluster.block_rank() + 1);
  if (wait) cluster.sync();
  if (threadIdx.x == 0) {
    float sum = 0;
    for (unsigned r = 0; r < cluster.num_blocks(); r++) sum += *cluster.map_shared_rank(mine, r);
    y[blockIdx.x] = sum;
  }
  if (stay) cluster.sync();
}

void missing_cluster_sync() {
  std::vector<float> y(8);
  launch(remote_read, {8, 32, 4}, nullptr, y.data(), fixed, true);
  for (float sum : y) expect(sum == 10, "sum over the cluster");
}

void block_leaves_cluster() {
  std::vector<float> y(8);
  launch(remote_read, {8, 32, 4}, nullptr, y.data(), true, fixed);
  for (float sum : y) expect(sum == 10, "sum over the cluster");
}

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

void remote_read_after_exit() {
  std::vector<float> y(256);
  launch(late_read, {8, 32, 2}, nullptr, y.data(), fixed);
  for (int i = 0; i < 256; i++) expect(y[i] == float((i / 32 & 1) ^ 1), "the neighbour's");
}

__global__ void scale(const float* x, float* y, int n) {
  int i = blockIdx.x * 32 + threadIdx.x;
  if (i < n) y[i] = 2 * x[i];
}

void global_past_the_end() {
  std::vector<float> x(50, 1.0f), y(50);
  launch(scale, {2, 32}, nullptr, x.data(), y.data(), fixed ? 50 : 51);
  for (float v : y) expect(v == 2, "scaled");
}

__global__ void shift(float* y, int size) {
  float* part = dynamic_shared<float>();
  part[threadIdx.x] = float(threadIdx.x);
  __syncthreads();
  int from = threadIdx.x + 1;
  y[threadIdx.x] = from < size ? part[from] : 0;
}

void shared_past_the_end() {
  std::vector<float> y(32);
  launch(shift, {1, 32, 1, 32 * sizeof(float)}, nullptr, y.data(), fixed ? 32 : 33);
  expect(y[3] == 4, "shifted");
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

void divergent_syncthreads() {
  std::vector<float> y(64);
  launch(two_barriers, {1, 64}, nullptr, y.data(), fixed);
}

__global__ void stage(const float4* x, float4* y, bool wait) {
  SHARED(float4, part, 32);
  cp_async16(&part[threadIdx.x], &x[threadIdx.x]);
  cp_async_commit();
  if (wait) cp_async_wait<0>();
  y[threadIdx.x] = part[threadIdx.x];
}

void missing_cp_async_wait() {
  std::vector<float4> x(32, float4{1, 2, 3, 4}), y(32);
  launch(stage, {1, 32}, nullptr, x.data(), y.data(), fixed);
  for (auto& v : y) expect(v.w == 4, "staged");
}

__global__ void overwrite(float4* x, float4* y, bool wait) {
  SHARED(float4, part, 32);
  cp_async16(&part[threadIdx.x], &x[threadIdx.x]);
  cp_async_commit();
  if (wait) cp_async_wait<0>();
  x[threadIdx.x] = float4{0, 0, 0, 0};
  cp_async_wait<0>();
  y[threadIdx.x] = part[threadIdx.x];
}

void source_overwritten_early() {
  std::vector<float4> x(32, float4{1, 2, 3, 4}), y(32);
  launch(overwrite, {1, 32}, nullptr, x.data(), y.data(), fixed);
  for (auto& v : y) expect(v.w == 4, "staged");
}

__global__ void load_too_much(const float* x, float* y, unsigned bytes) {
  SHARED(float, part, 16);
  SHARED(mbarrier, bar, 1);
  mbarrier_init(bar, 1);
  mbarrier_expect_tx(bar, bytes);
  bulk_load(part, x, bytes, bar);
  mbarrier_wait(bar, 0);
  y[0] = part[0];
}

void bulk_past_the_end() {
  alignas(16) static float x[32] = {3};
  std::vector<float> y(1);
  launch(load_too_much, {1, 1}, nullptr, x, y.data(), fixed ? 64u : 128u);
  expect(y[0] == 3, "loaded");
}

// thread 0 loads all, everybody waits
__global__ void bulk(const float* x, float* y, unsigned expected, unsigned parity, bool wait) {
  float* part = dynamic_shared<float>();
  SHARED(mbarrier, bar, 1);
  if (threadIdx.x == 0) mbarrier_init(bar, 1);
  __syncthreads();
  if (threadIdx.x == 0) {
    mbarrier_expect_tx(bar, expected);
    bulk_load(part, x, 32 * sizeof(float), bar);
  }
  if (wait) mbarrier_wait(bar, parity);
  y[threadIdx.x] = part[threadIdx.x];
}

void run_bulk(unsigned expected, unsigned parity, bool wait) {
  alignas(16) static float x[32];
  std::vector<float> y(32);
  for (int i = 0; i < 32; i++) x[i] = float(i);
  launch(bulk, {1, 32, 1, sizeof x}, nullptr, x, y.data(), expected, parity, wait);
  for (int i = 0; i < 32; i++) expect(y[i] == float(i), "loaded");
}
void missing_bulk_wait() { run_bulk(128, 0, fixed); }
void wrong_transaction_count() { run_bulk(fixed ? 128 : 144, 0, true); }
void wrong_parity() { run_bulk(128, fixed ? 0 : 1, true); }

__global__ void give_back(float* y, bool fence, bool wait) {
  float* part = dynamic_shared<float>();
  part[threadIdx.x] = float(threadIdx.x);
  if (fence) fence_proxy_async();
  __syncthreads();
  if (threadIdx.x == 0) {
    bulk_store(y, part, 64 * sizeof(float));
    bulk_commit();
    if (wait) bulk_wait<0>();
  }
}

void run_store(bool fence, bool wait) {
  alignas(16) static float y[64];
  launch(give_back, {1, 64, 1, sizeof y}, nullptr, y, fence, wait);
  for (int i = 0; i < 64; i++) expect(y[i] == float(i), "stored");
}
void missing_proxy_fence() { run_store(fixed, true); }
void store_after_exit() { run_store(true, fixed); }

__global__ void half_shuffle(float* y, int from) {
  float value = float(threadIdx.x);
  if (threadIdx.x < 16) y[threadIdx.x] = __shfl_sync(0x0000ffffu, value, from);
}

void absent_lane() {
  std::vector<float> y(16);
  launch(half_shuffle, {1, 32}, nullptr, y.data(), fixed ? 15 : 16);
  for (float v : y) expect(v == 15, "broadcast");
}

__global__ void lane_left(float* y, unsigned mask) {
  if (threadIdx.x >= 16) return;
  y[threadIdx.x] = __shfl_xor_sync(mask, float(threadIdx.x), 1);
}

void lane_has_left() {
  std::vector<float> y(16);
  launch(lane_left, {1, 32}, nullptr, y.data(), fixed ? 0xffffu : 0xffffffffu);
  expect(y[4] == 5, "exchanged");
}

__global__ void vector_load(const float* x, float* y, int offset) {
  float4 v = __ldcs(reinterpret_cast<const float4*>(x + offset));
  y[threadIdx.x] = v.x + v.w;
}

void misaligned() {
  alignas(16) static float x[32];
  std::vector<float> y(1);
  launch(vector_load, {1, 1}, nullptr, x, y.data(), fixed ? 4 : 2);
}

__global__ void cast_load(const float* x, float* y, int offset) {
  float4 v = *reinterpret_cast<const float4*>(x + offset);
  y[threadIdx.x] = v.x + v.w;
}

void misaligned_pointer() {
  alignas(16) static float x[32];
  std::vector<float> y(1);
  launch(cast_load, {1, 1}, nullptr, x, y.data(), fixed ? 4 : 2);
}

__global__ void unwritten(float* y, bool write) {
  SHARED(float, part, 32);
  if (write || threadIdx.x) part[threadIdx.x] = 1;
  __syncthreads();
  float sum = part[threadIdx.x] + part[31 - threadIdx.x];
  y[threadIdx.x] = sum;
}

void uninitialised() {
  std::vector<float> y(32);
  launch(unwritten, {1, 32}, nullptr, y.data(), fixed);
  for (float v : y) expect(v == 2, "sum of what was written");
}

__global__ void last_block_wins(float* y, bool apart) { y[apart ? blockIdx.x : 0] = float(blockIdx.x); }

void blocks_race() {
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

void missing_grid_sync() {
  std::vector<float> x(4, 1.0f), part(4), y(4);
  launch(everybody, {4, 32, 1, 0, true}, nullptr, x.data(), part.data(), y.data(), fixed);
  for (float v : y) expect(v == 4, "sum over the grid");
}

void grid_sync_alone() {
  std::vector<float> x(4, 1.0f), part(4), y(4);
  launch(everybody, {4, 32, 1, 0, fixed}, nullptr, x.data(), part.data(), y.data(), true);
}

__global__ void warp_synchronous(float* y, bool wait) {
  SHARED(float, part, 32);
  part[threadIdx.x] = float(threadIdx.x);
  if (wait) __syncwarp();
  y[threadIdx.x] = part[threadIdx.x ^ 1];
}

void missing_syncwarp() {
  std::vector<float> y(32);
  launch(warp_synchronous, {1, 32}, nullptr, y.data(), fixed);
  for (int i = 0; i < 32; i++) expect(y[i] == float(i ^ 1), "neighbour's");
}

__global__ void reuse(const float* x, float* y, int rounds, bool wait) {
  SHARED(float, part, 64);
  for (int i = 0; i < rounds; i++) {
    part[threadIdx.x] = x[threadIdx.x] + float(i);
    __syncthreads();
    y[i * 64 + threadIdx.x] = part[63 - threadIdx.x];
    if (wait) __syncthreads();
  }
}

// the second barrier of a loop: what one round still reads the next one overwrites
void missing_second_barrier() {
  std::vector<float> x(64), y(256);
  for (int i = 0; i < 64; i++) x[i] = float(i);
  launch(reuse, {1, 64}, nullptr, x.data(), y.data(), 4, fixed);
  for (int i = 0; i < 256; i++) expect(y[i] == float(63 - i % 64 + i / 64), "reversed");
}

__global__ void named(float* y, unsigned count) {
  SHARED(float, part, 64);
  part[threadIdx.x] = float(threadIdx.x);
  // the first two warps meet by themselves
  if (threadIdx.x < 64) named_barrier_sync(1, count);
  if (threadIdx.x < 64) y[threadIdx.x] = part[63 - threadIdx.x];
}

void wrong_barrier_count() {
  std::vector<float> y(64);
  launch(named, {1, 64}, nullptr, y.data(), fixed ? 64u : 96u);
  for (int i = 0; i < 64; i++) expect(y[i] == float(63 - i), "reversed");
}

__global__ void nothing(float*) {}

void too_large() {
  float y;
  expect(launch(nothing, {1, 1025}, nullptr, &y) == 9, "threads of a block");
  expect(launch(nothing, {17, 32, 17}, nullptr, &y) == 9, "blocks of a cluster");
  expect(launch(nothing, {3, 32, 2}, nullptr, &y) == 9, "a grid of whole clusters");
  expect(launch(nothing, {1, 32, 1, (227 << 10) + 1}, nullptr, &y) == 1, "shared memory");
  expect(launch(nothing, {1000, 32, 1, 0, true}, nullptr, &y) == 720, "a cooperative grid");
  expect(launch(nothing, {16, 1024, 16, 227 << 10}, nullptr, &y) == 0, "the largest");
}

const std::map<std::string, void (*)()> PROGRAMS = {
    {"missing_syncthreads", missing_syncthreads},
    {"missing_second_barrier", missing_second_barrier},
    {"missing_cluster_sync", missing_cluster_sync},
    {"block_leaves_cluster", block_leaves_cluster},
    {"global_past_the_end", global_past_the_end},
    {"shared_past_the_end", shared_past_the_end},
    {"divergent_syncthreads", divergent_syncthreads},
    {"missing_cp_async_wait", missing_cp_async_wait},
    {"source_overwritten_early", source_overwritten_early},
    {"missing_bulk_wait", missing_bulk_wait},
    {"wrong_transaction_count", wrong_transaction_count},
    {"wrong_parity", wrong_parity},
    {"missing_proxy_fence", missing_proxy_fence},
    {"store_after_exit", store_after_exit},
    {"absent_lane", absent_lane},
    {"lane_has_left", lane_has_left},
    {"misaligned", misaligned},
    {"uninitialised", uninitialised},
    {"blocks_race", blocks_race},
    {"missing_grid_sync", missing_grid_sync},
    {"missing_syncwarp", missing_syncwarp},
    {"wrong_barrier_count", wrong_barrier_count},
    {"remote_read_after_exit", remote_read_after_exit},
    {"bulk_past_the_end", bulk_past_the_end},
    {"misaligned_pointer", misaligned_pointer},
    {"grid_sync_alone", grid_sync_alone},
    {"too_large", too_large},
};

}  // namespace

// the seeds that follow, one after the other: exit code 1 where a result is wrong under one of them
int main(int count, char** arguments) {
  if (count < 5) {
    for (auto& [name, program] : PROGRAMS) std::printf("%s\n", name.c_str());
    return 2;
  }
  fixed = std::string(arguments[2]) == "fixed";
  int first = std::atoi(arguments[3]), seeds = std::atoi(arguments[4]);
  for (int seed = first; seed < first + seeds; seed++) {
    cuda_host::set_seed(uint64_t(seed));
    PROGRAMS.at(arguments[1])();
  }
  return failures > 0;
}
