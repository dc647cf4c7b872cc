// Copies that complete at some later time, and what tells that they did.
#include "machine.h"

namespace cuda_host {

void finish_copy(size_t which) {
  std::unique_ptr<Pending> copy = std::move(machine->pending[which]);
  machine->pending[which] = std::move(machine->pending.back());
  machine->pending.pop_back();
  Fiber& owner = *copy->owner;
  // the copying engine is an agent of its own: it knows what its issuer had done, or had fenced, and no more
  enter_companion(owner.context, machine->host);
  detector_acquire(&copy->order);
  machine->copy(copy->to, copy->from, copy->bytes);
  if (copy->barrier) detector_release(&copy->barrier->order[copy->barrier->phase & 1]);
  detector_release(&owner.copied);
  detector_release(&machine->ended);
  detector_switch(machine->host);
  if (copy->barrier) {
    MBarrier& barrier = *copy->barrier;
    barrier.bytes -= int64_t(copy->bytes);
    if (!barrier.pending && !barrier.bytes) {
      barrier.phase++;
      barrier.pending = barrier.expected;
      wake(barrier.waiting);
    }
  } else {
    owner.groups[int(copy->kind)][copy->group].unfinished--;
    if (owner.in_group_wait) {
      owner.in_group_wait = false;
      machine->ready.push_back(&owner);
    }
  }
}

static MBarrier& mbarrier_at(const void* address, const char* where) {
  auto found = current->block->mbarriers.find(address);
  if (found == current->block->mbarriers.end()) fault("%s: no mbarrier was initialised at %p", where, address);
  return found->second;
}

void start_copy(Kind kind, void* to, const void* from, size_t bytes, const void* bar, const char* where) {
  if ((reinterpret_cast<uintptr_t>(to) | reinterpret_cast<uintptr_t>(from)) % 16 || bytes % 16) {
    fault("misaligned %s: %zu bytes from %p to %p", where, bytes, from, to);
  }
  auto copy = std::unique_ptr<Pending>();
  {
    OnHost host;
    const void* key;
    size_t offset;
    const void* shared = kind == Kind::store ? from : to;
    Block& block = block_of(shared, *current->block->cluster, where, &key, &offset);
    if (offset + bytes > block.variables[key].bytes) {
      fault("%s: %zu bytes past the end of shared memory", where, offset + bytes - block.variables[key].bytes);
    }
    MBarrier* barrier = kind == Kind::load ? &mbarrier_at(bar, where) : nullptr;
    auto& groups = current->groups[int(kind)];
    if (kind != Kind::load) groups.back().unfinished++;
    copy.reset(new Pending{kind, to, from, bytes, barrier, current, groups.size() - 1, where});
  }
  // a store reads what was fenced: it goes through another proxy than the threads' own writes
  if (kind == Kind::store) detector_acquire_into(current->context, machine->host, &current->block->fenced, &copy->order);
  else detector_release(&copy->order);
  {
    OnHost host;
    machine->pending.push_back(std::move(copy));
  }
  maybe_pause(where);
}

void commit_group(Kind kind) {
  OnHost host;
  current->groups[int(kind)].push_back({});
}

void wait_group(Kind kind, unsigned left, const char* where) {
  auto done = [&] {
    auto& groups = current->groups[int(kind)];
    size_t committed = groups.size() - 1;
    for (size_t i = 0; i + left < committed; i++) {
      if (groups[i].unfinished) return false;
    }
    return true;
  };
  while (!done()) {
    {
      OnHost host;
      current->in_group_wait = true;
      current->waits_for = "for its copies";
    }
    pause(where);
  }
  detector_acquire(&current->copied);
}

void proxy_fence() { detector_release(&current->block->fenced); }

void mbarrier_init(const void* address, unsigned arrivals, const char* where) {
  OnHost host;
  const void* key;
  size_t offset;
  block_of(address, *current->block->cluster, where, &key, &offset);
  MBarrier& barrier = current->block->mbarriers[address];
  if (!barrier.waiting.empty()) fault("%s: threads wait at this mbarrier", where);
  barrier = MBarrier();
  barrier.expected = barrier.pending = arrivals;
}

void mbarrier_arrive(const void* address, size_t expected_bytes, const char* where) {
  MBarrier& barrier = mbarrier_at(address, where);
  if (!barrier.pending) fault("%s: more arrivals than the %u expected", where, barrier.expected);
  detector_release(&barrier.order[barrier.phase & 1]);
  {
    OnHost host;
    barrier.bytes += int64_t(expected_bytes);
    if (!--barrier.pending && !barrier.bytes) {
      barrier.phase++;
      barrier.pending = barrier.expected;
      wake(barrier.waiting);
    }
  }
  maybe_pause(where);
}

void mbarrier_wait(const void* address, unsigned parity, const char* where) {
  MBarrier& barrier = mbarrier_at(address, where);
  while ((barrier.phase & 1) == (parity & 1)) {
    wait_in(barrier.waiting, where, "for %lld arrivals and %lld bytes", barrier.pending, barrier.bytes);
  }
  detector_acquire(&barrier.order[parity & 1]);
}

}  // namespace cuda_host
