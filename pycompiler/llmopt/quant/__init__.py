"""Linears whose weights are small integers: schemes, rounding, calibration, files, accuracy.

schemes.py     what can be asked for: bits, groups, activations
rounding.py    a weight → codes, scales, offsets
module.py      QuantizedLinear, QuantizedExperts and the ops they call
experts.py     the parameters that hold the weights of a mixture's experts
convert.py     quantize(): model → model
calibration.py what is learnt from sample inputs; flow.py which layer feeds which
scaling.py     SmoothQuant and AWQ: magnitudes moved from activations into weights
gptq.py        GPTQ: rounding errors made up for by the inputs that follow
storage.py     a folder on disk; gguf.py weights that come quantised
evaluate.py    perplexity, divergence, agreement; budget.py the choice within an accuracy budget
"""
