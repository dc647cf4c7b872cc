// Where threads meet: of a warp, a block, a cluster, the grid; and what lanes of a warp hand to each other.
#include <cstring>
#include <set>
#include <utility>

#include "machine.h"

namespace cuda_host {

static bool recording = false;
static std::set<std::pair<std::string, int>> reached;
static std::string omitted_file;
static int omitted_line = 0;

static const char* base_name(const char* path) {
  const char* slash = std::strrchr(path, '/');
  return slash ? slash + 1 : path;
}

std::string text(const Call& at) {
  if (!at.line) return at.name;
  return std::string(base_name(at.file)) + ":" + std::to_string(at.line) + ": " + at.name;
}

void omit(const char* file, int line) { omitted_file = file, omitted_line = line; }
void record_barriers() { recording = true; }
void print_barriers() {
  for (auto& [file, line] : reached) std::printf("%s:%d\n", file.c_str(), line);
}

bool omitted(const Call& at) {
  if (recording) {
    OnHost host;
    reached.emplace(base_name(at.file), at.line);
  }
  return at.line == omitted_line && omitted_file == base_name(at.file);
}

void complete(Meeting& meeting) {
  meeting.phase++;
  meeting.arrived = 0;
  wake(meeting.waiting);
}

static void meet(Meeting& meeting, unsigned expected, const Call& at) {
  unsigned phase = meeting.phase;
  detector_release(&meeting.order[phase & 1]);
  bool last;
  {
    OnHost host;
    if (!meeting.arrived) meeting.call = at;
    last = ++meeting.arrived == expected;
    if (last) complete(meeting);
  }
  if (last) {
    maybe_pause(at);
  } else {
    wait_in(meeting.waiting, at, "until %lld threads are there", expected);
  }
  detector_acquire(&meeting.order[phase & 1]);
}

void sync_block(const Call& at) {
  if (omitted(at)) return;
  Meeting& barrier = current->block->barrier;
  if (barrier.arrived && (barrier.call.line != at.line || std::strcmp(barrier.call.file, at.file))) {
    fault(at, "divergent, others are at %s", text(barrier.call).c_str());
  }
  meet(barrier, current->block->live, at);
}

void sync_named(unsigned id, unsigned threads, const Call& at) {
  if (omitted(at)) return;
  if (id < 1 || id > 15 || !threads || threads % WARP) fault(at, "barrier %u of %u threads", id, threads);
  Named* barrier;
  {
    OnHost host;
    barrier = &current->block->named[id];
    if (barrier->arrived && barrier->expected != threads) {
      fault(at, "barrier %u of %u threads, others wait for %u", id, threads, barrier->expected);
    }
    barrier->expected = threads;
    barrier->lanes[current->linear / WARP] |= 1u << current->lane();
    if (barrier->arrived + 1 == threads) {
      for (auto& [warp, lanes] : barrier->lanes) {
        unsigned missing = current->block->warps[warp].live & ~lanes;
        if (missing) fault(at, "barrier %u: warp %u came without its lanes %08x", id, warp, missing);
      }
      barrier->lanes.clear();
    }
  }
  meet(*barrier, threads, at);
}

// lanes of a mask meet; those that have left are not waited for
static Exchange& meet_lanes(unsigned mask, uint64_t value, const Call& at) {
  if (!(mask >> current->lane() & 1)) fault(at, "lane %u is not in its own mask %08x", current->lane(), mask);
  Exchange* meeting;
  bool last;
  {
    OnHost host;
    meeting = &current->warp().meetings[mask];
    unsigned& present = meeting->present[meeting->phase & 1];
    if (!meeting->arrived) {
      meeting->call = at;
      present = 0;
    } else if (std::strcmp(meeting->call.name, at.name)) {
      fault(at, "divergent, others of mask %08x are at %s", mask, text(meeting->call).c_str());
    }
    present |= 1u << current->lane();
    meeting->arrived++;
    meeting->values[meeting->phase & 1][current->lane()] = value;
    last = present == (mask & current->warp().live);
    if (last) complete(*meeting);
  }
  if (!last) wait_in(meeting->waiting, at, "for the lanes of mask %08llx", mask);
  return *meeting;
}

void complete_without(Warp& warp) {
  for (auto& [mask, meeting] : warp.meetings) {
    if (meeting.arrived && meeting.present[meeting.phase & 1] == (mask & warp.live)) complete(meeting);
  }
}

void sync_warp(unsigned mask, const Call& at) {
  if (omitted(at)) return;
  char* order;
  {
    OnHost host;
    Exchange& meeting = current->warp().meetings[mask];
    order = &meeting.order[meeting.phase & 1];
  }
  detector_release(order);
  meet_lanes(mask, 0, at);
  detector_acquire(order);
}

uint64_t exchange(unsigned mask, uint64_t value, unsigned source, const Call& at) {
  if (source >= WARP || !(mask >> source & 1)) fault(at, "reads lane %u, absent from mask %08x", source, mask);
  unsigned phase;
  {
    OnHost host;
    phase = current->warp().meetings[mask].phase & 1;
  }
  // no order is given to memory: that is __syncwarp's
  Exchange& meeting = meet_lanes(mask, value, at);
  if (!(meeting.present[phase] >> source & 1)) fault(at, "reads lane %u, which has left", source);
  return meeting.values[phase][source];
}

void sync_grid(const Call& at) {
  if (omitted(at)) return;
  const Grid& grid = machine->grid;
  if (!grid.cooperative) fault(at, "in a grid that is not cooperative");
  meet(machine->everyone, unsigned(grid.block.x * grid.block.y * grid.block.z * machine->blocks.size()), at);
}

void cluster_arrive(const Call& at) {
  if (omitted(at)) return;
  Meeting& barrier = current->block->cluster->barrier;
  if (current->in_cluster_barrier) fault(at, "arrives again before it has waited");
  current->in_cluster_barrier = true;
  current->cluster_phase = barrier.phase;
  current->call = at;
  detector_release(&barrier.order[barrier.phase & 1]);
  OnHost host;
  if (++barrier.arrived == current->block->cluster->live) complete(barrier);
}

void cluster_wait(const Call& at) {
  if (omitted(at)) return;
  Meeting& barrier = current->block->cluster->barrier;
  if (!current->in_cluster_barrier) fault(at, "waits without having arrived");
  if (barrier.phase == current->cluster_phase) wait_in(barrier.waiting, at, "for the cluster");
  current->in_cluster_barrier = false;
  detector_acquire(&barrier.order[current->cluster_phase & 1]);
}

unsigned cluster_rank() { return current->block->rank; }
unsigned cluster_blocks() { return unsigned(current->block->cluster->blocks.size()); }

}  // namespace cuda_host
