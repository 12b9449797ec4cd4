"""Packs: all kernels of a model's plans as binaries for some GPU generations, made and checked where there is no GPU.

pack/manifest.json        versions, and per kernel: what it is a binary of, checksums, resources, instructions
pack/<target>/<key>.cubin or .hsaco, and <key>.json: what triton keeps beside a binary
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

from llmopt.gpu import device as gpu_device
from llmopt.gpu.compile import Compiled, binary, report, unique
from llmopt.launch import Launch
from llmopt.types import Target

FORMAT = 2
MANIFEST = "manifest.json"
_BINARY = {"cuda": "cubin", "hip": "hsaco"}


class PackError(ValueError):
    """A pack that cannot be made or used; the message says why."""


@dataclass(frozen=True)
class Entry:
    """One kernel of a pack."""

    file: str
    sha256: str
    metadata: str  # file beside it
    metadata_sha256: str
    key: str  # under which triton asks its cache for it
    specialisation: str  # what it is a binary of, see compile.specialisation
    launches: int  # of the plans, that use it
    symbol: str  # the function's name in the binary
    report: Compiled


@dataclass(frozen=True)
class Pack:
    """The kernels of one target, by specialisation, with their bytes."""

    folder: Path
    target: str
    entries: Mapping[str, Entry]
    binaries: Mapping[str, bytes]
    used: set[str] = field(default_factory=set)  # keys of entries that were launched from it


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
        beside = path.with_suffix(".json")
        beside.write_bytes(_metadata(kernel))
        entry = Entry(
            file=str(path.relative_to(folder)),
            sha256=_sha256(path),
            metadata=str(beside.relative_to(folder)),
            metadata_sha256=_sha256(beside),
            key=kernel.hash,
            specialisation=text,
            launches=uses[text],
            symbol=kernel.metadata.name,
            report=found,
        )
        entries.append(asdict(entry))
    return entries


def _metadata(kernel: Any) -> bytes:
    name = next(n for n in kernel.metadata_group if n.endswith(".json"))
    return Path(kernel.metadata_group[name]).read_bytes()


def _sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


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
        binaries[entry.specialisation] = _read(folder / entry.file, entry.sha256)
        _read(folder / entry.metadata, entry.metadata_sha256)
    return Pack(folder, str(target), entries, binaries)


def use(folder: str | Path) -> Pack:
    """Makes triton take a pack's kernels, for as long as this process lives, before it compiles any; all others it compiles as ever.

    Raises PackError where the pack does not fit the current GPU, for the reasons of `load`, or where there is no GPU.
    """
    if not torch.cuda.is_available():
        raise PackError(
            f"{folder} cannot be used: this process has no GPU; `load` checks a pack without one"
        )
    gpu = gpu_device.gpu_of(torch.device("cuda", torch.cuda.current_device()))
    assert gpu is not None
    target, reason = gpu_device.target_of(gpu)
    if target is None:
        raise PackError(f"{folder} cannot be used: {reason}")
    assert target.gpu is not None
    if target.gpu.arch != gpu.arch:
        raise PackError(
            f"{folder} cannot be used: triton compiles for {gpu} itself, and packs hold {target.tier}"
        )
    pack = load(Path(folder), target)
    _install(pack)
    return pack


def _install(pack: Pack) -> None:
    """Puts a pack in front of triton's cache on disk, which triton asks by key before it compiles."""
    from triton import knobs
    from triton.runtime.cache import FileCacheManager, _base32

    behind: Any = knobs.cache.manager_class or FileCacheManager
    entries = {_base32(entry.key): entry for entry in pack.entries.values()}

    class CacheManager(behind):
        def __init__(self, key: str, *given: Any, **more: Any) -> None:
            super().__init__(key, *given, **more)
            self._entry = entries.get(key)

        def get_group(self, filename: str) -> dict[str, str] | None:
            entry = self._entry
            if entry is None:
                return super().get_group(filename)
            files = {filename: (entry.metadata, entry.metadata_sha256)}
            files[entry.file] = (entry.file, entry.sha256)
            for file, digest in files.values():
                _read(pack.folder / file, digest)
            pack.used.add(entry.key)
            return {name: str(pack.folder / file) for name, (file, _) in files.items()}

    knobs.cache.manager_class = CacheManager


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


def _read(path: Path, digest: str) -> bytes:
    try:
        content = path.read_bytes()
    except OSError as error:
        raise PackError(f"{path} cannot be read: {error}") from error
    if hashlib.sha256(content).hexdigest() != digest:
        raise PackError(f"{path} is corrupt: its checksum is not the manifest's")
    return content


def _digest(body: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()
