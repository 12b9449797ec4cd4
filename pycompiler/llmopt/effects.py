"""Operations whose order counts though no value says so: they draw random numbers, or do what only their author knows."""

from __future__ import annotations

import torch
from torch import fx

from llmopt.graph import argument, kind

_DRAWS = frozenset(
    [
        "bernoulli",
        "binomial",
        "cauchy",
        "exponential",
        "fractional_max_pool2d",
        "fractional_max_pool3d",
        "geometric",
        "gru",
        "gumbel_softmax",
        "log_normal",
        "lstm",
        "multinomial",
        "native_dropout",
        "normal",
        "pca_lowrank",
        "poisson",
        "rand",
        "rand_like",
        "randint",
        "randint_like",
        "randn",
        "randn_like",
        "randperm",
        "random",
        "rnn_relu",
        "rnn_tanh",
        "rrelu_with_noise",
        "svd_lowrank",
        "uniform",
        "_sample_dirichlet",
        "_standard_gamma",
    ]
)
DROPOUTS = (
    "alpha_dropout",
    "dropout",
    "dropout1d",
    "dropout2d",
    "dropout3d",
    "feature_alpha_dropout",
    "feature_dropout",
)
# Where `training`, or `train`, says so: its place among the arguments.
DRAWS_IN_TRAINING = {
    **dict.fromkeys(DROPOUTS, 2),
    "multi_head_attention_forward": 13,
    "rrelu": 3,
}
_ATTENTION = ("scaled_dot_product_attention", "_scaled_dot_product_attention_math")


def is_idle_dropout(node: fx.Node) -> bool:
    """Whether it is a dropout that gives its argument back: not a copy, the same tensor."""
    if node.op not in ("call_function", "call_method") or kind(node).rstrip("_") not in DROPOUTS:
        return False
    return not _trains(node) or argument(node, 1, "p", 0.5) == 0.0


def _trains(node: fx.Node) -> bool:
    """What a function that draws in training is told; where nothing is, that it trains."""
    default = node.kwargs.get("train", True)
    place = DRAWS_IN_TRAINING[kind(node).removesuffix(".out").rstrip("_")]
    return argument(node, place, "training", default) is not False


def has_place(node: fx.Node) -> bool:
    """Whether it must stay behind those in front of it that have a place too.

    What PyTorch does not know is taken to: functions and operators of others, and operators that run a graph.
    """
    if isinstance(node.target, torch._ops.HigherOrderOperator) or node.op == "call_module":
        return True
    name = kind(node)
    if name.startswith("llmopt."):
        return False
    name = name.removesuffix(".out").rstrip("_")
    if name in _ATTENTION:
        return argument(node, 4, "dropout_p", 0.0) != 0.0
    if name in DRAWS_IN_TRAINING:
        return _trains(node)
    return name in _DRAWS or "." in name
