"""Measured configs on disk: a directory per environment, a file per problem.

A file appears under its name only when it is complete and synced, so that neither a killed process nor several writers leave half of
one; there are no locks. It names its environment and problem and has a checksum: what is damaged, foreign or newer is a miss
with a reason, never an error. Where nothing can be written, results last as long as the process, and a log line says so.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import os
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from llmopt.files import publish
from llmopt.tune.environment import SCHEMA, Environment

log = logging.getLogger("llmopt")

ENVIRONMENT_FILE = "environment.json"
_MAY_LACK = ("samples", "probe")  # as what nobody measured, or an older version did
_STALE_SECONDS = 3600.0  # a partial file this old has no writer any more


class Unusable(Exception):
    """A file that cannot be used; the message says why."""


@dataclass(frozen=True)
class Entry:
    """What was measured for one problem. config: the fields that are not left to the kernel; empty when its own rules won."""

    problem: Mapping[str, str | int]
    config: Mapping[str, str | int]
    us: float
    default_us: float
    roof: float  # share of the limit that binds, as probed then: 1.0 is the probe
    reason: str  # why this config and no other
    timings: Mapping[str, float]  # config in words → best us seen
    samples: Sequence[float] = field(default_factory=list)  # that us is the median of
    probe: Mapping[str, float] = field(default_factory=dict)  # the machine's rates then

    @property
    def key(self) -> str:
        return key_of(self.problem)

    @classmethod
    def of(cls, given: Any) -> Entry:
        """The entry with these fields; raises Unusable when they are not an entry's."""
        try:
            entry = cls(**given)
            numbers = [entry.us, entry.default_us, entry.roof, *entry.timings.values()]
            numbers += [*entry.samples, *entry.probe.values()]
            sound = all(isinstance(v, int | float) and v >= 0 for v in numbers)
            plain = [*entry.problem.values(), *entry.config.values()]
            sound = sound and all(isinstance(v, str | int) for v in plain)
        except (TypeError, AttributeError) as error:
            raise Unusable(f"it is no entry: {error}") from error
        if not sound or not isinstance(entry.reason, str):
            raise Unusable("it is no entry: a value has the wrong type")
        return entry


def key_of(problem: Mapping[str, str | int]) -> str:
    """A problem in words; two problems of one key are the same."""
    return " ".join(f"{name}={value}" for name, value in problem.items())


def encode(entry: Entry, environment: str) -> bytes:
    """An entry as the content of its file."""
    body = {n: value for n, value in asdict(entry).items() if value or n not in _MAY_LACK}
    given = {"schema": SCHEMA, "environment": environment, "key": entry.key, "entry": body}
    return json.dumps({**given, "checksum": _checksum(body)}, indent=1).encode()


def decode(content: bytes, environment: str) -> Entry:
    """The entry in a file's content; raises Unusable when it is damaged, or of another version or environment."""
    try:
        given = json.loads(content)
    except ValueError as error:
        raise Unusable(f"it is damaged: {error}") from error
    if not isinstance(given, dict) or not isinstance(given.get("schema"), int):
        raise Unusable("it is damaged: it names no schema")
    check_schema(given["schema"])
    if given.get("environment") != environment:
        raise Unusable("it was measured in another environment")
    if given.get("checksum") != _checksum(given.get("entry")):
        raise Unusable("it is damaged: the checksum differs")
    entry = Entry.of(given["entry"])
    if given.get("key") != entry.key:
        raise Unusable("it is damaged: its key is not that of its problem")
    return entry


def check_schema(schema: int) -> None:
    """Raises Unusable for a schema that this version does not read."""
    if schema != SCHEMA:
        age = "a newer" if schema > SCHEMA else "an older"
        raise Unusable(f"{age} llmopt wrote it: schema {schema}, this one reads {SCHEMA}")


def _checksum(body: Any) -> str:
    return hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()[:16]


class Database:
    """The entries of one environment under a root directory."""

    def __init__(self, root: Path, environment: Environment) -> None:
        self.root, self.environment = root, environment
        self.folder = root / environment.digest
        self._known: dict[str, Entry | str] = {}  # by key: an entry, or the reason of a miss
        self._listed: list[Entry] | None = None
        self._can_write, self._is_clean = True, False
        self._lock = threading.RLock()

    def get(self, key: str) -> tuple[Entry | None, str]:
        """The entry of a problem and "", or None and the reason."""
        with self._lock:
            if key not in self._known:
                self._known[key] = self._read(key)
            found = self._known[key]
        return (None, found) if isinstance(found, str) else (found, "")

    def put(self, entry: Entry) -> bool:
        """Keeps an entry: on disk where possible (then True), otherwise in this process."""
        with self._lock:
            self.remember(entry)
            if not self._can_write:
                return False
            try:
                self._write(entry)
                return True
            except OSError as error:
                self._can_write = False
                log.warning(
                    "cannot keep tuning results in %s (%s): they last as long as this process",
                    self.folder,
                    error,
                )
                return False

    def remember(self, entry: Entry) -> None:
        """Keeps an entry as long as the process lasts."""
        with self._lock:
            self._known[entry.key] = entry
            self._listed = None

    def entries(self) -> list[Entry]:
        """Every usable entry, on disk and of this process."""
        with self._lock:
            if self._listed is None:
                kept = {key: e for key, e in self._known.items() if isinstance(e, Entry)}
                read = {e.key: e for _, e in self.files() if isinstance(e, Entry)}
                self._listed = list({**read, **kept}.values())
            return list(self._listed)

    def files(self) -> Iterator[tuple[Path, Entry | str]]:
        """Every file of this environment with its entry, or what is wrong with it."""
        try:
            paths = sorted(self.folder.glob("*.json"))
        except OSError:  # a folder nobody may look into has no entries for us
            return
        for path in paths:
            if path.name == ENVIRONMENT_FILE:
                continue
            try:
                yield path, decode(path.read_bytes(), self.environment.digest)
            except (Unusable, OSError) as error:
                yield path, str(error)

    def path_of(self, key: str) -> Path:
        return self.folder / f"{hashlib.sha256(key.encode()).hexdigest()[:24]}.json"

    def _read(self, key: str) -> Entry | str:
        path = self.path_of(key)
        try:
            entry = decode(path.read_bytes(), self.environment.digest)
        except FileNotFoundError:
            return "not measured on this machine" if self.folder.is_dir() else self._why_empty()
        except OSError as error:
            return f"its file cannot be read: {error}"
        except Unusable as error:
            return f"{path.name} cannot be used: {error}"
        return (
            entry if entry.key == key else f"{path.name} cannot be used: it is of another problem"
        )

    def _why_empty(self) -> str:
        """What was measured lies in other environments: how they differ from this one."""
        others = [(environment, count) for environment, count in environments(self.root) if count]
        if not others:
            return "nothing was measured on this machine (llmopt tune does)"
        nearest = min((self.environment.difference(e) for e, _ in others), key=len)
        return f"nothing was measured in this environment; elsewhere: {nearest}"

    def _write(self, entry: Entry) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        if not self._is_clean:
            _remove_stale(self.folder)
            self._is_clean = True
        described = self.folder / ENVIRONMENT_FILE
        if not described.is_file():
            _write_atomically(
                described, json.dumps(dict(self.environment.facts), indent=1).encode()
            )
        _write_atomically(self.path_of(entry.key), encode(entry, self.environment.digest))


def environments(root: Path) -> list[tuple[Environment, int]]:
    """Every environment under a root that can be read, with its number of files."""
    found = []
    for path in sorted(root.glob(f"*/{ENVIRONMENT_FILE}")):
        try:
            environment = Environment.of(json.loads(path.read_bytes()))
        except (ValueError, OSError, AttributeError):
            continue  # what cannot be read says nothing about anywhere else
        if environment.digest == path.parent.name:
            found.append((environment, len(list(path.parent.glob("*.json"))) - 1))
    return found


def _write_atomically(path: Path, content: bytes) -> None:
    """Under its name the file is always whole: the one before or this one."""
    partial = path.with_name(f".{path.name}.{os.getpid()}.{threading.get_ident()}.partial")
    try:
        partial.write_bytes(content)
        publish(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def _remove_stale(folder: Path) -> None:
    """What killed writers left."""
    for path in folder.glob(".*.partial"):
        with contextlib.suppress(FileNotFoundError):  # another process was quicker
            if time.time() - path.stat().st_mtime > _STALE_SECONDS:
                path.unlink()
