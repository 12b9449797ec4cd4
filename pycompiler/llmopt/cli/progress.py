"""What is seen while something takes its time: a spinner or bar on a terminal, lines elsewhere.

All of it goes to stderr, so that stdout holds results only.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator
from typing import Any

from llmopt.models.errors import ModelError


class Task:
    """The running step; `say` changes its text, `advance` moves its bar."""

    def __init__(self, progress: Any, number: Any, console: Any) -> None:
        self._progress = progress
        self._number = number
        self._console = console

    def say(self, text: str) -> None:
        if self._console.is_terminal:
            self._progress.update(self._number, description=text)
        else:
            say(self._console, text)

    def advance(self, steps: int = 1) -> None:
        self._progress.advance(self._number, steps)


def say(console: Any, text: str) -> None:
    """Prints text as it is: names and paths may look like markup."""
    console.print(text, highlight=False, markup=False, emoji=False)


@contextlib.contextmanager
def working(text: str, total: int | None = None) -> Iterator[Task]:
    """Shows text with the elapsed time (and a bar when total is given) until the block ends."""
    try:
        from rich.console import Console
        from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn
    except ModuleNotFoundError as error:
        raise ModelError("this command needs rich: pip install 'llmopt[demo]'") from error

    console = Console(stderr=True)
    columns = [SpinnerColumn(), TextColumn("{task.description}", markup=False), TimeElapsedColumn()]
    if total is not None:
        columns.insert(2, BarColumn(bar_width=30))
    quiet = not console.is_terminal
    with Progress(*columns, console=console, transient=True, disable=quiet) as progress:
        task = Task(progress, progress.add_task(text, total=total), console)
        if quiet:
            say(console, text)
        with _saying_what_is_logged(task):
            yield task


class _Sayer(logging.Handler):
    """What the library says about long work becomes the text of the running step, and is no line of the log besides."""

    def __init__(self, task: Task) -> None:
        super().__init__(logging.INFO)
        self._task = task

    def emit(self, record: logging.LogRecord) -> None:
        if record.levelno == logging.INFO:
            self._task.say(record.getMessage())
        else:  # warnings go where they always go
            logging.getLogger().handle(record)


@contextlib.contextmanager
def _saying_what_is_logged(task: Task) -> Iterator[None]:
    log = logging.getLogger("llmopt")
    sayer, level, propagate = _Sayer(task), log.level, log.propagate
    log.addHandler(sayer)
    log.propagate = False
    log.setLevel(min(logging.INFO, log.getEffectiveLevel()))
    try:
        yield
    finally:
        log.removeHandler(sayer)
        log.propagate = propagate
        log.setLevel(level)
