// Stands for the list of compiled kernels that the build writes.
#include "cuda/driver.h"

const llmopt::cuda::Cubin llmopt::cuda::kCubins[] = {
    {"linear_w8a8_gemv", 80, ""}, {"linear_w8a8_gemm", 80, ""}, {"linear_w4a16_gemv", 80, ""},
    {"attention_decode", 80, ""}, {"linear_w8a8_gemv", 90, ""},
};
const int llmopt::cuda::kCubinCount = 5;
