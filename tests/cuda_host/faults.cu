// Programs with one mistake each, and the same without it: broken|fixed FIRST_SEED SEEDS NAMES. Exit code 1 where a result is
// wrong under one of the seeds. Without arguments: their names.
#include "faults_barriers.cuh"
#include "faults_copies.cuh"
#include "faults_memory.cuh"

int main(int count, char** arguments) {
  if (count < 5) {
    for (auto& [name, program] : programs()) std::printf("%s\n", name.c_str());
    return 2;
  }
  fixed = std::string(arguments[1]) == "fixed";
  int first = std::atoi(arguments[2]), seeds = std::atoi(arguments[3]);
  for (int i = 4; i < count; i++) {
    std::fprintf(stderr, "%s\n", arguments[i]);
    for (int seed = first; seed < first + seeds; seed++) {
      cuda_host::set_seed(uint64_t(seed));
      programs().at(arguments[i])();
    }
  }
  return failures > 0;
}
