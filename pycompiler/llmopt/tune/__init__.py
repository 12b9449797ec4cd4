"""The tuner: which config of a kernel is fastest here, measured once and kept.

lookup.py answers at plan time; search.py finds the fastest of the candidates that candidates.py thinks likely, timed by measure.py;
database.py keeps what was found, for one environment.py each; exchange.py carries it to other machines.
"""
