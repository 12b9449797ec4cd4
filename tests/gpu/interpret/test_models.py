"""Whole models through the GPU path: planned for one GPU generation, run in the interpreter, compared with PyTorch."""

from __future__ import annotations

import copy
import subprocess
import sys

import llmopt
import pytest
import torch
import transformers
from llmopt.compiled import alive
from llmopt.graph import kind
from transformers import DynamicCache

from tests.e2e import zoo
from tests.tolerance import INT8_QK, assert_close

SMALL = {
    "hidden_size": 64,
    "num_attention_heads": 4,
    "vocab_size": 100,
    "intermediate_size": 96,
}
GROUPED = SMALL | {"num_key_value_heads": 2, "head_dim": 16}
MODELS = {
    "llama": lambda n: transformers.LlamaForCausalLM(
        transformers.LlamaConfig(**GROUPED, num_hidden_layers=n)
    ),
    "qwen3": lambda n: transformers.Qwen3ForCausalLM(
        transformers.Qwen3Config(**GROUPED, num_hidden_layers=n)
    ),
    "bert": lambda n: transformers.BertModel(transformers.BertConfig(**SMALL, num_hidden_layers=n)),
}


def build(name: str, dtype: torch.dtype, layers: int = 2) -> torch.nn.Module:
    """The model with weights wide enough that every one matters."""
    torch._dynamo.reset()
    torch.manual_seed(0)
    model = MODELS[name](layers).eval()
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(
                torch.randn(p.shape) * (1.5 / p.shape[-1] ** 0.5 if p.dim() > 1 else 0.5)
                + (p.dim() == 1)
            )
    return model.to(dtype)


def compiled(model: torch.nn.Module, **options: str):
    return torch.compile(model, backend="llmopt", options={"target": "cuda:90", **options})


def test_a_process_that_imports_nothing_else_finds_the_kernels():
    code = """
import torch
linear, x = torch.nn.Linear(32, 16).half(), torch.randn(2, 32).half()
with torch.no_grad():
    got = torch.compile(linear, backend="llmopt", options={"target": "cuda:90"})(x)
    assert (got - linear(x)).abs().max() < 1e-2
"""
    subprocess.run([sys.executable, "-c", code], check=True)


def last_plan():
    return [g.plan for g in alive() if g.plan is not None][-1]


def rms_error(got: torch.Tensor, want: torch.Tensor) -> float:
    return ((got.double() - want).square().mean() / want.square().mean()).sqrt().item()


def assert_no_worse(got: torch.Tensor, peer: torch.Tensor, want: torch.Tensor) -> None:
    """got is about as far from the float64 result as another implementation in the same precision."""
    assert rms_error(got, want) <= 1.25 * rms_error(peer, want)


def first(output) -> torch.Tensor:
    return output.logits if "logits" in output else output.last_hidden_state


@pytest.mark.parametrize("name", MODELS)
def test_a_forward_equals_eager(name):
    model = build(name, torch.float16)
    ids = torch.randint(0, 100, (2, 17))
    with torch.no_grad():
        want = first(copy.deepcopy(model).double()(input_ids=ids))
        eager = first(model(input_ids=ids))
        got = first(compiled(model)(input_ids=ids))
    assert_close(got, want)
    assert_no_worse(got, eager, want)
    assert last_plan().target.tier == "sm_90"
    assert len(last_plan().segments) == 1
    assert ops_left_to_pytorch() == []


def ops_left_to_pytorch() -> list[str]:
    names = [kind(f.node) for f in last_plan().fallbacks]
    return [name for name in names if name.startswith("llmopt.")]


@pytest.mark.parametrize(("name", "layers"), [("gemma2", "num_hidden_layers"), ("gpt2", "n_layer")])
def test_only_masks_are_left_to_pytorch(name, layers):
    """Softcaps, scaled embeddings, sums of embeddings, tables of angles: what no family has is generated."""
    torch._dynamo.reset()
    model, given = zoo.make(name, torch.float16, **{layers: 1}), zoo.inputs(name, 5)
    with torch.no_grad():
        want = first(copy.deepcopy(model).double()(**given))
        got = first(compiled(model)(**given))
    assert_close(got, want)
    plan = last_plan()
    assert len(plan.segments) == 1
    assert [r for r in plan.records() if r.kernel == "pointwise.triton"]
    assert ops_left_to_pytorch() == []


def test_a_static_cache_is_written_in_place():
    model = build("llama", torch.float16, layers=1)
    exact = copy.deepcopy(model).double()
    ids = torch.randint(0, 100, (1, 8))
    run = compiled(model)
    cache, reference = (
        transformers.StaticCache(config=model.config, max_cache_len=16) for _ in range(2)
    )
    with torch.no_grad():
        for piece in (ids[:, :7], ids[:, 7:]):
            got = run(input_ids=piece, past_key_values=cache).logits
            assert_close(got, exact(input_ids=piece, past_key_values=reference).logits)
    assert [r for r in last_plan().records() if r.kernel == "index_copy.triton"]
    assert_close(cache.layers[0].keys, reference.layers[0].keys)


@pytest.mark.parametrize("name", MODELS)
def test_bfloat16_is_as_close_as_eager(name):
    model = build(name, torch.bfloat16, layers=1)
    ids = torch.randint(0, 100, (1, 9))
    with torch.no_grad():
        want = first(copy.deepcopy(model).double()(input_ids=ids))
        assert_no_worse(first(compiled(model)(input_ids=ids)), first(model(input_ids=ids)), want)


@pytest.mark.parametrize("name", ["llama", "qwen3"])
def test_prefill_and_decode_with_a_growing_cache(name):
    model = build(name, torch.float16)
    exact = copy.deepcopy(model).double()
    ids = torch.randint(0, 100, (1, 19))
    run = compiled(model)
    cache, reference = DynamicCache(), DynamicCache()
    with torch.no_grad():
        for piece in (ids[:, :17], ids[:, 17:18], ids[:, 18:]):
            got = run(input_ids=piece, past_key_values=cache, use_cache=True)
            want = exact(input_ids=piece, past_key_values=reference, use_cache=True)
            assert_close(got.logits, want.logits)
    for mine, theirs in zip(cache.layers, reference.layers, strict=True):
        assert_close(mine.keys, theirs.keys)
        assert_close(mine.values, theirs.values)


@pytest.mark.parametrize("layout", ["rows", "arrays"])
def test_a_cache_of_codes(layout):
    """Prefill and decode read and write llmopt.KVCache as codes, as close to the exact result as on the CPU."""
    model = build("llama", torch.float16, layers=1)
    ids = torch.randint(0, 100, (1, 19))
    pieces = ids[:, :17], ids[:, 17:18], ids[:, 18:]

    def logits(run):
        cache = llmopt.KVCache(model, layout=layout)
        with torch.no_grad():
            found = [run(input_ids=p, past_key_values=cache, use_cache=True).logits for p in pieces]
        return torch.cat(found, 1), cache

    got, cache = logits(compiled(model))
    assert any("int8_kv" in r.detail for r in last_plan().records())
    assert ops_left_to_pytorch() == []
    eager, theirs = logits(model)
    with torch.no_grad():
        exact = copy.deepcopy(model).double()(input_ids=ids).logits
    assert_no_worse(got, eager, exact)
    assert rms_error(got, exact) > 0
    mine, their_codes = cache.dequantized(0), theirs.dequantized(0)
    for a, b in zip(mine, their_codes, strict=True):
        step = b.abs().amax(-1, keepdim=True) / 127
        assert ((a - b).abs() <= 1.5 * step).all()


def test_int8_products_of_queries_and_keys():
    model = build("llama", torch.float16, layers=1)
    ids = torch.randint(0, 100, (1, 40))
    with torch.no_grad():
        want = copy.deepcopy(model).double()(input_ids=ids).logits
        got = compiled(model, attention="int8")(input_ids=ids).logits
    assert any("int8_qk" in r.detail for r in last_plan().records())
    assert "round_keys.triton" in str(last_plan())
    assert rms_error(got, want) < INT8_QK


def test_a_batch_with_padding():
    model = build("bert", torch.float16, layers=1)
    ids, mask = torch.randint(0, 100, (2, 13)), torch.ones(2, 13, dtype=torch.int64)
    mask[1, 8:] = 0
    with torch.no_grad():
        want = copy.deepcopy(model).double()(input_ids=ids, attention_mask=mask).last_hidden_state
        got = compiled(model)(input_ids=ids, attention_mask=mask).last_hidden_state
    assert_close(got[mask.bool()], want[mask.bool()])


@pytest.mark.parametrize(
    ("name", "precision"),
    [*((name, "w8a8") for name in MODELS), *(("llama", p) for p in ("w8a16", "w4a16", "w4a8"))],
)
def test_quantised_models_are_as_close_as_on_the_cpu(name, precision):
    model = build(name, torch.float16, layers=1)
    ids = torch.randint(0, 100, (1, 9))
    with torch.no_grad():
        want = first(copy.deepcopy(model).double()(input_ids=ids))
        got = first(compiled(model, precision=precision)(input_ids=ids))
        assert all(r.kernel.endswith(".triton") for r in last_plan().records())
        assert any(r.op == "linear_quantized" for r in last_plan().records())
        torch._dynamo.reset()
        on_cpu = torch.compile(model, backend="llmopt", options={"precision": precision})
        assert_no_worse(got, first(on_cpu(input_ids=ids)), want)


def test_an_edited_weight_is_seen():
    model = build("llama", torch.float16, layers=1)
    ids = torch.randint(0, 100, (1, 5))
    run = compiled(model)
    with torch.no_grad():
        before = run(input_ids=ids).logits
        model.model.layers[0].self_attn.k_proj.weight.mul_(-1)
        want = copy.deepcopy(model).double()(input_ids=ids).logits
        after = run(input_ids=ids).logits
    assert_close(after, want)
    assert rms_error(before, want) > 0.01
