"""Launches through triton's own launcher over a driver that is replaced: compiled there, or taken from a pack."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import triton
from llmopt import kernels
from llmopt.gpu import device, pack, run
from llmopt.gpu.compile import unique
from llmopt.gpu.device import Gpu
from llmopt.gpu.pack import PackError
from llmopt.kernels import linear, linear_tma, norm, swiglu
from llmopt.kernels.operands import Around
from llmopt.launch import GemmTile, LinearProblem, RowProblem, RowTile
from llmopt.target import gpu_target

from tests.gpu.compile.fake_driver import FakeDriver

kernels.load()
HOPPER = gpu_target("cuda:90")
H100 = Gpu("cuda", "90", "NVIDIA H100", 132, 232448)


def aligned(*shape: int) -> torch.Tensor:
    """As memory from a GPU is: at a multiple of 16 bytes."""
    tensor = torch.empty(shape, dtype=torch.float16)
    assert tensor.data_ptr() % 16 == 0
    return tensor


def launches() -> list:
    gated = swiglu.launch(RowProblem(4, 128, "fp16"), RowTile(128), HOPPER, aligned(4, 256), aligned(4, 128))  # fmt: skip
    p = RowProblem(4, 130, "fp16")
    x = aligned(4, 1, 130)
    ragged = norm.launch(p, norm.tiles(p, HOPPER)[0], HOPPER, x, aligned(130), None, aligned(4, 130), "rms", 1e-5)  # fmt: skip
    q = LinearProblem(256, 128, 128, "fp16")
    tile = linear_tma.tiles(q, HOPPER)[0]
    tma = linear_tma.launch(
        q, tile, HOPPER, aligned(256, 128), aligned(128, 128), aligned(256, 128), Around()
    )
    return [gated, ragged, tma]


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Compiled anew: binaries name their source file, which in the common cache may lie in another folder."""
    place = tmp_path_factory.mktemp("pack")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRITON_CACHE_DIR", str(tmp_path_factory.mktemp("cache")))
        pack.build(place, {HOPPER: launches()}, "three kernels")
    return place


@pytest.fixture
def driver(monkeypatch, tmp_path):
    """A process with an H100, but for the driver: an empty compile cache, nothing launched yet."""
    fake = FakeDriver(HOPPER)
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(triton.runtime.driver, "_active", fake)
    monkeypatch.setattr(run, "check_runnable", lambda _: None)
    monkeypatch.setattr(device, "gpu_of", lambda _: H100)
    monkeypatch.setattr(pack.torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(pack.torch.cuda, "current_device", lambda: 0)
    for launch in launches():
        launch.function.device_caches.clear()
    yield fake
    triton.knobs.cache.manager_class = None


def test_a_launch_compiles_what_compile_py_compiles(driver, folder):
    for launch in launches():
        run.run(launch)
    expected = set(pack.load(folder, HOPPER).binaries.values())
    assert {x.binary for x in driver.launched} == expected
    for launch, got in zip(launches(), driver.launched, strict=True):
        assert got.grid == (*launch.grid, 1, 1)[:3]
        assert got.stream == driver.stream


def test_a_pack_is_launched_from_and_nothing_is_compiled(driver, folder, monkeypatch):
    used = pack.use(folder)
    backend = triton.compiler.compiler.make_backend(driver.get_current_target())
    monkeypatch.setattr(type(backend), "add_stages", lambda *_: pytest.fail("triton compiles"))
    for launch in launches():
        run.run(launch)
    assert len(driver.launched) == 3
    assert used.used == {e.key for e in used.entries.values()}
    assert len(unique(launches(), HOPPER)) == len(used.used)


def test_what_a_pack_lacks_is_compiled(driver, folder):
    used = pack.use(folder)
    x, y = aligned(4, 64), aligned(4, 32)
    run.run(swiglu.launch(RowProblem(4, 32, "fp16"), RowTile(32), HOPPER, x, y))
    assert len(driver.launched) == 1
    assert used.used == set()


def test_a_tile_that_is_too_large_is_an_error_that_says_so(driver, monkeypatch):
    """Shared memory over the limit: what triton finds when it loads the kernel."""
    p = LinearProblem(256, 128, 128, "fp16")
    tile = GemmTile(128, 128, 64, 8, 5)
    launch = linear.launch(
        p, tile, HOPPER, aligned(256, 128), aligned(128, 128), aligned(256, 128), Around()
    )
    driver.target = gpu_target("cuda:89")
    # Triton remembers what device 0 has, which was an H100's.
    uncached = triton.compiler.compiler.max_shared_mem.__wrapped__
    monkeypatch.setattr(triton.compiler.compiler, "max_shared_mem", uncached)
    launch.function.device_caches.clear()
    with pytest.raises(
        run.DoesNotFit, match=r"linear_f16.triton with .*'BLOCK_M': 128.*shared memory.*101376"
    ):
        run.run(launch)
    launch.function.device_caches.clear()
    assert driver.launched == []


def test_packs_for_other_gpus_are_refused(driver, folder, monkeypatch):
    monkeypatch.setattr(device, "gpu_of", lambda _: Gpu("cuda", "80", "A100", 108, 166912))
    with pytest.raises(PackError, match="not for cuda:sm_80"):
        pack.use(folder)
    monkeypatch.setattr(device, "gpu_of", lambda _: Gpu("cuda", "86", "A10", 72, 101376))
    with pytest.raises(PackError, match=r"triton compiles for A10 \(sm_86\) itself"):
        pack.use(folder)
    monkeypatch.setattr(device, "gpu_of", lambda _: Gpu("cuda", "75", "T4", 40, 65536))
    with pytest.raises(PackError, match="too old"):
        pack.use(folder)


def test_a_pack_cannot_be_used_without_a_gpu(folder):
    with pytest.raises(PackError, match="no GPU"):
        pack.use(folder)
