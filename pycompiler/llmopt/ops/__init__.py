"""The ops: what a transformer is made of, each in one file with its reference in plain PyTorch.

A fused graph calls these functions. Each runs eagerly as it is (that is its reference, and what happens when no kernel takes the
problem); its attribute `fake` gives shape, dtype and layout of the result from example values. Ops never mention kernels.
"""

from llmopt.ops.attention import attention, attention_append, attention_append_arrays
from llmopt.ops.embedding import embedding
from llmopt.ops.experts import combine_experts, gather_tokens, limit_groups, sort_by_expert
from llmopt.ops.grouped_linear import grouped_linear
from llmopt.ops.linear import linear
from llmopt.ops.linear_quantized import dequantize, linear_quantized
from llmopt.ops.matmul import matmul
from llmopt.ops.norm import norm
from llmopt.ops.pointwise import pointwise
from llmopt.ops.rope import rope
from llmopt.ops.rotary_table import rotary_table
from llmopt.ops.slide import slide_

ALL = (
    attention,
    attention_append,
    attention_append_arrays,
    combine_experts,
    dequantize,
    embedding,
    gather_tokens,
    grouped_linear,
    limit_groups,
    linear,
    linear_quantized,
    matmul,
    norm,
    pointwise,
    rope,
    rotary_table,
    slide_,
    sort_by_expert,
)

__all__ = [
    "ALL",
    "attention",
    "attention_append",
    "attention_append_arrays",
    "combine_experts",
    "dequantize",
    "embedding",
    "gather_tokens",
    "grouped_linear",
    "limit_groups",
    "linear",
    "linear_quantized",
    "matmul",
    "norm",
    "pointwise",
    "rope",
    "rotary_table",
    "slide_",
    "sort_by_expert",
]
