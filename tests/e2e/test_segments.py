"""What crosses from one native segment to the next, and into PyTorch between them, keeps its values and its layout."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from llmopt.compiled import alive
from torch import nn
from torch.nn import functional as F
from transformers import (
    DeepseekV3Config,
    DeepseekV3ForCausalLM,
    DynamicCache,
    LlamaConfig,
    LlamaForCausalLM,
)

from tests.tolerance import assert_close


@torch.no_grad()
def check(function: Callable[..., torch.Tensor], *inputs: torch.Tensor, segments: int) -> None:
    """The compiled function gives what eager gives, in that many native segments."""
    torch._dynamo.reset()
    known = {id(g) for g in alive()}
    assert_close(torch.compile(function, backend="llmopt")(*inputs), function(*inputs))
    (plan,) = [g.plan for g in alive() if id(g) not in known]
    assert plan is not None
    assert len(plan.segments) == segments, str(plan)


def randn(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape)))


def test_a_transposed_result_is_read_by_a_later_segment() -> None:
    """Attention writes [B,S,H,D]; its value [B,H,S,D] is not contiguous, and must not be made so on the way."""
    linear = nn.Linear(32, 32)

    def function(x: torch.Tensor) -> torch.Tensor:
        h = linear(x).unflatten(-1, (4, 8)).transpose(1, 2)
        first = F.scaled_dot_product_attention(h, h, h)
        between = first.transpose(1, 2).flatten(2).cumsum(1).unflatten(-1, (4, 8)).transpose(1, 2)
        second = F.scaled_dot_product_attention(first, between, between)
        return linear(second.transpose(1, 2).flatten(2))

    check(function, randn(2, 5, 32), segments=2)


def test_heads_are_normed_where_they_lie() -> None:
    """RMSNorm and LayerNorm over the last dimension of heads cut out of one projection."""
    qkv, out = nn.Linear(48, 96), nn.Linear(64, 48)
    q_norm, k_norm = nn.RMSNorm(16), nn.LayerNorm(16)

    def function(x: torch.Tensor) -> torch.Tensor:
        q, k, v = (t.unflatten(-1, (-1, 16)) for t in qkv(x).split((64, 16, 16), dim=-1))
        q, k, v = (t.transpose(1, 2) for t in (q_norm(q), k_norm(k), v))
        return out(
            F.scaled_dot_product_attention(q, k.expand_as(q), v.expand_as(q))
            .transpose(1, 2)
            .flatten(2)
        )

    check(function, randn(2, 7, 48), segments=1)


@pytest.mark.parametrize("dims", [1, 2])
def test_a_convolution_is_the_only_cut(dims: int) -> None:
    """What a convolution gives is read as tokens: transposed, flattened, normed and projected natively."""
    convolution = (nn.Conv1d, nn.Conv2d)[dims - 1](3, 24, 4, stride=4)
    norm, linear = nn.LayerNorm(24), nn.Linear(24, 40)

    def function(x: torch.Tensor) -> torch.Tensor:
        tokens = convolution(x).flatten(2).transpose(1, 2)
        return linear(norm(tokens)) + linear(tokens)

    check(function, randn(2, 3, *(16,) * dims), segments=1)


@torch.no_grad()
@pytest.mark.parametrize("dynamic", [False, True])
def test_blocks_of_convolutions_and_linears(dynamic: bool) -> None:
    """ConvNeXt's block: channels go last and come back, so that PyTorch may lay out what it makes in either order."""
    convolution = nn.Conv2d(24, 24, 3, padding=1, groups=24)
    norm, up, down = nn.LayerNorm(24), nn.Linear(24, 96), nn.Linear(96, 24)

    def block(x: torch.Tensor) -> torch.Tensor:
        h = norm(convolution(x).permute(0, 2, 3, 1))
        return x + down(F.gelu(up(h))).permute(0, 3, 1, 2)

    def function(x: torch.Tensor) -> torch.Tensor:
        return block(block(x))

    known = {id(g) for g in alive()}
    torch._dynamo.reset()
    compiled = torch.compile(function, backend="llmopt", dynamic=dynamic)
    for size in (8, 6):
        x = randn(2, 24, size, 8)
        for given in (x, x.to(memory_format=torch.channels_last), x.transpose(2, 3)):
            assert_close(compiled(given), function(given))
    plans = [g.plan for g in alive() if id(g) not in known]
    assert plans
    for plan in plans:
        assert plan is not None
        linears = [r for r in plan.records() if r.op == "linear"]
        assert len(linears) == 4, str(plan)


@torch.no_grad()
def test_sizes_of_a_mask_alone() -> None:
    """A mask that is spread over the keys may have the only symbol for their number."""

    def function(x: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        tokens = F.max_pool2d(x, 2).flatten(2).permute(0, 2, 1)
        q = tokens.reshape(tokens.shape[0], tokens.shape[1], 4, 8).transpose(1, 2)
        return F.scaled_dot_product_attention(q, q, q, attn_mask=mask)

    torch._dynamo.reset()
    compiled = torch.compile(function, backend="llmopt", dynamic=True)
    for batch, height, width in ((2, 6, 4), (1, 4, 6), (3, 8, 8)):
        x, n = randn(batch, 32, height, width), height * width // 4
        mask = randn(batch, 1, n, 1).expand(batch, 1, n, n)
        assert_close(compiled(x, mask), function(x, mask))


def test_a_bias_that_lies_across_is_copied() -> None:
    """T5 looks its bias up as [S,S,H] and permutes it: an attention reads rows of it."""
    table, out = nn.Embedding(9, 4), nn.Linear(32, 32)
    places = torch.arange(25).view(5, 5) % 9

    def function(x: torch.Tensor) -> torch.Tensor:
        bias = table(places).permute(2, 0, 1)[None]
        h = x.unflatten(-1, (4, 8)).transpose(1, 2)
        return out(
            F.scaled_dot_product_attention(h, h, h, attn_mask=bias).transpose(1, 2).flatten(2)
        )

    check(function, randn(2, 5, 32), segments=1)


def test_an_index_of_one_is_a_slice() -> None:
    """x[..., [-2], :], Falcon's way to one head."""
    linear = nn.Linear(32, 32)

    def function(x: torch.Tensor) -> torch.Tensor:
        h = linear(x).unflatten(-1, (4, 8))
        q, k, v = (t.transpose(1, 2) for t in (h[..., :-2, :], h[..., [-2], :], h[..., [-1], :]))
        k, v = k.expand_as(q), v.expand_as(q)
        return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)

    check(function, randn(2, 5, 32), segments=1)


@pytest.mark.parametrize(
    ("precision", "past", "wide"),
    [
        ("exact", 9, 128),
        ("w8a8", 9, 128),
        ("w4a8", 9, 128),
        ("exact", 3000, 128),
        ("w8a8", 9, 6144),
    ],
)
def test_a_layer_of_decode_waits_once_a_product(precision: str, past: int, wide: int) -> None:
    """Four linears and attention: each thread prepares a single row for itself, and who ends the last keys of a head merges its parts."""

    def barriers(layers: int) -> int:
        torch._dynamo.reset()
        config = LlamaConfig(
            hidden_size=64,
            intermediate_size=wide,
            num_hidden_layers=layers,
            num_attention_heads=4,
            num_key_value_heads=2,
            vocab_size=100,
        )
        model = LlamaForCausalLM(config).eval()
        compiled = torch.compile(model, backend="llmopt", options={"precision": precision})
        cache = DynamicCache(config=config)
        for layer in range(layers):
            cache.update(randn(1, 2, past, 16), randn(1, 2, past, 16), layer)
        with torch.inference_mode():
            compiled(input_ids=torch.tensor([[3]]), past_key_values=cache)
        (segment,) = alive()[-1].segments()
        return segment.program.barriers

    assert barriers(2) - barriers(1) == 5


@torch.no_grad()
def test_latent_attention_and_limited_groups_of_experts() -> None:
    """DeepSeek-V3: caches that begin as empty vectors, keys put together in memory, experts from the best groups: one segment a call."""
    config = DeepseekV3Config(
        vocab_size=131, hidden_size=48, intermediate_size=76, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=4,
        n_routed_experts=8, n_group=4, topk_group=2, num_experts_per_tok=2, moe_intermediate_size=40, first_k_dense_replace=1,
        q_lora_rank=20, kv_lora_rank=12, qk_rope_head_dim=8, qk_nope_head_dim=10, v_head_dim=14,
    )  # fmt: skip
    torch.manual_seed(0)
    model = DeepseekV3ForCausalLM(config).eval()
    for parameter in model.parameters():
        parameter.copy_(torch.randn_like(parameter) * 0.2)
    ids = torch.randint(3, 131, (2, 9))
    want = [model(ids)]
    want.append(model(ids[:, :1], past_key_values=want[0].past_key_values))
    torch._dynamo.reset()
    known = {id(g) for g in alive()}
    compiled = torch.compile(model, backend="llmopt")
    got = [compiled(ids)]
    got.append(compiled(ids[:, :1], past_key_values=got[0].past_key_values))
    for ours, theirs in zip(got, want, strict=True):
        assert_close(ours.logits, theirs.logits)
    plans = [g.plan for g in alive() if id(g) not in known]
    assert [len(p.segments) for p in plans] == [1, 1]
    assert [len([r for r in p.records() if r.op == "limit_groups"]) for p in plans] == [1, 1]
    assert not any(p.fallbacks for p in plans)
