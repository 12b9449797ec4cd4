"""Which target plans for which GPU, and what is said where none does; the driver is replaced at gpu/device.py:gpu_of."""

from __future__ import annotations

import re
import sys

import pytest
import torch
from llmopt import kernels
from llmopt.gpu import device, run
from llmopt.gpu.device import Gpu, choose_target, target_of
from llmopt.gpu.run import GpuMissing, check_runnable
from llmopt.launch import LinearProblem
from llmopt.registry import choose
from llmopt.target import gpu_target, target

KIB = 1024
H100 = Gpu("cuda", "90", "NVIDIA H100 80GB HBM3", 132, 227 * KIB)
A10 = Gpu("cuda", "86", "NVIDIA A10", 72, 99 * KIB)
T4 = Gpu("cuda", "75", "Tesla T4", 40, 64 * KIB)
CPU, TENSORS = torch.device("cpu"), [torch.zeros(2, 3)]


@pytest.fixture
def gpu(monkeypatch):
    """Says that tensors on the CPU are on this GPU."""

    def install(found: Gpu) -> None:
        monkeypatch.setattr(device, "gpu_of", lambda d: found if d == CPU else None)

    return install


@pytest.mark.parametrize(
    ("gpu", "tier"),
    [
        (H100, "sm_90"),
        (A10, "sm_80"),
        (Gpu("cuda", "80", "A100", 108, 163 * KIB), "sm_80"),
        (Gpu("cuda", "89", "L4", 58, 99 * KIB), "sm_89"),
        (Gpu("cuda", "103", "B300", 148, 227 * KIB), "sm_100"),
        (Gpu("cuda", "121", "GB10", 48, 99 * KIB), "sm_120"),
        (Gpu("hip", "gfx942", "MI300X", 304, 64 * KIB), "gfx942"),
    ],
    ids=lambda x: x.arch if isinstance(x, Gpu) else x,
)
def test_a_gpu_is_planned_for_with_its_own_limits(gpu, tier):
    found, reason = target_of(gpu)
    assert reason == ""
    assert (found.tier, found.name, found.device) == (tier, gpu.name, gpu.device)
    assert (found.gpu.sms, found.gpu.smem_block) == (gpu.sms, gpu.smem_block)


@pytest.mark.parametrize(
    ("gpu", "words"),
    [
        (T4, r"Tesla T4 \(sm_75\) is too old; possible: sm_80, .*sm_120"),
        (Gpu("cuda", "110", "Thor", 20, 227 * KIB), "without kernels"),
        (Gpu("hip", "gfx90a", "MI250X", 110, 64 * KIB), "gfx90a.* possible: gfx942"),
    ],
    ids=lambda x: x.arch if isinstance(x, Gpu) else None,
)
def test_other_gpus_run_as_in_pytorch_and_say_why(gpu, words, monkeypatch):
    found, reason = target_of(gpu)
    assert found is None
    assert re.search(words, reason)
    monkeypatch.setattr(device, "gpu_of", lambda _: gpu)
    assert choose_target(None, TENSORS)[1] == reason


def test_shared_memory_that_no_tile_fits_is_an_error_with_the_limit():
    kernels.load()
    tiny, _ = target_of(Gpu("cuda", "80", "tiny", 8, 4 * KIB))
    with pytest.raises(ValueError, match="no tile fits the 4096 bytes of shared memory"):
        choose("linear", LinearProblem(512, 64, 64, "fp16"), tiny)


def test_the_target_is_where_the_tensors_are(gpu):
    assert choose_target(None, TENSORS) == (target(), "")
    assert choose_target("cuda:90", TENSORS) == (gpu_target("cuda:90"), "")
    gpu(H100)
    found, reason = choose_target(None, TENSORS)
    assert (found.tier, found.name, reason) == ("sm_90", H100.name, "")
    assert choose_target("cuda:90", TENSORS) == (found, "")
    assert "target='cpu'" in choose_target("cpu", TENSORS)[1]


def test_without_triton_a_model_runs_as_in_pytorch_and_says_why(gpu, monkeypatch):
    gpu(H100)
    monkeypatch.setattr(device.importlib.util, "find_spec", lambda _: None)
    assert "pip install 'llmopt[triton]'" in choose_target(None, TENSORS)[1]


def test_a_target_without_triton_is_an_error_that_says_how_to_get_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "triton", None)
    torch._dynamo.reset()
    linear, options = torch.nn.Linear(16, 16), {"target": "cuda:90"}
    with torch.no_grad(), pytest.raises(Exception, match=r"pip install 'llmopt\[triton\]'"):
        torch.compile(linear, backend="llmopt", options=options)(torch.randn(2, 16))


def test_another_target_than_the_gpu_is_an_error(gpu):
    gpu(A10)
    with pytest.raises(ValueError, match=r"cuda:90.*NVIDIA A10 \(sm_86\) is planned for as sm_80"):
        choose_target("cuda:90", TENSORS)
    gpu(T4)
    with pytest.raises(ValueError, match=r"Tesla T4.*too old"):
        choose_target("cuda:80", TENSORS)


def test_tensors_in_several_places_run_as_in_pytorch():
    meta = torch.zeros(2, device="meta")
    assert "cpu, meta: one device" in choose_target(None, [*TENSORS, meta])[1]
    assert "tensors on meta" in choose_target(None, [meta])[1]
    assert "tensors on meta" in choose_target(None, [meta, torch.tensor(1)])[1]


def test_tensors_on_the_cpu_of_a_machine_with_a_gpu(monkeypatch):
    monkeypatch.setattr(run.torch.cuda, "is_available", lambda: True)
    with pytest.raises(GpuMissing, match=r'model.to\("cuda"\)'):
        check_runnable(CPU)


def test_a_gpu_that_is_too_old_leaves_the_model_to_pytorch(gpu):
    gpu(T4)
    torch._dynamo.reset()
    linear, x = torch.nn.Linear(16, 16), torch.randn(2, 16)
    with torch.no_grad():
        assert torch.equal(torch.compile(linear, backend="llmopt")(x), linear(x))


def test_what_only_the_cpu_has_is_an_error_on_a_gpu(gpu):
    gpu(H100)
    torch._dynamo.reset()
    linear, options = torch.nn.Linear(16, 16), {"weights": "packed"}
    with torch.no_grad(), pytest.raises(Exception, match="'packed' is not available for target='cuda:sm_90'"):  # fmt: skip
        torch.compile(linear, backend="llmopt", options=options)(torch.randn(2, 16))


class _Properties:
    name, multi_processor_count, major, minor = "NVIDIA L4", 58, 8, 9
    shared_memory_per_block, shared_memory_per_block_optin = 48 * KIB, 99 * KIB
    gcnArchName = "gfx942:sramecc+:xnack-"


def test_what_torch_says_about_a_device(monkeypatch):
    monkeypatch.setattr(device.torch.cuda, "get_device_properties", lambda _: _Properties)
    read = device.gpu_of.__wrapped__
    assert read(torch.device("cuda:0")) == Gpu("cuda", "89", "NVIDIA L4", 58, 99 * KIB)
    monkeypatch.setattr(device.torch.version, "hip", "6.4")
    assert read(torch.device("cuda:0")) == Gpu("hip", "gfx942", "NVIDIA L4", 58, 99 * KIB)
    assert read(CPU) is None
