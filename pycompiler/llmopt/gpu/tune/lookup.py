"""What a GPU plan asks the tuner for every launch: kernel, tile, and where they come from.

tuned: measured on this GPU, for the kernel as it is. borrowed: measured on a GPU like it, or for a shape near to this one. predicted:
what the model says about this GPU. default: the kernel's own, with the reason. A tile that is impossible here is none of them.
"""

from __future__ import annotations

import dataclasses
import functools
import importlib.resources
import json
import logging
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from llmopt import settings
from llmopt.gpu.device import gpu_of, target_of
from llmopt.gpu.tune.environment import gpu_environment, is_alike, predicted_environment
from llmopt.gpu.tune.problems import (
    OPS,
    Asked,
    bucketed,
    facts,
    is_empty,
    shape,
    source_of,
    tile_of,
)  # fmt: skip
from llmopt.gpus import Part, part_of
from llmopt.launch import Problem, Tile
from llmopt.registry import Chooser, Chosen, Kernel, by_default, possible, refuse
from llmopt.target import GPUS
from llmopt.tune.database import Database, Entry, Unusable, environments, key_of
from llmopt.tune.environment import Environment
from llmopt.tune.exchange import entries_of
from llmopt.tune.lookup import distance
from llmopt.tune.recording import Recorder
from llmopt.tune.search import WIN
from llmopt.types import Target

FOLDER = "tuned"  # of llmopt.kernels, with a file per GPU
_NEAR = 1.0  # factors of two, over all sizes together, within which a shape may borrow
_SIZES = ("m", "n", "k", "batch", "q_len", "kv_len")
_AROUND = (
    "dtype",
    "act",
    "norm",
    "offsets",
    "plain",
)  # hardly change which tile is best: 16-bit types are alike
_OFF = "default: LLMOPT_TUNE=0"
Measure = Callable[[Kernel, Any], tuple[Entry, bool]]  # the bool: worth keeping

log = logging.getLogger("llmopt")

_asked = Recorder[Asked]()
recording = _asked.recording  # problems of GPU plans made within it, in their buckets


def chooser_for(target: Target, mode: str, on: torch.device | None = None) -> Chooser:
    """What GPU plans of a mode ask; max-autotune measures on the GPU that the model is on, else on the target's."""
    if not settings.tuning():
        return lambda op, p, t: dataclasses.replace(by_default(op, p, t), source=_OFF)
    here = local(target, on)
    if here is None:
        return Lookup(target, None)
    device, found = here
    known, measure = database(found, device), None
    if mode.startswith("max-autotune"):
        from llmopt.gpu.tune.tuning import Tuning

        measure = Tuning(found, device).measure
    return Lookup(found, known, measure)


def local(target: Target, on: torch.device | None = None) -> tuple[torch.device, Target] | None:
    """The GPU of this process that a target is for, and the target that has its own sizes; None where it is not here.

    on: no other than this one. A generation is any GPU of it; a target with a GPU's name is that GPU.
    """
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    every = [torch.device("cuda", number) for number in range(count)]
    for device in every if on is None else [on]:
        gpu = gpu_of(device)
        found = None if gpu is None else target_of(gpu)[0]
        if found is None or found.tier != target.tier:
            continue
        names = {found.name, *((p.name,) if (p := part_of(found)) is not None else ())}
        if target in GPUS or target.name in names:
            return device, found
    return None


def database(target: Target, device: torch.device) -> Database:
    """The measurements of a GPU of this machine."""
    return Database(settings.cache_dir() / "tune", gpu_environment(target, device))


def predictions(part: Part) -> Database:
    """What a user let the model predict for a GPU; what the package brings is in `shipped`."""
    return Database(settings.cache_dir() / "tune", predicted_environment(part))


def shipped(wanted: Callable[[Environment], bool]) -> tuple[dict[Environment, list[Entry]], str]:
    """What the package brings for the environments that are wanted, and what is wrong with its files, or ""."""
    folder = importlib.resources.files("llmopt.kernels") / FOLDER
    found: dict[Environment, list[Entry]] = {}
    wrong = []
    paths = (p for p in folder.iterdir() if p.name.endswith(".json")) if folder.is_dir() else ()
    for path in sorted(paths, key=lambda p: p.name):
        read, reason = _read(path, wanted)
        wrong += [reason] if reason else []
        for environment, entries in read:
            found.setdefault(environment, []).extend(entries)
    return found, "; ".join(wrong)


def _read(
    path: Any, wanted: Callable[[Environment], bool]
) -> tuple[list[tuple[Environment, list[Entry]]], str]:
    try:
        return entries_of(json.loads(path.read_text()), wanted), ""
    except (Unusable, ValueError, OSError) as error:
        return [], f"{path.name} cannot be used: {error}"


@dataclass(frozen=True)
class _Answer:
    """What is known about a kernel at a bucket."""

    config: Mapping[str, str | int]  # the fields of its tile; none for the default
    source: str
    us: float = 0.0  # as measured here


class Lookup:
    """Answers for launches on one target; with `measure`, what nobody measured is measured and kept."""

    def __init__(
        self, target: Target, known: Database | None, measure: Measure | None = None
    ) -> None:
        """known: the measurements of the target's GPU, None where it is not here."""
        self._target, self._known, self._measure = target, known, measure
        self._part = part_of(target)
        self._answers: dict[tuple[str, Any], _Answer] = {}
        self._predicts = None if self._part is None else predicted_environment(self._part)

    @functools.cached_property
    def _package(self) -> tuple[dict[Environment, list[Entry]], str]:
        """What the package brings that may be used here."""
        return shipped(
            lambda environment: environment == self._predicts or self._lends(environment)
        )

    @functools.cached_property
    def _predictions(self) -> tuple[dict[str, Entry], str]:
        """What is predicted for this GPU by key, and what is wrong with the package's files, or ""."""
        found, wrong = self._package
        if self._part is None or self._predicts is None:
            return {}, wrong
        entries = [*found.get(self._predicts, ()), *predictions(self._part).entries()]
        return {entry.key: entry for entry in entries}, wrong  # the user's own last

    def _lends(self, other: Environment) -> bool:
        """True for environments of this GPU and of GPUs like it."""
        ours = None if self._known is None else self._known.environment
        return ours is not None and (other == ours or is_alike(ours, other))

    def __call__(self, op: str, problem: Problem, target: Target) -> Chosen:
        """As registry.by_default, by what is known."""
        able = possible(op, problem, target)
        at = bucketed(problem) if op in OPS else None
        if at is None or is_empty(problem):
            return Chosen(able[0], able[0].configs(problem, target)[0], "")
        _asked.note(Asked(op, at))
        best, us = self._for_kernel(able[0], problem, at, is_first=True)
        # Another kernel than the first takes over only where both were measured here, and by as much as a tile has to.
        for kernel in able[1:] if us else ():
            other, theirs = self._for_kernel(kernel, problem, at, is_first=False)
            if 0 < theirs * WIN < us:
                best, us = other, theirs
        return best

    def entry(self, kernel: Kernel, problem: Any) -> tuple[Entry | None, str]:
        """What was measured here for a kernel at a bucket, if it can be used, or the reason why not."""
        source = source_of(kernel)
        if self._known is None:
            return None, f"no GPU of {self._target} is here, to measure on"
        if not source:
            return None, "kernels are interpreted in this process, which is not timed"
        entry, reason = self._known.get(key_of(facts(kernel, problem, source)))
        if entry is not None:
            reason = self._refuse(kernel, entry, problem)
        return (None, reason) if reason else (entry, "")

    def keep(self, entry: Entry, conclusive: bool) -> Entry:
        """Puts a measurement into the database; one that had no time to compare only for this process."""
        assert self._known is not None
        if conclusive:
            self._known.put(entry)
        else:
            self._known.remember(entry)
        return entry

    def _for_kernel(
        self, kernel: Kernel, problem: Problem, at: Any, is_first: bool
    ) -> tuple[Chosen, float]:
        """What a kernel runs a problem with, and the microseconds measured here, 0 where nobody did."""
        default = kernel.configs(problem, self._target)[0]
        key = (kernel.name, at)
        if key not in self._answers:
            self._answers[key] = self._find(kernel, at, is_first)
        answer = self._answers[key]
        if not answer.config:
            return Chosen(kernel, default, answer.source), answer.us
        # The tile of a bucket's largest size must be possible for this one, too.
        tile, reason = self._tile(kernel, answer.config, problem)
        if tile is None:
            source = f"default: the tile of {shape(at)} is impossible here: {reason}"
            return Chosen(kernel, default, source), 0.0
        return Chosen(kernel, tile, answer.source), answer.us

    def _find(self, kernel: Kernel, at: Any, is_first: bool) -> _Answer:
        if reason := kernel.reject(at, self._target):
            return _Answer({}, f"default: {shape(at)} stands for it, where this kernel has {reason}")  # fmt: skip
        entry, reason = self.entry(kernel, at)
        if entry is None and self._measure is not None and not _is_capturing():
            entry, reason = self._measured_now(self._measure, kernel, at, is_first)
        if entry is not None:
            return _measured(entry)
        for look in (self._borrowed, self._predicted):
            answer, why = look(kernel, at)
            if answer is not None:
                return answer
            reason += f"; {why}" if why else ""
        return _Answer({}, f"default: {reason}")

    def _measured_now(
        self, measure: Measure, kernel: Kernel, at: Any, is_first: bool
    ) -> tuple[Entry | None, str]:
        """A measurement, or why there is none. What the first kernel raises, the call would: it is the user's to see."""
        try:
            found = measure(kernel, at)
        except torch.OutOfMemoryError:  # the model's memory comes first
            return None, "the GPU has no memory left to measure in"
        except Exception as error:  # compilers and drivers raise what they like
            if is_first:
                raise
            first_line = f"{type(error).__name__}: {error}".splitlines()[0]
            log.warning("%s cannot be measured at %s: %s", kernel.name, shape(at), first_line)
            return None, f"it cannot be measured: {first_line}"
        return self.keep(*found), ""

    def _borrowed(self, kernel: Kernel, at: Any) -> tuple[_Answer | None, str]:
        """What a GPU like this one measured, or what this one did for a near shape."""
        source = source_of(kernel)
        if self._known is None or not source:
            return None, ""
        wanted = facts(kernel, at, source)
        for other, entry in self._lent(key_of(wanted)):
            if not self._refuse(kernel, entry, at):
                differs = self._known.environment.difference(other) or "the same in every fact"
                return _Answer(entry.config, f"borrowed from a GPU like it: {differs}"), ""
        near = self._nearest(kernel, at, wanted, self._known.entries())
        return (None, "") if near is None else (_Answer(near.config, f"borrowed from {_sizes(near)}"), "")  # fmt: skip

    def _lent(self, key: str) -> Iterator[tuple[Environment, Entry]]:
        """Measurements of a problem by GPUs like this one: on this machine, then those of the package."""
        assert self._known is not None
        for other, _ in environments(self._known.root):
            if other != self._known.environment and self._lends(other):
                entry, _ = Database(self._known.root, other).get(key)
                yield from () if entry is None else ((other, entry),)
        for other, entries in self._package[0].items():
            if other != self._predicts:
                yield from ((other, entry) for entry in entries if entry.key == key)

    def _predicted(self, kernel: Kernel, at: Any) -> tuple[_Answer | None, str]:
        if self._part is None:
            return None, f"nothing is predicted for {self._target.name}"
        wanted = facts(kernel, at)
        known, wrong = self._predictions
        exact = known.get(key_of(wanted))
        if exact is not None:
            wrong = self._refuse(kernel, exact, at)
            if not wrong:
                return _Answer(exact.config, f"predicted: {exact.reason}"), ""
        near = self._nearest(kernel, at, wanted, list(known.values()))
        if near is not None:
            return _Answer(near.config, f"predicted for {_sizes(near)}: {near.reason}"), ""
        return None, wrong or f"nothing is predicted for this shape on {self._part.name}"

    def _nearest(
        self, kernel: Kernel, at: Any, wanted: dict[str, str | int], entries: list[Entry]
    ) -> Entry | None:
        near = [(distance(wanted, e.problem, _SIZES, _AROUND), e) for e in entries]
        for far, entry in sorted(near, key=lambda pair: (pair[0], pair[1].key)):
            if far > _NEAR:
                return None
            if not self._refuse(kernel, entry, at):
                return entry
        return None

    def _refuse(self, kernel: Kernel, entry: Entry, problem: Any) -> str:
        """Why a tile of the database cannot be used for a problem, or ""."""
        if not entry.config:
            return ""
        reason = self._tile(kernel, entry.config, problem)[1]
        return reason and f"its tile is impossible: {reason}"

    def _tile(
        self, kernel: Kernel, config: Mapping[str, Any], problem: Any
    ) -> tuple[Tile | None, str]:
        """The tile of these fields, or None and why a problem cannot run with it here."""
        try:
            tile = tile_of(kernel, config, problem, self._target)
            reason = refuse(kernel, tile, problem, self._target)
        except ValueError as error:
            return None, str(error)
        return (None, reason) if reason else (tile, "")


def _measured(entry: Entry) -> _Answer:
    if not entry.config:
        return _Answer({}, f"default: measured, and {entry.reason}", entry.us)
    source = f"tuned: {entry.us:.1f} us, the default {entry.default_us:.1f} us ({entry.reason})"
    return _Answer(entry.config, source, entry.us)


def _is_capturing() -> bool:
    """Nothing may be timed while a CUDA graph is recorded."""
    return torch.cuda.is_available() and torch.cuda.is_current_stream_capturing()


def _sizes(entry: Entry) -> str:
    return "x".join(str(entry.problem[name]) for name in _SIZES if name in entry.problem)
