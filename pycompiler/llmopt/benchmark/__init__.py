"""End-to-end benchmarks: `llmopt bench`. Read in this order.

phases.py   what is run: prefill, decode, first token, encoder batches, any module's own inputs
systems.py  who runs it: llmopt and its peers, one row each
worker.py   one system in a process of its own, answering over a pipe
rounds.py   interleaved rounds over the workers, with probes of the machine around each measurement
results.py  medians, the roof of each phase, JSON lines, Markdown; plot.py draws them
"""
