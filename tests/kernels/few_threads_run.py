"""Linears planned for eight threads in a process whose OpenMP gives fewer: `python -m tests.kernels.few_threads_run`.

They run each chunk once: y is its own residual, which a chunk that ran twice would add twice.
"""

from itertools import product

import torch
from llmopt import _C

from tests.kernels import test_linear, test_linear_quantized
from tests.kernels.test_linear import randn

PLANNED = 8

if __name__ == "__main__":
    torch.set_num_threads(PLANNED)
    makes = (test_linear.case, test_linear_quantized.case)
    for tier, (m, n), make in product(_C.tiers(), ((1, 500), (200, 70), (460, 70)), makes):
        c = make(m, n, 64, norm=1)
        c.residual = randn(m, n)
        want = c.run(tier, 1)
        c.y = c.residual
        assert torch.equal(c.run(tier, PLANNED), want), (tier, m, make.__module__)
