"""Packed launches over a driver that writes them down: the same kernels, grids and arguments as triton's own launcher gives."""

from __future__ import annotations

import ctypes
import gc
import re
import shutil
import struct
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
import triton
from llmopt import _C, kernels
from llmopt.compiled import alive
from llmopt.gpu import device, executor, launching, native, run, weights
from llmopt.gpu.compile import _tools
from llmopt.gpu.native import NotNative
from llmopt.kernels import linear_tma, swiglu
from llmopt.kernels.operands import Around
from llmopt.launch import LinearProblem, RowProblem, RowTile
from llmopt.target import gpu_target

from tests.gpu.compile.fake_driver import FakeDriver
from tests.gpu.compile.test_pack_launch import H100, aligned

kernels.load()
HOPPER = gpu_target("cuda:90")
CPU = torch.device("cpu")
STREAM = 77


class FakeCuda:
    """The driver library of fake_cuda.cpp."""

    def __init__(self, path: Path) -> None:
        self._library = ctypes.CDLL(str(path))
        self.path = path

    def define(self, function: int, sizes: list[int]) -> None:
        self._library.define(
            ctypes.c_void_p(function), (ctypes.c_uint64 * len(sizes))(*sizes), len(sizes)
        )

    def refuse(self, result: int) -> None:
        self._library.refuse(result)

    def forget(self) -> None:
        self._library.forget()

    def launches(self) -> list[bytes]:
        """What was launched: seven numbers of 8 bytes (function, grid, threads, shared bytes, stream), then the parameters."""
        buffer, found = ctypes.create_string_buffer(8192), []
        while (length := self._library.take(len(found), buffer, len(buffer))) >= 0:
            assert length <= len(buffer)
            found.append(buffer.raw[:length])
        return found


@pytest.fixture(scope="module")
def library(tmp_path_factory):
    compiler = shutil.which("g++")
    assert compiler is not None, "g++ is missing: the other tests need it, too"
    path = tmp_path_factory.mktemp("cuda") / "fake_cuda.so"
    source = Path(__file__).with_name("fake_cuda.cpp")
    subprocess.run(
        [compiler, "-O0", "-shared", "-fPIC", "-std=c++17", str(source), "-o", str(path)],
        check=True,
    )
    return FakeCuda(path)


class Driver(FakeDriver):
    """Tells the fake library what each loaded kernel's parameters are, as its binary says."""

    cuda: FakeCuda

    def load_binary(self, name: str, binary: bytes, shared: int, number: int) -> tuple:
        module, index, *rest = super().load_binary(name, binary, shared, number)
        path = self.cuda.path.with_name("kernel.cubin")
        path.write_bytes(binary)
        text = subprocess.run(
            [str(_tools() / "cuobjdump"), "-elf", str(path)],
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        found = re.findall(r"Ordinal\s*:\s*(0x\w+)\s+Offset\s*:\s*0x\w+\s+Size\s*:\s*(0x\w+)", text)
        sizes = {int(ordinal, 16): int(size, 16) for ordinal, size in found}
        assert sorted(sizes) == list(range(len(sizes)))
        self.cuda.define(index, [sizes[i] for i in range(len(sizes))])
        return module, index, *rest


@pytest.fixture
def driver(library, monkeypatch):
    fake = Driver(HOPPER)
    fake.cuda = library
    library.forget()
    library.refuse(0)
    _C.open_gpu_driver(str(library.path))
    monkeypatch.setattr(triton.runtime.driver, "_active", fake)
    monkeypatch.setattr(device, "gpu_of", lambda _: H100)
    monkeypatch.setattr(native, "_handles", {})
    for module in (run, executor, launching):
        monkeypatch.setattr(module, "check_runnable", lambda _: None)
    yield fake
    # Kernels are unloaded when they go: while there is this driver.
    torch._dynamo.reset()
    native._handles.clear()
    gc.collect()


def no_place(name: str, tensor: torch.Tensor) -> tuple[int, int]:
    raise AssertionError("nothing is on the meta device here")


def words(launched: bytes) -> list[int]:
    return list(struct.unpack_from("<7Q", launched))


def test_a_packed_launch_has_the_kernel_s_grid_and_arguments(driver, library):
    x, y = aligned(4, 256), aligned(4, 128)
    launch = swiglu.launch(RowProblem(4, 128, "fp16"), RowTile(128), HOPPER, x, y)
    plan = _C.LaunchPlan([native.pack([launch], HOPPER, CPU, no_place).launches])
    plan.run(0, STREAM, [])
    (launched,) = library.launches()
    handle = native.handle_of(launch, HOPPER, CPU)
    assert words(launched) == [handle.function, *(*launch.grid, 1, 1)[:3], 32 * launch.num_warps, handle.shared, STREAM]  # fmt: skip
    expected = b""
    for kind, name in handle.parameters:
        value = launch.arguments[name]
        form = {"pointer": "<Q", "i32": "<i", "i64": "<q", "fp32": "<f"}[kind]
        expected += struct.pack(form, value.data_ptr() if kind == "pointer" else value)
    assert launched[56:] == expected + bytes(16)


def test_matrices_become_tensor_maps(driver, library):
    p = LinearProblem(256, 128, 64, "fp16")
    tile = linear_tma.tiles(p, HOPPER)[0]
    x, w, y = aligned(256, 64), aligned(128, 64), aligned(256, 128)
    launch = linear_tma.launch(p, tile, HOPPER, x, w, y, Around())
    _C.LaunchPlan([native.pack([launch], HOPPER, CPU, no_place).launches]).run(0, STREAM, [])
    (launched,) = library.launches()
    for start, tensor, rows in ((56, x, tile.block_m), (56 + 152, w, tile.block_n)):
        address, columns, count, row_bytes, box_columns, box_rows, data_type, _, rank = (
            struct.unpack_from("<9Q", launched, start)
        )
        assert (address, count, columns) == (tensor.data_ptr(), *tensor.shape)
        assert (row_bytes, data_type, rank) == (128, 6, 2)  # 6: CU_TENSOR_MAP_DATA_TYPE_FLOAT16
        assert (box_rows, box_columns) == (rows, tile.block_k)
        assert struct.unpack_from("<2i2q", launched, start + 128) == (*tensor.shape, 64, 1)


def test_addresses_are_those_of_the_call(driver, library):
    x, y = torch.empty(4, 256, dtype=torch.float16, device="meta"), torch.empty(4, 128, dtype=torch.float16, device="meta")  # fmt: skip
    launch = swiglu.launch(RowProblem(4, 128, "fp16"), RowTile(128), HOPPER, x, y)
    packed = native.pack([launch], HOPPER, CPU, lambda _, t: (0, 32) if t is x else (1, 0))
    plan = _C.LaunchPlan([packed.launches])
    plan.run(0, STREAM, [1 << 40, 1 << 41])
    plan.run(0, STREAM, [1 << 42, 1 << 43])
    first, second = (sorted(struct.unpack_from("<2Q", one, 56)) for one in library.launches())
    assert first == [(1 << 40) + 32, 1 << 41]
    assert second == [(1 << 42) + 32, 1 << 43]
    with pytest.raises(ValueError, match="1 addresses for 2 buffers"):
        plan.run(0, STREAM, [1 << 40])


def test_a_refusal_of_the_driver_is_an_error(driver, library):
    launch = swiglu.launch(RowProblem(4, 128, "fp16"), RowTile(128), HOPPER, aligned(4, 256), aligned(4, 128))  # fmt: skip
    plan = _C.LaunchPlan([native.pack([launch], HOPPER, CPU, no_place).launches])
    library.refuse(2)
    with pytest.raises(
        RuntimeError, match=r"cuLaunchKernel swiglu\.triton: a refusal of the test's"
    ):
        plan.run(0, STREAM, [])


def test_a_kernel_with_other_parameters_is_left_to_triton(driver, monkeypatch):
    monkeypatch.setattr(native._C, "parameter_bytes", lambda _: [8, 8])
    launch = swiglu.launch(RowProblem(4, 128, "fp16"), RowTile(128), HOPPER, aligned(4, 256), aligned(4, 128))  # fmt: skip
    with pytest.raises(NotNative, match="takes parameters of"):
        native.pack([launch], HOPPER, CPU, no_place)


def numbers(handle: native.Handle, launched: bytes) -> dict[str, int | float]:
    """The arguments of a launch that are no addresses, by name."""
    found: dict[str, int | float] = {}
    at = 56
    for kind, name in handle.parameters:
        if kind in ("i32", "i64", "fp32"):
            form = {"i32": "<i", "i64": "<q", "fp32": "<f"}[kind]
            (found[name],) = struct.unpack_from(form, launched, at)
        at += sum(native.bytes_of(kind))
    return found


def test_another_layer_s_buffers(driver, library):
    x, y = torch.empty(4, 256, dtype=torch.float16, device="meta"), torch.empty(4, 128, dtype=torch.float16, device="meta")  # fmt: skip
    launch = swiglu.launch(RowProblem(4, 128, "fp16"), RowTile(128), HOPPER, x, y)
    packed = native.pack([launch], HOPPER, CPU, lambda _, t: (0, 32) if t is x else (1, 0))
    other = packed.launches.over([(0, 3), (1, 0)])
    addresses = [(40 + i) << 32 for i in range(4)]
    for launches in (packed.launches, other):
        _C.LaunchPlan([launches]).run(0, STREAM, addresses)
    first, second = (sorted(struct.unpack_from("<2Q", one, 56)) for one in library.launches())
    assert first == [addresses[0] + 32, addresses[1]]
    assert second == [addresses[0], addresses[3] + 32]


def _llama() -> torch.nn.Module:
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        hidden_size=128, num_attention_heads=4, num_key_value_heads=2, head_dim=32, vocab_size=128,
        intermediate_size=256, num_hidden_layers=2,
    )  # fmt: skip
    return transformers.LlamaForCausalLM(config).half().eval()


def _step(model: Any, compiled: Any, length: int) -> None:
    """A prompt and four tokens."""
    cache = transformers.DynamicCache(config=model.config)
    ids = torch.arange(length)[None]
    compiled(input_ids=ids, past_key_values=cache)
    for i in range(4):  # every second id begins at 8 bytes
        compiled(input_ids=ids[:, i : i + 1], past_key_values=cache)


def test_a_model_launches_natively_what_it_launches_through_triton(driver, library, monkeypatch):
    """Every launch of a prompt and of decoding with a cache that grows: kernel, grid and all arguments but addresses."""
    model = _llama()
    monkeypatch.setattr(torch.cuda, "current_stream", lambda *_: type("Stream", (), {"cuda_stream": STREAM})())  # fmt: skip
    through_triton: list[tuple] = []
    logs = {}
    for packed in (True, False):
        torch._dynamo.reset()
        monkeypatch.setattr(launching, "_can_pack", lambda _, packed=packed: packed)
        compiled = torch.compile(model, backend="llmopt", options={"target": "cuda:90"})
        with torch.no_grad():
            _step(model, compiled, 20)
            driver.launched.clear()
            library.forget()
            _step(model, compiled, 20)
        modules = [m for graph in alive() for m in graph.executable.modules()]
        segments = [m for m in modules if isinstance(m, executor.GpuSegment)]
        assert segments
        assert not any(s.launcher.through_triton for s in segments)
        logs[packed] = library.launches()
        through_triton = driver.launched
    assert logs[False] == []
    assert len(logs[True]) == len(through_triton)
    handles = {h.function: h for h in native._handles.values()}
    lengths = set()
    for mine, theirs in zip(logs[True], through_triton, strict=True):
        function, *grid = words(mine)[:4]
        assert driver.binaries[function] == theirs.binary
        assert tuple(grid) == theirs.grid
        names = handles[function].kernel.src.fn.arg_names
        given = dict(zip(names, theirs.arguments, strict=True))
        mine_given = numbers(handles[function], mine)
        assert mine_given == pytest.approx({name: given[name] for name in mine_given})
        lengths.add(mine_given.get("Skv"))
    assert {21, 22, 23, 24} <= lengths


def test_layers_that_share_a_graph_are_planned_once_each(driver, library, monkeypatch):
    """Weights are prepared and launches packed once a layer; what is kept goes with the layer."""
    stream = type("Stream", (), {"cuda_stream": STREAM})()
    monkeypatch.setattr(torch.cuda, "current_stream", lambda *_: stream)
    monkeypatch.setattr(launching, "_can_pack", lambda _: True)
    torch._dynamo.reset()
    prepared, packed = [], []
    for module, name, calls in ((weights, "prepare", prepared), (launching, "pack", packed)):
        plain = getattr(module, name)
        monkeypatch.setattr(module, name, lambda *a, f=plain, c=calls: c.append(1) or f(*a))

    def run(layer: torch.nn.Module, x: torch.Tensor) -> torch.Tensor:
        return layer(x)

    compiled = torch.compile(run, backend="llmopt", options={"target": "cuda:90"})
    layers = [torch.nn.Linear(64, 64).half() for _ in range(3)]
    x = aligned(4, 64)
    with torch.no_grad():
        for layer in layers * 2:
            compiled(layer, x)
    modules = [m for graph in alive() for m in graph.executable.modules()]
    (segment,) = [m for m in modules if isinstance(m, executor.GpuSegment)]
    assert (len(prepared), len(packed), len(segment.launcher._sets)) == (3, 3, 3)
    addresses = {struct.unpack_from("<Q", one, 56 + 8 * 1)[0] for one in library.launches()}
    assert addresses >= {layer.weight.data_ptr() for layer in layers}
    del layer, layers[1:]
    gc.collect()
    assert len(segment.launcher._sets) == 1
