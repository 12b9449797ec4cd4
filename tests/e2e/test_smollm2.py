"""SmolLM2-135M-Instruct with its real weights: text, logits and half precision against eager PyTorch."""

from __future__ import annotations

from typing import Any

import llmopt
import pytest
import torch
from llmopt import models
from llmopt.models.text import documentation
from llmopt.quant.evaluate import divergence

from tests.e2e.compare import assert_near_tie
from tests.tolerance import assert_close

NEW_TOKENS = 64
KEEP_GRAPHS = True  # tracing thirty layers takes seconds: all tests share one compiled model
PROMPTS = (
    "The capital of France is",
    "Once upon a time, in a village by the sea, there lived",
    "def fibonacci(n):\n    ",
    "Water boils at",
    "1, 1, 2, 3, 5, 8, 13,",
    "Dear Sir or Madam,\n\nI am writing to",
    "The three laws of motion are",
    "Q: What is the largest planet?\nA:",
    "SELECT name, COUNT(*) FROM",
    "To bake bread you need",
    "import numpy as np\n\nx = np.",
    "In 1969, Neil Armstrong",
    "<|im_start|>user\nWhy is the sky blue?<|im_end|>\n<|im_start|>assistant\n",
    "Translate to Spanish: Good morning ->",
    "- apples\n- pears\n-",
    "The quick brown fox",
    "Photosynthesis is the process by which",
    '{"name": "Ada", "born": 1815, "',
    "It was the best of times, it was the worst of times,",
    "<|im_start|>user\nWrite a haiku about rain.<|im_end|>\n<|im_start|>assistant\n",
)


@pytest.fixture(scope="module")
def eager() -> models.LoadedModel:
    loaded = models.load("smollm2", torch.float32)
    loaded.model.generation_config.eos_token_id = None  # 64 tokens, whatever they say
    loaded.model.generation_config.pad_token_id = loaded.tokenizer.pad_token_id
    return loaded


@pytest.fixture(scope="module")
def compiled(eager: models.LoadedModel, backend: str) -> Any:
    """A second module over the same weights, so that they are in memory once."""
    twin = type(eager.model)(eager.model.config).eval()
    twin.load_state_dict(eager.model.state_dict(), assign=True)
    twin.tie_weights()
    twin.generation_config = eager.model.generation_config
    twin.compile(backend=backend)
    return twin


@pytest.fixture
def own_graphs() -> None:
    """Other caches and dtypes are other graphs, and Dynamo keeps eight of one function."""
    torch._dynamo.reset()


def text_of(tokenizer: Any, count: int) -> torch.Tensor:
    """`count` tokens of running text."""
    ids = tokenizer("\n\n".join(PROMPTS * 3), return_tensors="pt")["input_ids"]
    assert ids.shape[1] >= count
    return ids[:, :count]


def assert_greedy(model: Any, prompt: torch.Tensor, new: torch.Tensor) -> None:
    """`new` is the reference's own greedy text: fed back in one forward, every argmax is the next token.

    By induction this is what generating with the reference would have given, in a sixty-fourth of the time.
    """
    ids = torch.cat([prompt, new])
    with torch.no_grad():
        logits = model(ids[None, :-1]).logits[0, -len(new) :]
    best = logits.argmax(-1)
    for i in torch.nonzero(best != new).flatten().tolist():
        assert_near_tie(logits[i], new[i], best[i])


def test_greedy_text_of_twenty_prompts(eager: models.LoadedModel, compiled: Any) -> None:
    """Four alone and the others as one padded batch, whose rows run in other kernels; eager reads every text by itself.

    The batch comes first: then the length is a symbol already when single prompts are traced.
    """
    alone = range(0, len(PROMPTS), 5)
    rest = [i for i in range(len(PROMPTS)) if i not in alone]
    for numbers in (rest, *([i] for i in alone)):
        prompts = [PROMPTS[i] for i in numbers]
        x = eager.tokenizer(prompts, return_tensors="pt", padding=True, padding_side="left")
        texts = compiled.generate(**x, max_new_tokens=NEW_TOKENS, do_sample=False)
        for text, mask in zip(texts, x["attention_mask"], strict=True):
            text = text[len(mask) - mask.sum() :]
            assert len(text) == mask.sum() + NEW_TOKENS
            assert_greedy(eager.model, text[:-NEW_TOKENS], text[-NEW_TOKENS:])


@pytest.mark.parametrize("prompt", [PROMPTS[0], PROMPTS[12]], ids=["plain", "chat"])
def test_generate_is_eagers(prompt: str, eager: models.LoadedModel, compiled: Any) -> None:
    """The reference's own `generate`, a plain prompt and one with the chat template."""
    x = eager.tokenizer(prompt, return_tensors="pt")
    how = {"max_new_tokens": 32, "do_sample": False}
    got, want = compiled.generate(**x, **how), eager.model.generate(**x, **how)
    assert eager.tokenizer.decode(got[0]) == eager.tokenizer.decode(want[0])


@torch.no_grad()
def test_logits_over_512_tokens(eager: models.LoadedModel, compiled: Any) -> None:
    ids = text_of(eager.tokenizer, 512)
    assert_close(compiled(ids, use_cache=False).logits, eager.model(ids).logits)


@torch.no_grad()
@pytest.mark.usefixtures("own_graphs")
def test_int8_kv_cache_is_near_the_exact_one(eager: models.LoadedModel, compiled: Any) -> None:
    """A prefill, then tokens one by one: predictions stay, in little more than a quarter of the memory."""
    ids = text_of(eager.tokenizer, 320)
    cache = llmopt.KVCache(compiled)
    pieces = [ids[:, :256], *ids[:, 256:].split(1, dim=1)]
    got = torch.cat(
        [compiled(p, past_key_values=cache, use_cache=True).logits for p in pieces], dim=1
    )
    want = eager.model(ids).logits
    assert divergence(want, got) <= 0.003
    assert (want.argmax(-1) == got.argmax(-1)).double().mean() >= 0.97
    floats = sum(t.numel() * 4 for layer in range(30) for t in cache.dequantized(layer))
    codes = sum(t.nbytes for layer in cache.layers for t in (layer.keys, layer.values))
    assert codes / floats == 68 / 256


@pytest.mark.usefixtures("own_graphs")
def test_generate_with_int8_kv(eager: models.LoadedModel, compiled: Any) -> None:
    """The text of the same cache in eager."""
    x = eager.tokenizer(PROMPTS[0], return_tensors="pt")
    got, want = (
        m.generate(**x, max_new_tokens=16, do_sample=False, past_key_values=llmopt.KVCache(m))
        for m in (compiled, eager.model)
    )
    assert eager.tokenizer.decode(got[0]) == eager.tokenizer.decode(want[0])


@pytest.mark.usefixtures("own_graphs")
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=["fp16", "bf16"])
@torch.no_grad()
def test_half_precision_is_as_near_as_eager(
    eager: models.LoadedModel, dtype: torch.dtype, backend: str
) -> None:
    """Over twelve pieces of text: of a single one eager may be the nearer."""
    tokens = eager.tokenizer(documentation().content[:20_000], return_tensors="pt")["input_ids"]
    ids = tokens[:, : 12 * 96].reshape(12, 96)
    exact = eager.model(ids).logits
    half = models.load("smollm2", dtype).model
    theirs = half(ids, use_cache=False).logits.float() - exact
    llmopt.mark_layers(half)
    half.compile(backend=backend)
    ours = half(ids, use_cache=False).logits.float() - exact
    assert rms(ours) <= rms(theirs)


def rms(x: torch.Tensor) -> float:
    return x.pow(2).mean().sqrt().item()
