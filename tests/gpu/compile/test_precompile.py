"""Kernels a session compiles beforehand are those that triton's launcher then finds in its cache."""

from __future__ import annotations

import pytest
import torch
import triton
from llmopt import kernels
from llmopt.gpu import run
from llmopt.target import gpu_target

from bench.gpu.forms import FORMS
from bench.gpu.forms.work import SMALL
from bench.gpu.precompile import compiled
from tests.gpu.compile.fake_driver import FakeDriver

kernels.load()
HOPPER = gpu_target("cuda:90")
FEW = ("SwiGLU", "RMSNorm")


def test_what_was_compiled_beforehand_is_launched_without_a_compiler(monkeypatch, tmp_path):
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    names = ["norm.triton", "swiglu.triton", "swiglu.triton"]  # which has two tiles
    assert sorted(compiled(FEW, SMALL, HOPPER)) == [(name, "") for name in names]
    driver = FakeDriver(HOPPER)
    monkeypatch.setattr(triton.runtime.driver, "_active", driver)
    monkeypatch.setattr(run, "check_runnable", lambda _: None)
    backend = triton.compiler.compiler.make_backend(driver.get_current_target())
    monkeypatch.setattr(type(backend), "add_stages", lambda *_: pytest.fail("triton compiles"))
    for name in FEW:
        for _, _, launch in FORMS[name](SMALL, torch.device("cpu")).kernels(HOPPER):
            launch.function.device_caches.clear()
            run.run(launch)
            launch.function.device_caches.clear()
    assert len(driver.launched) == len(names)
