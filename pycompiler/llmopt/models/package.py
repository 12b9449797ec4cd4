"""Finding the folder of an installed package without importing it.

A model package may import what is not installed (it is installed with --no-deps).
"""

from __future__ import annotations

import importlib.util
from pathlib import Path


def package_folder(module: str) -> Path:
    """Where a package's files lie; raises ModuleNotFoundError when it is not installed."""
    spec = importlib.util.find_spec(module)
    if spec is None or not spec.submodule_search_locations:
        raise ModuleNotFoundError(f"No module named {module!r}", name=module)
    return Path(next(iter(spec.submodule_search_locations)))
