// The machine under the bench: threads of a grid as fibers under a seeded scheduler, shared memory, barriers, copies that
// complete late. Compiled without sanitizers' instrumentation: what it does to its own memory is no part of the program.
#pragma once

#include <cstddef>
#include <cstdint>
#include <functional>

namespace cuda_host {

struct Dim {
  unsigned x = 1, y = 1, z = 1;
};

struct Grid {
  Dim grid, block;
  unsigned cluster = 1;
  size_t shared_bytes = 0;
  bool cooperative = false;
};

// where a thread is, as the kernel reads it
struct Place {
  Dim thread, block, block_size, grid_size;
};

// limits of an H100; sizes above 8 are clusters that a kernel must ask for on the device
constexpr unsigned MAX_THREADS = 1024, MAX_CLUSTER = 16, WARP = 32;
constexpr size_t MAX_SHARED = 227 << 10;
// what cudaError_t has for the same mistakes
constexpr int INVALID_VALUE = 1, INVALID_CONFIGURATION = 9, COOPERATIVE_TOO_LARGE = 720;

// the order of everything that has none: which thread goes on, which block starts, when a copy completes
void set_seed(uint64_t seed);
// how many blocks may be there at once; a cooperative grid must fit
void set_resident(unsigned blocks);

// copies and fills are made by the instrumented side, so that sanitizers see them
using Copy = void (*)(void* to, const void* from, size_t bytes);
int run(const Grid& grid, const std::function<void()>& thread, Copy copy);

// ends the process: the name of the fault, the thread, and where it is
[[noreturn]] void fault(const char* format, ...) __attribute__((format(printf, 1, 2)));

const Place& place();

// key: the variable; the same in all blocks
void* shared_variable(const void* key, size_t bytes);
void* dynamic_memory();
void* map_shared(const void* address, unsigned rank);

void sync_block(const char* where);
void sync_named(unsigned id, unsigned threads, const char* where);
void sync_warp(unsigned mask, const char* where);
void sync_grid(const char* where);
void cluster_arrive(const char* where);
void cluster_wait(const char* where);
unsigned cluster_rank();
unsigned cluster_blocks();

// every lane of the mask hands over a value and names a lane; returns that lane's
uint64_t exchange(unsigned mask, uint64_t value, unsigned source, const char* where);

enum class Kind { thread_copy, load, store };
void start_copy(Kind kind, void* to, const void* from, size_t bytes, const void* barrier, const char* where);
// of the calling thread: copies of a kind so far become a group; wait until at most `left` groups are unfinished
void commit_group(Kind kind);
void wait_group(Kind kind, unsigned left, const char* where);
void proxy_fence();

void mbarrier_init(const void* address, unsigned arrivals, const char* where);
void mbarrier_arrive(const void* address, size_t expected_bytes, const char* where);
void mbarrier_wait(const void* address, unsigned parity, const char* where);

}  // namespace cuda_host
