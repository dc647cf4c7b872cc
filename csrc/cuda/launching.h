// Choices that both launchers make: the kernel of a type, a vector and a layout, and the shape of a launch.
#pragma once

#include "tables.cuh"

namespace semantica {

// what CUDA says of a launch that asks for what there is not
constexpr int INVALID = 1;

// calls `run` with a value of the type, and the vector and the layout as constants
template <typename Run>
int by_kind(const Problem& p, const Plan& plan, Run run) {
  auto by_layout = [&](auto type, auto vector) {
    return p.channels_last ? run(type, vector, std::true_type()) : run(type, vector, std::false_type());
  };
  auto by_vector = [&](auto type, auto most) {
    if (plan.vector == 1) return by_layout(type, std::integral_constant<int, 1>());
    return plan.vector == most.value ? by_layout(type, most) : INVALID;
  };
  switch (p.type) {
    case Type::f32: return by_vector(float(), std::integral_constant<int, 4>());
    case Type::f16: return by_vector(__half(), std::integral_constant<int, 8>());
    default: return by_vector(__nv_bfloat16(), std::integral_constant<int, 8>());
  }
}

// what follows the slots must fit in what was asked for
inline bool fits(const Problem& p, const Plan& plan, int item_bytes, int operands, int ahead, bool backward) {
  const Tables tables(nullptr, p, plan, backward);
  const int64_t behind = reinterpret_cast<intptr_t>(tables.end);
  return slot_bytes(plan, items_of(p, plan), item_bytes, operands, ahead) + behind <= plan.shared;
}

inline LaunchShape shape_of(const Plan& plan) {
  LaunchShape shape{};
  shape.grid = unsigned(plan.blocks);
  shape.block = unsigned(plan.threads);
  shape.cluster = plan.path == Path::resident ? unsigned(plan.parts * plan.chunks) : 1;
  shape.shared_bytes = size_t(plan.shared);
  shape.cooperative = plan.path == Path::grid;
  return shape;
}

// one launch, or two: `start(phase)`
template <typename Start>
int in_phases(const Plan& plan, Start start) {
  if (plan.path != Path::plain) return start(Phase::whole);
  const int error = start(Phase::first);
  return error ? error : start(Phase::second);
}

}  // namespace semantica
