"""Packs: all kernels of a model's plans as binaries for some GPU generations, made and checked where there is no GPU.

pack/manifest.json        versions, and per kernel: what it is a binary of, checksum, resources, instructions
pack/<target>/<key>.cubin or .hsaco
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from llmopt.gpu.compile import Compiled, binary, report, unique
from llmopt.launch import Launch
from llmopt.types import Target

FORMAT = 1
MANIFEST = "manifest.json"
_BINARY = {"cuda": "cubin", "hip": "hsaco"}


class PackError(ValueError):
    """A pack that cannot be made or used; the message says why."""


@dataclass(frozen=True)
class Entry:
    """One kernel of a pack."""

    file: str
    sha256: str
    specialisation: str  # what it is a binary of, see compile.specialisation
    launches: int  # of the plans, that use it
    symbol: str  # the function's name in the binary
    report: Compiled


@dataclass(frozen=True)
class Pack:
    """The kernels of one target, by specialisation, with their bytes."""

    target: str
    entries: Mapping[str, Entry]
    binaries: Mapping[str, bytes]


def build(folder: Path, plans: Mapping[Target, Sequence[Launch]], model: str) -> dict[str, Any]:
    """Compiles every launch once per target and writes the pack; returns the manifest.

    Raises PackError when the folder holds something else, or a kernel does not fit its target.
    """
    if folder.exists() and any(folder.iterdir()) and not (folder / MANIFEST).exists():
        raise PackError(f"{folder} holds something that is no pack: choose another folder")
    targets = {str(t): _compile(folder, t, list(launches)) for t, launches in plans.items()}
    body = {"format": FORMAT, "model": model, "versions": versions(), "targets": targets}
    manifest = {**body, "sha256": _digest(body)}
    (folder / MANIFEST).write_text(json.dumps(manifest, indent=1))
    return manifest


def versions() -> dict[str, str]:
    """What binaries depend on beside their sources."""
    import triton

    from llmopt.gpu.compile import assembler_version

    return {"triton": triton.__version__, "ptxas": assembler_version(), "llmopt": _own_version()}


def _own_version() -> str:
    from importlib.metadata import version

    return version("llmopt")


def _compile(folder: Path, target: Target, launches: list[Launch]) -> list[dict[str, Any]]:
    place = folder / str(target).replace(":", "_")
    place.mkdir(parents=True, exist_ok=True)
    uses: dict[str, int] = {}
    kernels = unique(launches, target, uses)
    entries = []
    for text, launch in kernels.items():
        kernel = binary(launch, target)
        found = report(launch, target, kernel)
        if problems := found.problems(target):
            raise PackError(f"{launch.kernel} does not fit {target}: {'; '.join(problems)}")
        kind = _BINARY[target.device]
        path = place / f"{hashlib.sha256(text.encode()).hexdigest()[:24]}.{kind}"
        path.write_bytes(kernel.asm[kind])
        digest = hashlib.sha256(kernel.asm[kind]).hexdigest()
        relative = str(path.relative_to(folder))
        entries.append(
            asdict(Entry(relative, digest, text, uses[text], kernel.metadata.name, found))
        )
    return entries


def load(folder: Path, target: Target) -> Pack:
    """The kernels of a pack for a target.

    Raises PackError that says why not: no pack, corrupt, another format, other versions, or other targets.
    """
    manifest = _read_manifest(folder)
    if manifest["format"] != FORMAT:
        raise PackError(f"{folder} has format {manifest['format']}; this version reads {FORMAT}")
    here = versions()
    differing = [
        f"{k} {v} (here {here.get(k)})" for k, v in manifest["versions"].items() if here.get(k) != v
    ]
    if differing:
        raise PackError(f"{folder} was made with {', '.join(differing)}: build it again")
    if str(target) not in manifest["targets"]:
        held = ", ".join(manifest["targets"])
        raise PackError(f"{folder} holds kernels for {held}, not for {target}")
    entries, binaries = {}, {}
    for row in manifest["targets"][str(target)]:
        entry = Entry(**{**row, "report": Compiled(**row["report"])})
        entries[entry.specialisation] = entry
        binaries[entry.specialisation] = _read_binary(folder, entry)
    return Pack(str(target), entries, binaries)


def _read_manifest(folder: Path) -> dict[str, Any]:
    path = folder / MANIFEST
    try:
        manifest = json.loads(path.read_text())
        stated = manifest.pop("sha256")
    except FileNotFoundError:
        raise PackError(f"{folder} is no pack: it has no {MANIFEST}") from None
    except (OSError, ValueError, KeyError, AttributeError, TypeError) as error:
        raise PackError(f"{path} is corrupt: {error!r}") from error
    if stated != _digest(manifest):
        raise PackError(f"{path} is corrupt: its checksum is not that of its content")
    return manifest


def _read_binary(folder: Path, entry: Entry) -> bytes:
    path = folder / entry.file
    try:
        content = path.read_bytes()
    except OSError as error:
        raise PackError(f"{path} cannot be read: {error}") from error
    if hashlib.sha256(content).hexdigest() != entry.sha256:
        raise PackError(f"{path} is corrupt: its checksum is not the manifest's")
    return content


def _digest(body: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()
