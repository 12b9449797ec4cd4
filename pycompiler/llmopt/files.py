"""Files that are whole under their name: somebody who opens one, or loses power, finds the old content or the new one."""

from __future__ import annotations

import os
from pathlib import Path


def sync(path: Path) -> None:
    """Waits until a file's content, or a folder's names, are on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def publish(written: Path, target: Path) -> None:
    """Renames a written file to `target` in the same file system, content and rename synced."""
    sync(written)
    os.replace(written, target)
    sync(target.parent)
