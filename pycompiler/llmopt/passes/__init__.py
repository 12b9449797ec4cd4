"""The passes: one file, one pass, FX graph → FX graph, in the order of PIPELINE."""
