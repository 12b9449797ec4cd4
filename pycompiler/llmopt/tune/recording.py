"""What plans ask a tuner, collected while somebody listens."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Generic, TypeVar

P = TypeVar("P")


class Recorder(Generic[P]):
    """The problems of the plans that are made meanwhile, each once."""

    def __init__(self) -> None:
        self._found: list[P] | None = None

    def note(self, problem: P) -> None:
        if self._found is not None and problem not in self._found:
            self._found.append(problem)

    @contextlib.contextmanager
    def recording(self) -> Iterator[list[P]]:
        self._found, before = [], self._found
        try:
            yield self._found
        finally:
            self._found = before
