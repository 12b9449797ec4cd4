"""What does not exist or is not built yet: one clear error that names what is possible."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import llmopt
import pytest
import torch
from llmopt import _C
from llmopt.options import parse_options
from llmopt.target import _target

from tests.e2e.blocks import Block, block_input, build

# keyword arguments of torch.compile → words the error must hold
ERRORS = {
    "mode": ({"mode": "bogus"}, ("bogus", "default", "reduce-overhead", "max-autotune")),
    "mode-option": ({"options": {"mode": "bogus"}}, ("bogus", "default", "reduce-overhead")),
    "option": ({"options": {"precison": "exact"}}, ("precison", "precision", "kv_cache", "target")),
    "no-dictionary": ({"options": "w8a8"}, ("'w8a8'", "dictionary", "precision")),
    "precision": ({"options": {"precision": "w3a3"}}, ("w3a3", "exact", "w8a8")),
    "precision-type": ({"options": {"precision": 8}}, ("8", "exact")),
    "group": (
        {"options": {"precision": "w8a8", "group": 48}},
        ("group=48", "'channel'", "32", "64", "128"),
    ),
    "group-exact": ({"options": {"group": 64}}, ("group", "w8a8", "'exact'")),
    "group-auto": ({"options": {"precision": "auto", "group": 64}}, ("group", "w8a8", "'auto'")),
    "budget": ({"options": {"accuracy_budget": 0.1}}, ("accuracy_budget", "precision='auto'")),
    "kv-cache": ({"options": {"kv_cache": "int3"}}, ("int3", "same", "int8")),
    "target": ({"options": {"target": "tpu"}}, ("tpu", "cpu")),
    "target-old": ({"options": {"target": "cuda:70"}}, ("cuda:70", "too old", "cuda:90")),
    "target-auto": (
        {"options": {"target": "cuda:90", "precision": "auto"}},
        ("precision='auto'", "not available", "cuda:90", "cpu"),
    ),
    "attention": ({"options": {"attention": "fp8"}}, ("fp8", "exact", "bf16", "int8")),
    "cpu-attention": (
        {"options": {"attention": "int8"}},
        ("attention='int8'", "not available", "target='cpu'", "cuda", "hip"),
    ),
    "target-attention": (
        {"options": {"target": "cuda:90", "attention": "bf16"}},
        ("attention='bf16'", "not available", "cuda:90", "cpu"),
    ),
    "target-weights": (
        {"options": {"target": "cuda:90", "weights": "packed"}},
        ("weights='packed'", "not available", "cuda:90", "cpu"),
    ),
}


@pytest.fixture(autouse=True)
def only_llmopt(backend: str) -> None:
    if backend != "llmopt":
        pytest.skip("about llmopt's own messages")


@pytest.mark.parametrize("case", ERRORS)
def test_unknown_options_are_errors(case: str) -> None:
    arguments, words = ERRORS[case]
    compiled = torch.compile(build(Block), backend="llmopt", **arguments)
    with torch.no_grad(), pytest.raises(Exception, match="llmopt") as error:
        compiled(block_input())
    assert isinstance(error.value, ValueError | torch._dynamo.exc.BackendCompilerFailed)
    missing = [word for word in words if word not in str(error.value)]
    assert not missing, f"{missing} not named by: {error.value}"


@pytest.mark.parametrize("mode", ["default", "reduce-overhead", "max-autotune"])
def test_known_modes_and_options_work(mode: str) -> None:
    module = build(Block)
    with torch.no_grad():
        compiled = torch.compile(module, backend="llmopt", mode=mode)
        torch.testing.assert_close(
            compiled(block_input()), module(block_input()), rtol=1e-4, atol=1e-4
        )


def test_a_mode_beside_the_same_option_is_an_error() -> None:
    with pytest.raises(
        ValueError, match=r"mode='default' and options=.*'max-autotune'.*: one of them"
    ):
        parse_options("default", {"mode": "max-autotune"})


def test_known_options_work() -> None:
    module = build(Block)
    options: dict[str, Any] = {
        "precision": "exact",
        "kv_cache": "same",
        "target": "cpu",
        "mode": "reduce-overhead",
    }
    with torch.no_grad():
        compiled = torch.compile(module, backend="llmopt", options=options)
        torch.testing.assert_close(
            compiled(block_input()), module(block_input()), rtol=1e-4, atol=1e-4
        )


def test_a_pass_that_does_not_exist_cannot_be_disabled(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LLMOPT_DISABLE", "share, nroms")
    compiled = torch.compile(build(Block), backend="llmopt")
    with torch.no_grad(), pytest.raises(Exception, match="nroms") as error:
        compiled(block_input())
    assert "simplify_again" in str(error.value)
    assert "quantize" in str(error.value)


@pytest.mark.parametrize("disabled", ["quantize", ""])
def test_rounding_is_a_pass_like_the_others(
    disabled: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    """It can be left out, and is verified and printed when it is not."""
    for name, value in (("DISABLE", disabled), ("VERIFY", "1"), ("DEBUG", "3")):
        monkeypatch.setenv(f"LLMOPT_{name}", value)
    torch.manual_seed(0)
    module, x = torch.nn.Linear(64, 64).eval(), torch.randn(3, 64)
    compiled = torch.compile(module, backend="llmopt", options={"precision": "w4a8"})
    with torch.no_grad():
        difference = (compiled(x) - module(x)).abs().max()
    assert ("graph after quantize" in capsys.readouterr().out) == (not disabled)
    assert (difference < 1e-4) == bool(disabled)


SCRIPT = """
import torch
module = torch.nn.Linear(8, 8)
compiled = torch.compile(module, backend="llmopt")
with torch.no_grad():
    torch.testing.assert_close(compiled(torch.ones(2, 8)), module(torch.ones(2, 8)))
print("done")
"""


def run(**environment: str) -> subprocess.CompletedProcess[str]:
    """The script in a fresh process that never imports llmopt by name."""
    return subprocess.run(
        [sys.executable, "-c", SCRIPT],
        env=os.environ | environment,
        capture_output=True,
        text=True,
        timeout=120,
    )


def test_the_backend_needs_no_import() -> None:
    result = run()
    assert result.stdout == "done\n", result.stderr


def call_block() -> None:
    """The environment is read whenever a graph is compiled, so this process will do."""
    module = build(Block)
    with torch.no_grad():
        got = torch.compile(module, backend="llmopt")(block_input())
        torch.testing.assert_close(got, module(block_input()), rtol=1e-4, atol=1e-4)


def test_a_cpu_tier_that_does_not_exist(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LLMOPT_CPU_ISA", "bogus")
    with pytest.raises(Exception, match="LLMOPT_CPU_ISA='bogus'") as error:
        call_block()
    assert all(
        tier in str(error.value) for tier in ("scalar", "avx2", "avx512", "avx512_vnni", "amx")
    )


def test_a_cpu_tier_this_cpu_lacks(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on an older CPU: it runs fewer tiers than the build has."""
    every = _C.tiers(supported_only=False)
    monkeypatch.setattr(
        _C, "tiers", lambda supported_only=True: every[-1:] if supported_only else every
    )
    monkeypatch.setenv("LLMOPT_CPU_ISA", every[0])
    _target.cache_clear()
    try:
        with pytest.raises(
            ValueError, match=f"this CPU runs {every[-1]}; this build has {every[0]}"
        ):
            llmopt.target()
    finally:
        _target.cache_clear()


def test_the_lowest_cpu_tier(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LLMOPT_CPU_ISA", "scalar")
    call_block()


def test_a_debug_level_that_does_not_exist(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LLMOPT_DEBUG", "7")
    with pytest.raises(Exception, match="LLMOPT_DEBUG='7': expected one of"):
        call_block()


@pytest.mark.parametrize("name", ["LLMOPT_VERIFY", "LLMOPT_TUNE"])
def test_a_switch_that_is_neither_on_nor_off(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(name, "yes")
    with pytest.raises(Exception, match=f"{name}='yes': expected 0 or 1"):
        call_block()


def test_compiling_needs_no_cache_directory(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """What converts a model, tunes or moves weights does, and goes on where it cannot be written: see their tests."""
    monkeypatch.setenv("LLMOPT_CACHE_DIR", str(tmp_path / "cache"))
    call_block()
    assert not (tmp_path / "cache").exists()


def test_fallbacks_are_told_at_debug_level_one(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("LLMOPT_DEBUG", "1")
    with torch.no_grad():
        torch.compile(
            torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.AvgPool1d(1)), backend="llmopt"
        )(torch.ones(2, 8))
    assert "no kernel for avg_pool1d" in capsys.readouterr().out


def test_a_position_past_a_static_cache_is_an_index_error() -> None:
    """PyTorch's own index_copy_ raises it too; memory behind the cache must stay as it is."""

    def step(cache: torch.Tensor, index: torch.Tensor, new: torch.Tensor) -> torch.Tensor:
        cache.index_copy_(2, index, new)
        return torch.nn.functional.scaled_dot_product_attention(new, cache, cache)

    slab = torch.zeros(2, 1, 2, 8, 4)
    compiled = torch.compile(step, backend="llmopt")
    with torch.no_grad():
        compiled(slab[0], torch.tensor([7]), torch.ones(1, 2, 1, 4))
        assert (slab[0, :, :, 7] == 1).all()
        for bad in (8, -1):
            with pytest.raises(IndexError, match=r"out of (range|bounds)"):
                compiled(slab[0], torch.tensor([bad]), torch.ones(1, 2, 1, 4))
    assert (slab[1] == 0).all()


def test_a_model_on_the_meta_device() -> None:
    """No memory behind the tensors: it runs as in PyTorch, shapes only."""
    module = build(Block).to("meta")
    with torch.no_grad():
        got = torch.compile(module, backend="llmopt")(block_input().to("meta"))
    assert got.device.type == "meta"
    assert got.shape == (2, 7, 48)


def test_integer_and_complex_modules_run_as_in_pytorch() -> None:
    def integers(x: torch.Tensor) -> torch.Tensor:
        return (x @ x.T).cumsum(0) // 3

    def complexes(x: torch.Tensor) -> torch.Tensor:
        return torch.fft.ifft(torch.fft.fft(x) * 2j).abs()

    with torch.no_grad():
        for f, x in ((integers, torch.arange(12).reshape(3, 4)), (complexes, torch.randn(4, 8))):
            torch.testing.assert_close(torch.compile(f, backend="llmopt")(x), f(x))
