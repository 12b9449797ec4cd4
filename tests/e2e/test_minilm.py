"""all-MiniLM-L6-v2 with its real weights: sentence embeddings against eager PyTorch, and their meaning."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from llmopt import models
from llmopt.models.minilm import embed

PAIRS = (  # each closer to the other than to any third sentence
    ("A man is playing a guitar.", "Somebody plays a musical instrument."),
    ("The weather is lovely today.", "It's so sunny outside!"),
    (
        "How do I reset my password?",
        "I forgot my login credentials and need a new one, what should I do?",
    ),
    ("The stock market fell sharply on Monday.", "Shares dropped at the start of the week."),
    ("def add(a, b): return a + b", "a Python function that sums two numbers"),
)
KEEP_GRAPHS = True  # one compiled model for all tests
SENTENCES = [sentence for pair in PAIRS for sentence in pair]


@pytest.fixture(scope="module")
def minilm() -> models.LoadedModel:
    return models.load("minilm", torch.float32)


@pytest.fixture(scope="module")
def compiled(minilm: models.LoadedModel, backend: str) -> Any:
    twin = copy.deepcopy(minilm.model)
    twin.compile(backend=backend)
    return twin


def test_embeddings_equal_eagers(minilm: models.LoadedModel, compiled: Any) -> None:
    """One by one, all at once with padding, and one longer than a block of any kernel."""
    long = " ".join(SENTENCES * 4)
    for texts in ([SENTENCES[0]], SENTENCES, [long, "x"]):
        want = embed(minilm.model, minilm.tokenizer, texts)
        got = embed(compiled, minilm.tokenizer, texts)
        torch.testing.assert_close(got, want, rtol=0, atol=1e-5)


def test_an_embedding_does_not_depend_on_its_batch(
    minilm: models.LoadedModel, compiled: Any
) -> None:
    together = embed(compiled, minilm.tokenizer, SENTENCES)
    for i in (0, 5):
        alone = embed(compiled, minilm.tokenizer, SENTENCES[i : i + 1])
        torch.testing.assert_close(together[i : i + 1], alone, rtol=0, atol=1e-5)


def test_pairs_find_each_other(minilm: models.LoadedModel, compiled: Any) -> None:
    vectors = embed(compiled, minilm.tokenizer, SENTENCES)
    similarity = (vectors @ vectors.T).fill_diagonal_(-1)
    partners = torch.arange(len(SENTENCES)).view(-1, 2).flip(1).flatten()
    assert similarity.argmax(dim=1).tolist() == partners.tolist()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=["fp16", "bf16"])
def test_half_precision_is_as_near_as_eager(
    minilm: models.LoadedModel, dtype: torch.dtype, backend: str
) -> None:
    exact = embed(minilm.model, minilm.tokenizer, SENTENCES)
    half = copy.deepcopy(minilm.model).to(dtype)
    theirs = embed(half, minilm.tokenizer, SENTENCES).float() - exact
    half.compile(backend=backend)
    ours = embed(half, minilm.tokenizer, SENTENCES).float() - exact
    assert ours.pow(2).mean().sqrt() <= 1.05 * theirs.pow(2).mean().sqrt()
