"""Errors as a user sees them: one sentence, with no traceback needed to act on it."""

from __future__ import annotations


class ModelError(Exception):
    """A model that cannot be loaded or run as asked; says what was asked and what is possible."""


def sentence(error: BaseException) -> str:
    """An exception on one line; its kind is named where the message was not written for users."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()] or ["no message"]
    text = lines[0]
    if text.endswith(":") and len(lines) > 1:  # Dynamo: "backend='llmopt' raised:", then what
        text = f"{text} {lines[1]}"
    return text if isinstance(error, ModelError | ValueError) else f"{type(error).__name__}: {text}"
