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

// a call in a kernel's text; as a default argument it is the caller's line
struct Call {
  const char *name = "", *file = "";
  int line = 0;

  static constexpr Call to(const char* name, const char* file = __builtin_FILE(), int line = __builtin_LINE()) {
    return {name, file, line};
  }
};

// limits of an H100; sizes above 8 are clusters that a kernel must ask for on the device
constexpr unsigned MAX_THREADS = 1024, MAX_CLUSTER = 16, WARP = 32, MAX_GRID = 0x7fffffff;
constexpr size_t MAX_SHARED = 227 << 10, MAX_TRANSACTION = (1 << 20) - 1;
// what cudaError_t has for the same mistakes
constexpr int INVALID_VALUE = 1, INVALID_CONFIGURATION = 9, COOPERATIVE_TOO_LARGE = 720;

// the order of everything that has none: which thread goes on, which block starts, when a copy completes
void set_seed(uint64_t seed);
// how many blocks may be there at once; a cooperative grid must fit
void set_resident(unsigned blocks);

// barriers and waits of this line do nothing, which shows whether anybody would notice
void omit(const char* file, int line);
// from now on, which lines with a barrier or a wait are reached; and those that were, as FILE:LINE
void record_barriers();
void print_barriers();

// copies and fills are made by the instrumented side, so that sanitizers see them
using Copy = void (*)(void* to, const void* from, size_t bytes);
int run(const Grid& grid, const std::function<void()>& thread, Copy copy);

// of a grid's size and shape; 0 where there are none so large
int clusters_at_once(const Grid& grid, int* count);

// ends the process: the call, the fault, the thread
[[noreturn]] void fault(const Call& at, const char* format, ...) __attribute__((format(printf, 2, 3)));

const Place& place();

// key: the variable; the same in all blocks
void* shared_variable(const void* key, size_t bytes, size_t align);
void* dynamic_memory(const Call& at);
void* map_shared(const void* address, unsigned rank, const Call& at);

// what is loaded in between comes from the cache that takes no notice of the kernel's own writes
struct ReadOnly {
  ReadOnly();
  ~ReadOnly();
};

void sync_block(const Call& at);
void sync_named(unsigned id, unsigned threads, const Call& at);
void sync_warp(unsigned mask, const Call& at);
void sync_grid(const Call& at);
void cluster_arrive(const Call& at);
void cluster_wait(const Call& at);
unsigned cluster_rank();
unsigned cluster_blocks();

// every lane of the mask hands over a value and names a lane; returns that lane's
uint64_t exchange(unsigned mask, uint64_t value, unsigned source, const Call& at);

enum class Kind { thread_copy, load, store };
// barrier: of a load, with what its memory holds
void start_copy(Kind kind, void* to, const void* from, size_t bytes, const void* barrier, uint64_t content, const Call& at);
// of the calling thread: copies of a kind so far become a group; wait until at most `left` groups are unfinished
void commit_group(Kind kind);
void wait_group(Kind kind, unsigned left, const Call& at);
void proxy_fence();

// returns what the barrier's memory holds from now on; every later call shows it
uint64_t mbarrier_init(const void* address, unsigned arrivals, const Call& at);
void mbarrier_arrive(const void* address, uint64_t content, size_t expected_bytes, const Call& at);
void mbarrier_wait(const void* address, uint64_t content, unsigned parity, const Call& at);

}  // namespace cuda_host
