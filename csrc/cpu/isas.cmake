# One row per CPU tier, best first: name = GCC feature names. Each row becomes one object per kernel family, compiled
# with these features and isa/<header>.h, and one line of isa_rows.inc that asks the CPU for the same features.
#   name | header | features
set(LLMOPT_CPU_ISAS
    "amx|amx|amx-tile amx-bf16 amx-int8 avx512f avx512bw avx512dq avx512vl avx512vnni avx512bf16 avx2 fma f16c"
    "avx512_vnni|avx512|avx512f avx512bw avx512dq avx512vl avx512vnni avx2 fma f16c"
    "avx512|avx512|avx512f avx512bw avx512dq avx512vl avx2 fma f16c"
    "avx2|avx2|avx2 fma f16c"
    "scalar|scalar|")
# Kernel families: one .cpp each, compiled once per tier; each object exports the one symbol llmopt_<family>_<tier>.
set(LLMOPT_CPU_FAMILIES linear linear_quantized attention rows vm probe)
