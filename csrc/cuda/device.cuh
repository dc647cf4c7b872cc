// The one header that kernels include: CUDA's own under a CUDA compiler, the host bench's (tests/cuda_host) under an ordinary
// one. What has no function in CUDA is here as a line of PTX; the bench gives the same names the same meaning.
#pragma once

#ifdef SEMANTICA_CUDA_HOST
#include "cuda_host.h"
#else

#include <cooperative_groups.h>
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cstdint>
#include <mutex>

#define SHARED(type, name, size) __shared__ type name[size]

// 128 bytes suit bulk copies
template <typename T>
__device__ __forceinline__ T* dynamic_shared() {
  extern __shared__ __align__(128) unsigned char dynamic_shared_memory[];
  return reinterpret_cast<T*>(dynamic_shared_memory);
}

__device__ __forceinline__ unsigned shared_address(const void* at) {
  return static_cast<unsigned>(__cvta_generic_to_shared(at));
}

__device__ __forceinline__ void named_barrier_sync(unsigned id, unsigned threads) {
  asm volatile("bar.sync %0, %1;" ::"r"(id), "r"(threads) : "memory");
}

__device__ __forceinline__ void grid_sync() { cooperative_groups::this_grid().sync(); }

// cp.async: PTX ISA, "Data Movement and Conversion Instructions: cp.async"
__device__ __forceinline__ void cp_async16(void* to_shared, const void* from) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(shared_address(to_shared)), "l"(from) : "memory");
}
__device__ __forceinline__ void cp_async_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }
template <int left>
__device__ __forceinline__ void cp_async_wait() {
  asm volatile("cp.async.wait_group %0;" ::"n"(left) : "memory");
}

// mbarriers and bulk copies, sm_90 and newer: PTX ISA, "cp.async.bulk" and "mbarrier"
struct alignas(8) mbarrier {
  uint64_t opaque;
};
__device__ __forceinline__ void mbarrier_init(mbarrier* bar, unsigned arrivals) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(shared_address(bar)), "r"(arrivals) : "memory");
  // the engine that copies must see it too
  asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
}
__device__ __forceinline__ void mbarrier_arrive(mbarrier* bar) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(shared_address(bar)) : "memory");
}
__device__ __forceinline__ void mbarrier_expect_tx(mbarrier* bar, unsigned bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(shared_address(bar)), "r"(bytes)
               : "memory");
}
__device__ __forceinline__ void mbarrier_wait(mbarrier* bar, unsigned parity) {
  asm volatile(
      "{\n\t.reg .pred done;\n"
      "again:\n\tmbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;\n"
      "\t@!done bra again;\n}" ::"r"(shared_address(bar)),
      "r"(parity)
      : "memory");
}
__device__ __forceinline__ void fence_proxy_async() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }
__device__ __forceinline__ void bulk_load(void* to_shared, const void* from, unsigned bytes, mbarrier* bar) {
  asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(
                   shared_address(to_shared)),
               "l"(from), "r"(bytes), "r"(shared_address(bar))
               : "memory");
}
__device__ __forceinline__ void bulk_store(void* to, const void* from_shared, unsigned bytes) {
  asm volatile("cp.async.bulk.global.shared::cta.bulk_group [%0], [%1], %2;" ::"l"(to), "r"(shared_address(from_shared)),
               "r"(bytes)
               : "memory");
}
__device__ __forceinline__ void bulk_commit() { asm volatile("cp.async.bulk.commit_group;" ::: "memory"); }
template <int left>
__device__ __forceinline__ void bulk_wait() {
  asm volatile("cp.async.bulk.wait_group %0;" ::"n"(left) : "memory");
}

// blocks of the largest cluster that every card with clusters runs; for more it must be asked
constexpr unsigned PORTABLE_CLUSTER = 8;

struct LaunchShape {
  unsigned grid, block, cluster = 1;
  size_t shared_bytes = 0;
  bool cooperative = false;
};

// limits of a kernel are the process's: no thread may set them between another's setting and its launch
inline std::mutex limits;

// a kernel's launch as CUDA takes it, with `limits` held; `error` is CUDA's
struct Launch {
  cudaLaunchAttribute attributes[2];
  cudaLaunchConfig_t config = {};
  cudaError_t error = cudaSuccess;

  Launch(const void* function, const LaunchShape& shape, cudaStream_t stream) {
    if (shape.shared_bytes > 48 << 10) {
      error = cudaFuncSetAttribute(function, cudaFuncAttributeMaxDynamicSharedMemorySize, int(shape.shared_bytes));
    }
    if (!error && shape.cluster > PORTABLE_CLUSTER) {
      error = cudaFuncSetAttribute(function, cudaFuncAttributeNonPortableClusterSizeAllowed, 1);
    }
    unsigned count = 0;
    if (shape.cluster > 1) {
      attributes[count].id = cudaLaunchAttributeClusterDimension;
      attributes[count++].val.clusterDim = {shape.cluster, 1, 1};
    }
    if (shape.cooperative) {
      attributes[count].id = cudaLaunchAttributeCooperative;
      attributes[count++].val.cooperative = 1;
    }
    config.gridDim = dim3(shape.grid);
    config.blockDim = dim3(shape.block);
    config.dynamicSmemBytes = shape.shared_bytes;
    config.stream = stream;
    config.attrs = attributes;
    config.numAttrs = count;
  }
  Launch(const Launch&) = delete;
};

// starts a kernel on a stream; returns CUDA's error, 0 for none
template <typename... P, typename... A>
int launch(void (*kernel)(P...), const LaunchShape& shape, cudaStream_t stream, A... arguments) {
  const std::lock_guard<std::mutex> held(limits);
  const Launch made(reinterpret_cast<const void*>(kernel), shape, stream);
  return made.error ? made.error : cudaLaunchKernelEx(&made.config, kernel, P(arguments)...);
}

// how many clusters of the shape's size the current device runs at once; returns CUDA's error
template <typename... P>
int clusters_at_once(void (*kernel)(P...), const LaunchShape& shape, int* count) {
  const void* function = reinterpret_cast<const void*>(kernel);
  const std::lock_guard<std::mutex> held(limits);
  const Launch made(function, shape, nullptr);
  if (made.error) return made.error;
  const cudaError_t error = cudaOccupancyMaxActiveClusters(count, function, &made.config);
  if (error != cudaErrorInvalidClusterSize) return error;
  // it has none so large, which is an answer
  cudaGetLastError();
  *count = 0;
  return cudaSuccess;
}

#endif

namespace semantica {

#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 900
// before sm_90 there are no clusters: these names compile, and no plan comes here
struct NoCluster {
  __device__ void sync() const { __trap(); }
  __device__ void barrier_arrive() const { __trap(); }
  __device__ void barrier_wait() const { __trap(); }
  template <typename T>
  __device__ T* map_shared_rank(T* address, unsigned) const {
    __trap();
    return address;
  }
};
__device__ __forceinline__ NoCluster this_cluster() { return {}; }
#else
using cooperative_groups::this_cluster;
#endif

}  // namespace semantica
