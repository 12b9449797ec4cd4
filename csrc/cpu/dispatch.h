// The tiers this build holds and the kernels of each. The only place that asks what the CPU is.
#pragma once
#include <string>
#include <vector>

#include "runtime/tensor.h"

namespace llmopt {

struct Tier {
  const char* name;
  bool (*supported)();
  const KernelFamily* families[LLMOPT_FAMILY_COUNT];

  // The kernel of this tier for an op; nullptr when there is none.
  const Kernel* find(const std::string& op) const;
  // Columns of a packed weight panel.
  int panel_width() const;
  // Rows of the largest register tile of an op over packed weights; 0 for other ops.
  int tile_rows(const std::string& op) const;
};

// Asks the operating system for the AMX tile registers. False where it has none to give.
bool tiles_permitted();
// All tiers of the build, best first.
const std::vector<Tier>& tiers();
// The tier with this name; throws std::invalid_argument that names what exists and what this CPU can run.
const Tier& tier(const std::string& name);

}  // namespace llmopt
