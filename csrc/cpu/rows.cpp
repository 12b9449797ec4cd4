#include "cpu/family.h"
LLMOPT_EXPORT_FAMILY(rows, nullptr, 0, 0)
