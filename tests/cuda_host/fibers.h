// Fibers of ucontext, with sanitizers told of every switch. For ThreadSanitizer each is a thread of its own, and switches
// order nothing: only what CUDA orders does (detector_release, detector_acquire).
#pragma once

#include <sys/mman.h>
#include <ucontext.h>

#include <algorithm>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <vector>

#if defined(CUDA_HOST_TSAN)
#include <sanitizer/tsan_interface.h>
#elif defined(CUDA_HOST_ASAN)
#include <sanitizer/asan_interface.h>
#endif

namespace cuda_host {

#if defined(CUDA_HOST_TSAN)
// its own limit is 8128 threads, and each of ours may copy asynchronously
constexpr unsigned MAX_FIBERS = 4000;
constexpr size_t STACK = 64 << 10;
#elif defined(CUDA_HOST_ASAN)
constexpr unsigned MAX_FIBERS = 1 << 20;
constexpr size_t STACK = 64 << 10;
#else
constexpr unsigned MAX_FIBERS = 1 << 22;
constexpr size_t STACK = 32 << 10;
#endif
#if defined(CUDA_HOST_ASAN)
// each variable in an allocation of its own, with red zones, freed when its block leaves
constexpr bool FRESH_SHARED = true;
#else
constexpr bool FRESH_SHARED = false;
#endif
#if defined(CUDA_HOST_TSAN)
constexpr bool DETECTS_RACES = true;
#else
constexpr bool DETECTS_RACES = false;
#endif
// at the far end of each stack
constexpr uint64_t UNTOUCHED = 0x6e6f626f64792121;

struct Context {
  ucontext_t state{};
  char* stack = nullptr;
  size_t stack_bytes = 0;
  bool over = false;
  void* detector = nullptr;
  void* companion = nullptr;
  void* fake_stack = nullptr;
};

// stacks that are free; under ThreadSanitizer none is used twice, since it would see two threads in one place
inline std::vector<char*> free_stacks;
inline Context* switched_from = nullptr;
inline Context* to_bury = nullptr;

inline bool finished(const Context& context) { return context.over; }
inline bool overflowed(const Context& context) { return *reinterpret_cast<volatile uint64_t*>(context.stack) != UNTOUCHED; }

inline void forbid([[maybe_unused]] char* at, [[maybe_unused]] size_t bytes) {
#if defined(CUDA_HOST_ASAN)
  // the macro for it does nothing here, where the compiler's own part of the sanitizer is off
  __asan_poison_memory_region(at, bytes);
#endif
}

inline void detector_switch([[maybe_unused]] Context& to) {
#if defined(CUDA_HOST_TSAN)
  __tsan_switch_to_fiber(to.detector, __tsan_switch_to_fiber_no_sync);
#endif
}
inline void detector_release([[maybe_unused]] void* at) {
#if defined(CUDA_HOST_TSAN)
  __tsan_release(at);
#endif
}
inline void detector_acquire([[maybe_unused]] void* at) {
#if defined(CUDA_HOST_TSAN)
  __tsan_acquire(at);
#endif
}
inline void enter_companion([[maybe_unused]] Context& owner, [[maybe_unused]] Context& host) {
#if defined(CUDA_HOST_TSAN)
  // who creates a thread hands over all it knows, so the host does
  detector_switch(host);
  if (!owner.companion) owner.companion = __tsan_create_fiber(0);
  __tsan_switch_to_fiber(owner.companion, __tsan_switch_to_fiber_no_sync);
#endif
}
// what was released at `from` is known to who acquires `to`, and nothing else of the current thread is
inline void detector_acquire_into([[maybe_unused]] Context& current, [[maybe_unused]] Context& host,
                                  [[maybe_unused]] void* from, [[maybe_unused]] void* to) {
#if defined(CUDA_HOST_TSAN)
  enter_companion(current, host);
  __tsan_acquire(from);
  __tsan_release(to);
  detector_switch(current);
#endif
}

inline void adopt([[maybe_unused]] Context& host) {
#if defined(CUDA_HOST_TSAN)
  host.detector = __tsan_get_current_fiber();
#endif
}

inline char* new_stack() {
  if (!free_stacks.empty()) {
    char* stack = free_stacks.back();
    free_stacks.pop_back();
    return stack;
  }
  void* stack = mmap(nullptr, STACK, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (stack == MAP_FAILED) {
    std::fprintf(stderr, "cuda_host: no memory for another stack\n");
    std::_Exit(98);
  }
  return static_cast<char*>(stack);
}

// stacks of all threads, before the first one starts
inline void reserve([[maybe_unused]] unsigned threads) {
#if defined(CUDA_HOST_TSAN)
  std::vector<char*> made;
  for (unsigned i = 0; i < threads; i++) made.push_back(new_stack());
  free_stacks = made;
#endif
}

inline void add_detector([[maybe_unused]] Context& context) {
#if defined(CUDA_HOST_TSAN)
  context.detector = __tsan_create_fiber(0);
#endif
}
inline void drop_detector([[maybe_unused]] Context& context) {
#if defined(CUDA_HOST_TSAN)
  __tsan_destroy_fiber(context.detector);
#endif
}

inline void make(Context& context, void (*entry)()) {
  context.stack = new_stack();
  *reinterpret_cast<volatile uint64_t*>(context.stack) = UNTOUCHED;
  context.stack_bytes = STACK;
  getcontext(&context.state);
  context.state.uc_stack.ss_sp = context.stack;
  context.state.uc_stack.ss_size = STACK;
  context.state.uc_link = nullptr;
  makecontext(&context.state, entry, 0);
  add_detector(context);
}

inline void arrived() {
#if defined(CUDA_HOST_ASAN)
  const void* bottom;
  size_t bytes;
  __sanitizer_finish_switch_fiber(nullptr, &bottom, &bytes);
  // the host's stack is known only once a fiber has been reached from it
  if (switched_from && !switched_from->stack) {
    switched_from->stack = static_cast<char*>(const_cast<void*>(bottom));
    switched_from->stack_bytes = bytes;
  }
#endif
}

inline void switch_to(Context& from, Context& to) {
  switched_from = &from;
#if defined(CUDA_HOST_ASAN)
  __sanitizer_start_switch_fiber(&from.fake_stack, to.stack, to.stack_bytes);
#endif
  detector_switch(to);
  swapcontext(&from.state, &to.state);
#if defined(CUDA_HOST_ASAN)
  __sanitizer_finish_switch_fiber(from.fake_stack, nullptr, nullptr);
#endif
  if (to_bury) {
#if !defined(CUDA_HOST_TSAN)
    free_stacks.push_back(to_bury->stack);
#endif
    to_bury = nullptr;
  }
}

// the last thing that a fiber does
[[noreturn]] inline void end_switch(Context& from, Context& to) {
  from.over = true;
  to_bury = &from;
#if defined(CUDA_HOST_ASAN)
  __sanitizer_start_switch_fiber(nullptr, to.stack, to.stack_bytes);
#endif
  detector_switch(to);
  setcontext(&to.state);
  std::abort();
}

inline void drop([[maybe_unused]] Context& context) {
  drop_detector(context);
#if defined(CUDA_HOST_TSAN)
  if (context.companion) __tsan_destroy_fiber(context.companion);
  munmap(context.stack, context.stack_bytes);
#endif
}

}  // namespace cuda_host
