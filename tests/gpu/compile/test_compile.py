"""Every kernel's tiles, cross-compiled for every GPU generation: resources within limits, and the instructions it is written for."""

from __future__ import annotations

import pytest
import torch
import triton
from llmopt.gpu.compile import binary, compiled, report, signature
from llmopt.gpu.run import is_interpreting, run
from llmopt.kernels import linear, swiglu
from llmopt.kernels.operands import Around
from llmopt.launch import GemmTile, LinearProblem, RowProblem, RowTile
from llmopt.target import GPUS, gpu_target

from tests.gpu.compile.cases import PRODUCTS, ROWS, SHORT_ROWS, cases, meta

assert not is_interpreting(), "TRITON_INTERPRET is set: this process cannot compile"

HOPPER = gpu_target("cuda:90")
# Tiles are chosen for the code that this Triton makes; PyTorch for GPUs may bring an older one, whose code spills elsewhere.
MAY_SPILL = tuple(map(int, triton.__version__.split(".")[:2])) < (3, 9)


def parameters(table):
    return [pytest.param(t, launch, id=name) for name, t, launch in cases(table, GPUS)]


@pytest.mark.parametrize(("target", "launch"), parameters(PRODUCTS))
def test_products_use_what_the_hardware_has(target, launch):
    kernel = compiled(launch, target)
    assert [p for p in kernel.problems(target) if not (MAY_SPILL and "spilled" in p)] == []
    assert kernel.instructions["tensor core"] > 0
    # Of small tiles over 4-bit codes AMD's 64 lanes get four bytes each.
    if (launch.kernel, target.device) != ("linear_w4a8.triton", "hip"):
        assert kernel.instructions["wide load"] > 0
    if target.device == "cuda":
        tma = launch.kernel == "linear_f16_tma.triton"
        assert kernel.instructions["tma" if tma else "async copy"] > 0
    # What the host must allocate for a kernel (device-made descriptors) nobody here allocates.
    assert kernel.global_scratch == 0


@pytest.mark.parametrize(("target", "launch"), parameters(ROWS))
def test_rows_load_wide_and_fit(target, launch):
    kernel = compiled(launch, target)
    assert kernel.problems(target) == []
    assert kernel.instructions["wide load"] > 0


@pytest.mark.parametrize(("target", "launch"), parameters(SHORT_ROWS))
def test_short_rows_fit(target, launch):
    assert compiled(launch, target).problems(target) == []


def test_hopper_products_are_warp_group_products():
    x, w, y = meta(512, 4096), meta(4096, 4096), meta(512, 4096)
    p = LinearProblem(512, 4096, 4096, "fp16")
    launch = linear.launch(p, linear.tiles(p, HOPPER)[0], HOPPER, x, w, y, Around())
    assert "wgmma.mma_async" in binary(launch, HOPPER).asm["ptx"]


def test_profilers_tell_kernels_apart_by_name():
    launches = [launch for table in (PRODUCTS, ROWS) for _, _, launch in cases(table, (HOPPER,))]
    functions = {launch.function for launch in launches}
    assert len({f.__name__ for f in functions}) == len(functions)


def test_a_tile_that_is_too_large_is_named():
    """The check can fail: a tile no target's list has."""
    x, w, y = meta(512, 4096), meta(4096, 4096), meta(512, 4096)
    p = LinearProblem(512, 4096, 4096, "fp16")
    small = gpu_target("cuda:89")
    launch = linear.launch(p, GemmTile(128, 128, 64, 8, 5), small, x, w, y, Around())
    (problem,) = report(launch, small, binary(launch, small)).problems(small)
    assert "bytes of shared memory" in problem


def test_sizes_share_a_binary_unless_they_divide_differently():
    def types(k):
        x, y = meta(4, 2 * k), meta(4, k)
        return signature(swiglu.launch(RowProblem(4, k, "fp16"), RowTile(128), HOPPER, x, y))

    assert types(4096) == types(8192)
    assert types(4096) != types(4097)


def test_running_without_a_gpu_says_what_is_missing():
    x, y = torch.randn(4, 256).half(), torch.empty(4, 128).half()
    launch = swiglu.launch(RowProblem(4, 128, "fp16"), RowTile(128), HOPPER, x, y)
    with pytest.raises(RuntimeError, match=r"no GPU.*TRITON_INTERPRET=1"):
        run(launch)


def test_the_cache_forgets_what_is_not_its_own(tmp_path, monkeypatch):
    monkeypatch.setenv("LLMOPT_CACHE_DIR", str(tmp_path))
    launch = swiglu.launch(
        RowProblem(4, 128, "fp16"), RowTile(128), HOPPER, meta(4, 256), meta(4, 128)
    )
    first = compiled(launch, HOPPER)
    (path,) = (tmp_path / "gpu").glob("*.json")
    path.write_text(path.read_text().replace(f'"registers": {first.registers}', '"registers": 99'))
    assert compiled(launch, HOPPER).registers == 99, "the cache is not read"
    path.write_text("{")
    assert compiled(launch, HOPPER) == first
