"""The passes in order. Any but `verify` can be left out by name (LLMOPT_DISABLE) to find the one that breaks a model."""

from __future__ import annotations

from collections.abc import Callable

from torch import fx

from llmopt.passes import (
    activations,
    attentions,
    embeddings,
    fuse_linear,
    fuse_pointwise,
    kv_cache,
    layouts,
    linears,
    norms,
    rotary,
    share,
    simplify,
)

PIPELINE: tuple[tuple[str, Callable[[fx.Graph], None]], ...] = (
    ("simplify", simplify.run),
    ("norms", norms.run),
    ("rotary", rotary.run),
    ("attentions", attentions.run),
    ("kv_cache", kv_cache.run),
    ("activations", activations.run),
    ("linears", linears.run),
    ("embeddings", embeddings.run),
    ("simplify_again", simplify.run),
    ("share", share.run),
    ("fuse_linear", fuse_linear.run),
    ("fuse_pointwise", fuse_pointwise.run),
    ("layouts", layouts.run),
)

NAMES = tuple(name for name, _ in PIPELINE)
