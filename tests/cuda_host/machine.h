// The state of the bench: what runtime.cpp schedules, and the other files change. See runtime.h.
#pragma once

#include <algorithm>
#include <cstdlib>
#include <map>
#include <memory>
#include <random>
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
  const char* where = nullptr;
};

struct Exchange : Meeting {
  unsigned lanes = 0;
  uint64_t values[2][WARP] = {};
};

struct Warp {
  unsigned there = 0, left = 0;
  std::map<unsigned, Exchange> exchanges;
  std::map<unsigned, Meeting> barriers;
};

// shared memory of one kernel variable in one block
struct Memory {
  char* at;
  size_t bytes;
};

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
  size_t used = 0;
  Meeting barrier;
  std::map<unsigned, Meeting> named;
  std::vector<Warp> warps;
  std::unordered_map<const void*, MBarrier> mbarriers;
  char left = 0, fenced = 0;
};

struct Cluster {
  std::vector<Block*> blocks;
  unsigned live = 0;
  Meeting barrier;
};

struct Group {
  unsigned unfinished = 0;
};

struct Pending {
  Kind kind;
  void* to;
  const void* from;
  size_t bytes;
  MBarrier* barrier;
  Fiber* owner;
  size_t group;
  const char* where;
  char order = 0;
};

struct Fiber {
  Context context;
  Place place;
  Block* block = nullptr;
  unsigned linear = 0;
  const char* where = "";
  // as numbers: a string's memory would be touched under the name of several threads
  const char* waits_for = nullptr;
  long long wanted[2] = {};
  bool in_cluster_barrier = false;
  unsigned cluster_phase = 0;
  // groups of asynchronous copies, by kind; the last one is open
  std::vector<Group> groups[3] = {std::vector<Group>(1), std::vector<Group>(1), std::vector<Group>(1)};
  bool in_group_wait = false;
  char copied = 0;

  Warp& warp() { return block->warps[linear / WARP]; }
  unsigned lane() const { return linear % WARP; }
};

struct Machine {
  Grid grid;
  const std::function<void()>* body;
  Copy copy;
  std::mt19937_64 random;
  Context host;
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
void pause(const char* where);
// lets others go ahead, or not, as drawn
void maybe_pause(const char* where);
void wait_in(std::vector<Fiber*>& waiting, const char* where, const char* what, long long a = 0, long long b = 0);

// shared memory: memory.cpp
Block& block_of(const void* address, const Cluster& cluster, const char* what, const void** key, size_t* offset);
Memory& variable(Block& block, const void* key, size_t bytes);
void leave(Block& block);

// barriers.cpp and copies.cpp
void complete(Meeting& meeting);
void finish_copy(size_t which);

}  // namespace cuda_host
