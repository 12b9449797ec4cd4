"""Predicted tiles: the seeds of a kernel, compiled for a GPU that nobody has here, ranked by the model, with its reasons.

kernels/tuned/ holds what this gives for `standard_problems`; `llmopt tune --predict` makes such files. No time in them was measured.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from llmopt.gpu.linears import FUSED_NORM_ROWS
from llmopt.gpu.tune.candidates import Candidate, inspect, seeds
from llmopt.gpu.tune.cost import roof
from llmopt.gpu.tune.environment import predicted_environment
from llmopt.gpu.tune.problems import Asked, facts, is_empty, words
from llmopt.gpus import Part
from llmopt.launch import AttentionProblem, LinearProblem
from llmopt.quant.schemes import SCHEMES
from llmopt.registry import Kernel, possible
from llmopt.tune.database import Entry
from llmopt.tune.exchange import write_file
from llmopt.tune.lookup import BUCKETS

# By how much the model must prefer a tile to the default, by rows: as far as it was off in its blind test (see cost.py).
_DOUBT = ((16, 1.05), (32, 1.1), (None, 1.55))
_SHOWN = 3  # tiles whose times an entry names
# (outputs, inputs, gated, what is fused) of the linears of an 8-billion Llama and of BERT-base.
_LLAMA = (
    (6144, 4096, False, True, "none"),
    (4096, 4096, False, False, "none"),
    (14336, 4096, True, True, "silu"),
    (4096, 14336, False, False, "none"),
)
_BERT = (
    (2304, 768, False, False, "none"),
    (768, 768, False, False, "none"),
    (3072, 768, False, False, "gelu_erf"),
    (768, 3072, False, False, "none"),
)
_HEAD = (128256, 4096)  # of a Llama's vocabulary, for the last token
# scheme, group, heights: weights of four bits are for few rows, where their bytes are the limit
_SCHEMES = (("f16", 0, BUCKETS), ("w4a16", 32, BUCKETS[:5]), ("w8a8", 64, BUCKETS))
Inspect = Callable[..., tuple[Candidate | None, str]]


def standard_problems() -> Iterator[Asked]:
    """What Llama-like and BERT-like models ask for, at every height that is measured."""
    yield Asked("linear", LinearProblem(1, *_HEAD, "fp16"))
    for kv_len in (128, 512, 1024, 4096, 16384):
        yield Asked(
            "attention", AttentionProblem(1, 32, 8, 1, kv_len, 128, 128, "fp16", "fp16", True)
        )
    for length in (128, 512, 1024, 2048, 4096):
        yield Asked(
            "attention", AttentionProblem(1, 32, 8, length, length, 128, 128, "fp16", "fp16", True)
        )
    for batch, length in ((1, 128), (1, 512), (8, 128), (8, 512)):
        yield Asked(
            "attention", AttentionProblem(batch, 12, 12, length, length, 64, 64, "fp16", "fp16")
        )
    for scheme, group, heights in _SCHEMES:
        op = "linear" if scheme == "f16" else "linear_quantized"
        for n, k, gated, has_norm, act in (*_LLAMA, *_BERT):
            for m in heights:
                fused = has_norm and m <= FUSED_NORM_ROWS and scheme != "w8a8"
                norm = "rms" if fused else "none"
                offsets = scheme in SCHEMES and not SCHEMES[scheme].symmetric
                yield Asked(
                    op, LinearProblem(m, n, k, "fp16", scheme, group, act, gated, norm, offsets)
                )


def predict_all(
    asked: Sequence[Asked], part: Part, said: Callable[[str], None] = lambda _: None
) -> tuple[list[Entry], list[str]]:
    """(what the model says about the first tuned kernel of every problem, why it says nothing about others)."""
    entries, left_out = [], []
    for a in asked:
        if is_empty(a.problem):
            continue
        try:
            kernel = first_tuned(a, part)
        except ValueError as error:
            left_out.append(str(error))
            continue
        said(f"{kernel.name} {a.problem}")
        entry, reason = predicted(kernel, a.problem, part)
        if entry is None:
            left_out.append(f"{kernel.name} {a.problem}: {reason}")
        else:
            entries.append(entry)
    return entries, left_out


def first_tuned(asked: Asked, part: Part) -> Kernel:
    """The first kernel of a problem that has tiles to choose from; raises ValueError when none can do it."""
    able = possible(asked.op, asked.problem, part.target)
    found = next((kernel for kernel in able if kernel.function is not None), None)
    if found is None:
        raise ValueError(f"the tiles of {able[0].name} are not tuned")
    return found


def predicted(
    kernel: Kernel, problem: Any, part: Part, look: Inspect = inspect
) -> tuple[Entry | None, str]:
    """What the model says about a problem, or None and why it says nothing.

    look: compiles a tile and predicts its time, as candidates.inspect.
    """
    tiles = seeds(kernel, problem, part.target)
    found = [look(kernel, problem, tile, part, part.target) for tile in tiles]
    usable = sorted((c for c, _ in found if c is not None), key=_order)
    if not usable:
        return None, f"no seed can be used: {found[0][1]}"
    best = usable[0]
    default = found[0][0] or best
    spoilt = f"; the default {words(tiles[0])} cannot be used: {found[0][1]}" if found[0][1] else ""
    gain = default.prediction.seconds / best.prediction.seconds
    chosen = best if gain >= _doubt(problem) else default
    entry = Entry(
        facts(kernel, problem),
        {} if chosen.tile == tiles[0] else dataclasses.asdict(chosen.tile),
        _us(chosen),
        _us(default),
        round(roof(problem, part, chosen.prediction.seconds), 3),
        _reason(chosen, default, best, len(tiles) - len(usable)) + spoilt,
        {words(c.tile): _us(c) for c in usable[:_SHOWN]},
    )
    return entry, ""


def write(path: Path, part: Part, entries: Sequence[Entry]) -> None:
    """A file of predictions for a GPU, as kernels/tuned/ holds them."""
    write_file(path, {predicted_environment(part): sorted(entries, key=lambda e: e.key)})


def _reason(chosen: Candidate, default: Candidate, best: Candidate, left_out: int) -> str:
    what = f"{chosen.prediction}, {chosen.resources.registers} registers, {chosen.resources.shared} B shared"
    if chosen is not default:
        what += f"; the default {words(default.tile)} {_us(default)} us"
    elif best is not default:
        what += (
            f"; the default stays, {words(best.tile)} at {_us(best)} us is within the model's doubt"
        )
    return what + (f"; {left_out} seeds do not fit" if left_out else "")


def _order(candidate: Candidate) -> tuple[float, str]:
    return candidate.prediction.seconds, words(candidate.tile)


def _us(candidate: Candidate) -> float:
    return round(candidate.prediction.seconds * 1e6, 1)


def _doubt(problem: Any) -> float:
    rows = problem.m if isinstance(problem, LinearProblem) else problem.q_len
    return next(doubt for most, doubt in _DOUBT if most is None or rows <= most)
