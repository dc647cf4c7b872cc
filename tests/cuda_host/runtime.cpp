// Runs a grid: starts blocks, picks threads, ends copies, and says who waits for what when nothing can go on. One operating
// system thread; the order is drawn from a seed, so that every run can be repeated.
#include <signal.h>
#include <sys/time.h>

#include <cstdarg>
#include <cstdio>

#include "machine.h"

namespace cuda_host {

static unsigned resident = 8;
// seconds of processor time for which one thread may run and meet nobody
constexpr int PATIENCE = 5;
static volatile sig_atomic_t alone = 0;

void pause(const Call& at) {
  current->call = at;
  switch_to(current->context, machine->host);
}

void wake(std::vector<Fiber*>& waiting) {
  for (Fiber* fiber : waiting) machine->ready.push_back(fiber);
  waiting.clear();
}

void maybe_pause(const Call& at) {
  {
    OnHost host;
    if (machine->draw() >= machine->pause_rate) return;
    machine->ready.push_back(current);
  }
  pause(at);
}

void wait_in(std::vector<Fiber*>& waiting, const Call& at, const char* what, long long wanted) {
  {
    OnHost host;
    waiting.push_back(current);
    current->waits_for = what, current->wanted = wanted;
  }
  pause(at);
}

static void finish(Fiber& fiber) {
  Block& block = *fiber.block;
  Cluster& cluster = *block.cluster;
  Warp& warp = fiber.warp();
  if (fiber.in_cluster_barrier) fault(fiber.call, "its thread leaves without having waited");
  check_copies(fiber);
  detector_release(&block.left);
  {
    OnHost host;
    warp.live &= ~(1u << fiber.lane());
    complete_without(warp);
    block.live--;
    cluster.live--;
    // barriers wait for those that have not left
    if (block.barrier.arrived && block.barrier.arrived == block.live) complete(block.barrier);
    if (cluster.barrier.arrived && cluster.barrier.arrived == cluster.live) complete(cluster.barrier);
    if (!cluster.live) machine->active -= cluster.blocks.size();
  }
  if (!block.live) {
    detector_acquire(&block.left);
    leave(block);
  }
  detector_release(&machine->ended);
}

static void thread_main() {
  arrived();
  detector_acquire(&machine->began);
  (*machine->body)();
  finish(*current);
  end_switch(current->context, machine->host);
}

static void start(Cluster& cluster) {
  const Grid& grid = machine->grid;
  unsigned threads = grid.block.x * grid.block.y * grid.block.z;
  for (Block* block : cluster.blocks) {
    if (grid.shared_bytes) block->dynamic = variable(*block, machine, grid.shared_bytes, LINE);
    block->live = threads;
    block->warps.resize((threads + WARP - 1) / WARP);
    for (unsigned i = 0; i < threads; i++) {
      auto fiber = std::make_unique<Fiber>();
      unsigned x = i % grid.block.x, y = i / grid.block.x % grid.block.y, z = i / grid.block.x / grid.block.y;
      fiber->place = {{x, y, z}, block->place, grid.block, grid.grid};
      fiber->block = block;
      fiber->linear = i;
      fiber->warp().live |= 1u << fiber->lane();
      make(fiber->context, thread_main);
      machine->ready.push_back(fiber.get());
      machine->fibers.push_back(std::move(fiber));
    }
  }
  cluster.live = threads * cluster.blocks.size();
  machine->active += cluster.blocks.size();
}

[[noreturn]] static void deadlock() {
  std::map<std::string, unsigned> found;
  std::map<std::string, std::string> example;
  for (auto& fiber : machine->fibers) {
    if (finished(fiber->context)) continue;
    char what[128];
    if (const MBarrier* barrier = fiber->mbarrier) {
      std::snprintf(what, sizeof what, "for %u arrivals and %lld bytes", barrier->pending, (long long)barrier->bytes);
    } else {
      std::snprintf(what, sizeof what, fiber->waits_for ? fiber->waits_for : "to go on", fiber->wanted);
    }
    std::string line = text(fiber->call) + " " + what;
    if (!found[line]++) {
      example[line] = "thread " + std::to_string(fiber->linear) + " of block " + std::to_string(fiber->block->index);
    }
  }
  for (auto& [line, count] : found) {
    std::fprintf(stderr, "cuda_host: %u threads wait at %s (%s)\n", count, line.c_str(), example[line].c_str());
  }
  fault(Call{"deadlock"}, "no thread can go on");
}

static Fiber* pick() {
  auto& ready = machine->ready;
  size_t last = ready.size() - 1;
  size_t which = machine->order == 0 ? machine->below(ready.size()) : machine->order == 1 ? last : 0;
  if (machine->order == 3) which = machine->draw() < 0.9 ? last : machine->below(ready.size());
  Fiber* fiber = ready[which];
  if (machine->order == 2) {
    ready.erase(ready.begin());
  } else {
    ready[which] = ready[last];
    ready.pop_back();
  }
  return fiber;
}

static void watch(bool begin);

static void schedule() {
  uint64_t switches = 0;
  std::vector<Cluster*> queue;
  for (auto& cluster : machine->clusters) queue.push_back(cluster.get());
  std::shuffle(queue.begin(), queue.end(), machine->random);
  while (true) {
    bool room = !queue.empty() && machine->active + machine->grid.cluster <= std::max(resident, machine->grid.cluster);
    // a cooperative grid is there as a whole
    if (room && (machine->ready.empty() || machine->grid.cooperative || machine->draw() < 0.1)) {
      start(*queue.back());
      queue.pop_back();
      continue;
    }
    if (!machine->pending.empty() && (machine->ready.empty() || machine->draw() < machine->copy_rate)) {
      finish_copy(machine->below(machine->pending.size()));
      continue;
    }
    if (machine->ready.empty()) {
      if (queue.empty() && !machine->active) return;
      deadlock();
    }
    current = pick();
    current->waits_for = nullptr;
    alone = 0;
    if (DETECTS_RACES && ++switches % 1000 == 0) watch(true);
    switch_to(machine->host, current->context);
    if (overflowed(current->context)) fault(current->call, "local variables of more than %zu bytes", STACK);
    current = nullptr;
  }
}

void set_seed(uint64_t value) { seed = value; }
void set_resident(unsigned blocks) { resident = blocks; }
const Place& place() { return current->place; }

void fault(const Call& at, const char* format, ...) {
  va_list arguments;
  va_start(arguments, format);
  std::fprintf(stderr, "cuda_host: fault: %s: ", text(at).c_str());
  std::vfprintf(stderr, format, arguments);
  va_end(arguments);
  if (current) {
    std::fprintf(stderr, " (thread %u of block %u, seed %llu)", current->linear, current->block->index,
                 (unsigned long long)seed);
  }
  std::fprintf(stderr, "\n");
  std::fflush(stderr);
  std::_Exit(99);
}

ReadOnly::ReadOnly() { detector_switch(machine->read_only); }
ReadOnly::~ReadOnly() { detector_switch(current->context); }

static void tick(int) {
  if (++alone > PATIENCE && current) fault(current->call, "since then a thread runs and meets nobody: it waits in a loop");
}

static void crash(int) {
  fault(current ? current->call : Call{"the host"},
        "since then a thread left its memory: a bad address, or local variables of more than %zu bytes", STACK);
}

// a thread that waits for another one without saying so would hang the bench
static void watch(bool begin) {
  if (DETECTS_RACES) {
    // its sanitizer puts off whatever handles a signal: the signal itself ends the process
    itimerval once{{0, 0}, {begin ? PATIENCE : 0, 0}};
    setitimer(ITIMER_VIRTUAL, &once, nullptr);
    return;
  }
  static char stack[64 << 10];
  stack_t apart{};
  apart.ss_sp = stack, apart.ss_size = sizeof stack;
  sigaltstack(&apart, nullptr);
  struct sigaction action{};
  action.sa_handler = tick, action.sa_flags = SA_ONSTACK | SA_RESTART;
  sigaction(SIGVTALRM, &action, nullptr);
  // AddressSanitizer says more about it
  action.sa_handler = crash;
  if (!FRESH_SHARED) sigaction(SIGSEGV, &action, nullptr);
  itimerval every{{begin, 0}, {begin, 0}};
  setitimer(ITIMER_VIRTUAL, &every, nullptr);
}

int run(const Grid& grid, const std::function<void()>& thread, Copy copy) {
  unsigned threads = grid.block.x * grid.block.y * grid.block.z, count = grid.grid.x * grid.grid.y * grid.grid.z;
  if (!threads || threads > MAX_THREADS || !count || count > MAX_GRID) return INVALID_CONFIGURATION;
  if (!grid.cluster || grid.cluster > MAX_CLUSTER || grid.grid.x % grid.cluster) return INVALID_CONFIGURATION;
  if (grid.shared_bytes > MAX_SHARED) return INVALID_VALUE;
  if (grid.cooperative && count > resident) return COOPERATIVE_TOO_LARGE;
  if (uint64_t(threads) * count > MAX_FIBERS) fault(Call{"launch"}, "%u blocks of %u threads: more than %u threads", count, threads, MAX_FIBERS);
  Machine made;
  machine = &made;
  made.grid = grid;
  made.body = &thread;
  made.copy = copy;
  made.random.seed(seed);
  made.order = made.below(4);
  made.copy_rate = made.below(3) * 0.2;
  made.pause_rate = made.below(3) * 0.3;
  if (made.below(3) == 0) made.filling = 0x7a;
  adopt(made.host);
  for (unsigned i = 0; i < count; i++) {
    auto block = std::make_unique<Block>();
    block->index = i;
    block->place = {i % grid.grid.x, i / grid.grid.x % grid.grid.y, i / grid.grid.x / grid.grid.y};
    block->rank = i % grid.cluster;
    if (!FRESH_SHARED) block->arena.reset(static_cast<char*>(std::aligned_alloc(LINE, ARENA)));
    if (!block->rank) made.clusters.push_back(std::make_unique<Cluster>());
    block->cluster = made.clusters.back().get();
    block->cluster->blocks.push_back(block.get());
    made.blocks.push_back(std::move(block));
  }
  reserve(threads * count);
  detector_release(&made.began);
  add_detector(made.read_only);
  watch(true);
  schedule();
  watch(false);
  // what was read past the caches of threads is over with them
  detector_switch(made.read_only);
  detector_release(&made.ended);
  detector_switch(made.host);
  detector_acquire(&made.ended);
  drop_detector(made.read_only);
  for (auto& fiber : made.fibers) drop(fiber->context);
  machine = nullptr;
  return 0;
}

int clusters_at_once(const Grid& grid, int* count) {
  *count = grid.cluster > MAX_CLUSTER ? 0 : int(resident / grid.cluster);
  return grid.shared_bytes > MAX_SHARED || grid.block.x > MAX_THREADS ? INVALID_VALUE : 0;
}

}  // namespace cuda_host
