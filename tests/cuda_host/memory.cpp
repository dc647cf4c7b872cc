// Shared memory: one allocation for each variable and block, full of what nobody has written, gone when its block leaves.
#include "machine.h"

namespace cuda_host {

Block* block_of(const void* address, const Cluster& cluster, const void** key, size_t* offset) {
  const char* at = static_cast<const char*>(address);
  for (Block* block : cluster.blocks) {
    for (auto& [name, memory] : block->variables) {
      if (at >= memory.at && at < memory.at + memory.bytes) {
        if (key) *key = name, *offset = at - memory.at;
        return block;
      }
    }
  }
  return nullptr;
}

static Memory allocate(Block& block, size_t bytes, size_t align) {
  // aligned as its type asks and no better, so that who relies on more is seen
  size_t skew = align % LINE, room = (skew + bytes + LINE - 1) / LINE * LINE;
  block.counted = (block.counted + align - 1) / align * align + bytes;
  if (block.counted > MAX_SHARED || block.used + room > ARENA) {
    fault(Call{"shared memory"}, "%zu bytes, a block has %zu", block.counted, MAX_SHARED);
  }
  char* base = FRESH_SHARED ? static_cast<char*>(std::aligned_alloc(LINE, room)) : block.arena.get() + block.used;
  block.used += room;
  // volatile, or the compiler calls memset, which sanitizers watch
  for (size_t i = 0; i < room; i++) reinterpret_cast<volatile char*>(base)[i] = machine->filling;
  char* at = base + skew;
  if (FRESH_SHARED) {
    forbid(base, skew);
    forbid(at + bytes, room - skew - bytes);
  }
  return {at, bytes, align, base};
}

Memory& variable(Block& block, const void* key, size_t bytes, size_t align) {
  auto found = block.variables.find(key);
  if (found != block.variables.end()) return found->second;
  return block.variables[key] = allocate(block, bytes, align);
}

static const std::vector<char> ONES(MAX_SHARED, char(0xff));

// what other blocks read here from now on is a fault
void leave(Block& block) {
  for (auto& copy : machine->pending) {
    if (copy->block == &block) fault(copy->call, "unfinished when its block leaves");
  }
  for (auto& [key, memory] : block.variables) {
    if (FRESH_SHARED) {
      std::free(memory.base);
    } else {
      machine->copy(memory.at, ONES.data(), memory.bytes);
    }
  }
}

void* shared_variable(const void* key, size_t bytes, size_t align) {
  OnHost host;
  return variable(*current->block, key, bytes, align).at;
}

void* dynamic_memory(const Call& at) {
  if (!current->block->dynamic.bytes) fault(at, "the launch gives no dynamic shared memory");
  return current->block->dynamic.at;
}

void* map_shared(const void* address, unsigned rank, const Call& at) {
  OnHost host;
  Cluster& cluster = *current->block->cluster;
  if (rank >= cluster.blocks.size()) fault(at, "rank %u of %zu blocks", rank, cluster.blocks.size());
  const void* key;
  size_t offset;
  if (block_of(address, cluster, &key, &offset) != current->block) fault(at, "%p is not in the block's shared memory", address);
  Block& block = *cluster.blocks[rank];
  if (!block.live) fault(at, "block %u of the cluster has left", rank);
  if (&block != current->block && !cluster.barrier.phase) {
    fault(at, "block %u may not have started: no barrier of the cluster came before", rank);
  }
  const Memory& mine = current->block->variables[key];
  return variable(block, key, mine.bytes, mine.align).at + offset;
}

}  // namespace cuda_host
