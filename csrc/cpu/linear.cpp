#include "cpu/family.h"
LLMOPT_EXPORT_FAMILY(linear, nullptr, 0, 0)
