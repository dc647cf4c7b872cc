// Launches of one kernel by several threads, with as much shared memory as each likes: csrc/cuda/device.cuh over stand-ins
// of CUDA's functions, which refuse what exceeds the limit that was set last, as CUDA does.
#include "device.cuh"

#include <atomic>
#include <cstdio>
#include <thread>
#include <vector>

std::atomic<int> limit{48 << 10};

cudaError_t cudaFuncSetAttribute(const void*, int, int value) {
  limit = value;
  std::this_thread::yield();
  return cudaSuccess;
}

cudaError_t launched(const cudaLaunchConfig_t* config) {
  std::this_thread::yield();
  return int(config->dynamicSmemBytes) > limit ? 1 : cudaSuccess;
}

void kernel(int) {}

int main() {
  std::atomic<int> refused{0};
  std::vector<std::thread> threads;
  for (int i = 0; i < 8; ++i)
    threads.emplace_back([&, i] {
      LaunchShape shape;
      shape.grid = shape.block = 1;
      shape.shared_bytes = size_t(64 + 16 * i) << 10;
      for (int n = 0; n < 500; ++n) refused += launch(kernel, shape, nullptr, n) != 0;
    });
  for (auto& thread : threads) thread.join();
  std::printf("%d refused\n", refused.load());
}
