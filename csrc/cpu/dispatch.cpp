#include "cpu/dispatch.h"

#include <sys/syscall.h>
#include <unistd.h>

#include <stdexcept>

#include "isa_declarations.inc"

namespace llmopt {

// Linux keeps the tile registers switched off until a process asks for them; the answer holds for all its threads.
bool tiles_permitted() {
  constexpr long kRequestPermission = 0x1023, kTileData = 18;  // ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA
  static const bool permitted = syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
  return permitted;
}

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

int Tier::tile_rows(const std::string& op) const {
  for (const KernelFamily* family : families)
    for (int i = 0; i < family->count; ++i)
      if (op == family->kernels[i].op) return family->tile_rows;
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
