#include "cpu/dispatch.h"

#include <stdexcept>

#include "isa_declarations.inc"

namespace llmopt {

const std::vector<Tier>& tiers() {
  static const std::vector<Tier> rows = {
#include "isa_rows.inc"
  };
  return rows;
}

const Kernel* Tier::find(const std::string& op) const {
  for (const KernelFamily* family : families)
    for (int i = 0; i < family->count; ++i)
      if (op == family->kernels[i].op) return &family->kernels[i];
  return nullptr;
}

int Tier::panel_width() const {
  for (const KernelFamily* family : families)
    if (family->panel_width) return family->panel_width;
  return 0;
}

const Tier& tier(const std::string& name) {
  std::string known, runnable;
  for (const Tier& t : tiers()) {
    bool ok = t.supported();
    if (name == t.name && ok) return t;
    known += std::string(known.empty() ? "" : ", ") + t.name;
    if (ok) runnable += std::string(runnable.empty() ? "" : ", ") + t.name;
  }
  throw std::invalid_argument("CPU tier '" + name + "' cannot be used here: this build has " + known +
                              "; this CPU runs " + runnable);
}

}  // namespace llmopt
