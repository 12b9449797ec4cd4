"""Perplexity, divergence and agreement against their definitions, and the command that prints them."""

from __future__ import annotations

import dataclasses
import json
import math
from types import SimpleNamespace

import pytest
import torch
from llmopt import cli
from llmopt.models import text
from llmopt.quant.evaluate import compare_causal, compare_embeddings, divergence, windows_of


def fixed(logits: torch.Tensor):
    """A model that gives token t the logits row t."""
    return lambda input_ids, use_cache: SimpleNamespace(logits=logits[input_ids])


def test_numbers_by_their_definitions() -> None:
    g = torch.Generator().manual_seed(0)
    a, b = torch.randn(11, 11, generator=g), torch.randn(11, 11, generator=g)
    windows = torch.randint(0, 11, (5, 700), generator=g)
    found = compare_causal(fixed(a), {"b": fixed(b)}, windows, batch=2)
    before, after = windows[:, :-1].flatten(), windows[:, 1:].flatten()
    p, q = a.double()[before].softmax(-1), b.double()[before].softmax(-1)
    at = torch.arange(len(after))
    want = math.exp(-q[at, after].log().mean())
    assert found["b"].tokens == 5 * 699
    assert found["b"].perplexity == pytest.approx(want, rel=1e-5)
    base = math.exp(-p[at, after].log().mean())
    assert found["reference"].perplexity == pytest.approx(base, rel=1e-5)
    assert found["b"].perplexity_change == pytest.approx(want / base - 1, rel=1e-4)
    assert found["b"].divergence == pytest.approx(
        (p * (p / q).log()).sum(-1).mean().item(), rel=1e-5
    )
    assert found["b"].top1 == pytest.approx((p.argmax(-1) == q.argmax(-1)).double().mean().item())
    assert found["reference"].divergence == 0
    assert found["reference"].top1 == 1
    assert divergence(a[windows], b[windows]) > 0
    assert divergence(a, a) == 0


def test_excluded_tokens() -> None:
    """Logits of −∞ on both sides are no difference; on the model's side alone the divergence is infinite."""
    a = torch.tensor([[0.0, 1.0, -math.inf, 2.0]])
    b = torch.tensor([[0.0, 1.5, -math.inf, 2.0]])
    kept = [0, 1, 3]
    assert divergence(a, b) == pytest.approx(divergence(a[:, kept], b[:, kept]), rel=1e-6)
    assert divergence(torch.zeros(1, 4), b) == math.inf


def test_windows() -> None:
    ids = torch.arange(1000)
    assert windows_of(ids, 300).shape == (3, 300)
    assert windows_of(ids, 300, 650).shape == (2, 300)
    for wrong in ((ids, 2000, None), (ids, 300, 299), (ids, 1, None)):
        with pytest.raises(ValueError, match="hold no window"):
            windows_of(*wrong)


def test_cosines() -> None:
    a = torch.tensor([[1.0, 0.0], [0.0, 2.0]])
    found = compare_embeddings(a, torch.tensor([[1.0, 1.0], [0.0, 1.0]]))
    assert (found.texts, found.mean_cosine) == (2, pytest.approx((0.5**0.5 + 1) / 2))
    assert found.lowest_cosine == pytest.approx(0.5**0.5)


def test_the_text() -> None:
    document = text.documentation()
    assert document == text.documentation()
    assert len(document.content) > 300_000
    parts = text.paragraphs(document)
    assert len(parts) > 500
    assert all(len(p) >= 80 and "\n" not in p for p in parts)


def test_the_command(tmp_path, capsys) -> None:
    file = tmp_path / "model.py"
    file.write_text("from tests.quant.models import llama\n")
    arguments = ["eval", f"{file}:llama", "--tokens", "1024", "--json", str(tmp_path / "out.json")]
    assert cli.main([*arguments, "--scheme", "w8a8,w4a16", "--precision", "exact"]) == 0
    printed = capsys.readouterr().out
    assert "w4a16 round" in printed
    found = json.loads((tmp_path / "out.json").read_text())
    rows = found["results"]
    assert list(rows) == ["reference", "w8a8 round", "w4a16 round", "compiled exact"]
    assert rows["reference"]["tokens"] == 8 * 127
    assert 0 < rows["w8a8 round"]["divergence"] < rows["w4a16 round"]["divergence"]
    assert rows["compiled exact"]["divergence"] < 1e-6
    assert "pydoc_data.topics" in found["text"]


def test_bad_requests(tmp_path, capsys) -> None:
    file = tmp_path / "model.py"
    file.write_text("from tests.quant.models import llama\n")
    for arguments, words in (
        ([], "say what to measure"),
        (["--scheme", "w2a2"], "'w2a2' does not exist"),
        (["--scheme", "w8a8", "--group", "7"], "group=7"),
        (["--scheme", "w8a8", "--algorithm", "magic"], "'magic' does not exist"),
        (["--scheme", "gguf"], "--scheme gguf is for smollm2"),
        (["--precision", "w1"], "'w1' does not exist"),
        (["--scheme", "w8a8", "--tokens", "100"], "100 tokens hold no window of 128"),
        (["--precision", "w8a8", "--group", "7"], "group=7"),
        (
            ["--precision", "w8a8,exact", "--group", "32"],
            "--group is for w8a8, w8a16, w4a16, w4a8: measure exact apart",
        ),
        (["--scheme", "w8a8,auto", "--group", "32"], "measure auto apart"),
        (["--kv-cache", "int8", "--group", "32"], "measure int8 apart"),
        (
            ["--scheme", "w8a8", "--precision", "exact", "--algorithm", "awq"],
            "measure --precision apart",
        ),
    ):
        assert cli.main(["eval", f"{file}:llama", *arguments]) == 1
        assert words in capsys.readouterr().err
    assert cli.main(["eval", "minilm", "--random-weights", "--scheme", "w8a8"]) == 1
    assert "encoders with a tokenizer can be measured" in capsys.readouterr().err


def test_models_with_short_windows(tmp_path, capsys) -> None:
    """64 positions: windows of 64 tokens."""
    file = tmp_path / "model.py"
    file.write_text("from tests.quant.models import gpt2\n")
    out = tmp_path / "out.json"
    arguments = ["--scheme", "w8a8", "--algorithm", "gptq", "--tokens", "256", "--json", str(out)]
    assert cli.main(["eval", f"{file}:gpt2", *arguments]) == 0, capsys.readouterr().err
    assert json.loads(out.read_text())["results"]["reference"]["tokens"] == 4 * 63


def test_texts_that_are_too_short(tmp_path, capsys, monkeypatch) -> None:
    short = dataclasses.replace(text.documentation(), content="word " * 300)
    monkeypatch.setattr(text, "documentation", lambda: short)
    file = tmp_path / "model.py"
    file.write_text("from tests.quant.models import llama\n")
    monkeypatch.setattr("llmopt.cli.eval.CALIBRATION_WINDOWS", 12)
    assert cli.main(["eval", f"{file}:llama", "--scheme", "w8a8"]) == 1
    assert "tokens: 1536 for calibration and 128 to measure" in capsys.readouterr().err
