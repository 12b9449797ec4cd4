"""llmopt: a torch.compile backend that runs transformers close to the limit of the machine they are on.

    model.compile(backend="llmopt")        # or torch.compile(model, backend="llmopt")
"""

from __future__ import annotations

import torch  # noqa: F401  (first: the native module must find torch's OpenMP runtime already loaded)

from llmopt.backend import llmopt as backend
from llmopt.report import Report, explain, refresh
from llmopt.target import target
from llmopt.types import Target

__version__ = "0.1.0"

__all__ = ["Report", "Target", "__version__", "backend", "explain", "refresh", "target"]
