"""What llmopt says while it works: printed from the LLMOPT_DEBUG level that asks for it, and logged for debugging."""

from __future__ import annotations

import logging

from llmopt import settings

log = logging.getLogger("llmopt")
_said: set[str] = set()


def say(level: int, text: str) -> None:
    """One message of LLMOPT_DEBUG level `level`."""
    if settings.debug_level() >= level:
        print(f"llmopt: {text}", flush=True)
    log.debug(text)


def warn_once(text: str) -> None:
    """A warning about what was asked for and is not done, the first time in a process."""
    if text not in _said:
        log.warning("llmopt: %s", text)
    _said.add(text)
