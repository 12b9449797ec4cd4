"""The one error of model loading: its message is a sentence for the user, and no traceback is needed to act on it."""

from __future__ import annotations


class ModelError(Exception):
    """A model that cannot be loaded; says what was asked and what is possible."""
