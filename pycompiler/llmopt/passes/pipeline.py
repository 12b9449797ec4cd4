"""The passes in order. Any but `verify` can be left out by name (LLMOPT_DISABLE) to find the one that breaks a model."""

from __future__ import annotations

from collections.abc import Callable, Collection

from torch import fx

from llmopt.passes import (
    activations,
    assignments,
    attentions,
    convolutions,
    einsums,
    embeddings,
    experts,
    functionalize,
    fuse_linear,
    fuse_pointwise,
    kv_cache,
    layouts,
    linears,
    masks,
    norms,
    products,
    repeats,
    rotary,
    rotary_tables,
    routers,
    share,
    shifts,
    simplify,
    sliding_caches,
    torch_layers,
)

Pass = Callable[[fx.Graph], None]

PIPELINE: tuple[tuple[str, Pass], ...] = (
    ("functionalize", functionalize.run),
    ("assignments", assignments.run),
    ("torch_layers", torch_layers.run),
    ("einsums", einsums.run),
    ("simplify", simplify.run),
    ("masks", masks.run),
    ("sliding_caches", sliding_caches.run),
    ("convolutions", convolutions.run),
    ("shifts", shifts.run),
    ("norms", norms.run),
    ("rotary", rotary.run),
    ("rotary_tables", rotary_tables.run),
    ("attentions", attentions.run),
    ("kv_cache", kv_cache.run),
    ("activations", activations.run),
    ("linears", linears.run),
    ("routers", routers.run),
    ("experts", experts.run),
    ("products", products.run),
    ("repeats", repeats.run),
    ("embeddings", embeddings.run),
    ("simplify_again", simplify.run),
    ("share", share.run),
    ("fuse_linear", fuse_linear.run),
    ("fuse_pointwise", fuse_pointwise.run),
    ("layouts", layouts.run),
)

QUANTIZE = "quantize"  # the last one, which needs to know the schemes
NAMES = (*(name for name, _ in PIPELINE), QUANTIZE)
GUARDS = "guards"  # no pass, but can be left out like one: see llmopt.guards


def passes(quantise: Pass, disabled: Collection[str]) -> list[tuple[str, Pass]]:
    """The passes of one compilation. quantise: the last one, which knows what was asked for.

    Raises ValueError when `disabled` names a pass that does not exist.
    """
    possible = (*NAMES, GUARDS)
    unknown = sorted(set(disabled) - set(possible))
    if unknown:
        raise ValueError(f"LLMOPT_DISABLE={','.join(unknown)}: possible: {', '.join(possible)}")
    every = (*PIPELINE, (QUANTIZE, quantise))
    return [(name, run) for name, run in every if name not in disabled]
