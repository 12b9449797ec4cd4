"""Plans for GPUs on a machine without one: launches per layer, bytes they move, what they say, and that all of it compiles."""

from __future__ import annotations

import re

import pytest
import torch
import transformers
from llmopt.compiled import alive
from llmopt.gpu.compile import compiled, unique
from llmopt.gpu.executor import recording
from llmopt.gpu.plan import tensors, traffic
from llmopt.gpu.run import GpuMissing
from llmopt.target import GPUS, gpu_target
from transformers import DynamicCache

HEAD, HEADS, KV_HEADS, HIDDEN, WIDE = 128, 32, 8, 4096, 14336
LAYER_WEIGHTS = 2 * (
    HIDDEN * HEAD * (HEADS + 2 * KV_HEADS) + HIDDEN * HIDDEN + 3 * HIDDEN * WIDE + 2 * HIDDEN
)


def llama_8b(layers: int) -> torch.nn.Module:
    """The layers of an 8-billion-parameter Llama with a small vocabulary; its memory is never touched."""
    config = transformers.LlamaConfig(
        hidden_size=HIDDEN, intermediate_size=WIDE, num_hidden_layers=layers, num_attention_heads=HEADS,
        num_key_value_heads=KV_HEADS, vocab_size=512,
    )  # fmt: skip
    with torch.device("meta"):
        model = transformers.LlamaForCausalLM(config).half()
    return model.to_empty(device="cpu").eval()


def launches(layers: int, new: int, cached: int, target: str = "cuda:90", **options: str) -> list:
    torch._dynamo.reset()
    options = {"target": target, **options}
    run = torch.compile(llama_8b(layers), backend="llmopt", options=options)
    cache = DynamicCache()
    for layer in range(layers if cached else 0):
        cache.update(*torch.zeros(2, 1, KV_HEADS, cached, HEAD, dtype=torch.float16), layer)
    with torch.no_grad(), recording() as found:
        run(input_ids=torch.zeros(1, new, dtype=torch.int64), past_key_values=cache, use_cache=True)
    return found


def in_one_layer(new: int, cached: int, **options: str) -> list:
    """The launches a second layer adds, in order; nothing of a layer is left to PyTorch."""
    one, two = (launches(layers, new, cached, **options) for layers in (1, 2))
    plan = [g.plan for g in alive() if g.plan is not None][-1]
    assert len(plan.segments) == 1
    parts = ("linear", "norm", "quantize")  # what a layer may begin with
    start = next(i for i, launch in enumerate(one) if launch.kernel.startswith(parts))
    added = len(two) - len(one)
    assert [x.kernel for x in two[start : start + added]] == [
        x.kernel for x in two[start + added : start + 2 * added]
    ]
    return two[start : start + added]


# (new tokens, cached tokens, most launches)
@pytest.mark.parametrize(
    ("new", "cached", "most"), [(1, 1024, 6), (256, 0, 8)], ids=["decode", "prefill"]
)
def test_launches_and_bytes_of_a_layer(new, cached, most):
    layer = in_one_layer(new, cached)
    assert 0 < len(layer) <= most
    cache = 2 * 2 * KV_HEADS * HEAD * (cached + new)
    states = 2 * 2 * new * HIDDEN
    least = LAYER_WEIGHTS + cache + states
    moved = sum(map(traffic, layer))
    assert least * 0.99 < moved <= least * 1.15, f"{moved / least:.3f} of the least"


def test_launches_and_bytes_of_a_layer_in_8_bits():
    """Each of the four linears has a launch in front that rounds its rows, behind a norm where there is one."""
    layer = in_one_layer(1, 1024, precision="w8a8")
    assert len(layer) <= 10
    assert sum(x.kernel == "quantize_rows.triton" for x in layer) == 4
    # A code a weight, and a float32 for each group of 64.
    weights = LAYER_WEIGHTS // 2 * (1 + 4 / 64)
    least = weights + 2 * 2 * KV_HEADS * HEAD * 1025 + 2 * 2 * HIDDEN
    moved = sum(map(traffic, layer))
    assert least * 0.99 < moved <= least * 1.15, f"{moved / least:.3f} of the least"


def test_every_launch_of_a_plan_compiles_on_every_target():
    for target in GPUS:
        found = launches(1, 1, 256, f"{target.device}:{target.gpu.arch}")
        for launch in unique(found, target).values():
            assert compiled(launch, target).problems(target) == []


def test_the_plan_says_what_it_launches():
    launches(1, 128, 0)
    text = str([g.plan for g in alive() if g.plan is not None][-1])
    assert "target=cuda:sm_90" in text
    assert "linear_f16_tma.triton" in text
    assert "(predicted)" in text
    assert re.search(r"tiles: \d+ default: LLMOPT_TUNE=0", text)


def test_a_plan_uses_predictions_and_says_so(monkeypatch, tmp_path):
    monkeypatch.setenv("LLMOPT_TUNE", "1")
    monkeypatch.setenv("LLMOPT_CACHE_DIR", str(tmp_path))
    launches(1, 1, 256)
    text = str([g.plan for g in alive() if g.plan is not None][-1])
    assert re.search(r"tiles: \d+ predicted: memory-bound, [\d.]+ waves", text)
    assert "default: LLMOPT_TUNE=0" not in text


def test_traffic_counts_what_a_launch_touches():
    (attention,) = [x for x in launches(1, 1, 1023) if x.kernel == "attention_decode.triton"]
    q, k, v = tensors(attention, ("q_ptr", "k_ptr", "v_ptr"))
    partial = attention.arguments["partial_ptr"].numel() * 4
    rows = 2 * HEADS * HEAD
    assert traffic(attention) == 2 * rows + 2 * (2 * KV_HEADS * HEAD * 1024) + 2 * partial
    assert q.numel() * 2 == rows
    assert k.shape == v.shape == (1, KV_HEADS, 1024, HEAD)


def test_running_without_a_gpu_says_what_is_missing():
    torch._dynamo.reset()
    linear = torch.nn.Linear(64, 64).half()
    run = torch.compile(linear, backend="llmopt", options={"target": "cuda:90"})
    with (
        torch.no_grad(),
        pytest.raises(GpuMissing, match=r"no GPU.*llmopt build.*TRITON_INTERPRET=1"),
    ):
        run(torch.zeros(2, 64).half())


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("cuda:70", "too old"),
        ("cuda:91", "does not exist"),
        ("hip:gfx90a", "does not exist"),
        ("cuda", "cuda:90"),
    ],
)
def test_unknown_targets(name, words):
    with pytest.raises(ValueError, match=words):
        gpu_target(name)
    torch._dynamo.reset()
    linear = torch.nn.Linear(8, 8)
    with torch.no_grad(), pytest.raises(Exception, match=words):
        torch.compile(linear, backend="llmopt", options={"target": name})(torch.zeros(1, 8))
