// What the programs with planted mistakes share: each runs with its mistake, or without.
#pragma once

#include <cstdio>
#include <cstdlib>
#include <map>
#include <string>
#include <vector>

#include "device.cuh"

namespace cg = cooperative_groups;

inline bool fixed = false;
inline int failures = 0;

inline void expect(bool right, const char* what) {
  if (!right && !failures++) std::printf("wrong: %s\n", what);
}

inline std::map<std::string, void (*)()>& programs() {
  static std::map<std::string, void (*)()> all;
  return all;
}

#define PROGRAM(name)                                                       \
  static void name();                                                       \
  static const bool name##_listed = programs().emplace(#name, name).second; \
  static void name()

// memory that bulk copies can reach
template <typename T>
struct alignas(16) Aligned {
  T at[64];
};
