#include "cpu/family.h"
LLMOPT_EXPORT_FAMILY(vm, nullptr, 0, 0)
