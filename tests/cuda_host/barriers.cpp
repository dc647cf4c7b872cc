// Where threads meet: of a warp, a block, a cluster, the grid; and what lanes of a warp hand to each other.
#include "machine.h"

namespace cuda_host {

void complete(Meeting& meeting) {
  meeting.phase++;
  meeting.arrived = 0;
  meeting.where = nullptr;
  wake(meeting.waiting);
}

static void meet(Meeting& meeting, unsigned expected, const char* where) {
  unsigned phase = meeting.phase;
  detector_release(&meeting.order[phase & 1]);
  bool last;
  {
    OnHost host;
    last = ++meeting.arrived == expected;
    if (last) complete(meeting);
  }
  if (last) {
    maybe_pause(where);
  } else {
    wait_in(meeting.waiting, where, "until %lld threads are there", expected);
  }
  detector_acquire(&meeting.order[phase & 1]);
}

void sync_block(const char* where) {
  Meeting& barrier = current->block->barrier;
  if (barrier.where && barrier.where != where && std::string(barrier.where) != where) {
    fault("divergent __syncthreads: %s, and others at %s", where, barrier.where);
  }
  barrier.where = where;
  meet(barrier, current->block->live, where);
}

void sync_named(unsigned id, unsigned threads, const char* where) {
  if (id < 1 || id > 15 || !threads || threads % WARP) fault("%s: named barrier %u of %u threads", where, id, threads);
  Meeting* barrier;
  {
    OnHost host;
    barrier = &current->block->named[id];
  }
  meet(*barrier, threads, where);
}

static void check_lanes(unsigned mask, const char* where) {
  Warp& warp = current->warp();
  if (!(mask >> current->lane() & 1)) fault("%s: lane %u is not in its own mask %08x", where, current->lane(), mask);
  unsigned absent = mask & ~warp.there;
  if (absent) fault("%s: mask %08x names lanes that are not there (%08x)", where, mask, absent);
  if (mask & warp.left) fault("%s: mask %08x names lanes that have left (%08x)", where, mask, mask & warp.left);
}

void sync_warp(unsigned mask, const char* where) {
  // lanes beyond the block's last thread are masked by the hardware for the whole warp
  if (mask == 0xffffffffu) mask = current->warp().there;
  check_lanes(mask, where);
  Meeting* barrier;
  {
    OnHost host;
    barrier = &current->warp().barriers[mask];
  }
  meet(*barrier, unsigned(__builtin_popcount(mask)), where);
}

void sync_grid(const char* where) {
  if (!machine->grid.cooperative) fault("%s: grid_sync in a grid that is not cooperative", where);
  const Grid& grid = machine->grid;
  meet(machine->everyone, unsigned(grid.block.x * grid.block.y * grid.block.z * machine->blocks.size()), where);
}

void cluster_arrive(const char* where) {
  Meeting& barrier = current->block->cluster->barrier;
  if (current->in_cluster_barrier) fault("%s: arrived already, and has not waited", where);
  current->in_cluster_barrier = true;
  current->cluster_phase = barrier.phase;
  detector_release(&barrier.order[barrier.phase & 1]);
  OnHost host;
  if (++barrier.arrived == current->block->cluster->live) complete(barrier);
}

void cluster_wait(const char* where) {
  Meeting& barrier = current->block->cluster->barrier;
  if (!current->in_cluster_barrier) fault("%s: waits without having arrived", where);
  if (barrier.phase == current->cluster_phase) wait_in(barrier.waiting, where, "for the cluster");
  current->in_cluster_barrier = false;
  detector_acquire(&barrier.order[current->cluster_phase & 1]);
}

unsigned cluster_rank() { return current->block->rank; }
unsigned cluster_blocks() { return unsigned(current->block->cluster->blocks.size()); }

uint64_t exchange(unsigned mask, uint64_t value, unsigned source, const char* where) {
  check_lanes(mask, where);
  if (source >= WARP || !(mask >> source & 1)) fault("%s: reads lane %u, absent from mask %08x", where, source, mask);
  Exchange* meeting;
  unsigned phase;
  bool last;
  {
    OnHost host;
    meeting = &current->warp().exchanges[mask];
    phase = meeting->phase;
    meeting->values[phase & 1][current->lane()] = value;
    last = ++meeting->arrived == unsigned(__builtin_popcount(mask));
    if (last) complete(*meeting);
  }
  // no order is given to memory: that is __syncwarp's
  if (!last) wait_in(meeting->waiting, where, "for the lanes of its mask");
  return meeting->values[phase & 1][source];
}

}  // namespace cuda_host
