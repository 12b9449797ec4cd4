"""explain(): everything it promises, on a module with a fallback and members of an nn.Sequential."""

from __future__ import annotations

import html
import json
import re
from pathlib import Path
from typing import Any

import llmopt
import pytest
import torch
from llmopt import _C, Report
from llmopt import report as report_module
from llmopt.native.probe import Probe
from torch import nn
from torch.nn import functional as F


class Mixed(nn.Module):
    """A linear written out, two in a Sequential with an activation no kernel has, and attention."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv = nn.Linear(64, 192)
        self.mlp = nn.Sequential(
            nn.Linear(64, 96), nn.AvgPool1d(1), nn.Sequential(nn.Linear(96, 64))
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, 4, 16)).permute(2, 0, 3, 1, 4)
        y = nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.mlp(y.transpose(1, 2).flatten(2))


def explained(module: nn.Module, *inputs: torch.Tensor) -> Report:
    torch._dynamo.reset()
    return llmopt.explain(torch.compile(module.eval(), backend="llmopt"), *inputs)


def test_shares_are_of_the_better_probe(monkeypatch: pytest.MonkeyPatch) -> None:
    """One that other work disturbed would make kernels look faster than the machine; the summary says so."""
    probes = iter(
        (Probe(9e9, 1e9, 0), Probe(3e9, 2e9, 9e9), Probe(9e9, 1e9, 0), Probe(9e9, 1e9, 8e9))
    )
    read = []

    def measure(threads: int, read_bytes: int) -> Probe:
        read.append(read_bytes)
        return next(probes)

    monkeypatch.setattr(report_module, "measure", measure)
    found = explained(nn.Linear(8, 8), torch.randn(2, 8))
    assert found.probe == Probe(9e9, 2e9, 9e9)
    assert read == [0, sum(step.bytes for step in found.steps)]
    assert "probes before and after differ" in found.summary()
    assert "probes before and after differ" not in explained(nn.Linear(8, 8), torch.randn(2, 8)).summary()  # fmt: skip


@pytest.fixture(scope="module")
def report() -> Report:
    torch.manual_seed(0)
    return explained(Mixed(), torch.randn(2, 9, 64))


def test_every_step_has_its_kernel_tier_shapes_and_costs(report: Report) -> None:
    kernels = [s.kernel for s in report.steps]
    assert kernels.count("linear.cpu") == 3
    assert kernels.count("attention.cpu") == 1
    for step in report.steps:
        assert step.isa == llmopt.target().tier
        assert re.search(r"\[[\d,]+\]f32", step.inputs[0])
        assert step.microseconds > 0
        assert step.bytes > 0
        assert step.roof >= 0
        assert step.bound in ("compute", "memory")
    linear = next(s for s in report.steps if s.detail.startswith("192x64"))
    assert linear.flops == 2 * 18 * 192 * 64
    assert linear.bytes == 4 * (192 * 64 + 18 * 64 + 18 * 192)
    seconds = linear.microseconds / 1e6
    compute = linear.flops / report.probe.linear_peak("f32")
    memory = linear.bytes / report.probe.read_bytes
    assert linear.roof == pytest.approx(max(compute, memory) / seconds)


@pytest.mark.parametrize("causal", [False, True])
def test_scores_above_the_diagonal_are_no_work(causal: bool) -> None:
    q, k, v = torch.randn(3, 2, 4, 24, 16)
    attend = torch.compile(
        lambda q, k, v: F.scaled_dot_product_attention(q, k, v, is_causal=causal), backend="llmopt"
    )
    report = llmopt.explain(attend, q, k, v)
    (step,) = [s for s in report.steps if s.kernel == "attention.cpu"]
    scores = 24 * 25 // 2 if causal else 24 * 24
    assert step.flops == 4 * 2 * 4 * 16 * scores


def test_fallbacks_say_why_and_where(report: Report) -> None:
    (pool,) = [f for f in report.fallbacks if f.operation == "avg_pool1d"]
    assert "no kernel for avg_pool1d" in pool.reason
    assert pool.source.startswith("1 (AvgPool1d)  ")
    assert "return self.mlp(" in pool.source


def test_source_lines_are_short_and_name_members_of_a_sequential(report: Report) -> None:
    sources = [s.source for s in report.steps if s.kernel == "linear.cpu"]
    file = Path(__file__).resolve()
    name = file.relative_to(Path.cwd()) if file.is_relative_to(Path.cwd()) else file.name
    assert f"{name}:" in sources[0]
    assert "self.qkv(x)" in sources[0]
    assert sources[1].startswith("0 (Linear)  ")
    assert sources[2].startswith("2.0 (Linear)  ")
    bare = explained(nn.Sequential(nn.Linear(8, 8), nn.AvgPool1d(1)), torch.randn(2, 8))
    assert [s.source for s in bare.steps] == ["0 (Linear)"]
    assert [f.source for f in bare.fallbacks] == ["1 (AvgPool1d)"]


def test_package_paths_start_with_the_package() -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=1,
                         num_attention_heads=2, num_key_value_heads=2)  # fmt: skip
    report = explained(LlamaForCausalLM(config), torch.arange(7)[None])
    text = str(report)
    assert re.search(r"^\s+transformers/models/llama/modeling_llama.py:\d+: ", text, re.M)
    assert "site-packages" not in text
    assert max(map(len, text.splitlines())) <= 120


def test_the_text_tells_all_of_it(report: Report) -> None:
    text = str(report)
    assert max(map(len, text.splitlines())) <= 120
    assert f"linear.cpu:{llmopt.target().tier} 192x64" in text
    # No share is told where other work disturbed the probe.
    assert re.search(r"\d us +(\d+%|–) of (compute|memory) +442\.4 kFLOP 67\.6 kB", text)
    assert "avg_pool1d: no kernel for avg_pool1d" in text
    assert "compile seconds beyond Dynamo:" in text
    for phase in ("fuse_linear", "plan", "build"):
        assert phase in report.compile_seconds
        assert f"  {phase}: " in text


def test_the_tier_is_the_one_that_ran(monkeypatch: pytest.MonkeyPatch) -> None:
    lowest = _C.tiers()[-1]
    monkeypatch.setenv("LLMOPT_CPU_ISA", lowest)
    report = explained(nn.Linear(8, 8), torch.randn(2, 8))
    assert {s.isa for s in report.steps} == {lowest}


def test_json_holds_the_report(report: Report, tmp_path: Path) -> None:
    report.to_json(tmp_path / "report.json")
    data: dict[str, Any] = json.loads((tmp_path / "report.json").read_text())
    assert len(data["steps"]) == len(report.steps)
    assert {"kernel", "isa", "inputs", "outputs", "flops", "bytes", "roof"} <= set(data["steps"][0])
    assert data["compile_seconds"] == report.compile_seconds
    assert data["fallbacks"][0]["reason"]


def test_html_is_one_self_contained_file_with_a_plot(report: Report, tmp_path: Path) -> None:
    report.to_html(tmp_path / "report.html")
    page = (tmp_path / "report.html").read_text()
    assert page.startswith("<!doctype html>")
    assert page.count("<rect") >= 2 * len({f"{s.kernel} {s.detail}" for s in report.steps})
    assert not re.search(r"(src|href)\s*=|@import|url\(", page)
    assert html.escape(str(report)) in page


def test_a_model_that_was_never_compiled_is_an_error() -> None:
    with pytest.raises(ValueError, match='backend="llmopt"'):
        llmopt.explain(nn.Linear(4, 4), torch.ones(1, 4))


def test_a_weight_of_two_graphs_is_counted_once() -> None:
    torch._dynamo.reset()
    linear, x = nn.Linear(64, 64).eval(), torch.randn(3, 64)
    one = torch.compile(lambda x: linear(x) + 1, backend="llmopt")
    two = torch.compile(lambda x: linear(x.sin()).cumsum(0) + linear(x.cos()), backend="llmopt")
    alone = llmopt.explain(one, x).packed_bytes
    assert alone > 0
    assert llmopt.explain(lambda x: one(x) + two(x), x).packed_bytes == alone
