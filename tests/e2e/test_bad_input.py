"""What does not exist or is not built yet: one clear error that names what is possible."""

from __future__ import annotations

import os
import subprocess
import sys
from typing import Any

import pytest
import torch

from tests.e2e.blocks import Block, block_input, build

# keyword arguments of torch.compile → words the error must hold
ERRORS = {
    "mode": ({"mode": "bogus"}, ("bogus", "default", "reduce-overhead", "max-autotune")),
    "option": ({"options": {"precison": "exact"}}, ("precison", "precision", "kv_cache", "target")),
    "precision": ({"options": {"precision": "w3a3"}}, ("w3a3", "exact", "w8a8")),
    "precision-type": ({"options": {"precision": 8}}, ("8", "exact")),
    "precision-later": ({"options": {"precision": "auto"}}, ("auto", "not available", "exact")),
    "kv-cache": ({"options": {"kv_cache": "int3"}}, ("int3", "same")),
    "kv-cache-later": ({"options": {"kv_cache": "int8"}}, ("int8", "not available", "same")),
    "target": ({"options": {"target": "tpu"}}, ("tpu", "cpu")),
    "target-later": ({"options": {"target": "cuda:90"}}, ("cuda:90", "not available", "cpu")),
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


def test_known_options_work() -> None:
    module = build(Block)
    options: dict[str, Any] = {"precision": "exact", "kv_cache": "same", "target": "cpu"}
    with torch.no_grad():
        compiled = torch.compile(module, backend="llmopt", options=options)
        torch.testing.assert_close(
            compiled(block_input()), module(block_input()), rtol=1e-4, atol=1e-4
        )


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


def test_a_cpu_tier_that_does_not_exist() -> None:
    result = run(LLMOPT_CPU_ISA="bogus")
    assert result.returncode != 0
    assert "bogus" in result.stderr
    assert all(tier in result.stderr for tier in ("scalar", "avx2", "avx512", "avx512_vnni"))


def test_the_lowest_cpu_tier() -> None:
    result = run(LLMOPT_CPU_ISA="scalar")
    assert result.stdout == "done\n", result.stderr


def test_a_debug_level_that_does_not_exist() -> None:
    result = run(LLMOPT_DEBUG="7")
    assert result.returncode != 0
    assert "LLMOPT_DEBUG" in result.stderr


def test_an_unwritable_cache_directory() -> None:
    result = run(LLMOPT_CACHE_DIR="/proc/nowhere")
    assert result.stdout == "done\n", result.stderr


def test_fallbacks_are_told_at_debug_level_one() -> None:
    script = SCRIPT.replace(
        "torch.nn.Linear(8, 8)", "torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.CELU())"
    )
    result = subprocess.run(
        [sys.executable, "-c", script],
        env=os.environ | {"LLMOPT_DEBUG": "1"},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert "no kernel for celu" in result.stdout + result.stderr


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
