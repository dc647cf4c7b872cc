// Shared memory: one allocation for each variable and block, full of NaN, gone when its block leaves.
#include "machine.h"

namespace cuda_host {

Block& block_of(const void* address, const Cluster& cluster, const char* what, const void** key, size_t* offset) {
  const char* at = static_cast<const char*>(address);
  for (Block* block : cluster.blocks) {
    for (auto& [name, memory] : block->variables) {
      if (at >= memory.at && at < memory.at + memory.bytes) {
        *key = name, *offset = at - memory.at;
        return *block;
      }
    }
  }
  fault("%s: %p is not in shared memory of this cluster", what, address);
}

static void fill(char* at, size_t bytes) {
  // NaN in every floating-point type; volatile, or the compiler calls memset, which sanitizers watch
  for (size_t i = 0; i < bytes; i++) reinterpret_cast<volatile char*>(at)[i] = char(0xff);
}

static Memory allocate(Block& block, size_t bytes, const char* what) {
  size_t room = (bytes + 127) / 128 * 128;
  if (block.used + room > MAX_SHARED) fault("%s: a block has %zu bytes of shared memory at most", what, MAX_SHARED);
  char* at = FRESH_SHARED ? static_cast<char*>(std::aligned_alloc(128, room)) : block.arena.get() + block.used;
  block.used += room;
  fill(at, room);
  if (FRESH_SHARED) forbid(at + bytes, room - bytes);
  return {at, bytes};
}

Memory& variable(Block& block, const void* key, size_t bytes) {
  auto found = block.variables.find(key);
  if (found != block.variables.end()) return found->second;
  return block.variables[key] = allocate(block, bytes, "shared variable");
}

static const std::vector<char> ONES(MAX_SHARED, char(0xff));

// what other blocks read here from now on is a fault
void leave(Block& block) {
  for (auto& [key, memory] : block.variables) {
    if (FRESH_SHARED) {
      std::free(memory.at);
    } else {
      machine->copy(memory.at, ONES.data(), memory.bytes);
    }
  }
}

void* shared_variable(const void* key, size_t bytes) {
  OnHost host;
  return variable(*current->block, key, bytes).at;
}

void* dynamic_memory() { return current->block->dynamic.at; }

void* map_shared(const void* address, unsigned rank) {
  OnHost host;
  Cluster& cluster = *current->block->cluster;
  if (rank >= cluster.blocks.size()) fault("map_shared_rank: rank %u of %zu blocks", rank, cluster.blocks.size());
  const void* key;
  size_t offset;
  Block& owner = block_of(address, cluster, "map_shared_rank", &key, &offset);
  if (&owner != current->block) fault("map_shared_rank: the address is another block's already");
  if (!cluster.blocks[rank]->live) fault("map_shared_rank: block %u of the cluster has left", rank);
  return variable(*cluster.blocks[rank], key, owner.variables[key].bytes).at + offset;
}

}  // namespace cuda_host
