#include "cpu/family.h"
LLMOPT_EXPORT_FAMILY(attention, nullptr, 0, 0)
