"""Real weights: what quantisation costs SmolLM2 and all-MiniLM-L6-v2, and the GGUF's own codes."""

from __future__ import annotations

from typing import Any

import llmopt
import pytest
import torch
from llmopt import models
from llmopt.models import minilm, smollm2, text
from llmopt.quant.evaluate import compare_causal, compare_embeddings, windows_of
from llmopt.quant.module import QuantizedLinear


@pytest.fixture(scope="module")
def smol() -> models.LoadedModel:
    return models.load("smollm2", torch.float32)


@pytest.fixture(scope="module")
def document(smol: models.LoadedModel) -> torch.Tensor:
    return torch.tensor(smol.tokenizer(text.documentation().content, verbose=False)["input_ids"])


def test_the_ggufs_own_codes_are_the_model(smol: models.LoadedModel) -> None:
    model, _ = smollm2.load_quantized()
    found = {n: m for n, m in model.named_modules() if isinstance(m, QuantizedLinear)}
    assert len(found) == 211
    for name, linear in found.items():
        assert torch.equal(linear.weight, smol.model.get_submodule(name).weight), name


@pytest.mark.slow
@pytest.mark.parametrize(
    ("scheme", "calibrated", "change", "divergence", "top1"),
    [
        ("w8a8", True, 0.01, 0.008, 0.955),
        ("w8a16", False, 0.005, 0.003, 0.975),
        ("w4a16", False, 0.02, 0.008, 0.95),
    ],
)
def test_accuracy_of_smollm2(
    smol: models.LoadedModel,
    document: torch.Tensor,
    scheme: str,
    calibrated: bool,
    change: float,
    divergence: float,
    top1: float,
) -> None:
    samples = [{"input_ids": w[None]} for w in windows_of(document[-4096:], 512)]
    model: Any = llmopt.quantize(smol.model, scheme, samples if calibrated else None)
    found = compare_causal(smol.model, {scheme: model}, windows_of(document, 512, 20480))[scheme]
    assert abs(found.perplexity_change) <= change
    assert found.divergence <= divergence
    assert found.top1 >= top1


@pytest.mark.parametrize(("scheme", "least"), [("w8a8", 0.995), ("w8a16", 0.999), ("w4a16", 0.98)])
def test_accuracy_of_minilm(scheme: str, least: float) -> None:
    loaded = models.load("minilm", torch.float32)
    parts = text.paragraphs(text.documentation())
    samples = [
        dict(loaded.tokenizer(parts[-i], truncation=True, max_length=256, return_tensors="pt"))
        for i in range(1, 33)
    ]
    model = llmopt.quantize(loaded.model, scheme, samples if scheme == "w4a16" else None)
    wanted, got = (
        torch.cat([minilm.embed(m, loaded.tokenizer, parts[i : i + 8]) for i in range(0, 64, 8)])
        for m in (loaded.model, model)
    )
    assert compare_embeddings(wanted, got).mean_cosine >= least
