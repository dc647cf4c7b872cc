// Copies that complete at some later time, and what tells that they did.
#include "machine.h"

namespace cuda_host {

// what an initialised mbarrier holds: whoever writes over it, or uses it before it is there, is seen
constexpr uint64_t INITIALISED = 0x6d62617272696572;

// for the detector a thread's copies are one thread, so they end in their order
static size_t first_of(size_t which) {
  if (!DETECTS_RACES) return which;
  auto& pending = machine->pending;
  for (size_t i = 0; i < pending.size(); i++) {
    if (pending[i]->owner == pending[which]->owner && pending[i]->group < pending[which]->group) which = i;
  }
  return which;
}

static void end_phase(MBarrier& barrier) {
  if (barrier.pending || barrier.bytes) return;
  barrier.phase++;
  barrier.pending = barrier.expected;
  wake(barrier.waiting);
}

void finish_copy(size_t which) {
  which = first_of(which);
  std::unique_ptr<Pending> copy = std::move(machine->pending[which]);
  machine->pending[which] = std::move(machine->pending.back());
  machine->pending.pop_back();
  Fiber& owner = *copy->owner;
  Groups& groups = owner.groups[int(copy->kind)];
  Group& group = groups.left[copy->group - groups.waited];
  // the copying engine is an agent of its own: it knows what its issuer had done, or had fenced, and no more
  enter_companion(owner.context, machine->host);
  detector_acquire(&copy->order);
  machine->copy(copy->to, copy->from, copy->bytes);
  if (copy->barrier) detector_release(&copy->barrier->order[copy->barrier->phase & 1]);
  else detector_release(&group.done);
  detector_release(&machine->ended);
  detector_switch(machine->host);
  if (copy->barrier) {
    copy->barrier->bytes -= int64_t(copy->bytes);
    end_phase(*copy->barrier);
    return;
  }
  group.unfinished--;
  if (owner.in_group_wait) {
    owner.in_group_wait = false;
    machine->ready.push_back(&owner);
  }
}

static MBarrier& mbarrier_at(const void* address, uint64_t content, const Call& at) {
  auto found = current->block->mbarriers.find(address);
  if (found == current->block->mbarriers.end()) fault(at, "no mbarrier was initialised at %p", address);
  if (content != INITIALISED) fault(at, "the mbarrier's memory was overwritten");
  return found->second;
}

void start_copy(Kind kind, void* to, const void* from, size_t bytes, const void* bar, uint64_t content, const Call& at) {
  if ((reinterpret_cast<uintptr_t>(to) | reinterpret_cast<uintptr_t>(from)) % 16 || bytes % 16) {
    fault(at, "misaligned: %zu bytes from %p to %p", bytes, from, to);
  }
  auto copy = std::unique_ptr<Pending>();
  {
    OnHost host;
    const void *key, *shared = kind == Kind::store ? from : to, *global = kind == Kind::store ? to : from;
    size_t offset;
    Block* block = current->block;
    if (block_of(shared, *block->cluster, &key, &offset) != block) fault(at, "%p is not in the block's shared memory", shared);
    if (block_of(global, *block->cluster)) fault(at, "%p is in shared memory", global);
    if (offset + bytes > block->variables[key].bytes) {
      fault(at, "%zu bytes past the end of shared memory", offset + bytes - block->variables[key].bytes);
    }
    MBarrier* barrier = kind == Kind::load ? &mbarrier_at(bar, content, at) : nullptr;
    Groups& groups = current->groups[int(kind)];
    if (kind != Kind::load) {
      Group& group = groups.left.back();
      group.unfinished++;
      group.any = true, group.call = at;
    }
    size_t group = groups.waited + groups.left.size() - 1;
    copy.reset(new Pending{kind, to, from, bytes, barrier, block, current, group, at});
  }
  // a store reads what was fenced: it goes through another proxy than the threads' own writes
  if (kind == Kind::store) detector_acquire_into(current->context, machine->host, &current->block->fenced, &copy->order);
  else detector_release(&copy->order);
  {
    OnHost host;
    machine->pending.push_back(std::move(copy));
  }
  maybe_pause(at);
}

void commit_group(Kind kind) {
  OnHost host;
  current->groups[int(kind)].left.emplace_back();
}

void wait_group(Kind kind, unsigned left, const Call& at) {
  if (omitted(at)) return;
  Groups& groups = current->groups[int(kind)];
  // the last one is open, and of no concern here
  while (groups.left.size() > left + 1) {
    if (groups.left.front().unfinished) {
      current->in_group_wait = true;
      current->waits_for = "for its copies";
      pause(at);
      continue;
    }
    detector_acquire(&groups.left.front().done);
    OnHost host;
    groups.left.pop_front();
    groups.waited++;
  }
}

void check_copies(Fiber& fiber) {
  for (Groups& groups : fiber.groups) {
    for (Group& group : groups.left) {
      if (group.any) fault(group.call, "its thread leaves without having waited for it");
    }
  }
}

void proxy_fence() { detector_release(&current->block->fenced); }

uint64_t mbarrier_init(const void* address, unsigned arrivals, const Call& at) {
  OnHost host;
  if (block_of(address, *current->block->cluster) != current->block) fault(at, "%p is not in the block's shared memory", address);
  if (!arrivals || arrivals > MAX_TRANSACTION) fault(at, "%u arrivals", arrivals);
  MBarrier& barrier = current->block->mbarriers[address];
  if (!barrier.waiting.empty()) fault(at, "threads wait at this mbarrier");
  barrier = MBarrier();
  barrier.expected = barrier.pending = arrivals;
  return INITIALISED;
}

void mbarrier_arrive(const void* address, uint64_t content, size_t expected_bytes, const Call& at) {
  MBarrier& barrier = mbarrier_at(address, content, at);
  if (!barrier.pending) fault(at, "more arrivals than the %u expected", barrier.expected);
  detector_release(&barrier.order[barrier.phase & 1]);
  {
    OnHost host;
    barrier.bytes += int64_t(expected_bytes);
    if (barrier.bytes > int64_t(MAX_TRANSACTION)) fault(at, "%lld bytes in one phase", (long long)barrier.bytes);
    barrier.pending--;
    end_phase(barrier);
  }
  maybe_pause(at);
}

void mbarrier_wait(const void* address, uint64_t content, unsigned parity, const Call& at) {
  if (omitted(at)) return;
  MBarrier& barrier = mbarrier_at(address, content, at);
  while ((barrier.phase & 1) == (parity & 1)) {
    current->mbarrier = &barrier;
    wait_in(barrier.waiting, at, "for its mbarrier");
    current->mbarrier = nullptr;
  }
  detector_acquire(&barrier.order[parity & 1]);
}

}  // namespace cuda_host
