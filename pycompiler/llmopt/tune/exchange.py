"""Measurements from one machine to another: every environment's entries in one file.

What was measured elsewhere stays in an environment of its own: it is used only by machines, builds and thread counts that are the
same in every fact.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
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
    found = {}
    for environment, _ in environments(root):
        files = Database(root, environment).files()
        found[environment] = [entry for _, entry in files if isinstance(entry, Entry)]
    write_file(path, found)
    return sum(map(len, found.values()))


def write_file(path: Path, found: Mapping[Environment, Sequence[Entry]]) -> None:
    """Writes entries by their environments as `import_file` and `entries_of` read them: an entry a line."""
    blocks = []
    for environment, entries in found.items():
        lines = [json.dumps(json.loads(encode(e, environment.digest))) for e in entries]
        facts = json.dumps(dict(environment.facts))
        blocks.append('{"facts": ' + facts + ', "entries": [\n' + ",\n".join(lines) + "]}")
    head = json.dumps({"format": FORMAT, "schema": SCHEMA})[:-1]
    path.write_text(head + ', "environments": [' + ",\n".join(blocks) + "]}\n")


def entries_of(
    given: Any, wanted: Callable[[Environment], bool] = lambda _: True
) -> list[tuple[Environment, list[Entry]]]:
    """The entries in a file's content of the wanted environments; raises Unusable when one of them is damaged."""
    return [
        (environment, [decode(json.dumps(e).encode(), environment.digest) for e in entries])
        for environment, entries in _environments_in(given)
        if wanted(environment)
    ]


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
        found = _environments_in(given)
    except Unusable as error:
        raise ValueError(f"{path} cannot be imported: {error}") from error
    return [_import(Database(root, environment), entries) for environment, entries in found]


def _environments_in(given: Any) -> list[tuple[Environment, list[Any]]]:
    """Every environment of a file's content with its entries as they are; raises Unusable."""
    try:
        check_schema(int(given["schema"]))
        return [(Environment.of(e["facts"]), list(e["entries"])) for e in given["environments"]]
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise Unusable(f"it is damaged: {error!r}") from error


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
