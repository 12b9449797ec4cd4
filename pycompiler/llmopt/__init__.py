"""llmopt: a torch.compile backend that runs transformers close to the limit of the machine they are on.

    model.compile(backend="llmopt")        # or torch.compile(model, backend="llmopt")

The compiler itself is imported at first use: it needs parts of torch (sympy among them) that `import torch` leaves out.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

import torch  # noqa: F401  (first: the native module must find torch's OpenMP runtime already loaded)

from llmopt.target import target
from llmopt.types import Target

if TYPE_CHECKING:
    from llmopt.auto.module import quantize
    from llmopt.layers import mark_layers
    from llmopt.quant.kv_cache import KVCache
    from llmopt.quant.storage import load_quantized, save_quantized
    from llmopt.report import Report, explain, refresh

__version__ = "0.1.0"

__all__ = [
    "KVCache",
    "Report",
    "Target",
    "__version__",
    "explain",
    "load_quantized",
    "mark_layers",
    "quantize",
    "refresh",
    "save_quantized",
    "target",
]

_AT_FIRST_USE = {
    "KVCache": ("llmopt.quant.kv_cache", "KVCache"),
    "Report": ("llmopt.report", "Report"),
    "explain": ("llmopt.report", "explain"),
    "load_quantized": ("llmopt.quant.storage", "load_quantized"),
    "mark_layers": ("llmopt.layers", "mark_layers"),
    "quantize": ("llmopt.auto.module", "quantize"),
    "refresh": ("llmopt.report", "refresh"),
    "save_quantized": ("llmopt.quant.storage", "save_quantized"),
}


def __getattr__(name: str) -> Any:
    if name not in _AT_FIRST_USE:
        raise AttributeError(f"module 'llmopt' has no attribute {name!r}")
    module, attribute = _AT_FIRST_USE[name]
    value = getattr(importlib.import_module(module), attribute)
    globals()[name] = value
    return value
