// CUDA C++ for an ordinary compiler: the names that csrc/cuda uses, with the semantics that CUDA gives them, and a named
// fault where CUDA leaves them undefined. Kernels include csrc/cuda/device.cuh, which includes this or CUDA's headers.
#pragma once

#include <cmath>
#include <cstring>
#include <type_traits>

#include "numbers.h"
#include "runtime.h"

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __launch_bounds__(...)

#define threadIdx (cuda_host::place().thread)
#define blockIdx (cuda_host::place().block)
#define blockDim (cuda_host::place().block_size)
#define gridDim (cuda_host::place().grid_size)

using cudaStream_t = void*;

// one array for each block; the key's address is the variable's name in all of them
#define SHARED(type, name, size) \
  static const char name##_key = 0; \
  type* const name = static_cast<type*>(cuda_host::shared_variable(&name##_key, sizeof(type) * (size), alignof(type)))

// the last argument of what follows is never given: it is the line of the call
template <typename T>
T* dynamic_shared(cuda_host::Call at = cuda_host::Call::to("dynamic_shared")) {
  return static_cast<T*>(cuda_host::dynamic_memory(at));
}

inline void __syncthreads(cuda_host::Call at = cuda_host::Call::to("__syncthreads")) { cuda_host::sync_block(at); }
inline void named_barrier_sync(unsigned id, unsigned threads,
                               cuda_host::Call at = cuda_host::Call::to("named_barrier_sync")) {
  cuda_host::sync_named(id, threads, at);
}
inline void grid_sync(cuda_host::Call at = cuda_host::Call::to("grid_sync")) { cuda_host::sync_grid(at); }
inline void __syncwarp(unsigned mask = 0xffffffffu, cuda_host::Call at = cuda_host::Call::to("__syncwarp")) {
  cuda_host::sync_warp(mask, at);
}

namespace cuda_host {

inline unsigned lane() {
  const Place& at = place();
  return (at.thread.x + at.block_size.x * (at.thread.y + at.block_size.y * at.thread.z)) % WARP;
}

// beyond the end of its segment of lanes a thread reads its own value
template <typename T>
T shuffle(unsigned mask, T value, int source, int width, const Call& at) {
  static_assert(sizeof(T) <= 8 && std::is_trivially_copyable_v<T>);
  if (width < 1 || width > int(WARP) || (width & (width - 1))) fault(at, "width %d is not a power of 2 up to 32", width);
  int own = int(lane()), end = own / width * width + width;
  uint64_t bits = 0;
  std::memcpy(&bits, &value, sizeof(T));
  bits = exchange(mask, bits, unsigned(source < 0 || source >= end ? own : source), at);
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
void check_aligned(const T* address, const Call& at) {
  if (reinterpret_cast<uintptr_t>(address) % sizeof(T)) {
    fault(at, "misaligned: %zu bytes at %p", sizeof(T), static_cast<const void*>(address));
  }
}

}  // namespace cuda_host

// width: of the segments of a warp that exchange among themselves; an xor may reach into segments before its own
template <typename T>
T __shfl_xor_sync(unsigned mask, T value, int xor_with, int width = 32,
                  cuda_host::Call at = cuda_host::Call::to("__shfl_xor_sync")) {
  return cuda_host::shuffle(mask, value, int(cuda_host::lane()) ^ xor_with, width, at);
}
template <typename T>
T __shfl_down_sync(unsigned mask, T value, unsigned delta, int width = 32,
                   cuda_host::Call at = cuda_host::Call::to("__shfl_down_sync")) {
  return cuda_host::shuffle(mask, value, int(cuda_host::lane() + delta), width, at);
}
template <typename T>
T __shfl_sync(unsigned mask, T value, int source, int width = 32,
              cuda_host::Call at = cuda_host::Call::to("__shfl_sync")) {
  int first = int(cuda_host::lane()) & -width;
  return cuda_host::shuffle(mask, value, first | (source & (width - 1)), width, at);
}

// through a cache that is not told of writes: of what the kernel writes, before or after, nothing may be read
template <typename T>
T __ldg(const T* address, cuda_host::Call at = cuda_host::Call::to("__ldg")) {
  cuda_host::check_aligned(address, at);
  cuda_host::ReadOnly cache;
  return *address;
}
template <typename T>
T __ldcs(const T* address, cuda_host::Call at = cuda_host::Call::to("__ldcs")) {
  cuda_host::check_aligned(address, at);
  return *address;
}
template <typename T>
T __ldcg(const T* address, cuda_host::Call at = cuda_host::Call::to("__ldcg")) {
  cuda_host::check_aligned(address, at);
  return *address;
}
template <typename T>
void __stcs(T* address, T value, cuda_host::Call at = cuda_host::Call::to("__stcs")) {
  cuda_host::check_aligned(address, at);
  *address = value;
}

namespace cooperative_groups {
struct cluster_group {
  using Call = cuda_host::Call;
  void barrier_arrive(Call at = Call::to("cluster.barrier_arrive")) const { cuda_host::cluster_arrive(at); }
  void barrier_wait(Call at = Call::to("cluster.barrier_wait")) const { cuda_host::cluster_wait(at); }
  void sync(Call at = Call::to("cluster.sync")) const {
    cuda_host::cluster_arrive(at);
    cuda_host::cluster_wait(at);
  }
  unsigned block_rank() const { return cuda_host::cluster_rank(); }
  unsigned num_blocks() const { return cuda_host::cluster_blocks(); }
  template <typename T>
  T* map_shared_rank(T* address, unsigned rank, Call at = Call::to("map_shared_rank")) const {
    return static_cast<T*>(cuda_host::map_shared(address, rank, at));
  }
};
inline cluster_group this_cluster() { return {}; }
}  // namespace cooperative_groups

// asynchronous copies; see device.cuh for what they are on a GPU
inline void cp_async16(void* to_shared, const void* from, cuda_host::Call at = cuda_host::Call::to("cp_async16")) {
  cuda_host::start_copy(cuda_host::Kind::thread_copy, to_shared, from, 16, nullptr, 0, at);
}
inline void cp_async_commit() { cuda_host::commit_group(cuda_host::Kind::thread_copy); }
template <int left>
void cp_async_wait(cuda_host::Call at = cuda_host::Call::to("cp_async_wait")) {
  cuda_host::wait_group(cuda_host::Kind::thread_copy, left, at);
}

struct alignas(8) mbarrier {
  uint64_t opaque;
};
inline void mbarrier_init(mbarrier* bar, unsigned arrivals, cuda_host::Call at = cuda_host::Call::to("mbarrier_init")) {
  bar->opaque = cuda_host::mbarrier_init(bar, arrivals, at);
}
inline void mbarrier_arrive(mbarrier* bar, cuda_host::Call at = cuda_host::Call::to("mbarrier_arrive")) {
  cuda_host::mbarrier_arrive(bar, bar->opaque, 0, at);
}
inline void mbarrier_expect_tx(mbarrier* bar, unsigned bytes,
                               cuda_host::Call at = cuda_host::Call::to("mbarrier_expect_tx")) {
  cuda_host::mbarrier_arrive(bar, bar->opaque, bytes, at);
}
inline void mbarrier_wait(mbarrier* bar, unsigned parity, cuda_host::Call at = cuda_host::Call::to("mbarrier_wait")) {
  cuda_host::mbarrier_wait(bar, bar->opaque, parity, at);
}
inline void fence_proxy_async() { cuda_host::proxy_fence(); }
inline void bulk_load(void* to_shared, const void* from, unsigned bytes, mbarrier* bar,
                      cuda_host::Call at = cuda_host::Call::to("bulk_load")) {
  cuda_host::start_copy(cuda_host::Kind::load, to_shared, from, bytes, bar, bar->opaque, at);
}
inline void bulk_store(void* to, const void* from_shared, unsigned bytes,
                       cuda_host::Call at = cuda_host::Call::to("bulk_store")) {
  cuda_host::start_copy(cuda_host::Kind::store, to, from_shared, bytes, nullptr, 0, at);
}
inline void bulk_commit() { cuda_host::commit_group(cuda_host::Kind::store); }
template <int left>
void bulk_wait(cuda_host::Call at = cuda_host::Call::to("bulk_wait")) {
  cuda_host::wait_group(cuda_host::Kind::store, left, at);
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
// as many as there may be blocks at once
template <typename... P>
int clusters_at_once(void (*)(P...), const LaunchShape& shape, int* count) {
  return cuda_host::clusters_at_once({{shape.grid}, {shape.block}, shape.cluster, shape.shared_bytes, false}, count);
}
