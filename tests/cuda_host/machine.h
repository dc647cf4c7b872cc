// The state of the bench: what runtime.cpp schedules, and the other files change. See runtime.h.
#pragma once

#include <algorithm>
#include <cstdlib>
#include <deque>
#include <map>
#include <memory>
#include <random>
#include <string>
#include <unordered_map>
#include <vector>

#include "fibers.h"
#include "runtime.h"

namespace cuda_host {

struct Fiber;

// who has come, who waits, and what an ordinary happens-before detector is told: two addresses, since a thread may
// arrive at the next meeting before a slow one has left this one
struct Meeting {
  unsigned phase = 0, arrived = 0;
  std::vector<Fiber*> waiting;
  char order[2] = {};
  // of the first to come
  Call call;
};

// of some warps of a block
struct Named : Meeting {
  unsigned expected = 0;
  std::map<unsigned, unsigned> lanes;
};

// of the lanes of a mask: who was there, and what it brought
struct Exchange : Meeting {
  unsigned present[2] = {};
  uint64_t values[2][WARP] = {};
};

struct Warp {
  unsigned live = 0;
  std::map<unsigned, Exchange> meetings;
};

// shared memory of one kernel variable in one block
struct Memory {
  char* at = nullptr;
  size_t bytes = 0, align = 0;
  char* base = nullptr;
};

// what variables lie in, and all of a block's with the gaps between them
constexpr size_t LINE = 128, ARENA = MAX_SHARED + (16 << 10);

struct MBarrier {
  unsigned phase = 0, expected = 0, pending = 0;
  int64_t bytes = 0;
  std::vector<Fiber*> waiting;
  char order[2] = {};
};

struct Cluster;

struct Block {
  unsigned index = 0, rank = 0, live = 0;
  Dim place;
  Cluster* cluster = nullptr;
  std::unordered_map<const void*, Memory> variables;
  Memory dynamic{};
  // under ThreadSanitizer all blocks have theirs from the start: what is allocated later would look like a write
  std::unique_ptr<char, void (*)(void*)> arena{nullptr, std::free};
  size_t used = 0, counted = 0;
  Meeting barrier;
  std::map<unsigned, Named> named;
  std::vector<Warp> warps;
  std::unordered_map<const void*, MBarrier> mbarriers;
  char left = 0, fenced = 0;
};

struct Cluster {
  std::vector<Block*> blocks;
  unsigned live = 0;
  Meeting barrier;
};

// copies that are committed together
struct Group {
  unsigned unfinished = 0;
  bool any = false;
  char done = 0;
  Call call;
};
// those that the thread has not waited for; the last one is open. `waited`: how many were before them
struct Groups {
  std::deque<Group> left{1};
  size_t waited = 0;
};

struct Pending {
  Kind kind;
  void* to;
  const void* from;
  size_t bytes;
  MBarrier* barrier;
  Block* block;
  Fiber* owner;
  size_t group;
  Call call;
  char order = 0;
};

struct Fiber {
  Context context;
  Place place;
  Block* block = nullptr;
  unsigned linear = 0;
  Call call{"its start"};
  // as numbers: a string's memory would be touched under the name of several threads
  const char* waits_for = nullptr;
  long long wanted = 0;
  const MBarrier* mbarrier = nullptr;
  bool in_cluster_barrier = false;
  unsigned cluster_phase = 0;
  // of asynchronous copies, by kind
  Groups groups[3];
  bool in_group_wait = false;

  Warp& warp() { return block->warps[linear / WARP]; }
  unsigned lane() const { return linear % WARP; }
};

struct Machine {
  Grid grid;
  const std::function<void()>* body;
  Copy copy;
  std::mt19937_64 random;
  Context host, read_only;
  std::vector<std::unique_ptr<Block>> blocks;
  std::vector<std::unique_ptr<Cluster>> clusters;
  std::vector<std::unique_ptr<Fiber>> fibers;
  std::vector<Fiber*> ready;
  std::vector<std::unique_ptr<Pending>> pending;
  unsigned active = 0;
  Meeting everyone;
  char began = 0, ended = 0;
  // drawn once: how threads are picked, how late copies are, how often a thread pauses where it need not
  unsigned order = 0;
  double copy_rate = 0, pause_rate = 0;
  // what fills memory that nobody has written: NaN, or a number that no maximum or comparison swallows
  char filling = char(0xff);

  double draw() { return double(random() >> 11) * 0x1p-53; }
  size_t below(size_t n) { return random() % n; }
};
inline Machine* machine = nullptr;
inline Fiber* current = nullptr;
inline uint64_t seed = 0;

// within, the detector takes what happens for the host's: allocations above all
struct OnHost {
  OnHost() { if (current) detector_switch(machine->host); }
  ~OnHost() { if (current) detector_switch(current->context); }
};

// scheduling: runtime.cpp
void wake(std::vector<Fiber*>& waiting);
void pause(const Call& at);
// lets others go ahead, or not, as drawn
void maybe_pause(const Call& at);
void wait_in(std::vector<Fiber*>& waiting, const Call& at, const char* what, long long wanted = 0);
std::string text(const Call& at);

// shared memory: memory.cpp
Block* block_of(const void* address, const Cluster& cluster, const void** key = nullptr, size_t* offset = nullptr);
Memory& variable(Block& block, const void* key, size_t bytes, size_t align);
void leave(Block& block);

// barriers.cpp and copies.cpp
bool omitted(const Call& at);
void complete(Meeting& meeting);
// a lane, or a thread of a named barrier, comes no more
void complete_without(Warp& warp);
void finish_copy(size_t which);
void check_copies(Fiber& fiber);

}  // namespace cuda_host
