"""Converted models on disk: `save_pretrained` folders with a manifest of their bytes.

A folder appears under its final name only when it is complete and synced. What is damaged is
converted again; a cache directory that cannot be written costs time, never the result. Both are
said in a log line.
"""

from __future__ import annotations

import json
import logging
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path

import numpy as np

from llmopt import settings
from llmopt.files import publish, sync

log = logging.getLogger("llmopt")

MANIFEST = "manifest.json"


def converted(key: str, convert: Callable[[], Callable[[Path], None]]) -> Path | None:
    """The folder of a converted model, made if missing or damaged; None when it cannot be kept.

    convert: does the conversion and returns the function that writes it into a folder.
    """
    folder = settings.cache_dir() / "models" / key
    reason = damage(folder)
    if reason is None:
        return folder
    if reason:
        log.warning("converted model %s is damaged (%s): converting it again", folder, reason)
    write = convert()
    try:
        _write_atomically(folder, write)
    except OSError as error:
        log.warning(
            "cannot keep the converted model in %s (%s): it is converted at every start",
            folder,
            error,
        )
        return None
    return folder


def damage(folder: Path) -> str | None:
    """None: every file is as it was written. "": nothing is there. Otherwise what is wrong."""
    if not folder.is_dir():
        return ""
    try:
        files = json.loads((folder / MANIFEST).read_text())
        for name, (size, checksum) in files.items():
            path = folder / name
            if path.stat().st_size != size:
                return f"{name} has {path.stat().st_size} bytes instead of {size}"
            if _checksum(path) != checksum:
                return f"{name} does not have the bytes that were written"
    except (OSError, ValueError, TypeError, AttributeError) as error:
        return str(error)
    return None


def _write_atomically(folder: Path, write: Callable[[Path], None]) -> None:
    folder.parent.mkdir(parents=True, exist_ok=True)
    partial = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", dir=folder.parent))
    try:
        write(partial)
        files = {p.name: [p.stat().st_size, _checksum(p)] for p in sorted(partial.iterdir())}
        (partial / MANIFEST).write_text(json.dumps(files, indent=1))
        for path in partial.iterdir():
            sync(path)
        partial.chmod(0o755)  # mkdtemp made it private
        if folder.exists():  # damaged, or just written by another process: either way ours is whole
            shutil.rmtree(folder)
        publish(partial, folder)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _checksum(path: Path) -> int:
    """The sum of the file's 8-byte words and its tail, modulo 2^64: damage at memory speed."""
    data = np.fromfile(path, dtype=np.uint8)
    whole = data.size // 8 * 8
    words = data[:whole].view(np.uint64)
    return (int(words.sum(dtype=np.uint64)) + int(data[whole:].sum(dtype=np.uint64))) % 2**64
