"""Comparing what two runs of one model return: whole outputs, and generations step by step."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from transformers.cache_utils import Cache, EncoderDecoderCache

from tests.tolerance import BOUNDS, assert_close


def assert_same_output(got: Any, want: Any, where: str = "output") -> None:
    """Same structure, same dtypes, values within the tolerance of the dtype; caches by what they hold."""
    if isinstance(want, torch.Tensor):
        assert got.dtype == want.dtype, f"{where}: {got.dtype} instead of {want.dtype}"
        try:
            assert_close(got, want)
        except AssertionError as error:
            raise AssertionError(f"{where}: {error}") from None
        return
    want, got = _parts(want), _parts(got)
    if isinstance(want, Mapping):
        assert list(got) == list(want), f"{where}: {list(got)} instead of {list(want)}"
        for key in want:
            assert_same_output(got[key], want[key], f"{where}.{key}")
    elif isinstance(want, (list, tuple)):
        assert len(got) == len(want), f"{where}: {len(got)} parts instead of {len(want)}"
        for i, pair in enumerate(zip(got, want, strict=True)):
            assert_same_output(*pair, f"{where}[{i}]")
    else:
        assert got == want, f"{where}: {got} instead of {want}"


def _parts(value: Any) -> Any:
    """A cache as its tensors: a static one holds zeros or leftovers past its length, so only the lengths' worth."""
    if isinstance(value, EncoderDecoderCache):
        return {
            "self": _parts(value.self_attention_cache),
            "cross": _parts(value.cross_attention_cache),
        }
    if isinstance(value, Cache):
        return [
            {k: v for k, v in vars(layer).items() if k in ("keys", "values")}
            for layer in value.layers
        ]
    return value


def assert_same_generation(got: Any, want: Any) -> None:
    """Two `generate(return_dict_in_generate=True, output_logits=True)` results of one prompt.

    Logits must agree at every step. A row may leave the other run's path only where the reference itself
    hardly prefers its token; what follows in that row is another text and is not compared.
    """
    tokens, reference = got.sequences, want.sequences
    steps = len(want.logits)
    assert len(got.logits) == steps, f"{len(got.logits)} steps instead of {steps}"
    alive = torch.ones(tokens.shape[0], dtype=torch.bool)
    for step in range(steps):
        assert_close(
            got.logits[step][alive], want.logits[step][alive].double(), want.logits[step].dtype
        )
        column = reference.shape[1] - steps + step
        same = tokens[:, column] == reference[:, column]
        for i in torch.nonzero(alive & ~same).flatten().tolist():
            assert_near_tie(want.logits[step][i], tokens[i, column], reference[i, column])
        alive &= same
    assert alive.any(), "every row left the reference's path: nothing to compare"


def assert_near_tie(logits: torch.Tensor, chosen: torch.Tensor, best: torch.Tensor) -> None:
    """The reference prefers its own token by less than the tolerance of the dtype."""
    gap = (logits[best] - logits[chosen]).item()
    allowed = BOUNDS[logits.dtype][0] * logits.float().abs().max().item()
    assert gap < allowed, f"token {chosen} instead of {best}, preferred by {gap:.3g}"
