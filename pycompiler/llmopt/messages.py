"""What llmopt says while it works: printed from the LLMOPT_DEBUG level that asks for it, and logged for debugging."""

from __future__ import annotations

import logging

from llmopt import settings

log = logging.getLogger("llmopt")


def say(level: int, text: str) -> None:
    """One message of LLMOPT_DEBUG level `level`."""
    if settings.debug_level() >= level:
        print(f"llmopt: {text}", flush=True)
    log.debug(text)
