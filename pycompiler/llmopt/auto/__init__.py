"""precision="auto": per layer the fastest scheme that stays inside an accuracy budget, measured on the first inputs a graph sees.

plans.py   what a layer can have: one packed weight, read in one way for each range of M
timing.py  how long the kernels take on this machine
choose.py  what the plans cost in accuracy, and the decision
"""
