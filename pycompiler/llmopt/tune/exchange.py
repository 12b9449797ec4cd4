"""Measurements from one machine to another: every environment's entries in one file.

What was measured elsewhere stays in an environment of its own: it is used only by machines, builds and thread counts that are the
same in every fact.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llmopt.tune.database import (
    Database,
    Entry,
    Unusable,
    check_schema,
    decode,
    encode,
    environments,
)
from llmopt.tune.environment import SCHEMA, Environment

FORMAT = "llmopt tuning"


def export_file(root: Path, path: Path) -> int:
    """Writes all usable entries under a root to one file; returns how many."""
    written, count = [], 0
    for environment, _ in environments(root):
        found = Database(root, environment).files()
        entries = [
            json.loads(encode(e, environment.digest)) for _, e in found if isinstance(e, Entry)
        ]
        written.append({"facts": dict(environment.facts), "entries": entries})
        count += len(entries)
    path.write_text(
        json.dumps({"format": FORMAT, "schema": SCHEMA, "environments": written}, indent=1)
    )
    return count


@dataclass(frozen=True)
class Imported:
    """What became of an environment's entries."""

    environment: Environment
    added: int
    kept: int  # of ours, that were measured already
    unusable: tuple[str, ...]  # reasons


def import_file(root: Path, path: Path) -> list[Imported]:
    """Adds the entries of an exported file to those under a root; what is there already stays.

    Raises ValueError, and adds nothing, when the file is damaged, is something else, or comes from a newer version.
    """
    try:
        given = json.loads(path.read_text())
    except (ValueError, OSError) as error:
        raise ValueError(f"{path} cannot be read: {error}") from error
    if not isinstance(given, dict) or given.get("format") != FORMAT:
        raise ValueError(f"{path} is not a file that llmopt tune --export wrote")
    try:
        check_schema(int(given["schema"]))
        found = [(Environment.of(e["facts"]), list(e["entries"])) for e in given["environments"]]
    except Unusable as error:
        raise ValueError(f"{path} cannot be imported: {error}") from error
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise ValueError(f"{path} is damaged: {error!r}") from error
    return [_import(Database(root, environment), entries) for environment, entries in found]


def _import(known: Database, entries: list[Any]) -> Imported:
    added, kept, unusable = 0, 0, []
    for given in entries:
        try:
            entry = decode(json.dumps(given).encode(), known.environment.digest)
        except Unusable as error:  # one bad entry is no reason to lose the others
            unusable.append(str(error))
            continue
        if known.get(entry.key)[0] is not None:
            kept += 1
            continue
        if not known.put(entry):
            raise ValueError(f"cannot write to {known.folder}: nothing more is imported")
        added += 1
    return Imported(known.environment, added, kept, tuple(unusable))
