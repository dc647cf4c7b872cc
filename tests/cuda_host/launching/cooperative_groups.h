// Grids and clusters by name alone: no kernel runs.
#pragma once
namespace cooperative_groups {
struct grid_group { void sync() const {} };
inline grid_group this_grid() { return {}; }
inline grid_group this_cluster() { return {}; }
}
