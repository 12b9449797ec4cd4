"""Goldens of str(plan): a change of what is fused, chosen or left to PyTorch shows as a readable difference.

To accept a change: pytest tests/compiler/test_plans.py --accept-plans
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import transformers
from llmopt.compiled import alive

GOLDEN = Path(__file__).parent.parent / "golden"
SMALL = {"hidden_size": 64, "num_hidden_layers": 1, "num_attention_heads": 4, "vocab_size": 100}


def llama() -> torch.nn.Module:
    config = transformers.LlamaConfig(**SMALL, intermediate_size=128, num_key_value_heads=2)
    return transformers.LlamaForCausalLM(config)


def qwen3() -> torch.nn.Module:
    config = transformers.Qwen3Config(
        **SMALL, intermediate_size=128, num_key_value_heads=2, head_dim=16
    )
    return transformers.Qwen3ForCausalLM(config)


def gpt2() -> torch.nn.Module:
    config = transformers.GPT2Config(n_embd=64, n_layer=1, n_head=4, vocab_size=100, n_positions=64)
    return transformers.GPT2LMHeadModel(config)


def bert() -> torch.nn.Module:
    config = transformers.BertConfig(**SMALL, intermediate_size=128)
    return transformers.BertModel(config)


def neox() -> torch.nn.Module:
    config = transformers.GPTNeoXConfig(**SMALL, intermediate_size=128)
    return transformers.GPTNeoXForCausalLM(config)


@pytest.mark.parametrize("build", [llama, qwen3, gpt2, bert, neox], ids=lambda f: f.__name__)
def test_plan_is_as_reviewed(
    build: Callable[[], torch.nn.Module], request: pytest.FixtureRequest
) -> None:
    torch._dynamo.reset()
    model = build().eval()
    with torch.no_grad():
        torch.compile(model, backend="llmopt")(input_ids=torch.arange(7)[None])
    plans = [str(g.plan).split("\n", 1)[1] for g in alive() if g.plan is not None][-1:]
    text = "\n".join(plans) + "\n"
    assert text.count("\n") < 60
    path = GOLDEN / f"plan_{build.__name__}.txt"
    if request.config.getoption("--accept-plans"):
        path.write_text(text)
    assert text == path.read_text()
