"""The one error of model loading: a sentence the user can act on without a traceback."""

from __future__ import annotations


class ModelError(Exception):
    """A model that cannot be loaded; says what was asked and what is possible."""
