"""The tuner for GPUs, over the database and search of llmopt.tune.

lookup.py answers for every launch; tuning.py measures tiles that candidates.py finds likely by cost.py's model, on operands of
problems.py; predict.py writes down what the model thinks where nobody has measured.
"""
