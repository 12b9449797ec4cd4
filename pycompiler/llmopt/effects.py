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
        "uniform",
        "_sample_dirichlet",
        "_standard_gamma",
    ]
)
# Where `training` says so: its place among the arguments.
_DRAWS_IN_TRAINING = {
    "alpha_dropout": 2,
    "dropout": 2,
    "dropout1d": 2,
    "dropout2d": 2,
    "dropout3d": 2,
    "feature_alpha_dropout": 2,
    "feature_dropout": 2,
    "multi_head_attention_forward": 11,
    "rrelu": 3,
}


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
    if name == "scaled_dot_product_attention":
        return argument(node, 4, "dropout_p", 0.0) != 0.0
    if name in _DRAWS_IN_TRAINING:
        return argument(node, _DRAWS_IN_TRAINING[name], "training", True) is not False
    return name in _DRAWS or "." in name
