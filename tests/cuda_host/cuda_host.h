// CUDA C++ for an ordinary compiler: the names that csrc/cuda uses, with the semantics that CUDA gives them, and a named
// fault where CUDA leaves them undefined. Kernels include csrc/cuda/device.cuh, which includes this or CUDA's headers.
#pragma once

#include <cmath>
#include <cstring>
#include <type_traits>

#include "runtime.h"
#include "types.h"

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __launch_bounds__(...)

#define threadIdx (cuda_host::place().thread)
#define blockIdx (cuda_host::place().block)
#define blockDim (cuda_host::place().block_size)
#define gridDim (cuda_host::place().grid_size)

#define CUDA_HOST_TEXT_(line) #line
#define CUDA_HOST_TEXT(line) CUDA_HOST_TEXT_(line)
#define CUDA_HOST_HERE __FILE__ ":" CUDA_HOST_TEXT(__LINE__)

using cudaStream_t = void*;

// one array for each block; a lambda's address is the variable's name in all of them
#define SHARED(type, name, size) \
  static const char name##_key = 0; \
  type* const name = static_cast<type*>(cuda_host::shared_variable(&name##_key, sizeof(type) * (size)))

template <typename T>
T* dynamic_shared() {
  return static_cast<T*>(cuda_host::dynamic_memory());
}

#define __syncthreads() cuda_host::sync_block(CUDA_HOST_HERE)
#define named_barrier_sync(id, threads) cuda_host::sync_named(id, threads, CUDA_HOST_HERE)
#define grid_sync() cuda_host::sync_grid(CUDA_HOST_HERE)
inline void __syncwarp(unsigned mask = 0xffffffffu) { cuda_host::sync_warp(mask, "__syncwarp"); }
inline void __threadfence() {}

namespace cuda_host {

inline unsigned lane() {
  const Place& at = place();
  return (at.thread.x + at.block_size.x * (at.thread.y + at.block_size.y * at.thread.z)) % WARP;
}

template <typename T>
T shuffle(unsigned mask, T value, unsigned source, const char* where) {
  static_assert(sizeof(T) <= 8 && std::is_trivially_copyable_v<T>);
  uint64_t bits = 0;
  std::memcpy(&bits, &value, sizeof(T));
  bits = exchange(mask, bits, source, where);
  std::memcpy(&value, &bits, sizeof(T));
  return value;
}

// by words, through the compiler's own instrumentation
inline void copy_bytes(void* to, const void* from, size_t bytes) {
  auto* out = static_cast<unsigned char*>(to);
  const auto* in = static_cast<const unsigned char*>(from);
  size_t i = 0;
  if ((reinterpret_cast<uintptr_t>(out) | reinterpret_cast<uintptr_t>(in)) % 8 == 0) {
    for (; i + 8 <= bytes; i += 8) {
      *reinterpret_cast<volatile uint64_t*>(out + i) = *reinterpret_cast<const volatile uint64_t*>(in + i);
    }
  }
  for (; i < bytes; i++) static_cast<volatile unsigned char*>(out)[i] = static_cast<const volatile unsigned char*>(in)[i];
}

template <typename T>
void check_aligned(const T* address, const char* what) {
  if (reinterpret_cast<uintptr_t>(address) % sizeof(T)) {
    fault("misaligned %s of %zu bytes at %p", what, sizeof(T), static_cast<const void*>(address));
  }
}

}  // namespace cuda_host

// width: of the segments of a warp that exchange among themselves
template <typename T>
T __shfl_xor_sync(unsigned mask, T value, int xor_with, int width = 32) {
  unsigned lane = cuda_host::lane(), source = lane ^ unsigned(xor_with);
  return cuda_host::shuffle(mask, value, source / width == lane / width ? source : lane, "__shfl_xor_sync");
}
template <typename T>
T __shfl_down_sync(unsigned mask, T value, unsigned delta, int width = 32) {
  unsigned lane = cuda_host::lane(), source = lane + delta;
  return cuda_host::shuffle(mask, value, source / width == lane / width ? source : lane, "__shfl_down_sync");
}
template <typename T>
T __shfl_up_sync(unsigned mask, T value, unsigned delta, int width = 32) {
  unsigned lane = cuda_host::lane(), within = lane % width;
  return cuda_host::shuffle(mask, value, within >= delta ? lane - delta : lane, "__shfl_up_sync");
}
template <typename T>
T __shfl_sync(unsigned mask, T value, int source, int width = 32) {
  unsigned first = cuda_host::lane() / width * width;
  return cuda_host::shuffle(mask, value, first + unsigned(source) % width, "__shfl_sync");
}

template <typename T>
T __ldg(const T* address) {
  cuda_host::check_aligned(address, "load");
  return *address;
}
template <typename T>
T __ldcs(const T* address) {
  return __ldg(address);
}
template <typename T>
T __ldcg(const T* address) {
  return __ldg(address);
}
template <typename T>
void __stcs(T* address, T value) {
  cuda_host::check_aligned(address, "store");
  *address = value;
}

inline float __expf(float x) { return std::exp(x); }
inline float __frcp_rn(float x) { return 1.0f / x; }
inline float __fdividef(float a, float b) { return a / b; }
inline float rsqrtf(float x) { return 1.0f / std::sqrt(x); }

namespace cooperative_groups {
struct cluster_group {
  void barrier_arrive() const { cuda_host::cluster_arrive("cluster.barrier_arrive"); }
  void barrier_wait() const { cuda_host::cluster_wait("cluster.barrier_wait"); }
  void sync() const {
    cuda_host::cluster_arrive("cluster.sync");
    cuda_host::cluster_wait("cluster.sync");
  }
  unsigned block_rank() const { return cuda_host::cluster_rank(); }
  unsigned num_blocks() const { return cuda_host::cluster_blocks(); }
  template <typename T>
  T* map_shared_rank(T* address, unsigned rank) const {
    return static_cast<T*>(cuda_host::map_shared(address, rank));
  }
};
inline cluster_group this_cluster() { return {}; }
}  // namespace cooperative_groups

// asynchronous copies; see device.cuh for what they are on a GPU
inline void cp_async16(void* to_shared, const void* from) {
  cuda_host::start_copy(cuda_host::Kind::thread_copy, to_shared, from, 16, nullptr, "cp_async16");
}
inline void cp_async_commit() { cuda_host::commit_group(cuda_host::Kind::thread_copy); }
template <int left>
void cp_async_wait() {
  cuda_host::wait_group(cuda_host::Kind::thread_copy, left, "cp_async_wait");
}

struct alignas(8) mbarrier {
  uint64_t opaque;
};
inline void mbarrier_init(mbarrier* bar, unsigned arrivals) { cuda_host::mbarrier_init(bar, arrivals, "mbarrier_init"); }
inline void mbarrier_arrive(mbarrier* bar) { cuda_host::mbarrier_arrive(bar, 0, "mbarrier_arrive"); }
inline void mbarrier_expect_tx(mbarrier* bar, unsigned bytes) {
  cuda_host::mbarrier_arrive(bar, bytes, "mbarrier_expect_tx");
}
inline void mbarrier_wait(mbarrier* bar, unsigned parity) { cuda_host::mbarrier_wait(bar, parity, "mbarrier_wait"); }
inline void fence_proxy_async() { cuda_host::proxy_fence(); }
inline void bulk_load(void* to_shared, const void* from, unsigned bytes, mbarrier* bar) {
  cuda_host::start_copy(cuda_host::Kind::load, to_shared, from, bytes, bar, "bulk_load");
}
inline void bulk_store(void* to, const void* from_shared, unsigned bytes) {
  cuda_host::start_copy(cuda_host::Kind::store, to, from_shared, bytes, nullptr, "bulk_store");
}
inline void bulk_commit() { cuda_host::commit_group(cuda_host::Kind::store); }
template <int left>
void bulk_wait() {
  cuda_host::wait_group(cuda_host::Kind::store, left, "bulk_wait");
}

struct LaunchShape {
  unsigned grid, block, cluster = 1;
  size_t shared_bytes = 0;
  bool cooperative = false;
};

// returns 0, or the number that cudaError_t has for the mistake
template <typename... P, typename... A>
int launch(void (*kernel)(P...), const LaunchShape& shape, cudaStream_t, A... arguments) {
  cuda_host::Grid grid{{shape.grid}, {shape.block}, shape.cluster, shape.shared_bytes, shape.cooperative};
  return cuda_host::run(grid, [=] { kernel(P(arguments)...); }, cuda_host::copy_bytes);
}
