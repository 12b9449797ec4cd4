#include "cpu/family.h"
LLMOPT_EXPORT_FAMILY(probe, nullptr, 0, 0)
