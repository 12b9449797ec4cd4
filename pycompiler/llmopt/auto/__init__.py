"""precision="auto": per layer the fastest scheme that stays inside an accuracy budget, measured on sample inputs.

plans.py   what a layer can have: one packed weight, read in one way for each range of M
timing.py  how long the kernels take on this machine
trial.py   what schemes cost in accuracy
choose.py  the decision for one graph
module.py  llmopt.quantize: a module with the decision made, or with a scheme by name
"""
