"""End-to-end benchmarks: `llmopt bench`. Read in this order.

phases.py   what is run: prefill, decode, first token, encoder batches, any module's own inputs
systems.py  who runs it: llmopt and its peers, one row each; *_runner.py builds a peer, flat_cache.py is what exporters get
work.py     the bytes and products that a phase needs, in each system's form of the weights: its roof
accuracy.py what a system's outputs are beside those of the model in fp32
worker.py   one system in a process of its own, answering over a pipe
rounds.py   interleaved rounds over the workers, with probes of the machine around each measurement
results.py  medians, JSON lines, Markdown; plot.py draws them
"""
