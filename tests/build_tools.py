"""Compilers and other tools as tests run them: found, run, and waited for by one process at a time."""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def run(command: list[str | Path], **environment: str) -> str:
    """What the command prints; its failure is the test's."""
    done = subprocess.run(
        [str(c) for c in command],
        cwd=ROOT,
        env={**os.environ, **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    assert done.returncode == 0, f"{command[0]} failed:\n{done.stdout[-8000:]}"
    return done.stdout


def tool(name: str, *folders: Path, brought_by: str = "pip install '.[test]'") -> str:
    """A tool of the test environment, which need not be activated, of the folders, or of the system."""
    places = (Path(sys.executable).parent, *folders, os.environ.get("PATH", ""))
    found = shutil.which(name, path=os.pathsep.join(map(str, places)))
    assert found, f"{name} is missing: {brought_by} brings it"
    return found


@contextlib.contextmanager
def only_one(folder: Path) -> Iterator[None]:
    """Test processes that build into the same folder do so one after another; who comes later finds it built."""
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield
