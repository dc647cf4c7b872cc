// Mistakes with copies that complete later: cp.async, bulk copies, mbarriers.
#pragma once

#include "faults.cuh"

// copies 16 bytes for each thread; waits, or not, before it reads them
__global__ void stage(const float4* x, float4* y, bool commit, bool wait) {
  SHARED(float4, part, 32);
  cp_async16(&part[threadIdx.x], &x[threadIdx.x]);
  if (commit) cp_async_commit();
  if (wait) cp_async_wait<0>();
  y[threadIdx.x] = part[threadIdx.x];
  if (!commit) cp_async_commit();
  cp_async_wait<0>();
}
static void run_stage(bool commit, bool wait) {
  std::vector<float4> x(32, float4{1, 2, 3, 4}), y(32);
  launch(stage, {1, 32}, nullptr, x.data(), y.data(), commit, wait);
  for (auto& v : y) expect(v.w == 4, "staged");
}
PROGRAM(missing_cp_async_wait) { run_stage(true, fixed); }
PROGRAM(missing_commit) { run_stage(fixed, true); }

__global__ void never_waits(const float4* x, bool wait) {
  SHARED(float4, part, 32);
  cp_async16(&part[threadIdx.x], &x[threadIdx.x]);
  cp_async_commit();
  if (wait) cp_async_wait<0>();
}
PROGRAM(never_waited_for) {
  std::vector<float4> x(32);
  launch(never_waits, {1, 32}, nullptr, x.data(), fixed);
}

// two buffers: what comes first is worked on while the second is under way
__global__ void two_stages(const float4* x, float4* y, int rounds, bool enough, bool wait) {
  SHARED(float4, part, 64);
  auto fetch = [&](int i) {
    if (i < rounds) cp_async16(&part[i % 2 * 32 + threadIdx.x], &x[i * 32 + threadIdx.x]);
    cp_async_commit();
  };
  fetch(0);
  for (int i = 0; i < rounds; i++) {
    fetch(i + 1);
    if (enough) cp_async_wait<1>();
    else cp_async_wait<2>();
    __syncthreads();
    y[i * 32 + threadIdx.x] = part[i % 2 * 32 + 31 - threadIdx.x];
    // the next round fills what others may still read
    if (wait) __syncthreads();
  }
  cp_async_wait<0>();
}
static void run_stages(bool enough, bool wait) {
  std::vector<float4> x(256), y(256);
  for (int i = 0; i < 256; i++) x[i] = {0, 0, 0, float(i)};
  launch(two_stages, {1, 32}, nullptr, x.data(), y.data(), 8, enough, wait);
  for (int i = 0; i < 256; i++) expect(y[i].w == float(i / 32 * 32 + 31 - i % 32), "reversed in rounds");
}
PROGRAM(waits_for_too_few) { run_stages(fixed, true); }
PROGRAM(refilled_too_early) { run_stages(true, fixed); }

__global__ void overwrite(float4* x, float4* y, bool wait) {
  SHARED(float4, part, 32);
  cp_async16(&part[threadIdx.x], &x[threadIdx.x]);
  cp_async_commit();
  if (wait) cp_async_wait<0>();
  x[threadIdx.x] = float4{0, 0, 0, 0};
  cp_async_wait<0>();
  y[threadIdx.x] = part[threadIdx.x];
}
PROGRAM(source_overwritten_early) {
  std::vector<float4> x(32, float4{1, 2, 3, 4}), y(32);
  launch(overwrite, {1, 32}, nullptr, x.data(), y.data(), fixed);
  for (auto& v : y) expect(v.w == 4, "staged");
}

__global__ void from_shared(const float4* x, float4* y, bool global) {
  SHARED(float4, part, 2);
  part[1] = x[0];
  cp_async16(&part[0], global ? x : &part[1]);
  cp_async_commit();
  cp_async_wait<0>();
  y[0] = part[0];
}
PROGRAM(copied_from_shared) {
  std::vector<float4> x(1), y(1);
  launch(from_shared, {1, 1}, nullptr, x.data(), y.data(), fixed);
}

// what an array of floats is aligned to, whatever the compiler does
__global__ void into_floats(const float4* x, float4* y, bool vectors) {
  SHARED(float, loose, 4);
  SHARED(float4, tight, 1);
  void* to = vectors ? static_cast<void*>(tight) : static_cast<void*>(loose);
  cp_async16(to, x);
  cp_async_commit();
  cp_async_wait<0>();
  y[0] = *static_cast<float4*>(to);
}
PROGRAM(misaligned_shared) {
  std::vector<float4> x(1), y(1);
  launch(into_floats, {1, 1}, nullptr, x.data(), y.data(), fixed);
}

__global__ void load_too_much(const float* x, float* y, unsigned bytes) {
  SHARED(float4, part, 4);
  SHARED(mbarrier, bar, 1);
  mbarrier_init(bar, 1);
  mbarrier_expect_tx(bar, bytes);
  bulk_load(part, x, bytes, bar);
  mbarrier_wait(bar, 0);
  y[0] = part[0].x;
}
PROGRAM(bulk_past_the_end) {
  static Aligned<float> x = {{3}};
  std::vector<float> y(1);
  launch(load_too_much, {1, 1}, nullptr, x.at, y.data(), fixed ? 64u : 128u);
  expect(y[0] == 3, "loaded");
}

struct Bulk {
  unsigned expected, parity;
  bool meet, wait, spoil, twice, stay;
};
// thread 0 loads all, everybody waits
__global__ void bulk(const float* x, float* y, Bulk how) {
  float* part = dynamic_shared<float>();
  SHARED(mbarrier, bar, 1);
  if (threadIdx.x == 0) mbarrier_init(bar, 1);
  if (how.meet) __syncthreads();
  if (threadIdx.x == 0) {
    bulk_load(part, x, 32 * sizeof(float), bar);
    mbarrier_expect_tx(bar, how.expected);
    if (how.twice) mbarrier_arrive(bar);
    if (how.spoil) bar->opaque = 0;
  }
  if (how.wait) mbarrier_wait(bar, how.parity);
  y[threadIdx.x] = part[threadIdx.x];
  if (how.stay) mbarrier_wait(bar, 0);
}
static void run_bulk(const Bulk& how) {
  static Aligned<float> x;
  std::vector<float> y(32);
  for (int i = 0; i < 32; i++) x.at[i] = float(i);
  launch(bulk, {1, 32, 1, 128}, nullptr, x.at, y.data(), how);
  for (int i = 0; i < 32; i++) expect(y[i] == float(i), "loaded");
}
PROGRAM(missing_bulk_wait) { run_bulk({128, 0, true, fixed, false, false, true}); }
PROGRAM(left_before_the_load) { run_bulk({128, 0, true, fixed, false, false, false}); }
PROGRAM(wrong_transaction_count) { run_bulk({fixed ? 128u : 144u, 0, true, true, false, false, false}); }
PROGRAM(wrong_parity) { run_bulk({128, fixed ? 0u : 1u, true, true, false, false, true}); }
PROGRAM(missing_sync_after_init) { run_bulk({128, 0, fixed, true, false, false, false}); }
PROGRAM(mbarrier_overwritten) { run_bulk({128, 0, true, true, !fixed, false, false}); }
PROGRAM(one_arrival_too_many) { run_bulk({128, 0, true, true, false, !fixed, false}); }

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
static void run_store(bool fence, bool wait) {
  static Aligned<float> y;
  launch(give_back, {1, 64, 1, sizeof y}, nullptr, y.at, fence, wait);
  for (int i = 0; i < 64; i++) expect(y.at[i] == float(i), "stored");
}
PROGRAM(missing_proxy_fence) { run_store(fixed, true); }
PROGRAM(store_after_exit) { run_store(true, fixed); }
