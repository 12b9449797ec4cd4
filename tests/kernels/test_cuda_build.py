"""What nvcc makes of csrc/cuda: registers, spills and instructions for three GPUs, the library that holds it, and its absence."""

from __future__ import annotations

import functools
import importlib.util
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pybind11
import pytest
from build_tools import ROOT, only_one, run, tool
from cuda_emulator.emulator import build as build_emulator
from cuda_emulator.operands import W4A16, W8A8, Decode
from llmopt.native import cuda
from llmopt.native.cuda import CudaError, Library
from tolerance import assert_close

BUILD = ROOT / "build" / "cuda"
ARCHITECTURES = ("80", "90a", "120")
FILES = ("linear_w8a8_gemv", "linear_w8a8_gemm", "linear_w4a16_gemv", "attention_decode")

# Registers of a thread at most: beside each, the warps of a multiprocessor (65536 registers) that they allow.
REGISTERS = {
    r"linear_w8a8_gemm_128x128x64_.*": 128,  # 16: two blocks of 8 warps
    r"linear_w8a8_gemm_64x128x64_.*": 128,  # 16
    r"linear_w8a8_gemm_32x64x128_.*": 96,  # 20
    r"linear_w8a8_gemv_[124]_.*": 72,  # 28
    r"linear_w8a8_gemv_8_.*": 96,  # 20
    r"linear_w4a16_gemv_[124]_.*": 80,  # 25
    r"linear_w4a16_gemv_8_.*": 104,  # 19
    r"attention_decode_.*_1_.*": 64,  # 32
    r"attention_decode_.*_4_.*": 128,  # 16
    r"attention_decode_.*_8_.*": 255,  # 8
}
# Instructions (as nvdisasm writes them) that every kernel of a file must have.
INSTRUCTIONS = {
    "linear_w8a8_gemv": (r"IDP\.4A\.S8\.S8", r"LDG\.E\.NA\.128", r"SHFL\.BFLY"),
    "linear_w8a8_gemm": (
        r"IMMA\.16832\.S8\.S8",
        r"LDSM\.16\.M88\.4",
        r"LDGSTS\.E\.BYPASS\.128\.ZFILL",
    ),
    "linear_w4a16_gemv": (r"LDG\.E\.NA", r"LDG\.E\.128", r"HADD2", r"FFMA"),
    "attention_decode": (r"LDG\.E\.NA\.(128|64)", r"MUFU\.EX2", r"SHFL\.BFLY", r"ATOMG"),
}
SPILLED = r"\b(LDL|STL)\b"
UNKNOWN_SPACE = r"\b(LD|ST)\.E\b"  # an address whose kind of memory the compiler did not see


def nvcc() -> str:
    return tool("nvcc", Path("/usr/local/cuda/bin"), brought_by="the CUDA toolkit, 12.8 or newer,")


def triton_tools() -> Path:
    """cuobjdump and nvdisasm come with triton; the toolkit may lack them."""
    found = importlib.util.find_spec("triton")
    return Path(str(found.origin)).parent / "backends/nvidia/bin" if found else Path()


def disassembler(*arguments: str | Path) -> str:
    path = tool(
        "cuobjdump", triton_tools(), brought_by="pip install '.[test]', or the CUDA toolkit,"
    )
    folders = f"{Path(path).parent}{os.pathsep}{os.environ.get('PATH', '')}"
    return run([path, *arguments], PATH=folders)


def configure(folder: Path, *options: str) -> list[str | Path]:
    command = [tool("cmake"), "-S", ROOT, "-B", folder, "-G", "Ninja", "-DLLMOPT_CUDA=ON"]
    command += [
        f"-DCMAKE_MAKE_PROGRAM={tool('ninja')}",
        f"-Dpybind11_DIR={pybind11.get_cmake_dir()}",
    ]
    return [*command, f"-DPython_EXECUTABLE={sys.executable}", *options]


@pytest.fixture(scope="session")
def library() -> Path:
    """libllmopt_cuda.so for three architectures, by the project's own build; only what changed is compiled again."""
    with only_one(BUILD):
        architectures = f"-DLLMOPT_CUDA_ARCHITECTURES={';'.join(ARCHITECTURES)}"
        run(configure(BUILD, f"-DLLMOPT_NVCC={nvcc()}", architectures))
        run([tool("cmake"), "--build", BUILD, "--target", "llmopt_cuda"])
    return BUILD / "libllmopt_cuda.so"


@functools.cache
def resources(cubin: Path) -> dict[str, dict[str, int]]:
    """Kernel → its REG, STACK and LOCAL."""
    text = disassembler("--dump-resource-usage", cubin)
    found = re.findall(r"Function (\w+):\s+(.*)", text)
    return {name: {k: int(v) for k, v in re.findall(r"(\w+):(\d+)", rest)} for name, rest in found}


@functools.cache
def code(cubin: Path) -> dict[str, str]:
    """Kernel → its instructions."""
    parts = re.split(r"Function : (\w+)", disassembler("-sass", cubin))[1:]
    return dict(zip(parts[::2], parts[1::2], strict=True))


@pytest.fixture(
    params=[(f, a) for f in FILES for a in ARCHITECTURES], ids=lambda p: f"{p[0]}-sm_{p[1]}"
)
def cubin(request, library) -> Path:
    file, architecture = request.param
    return BUILD / "cuda" / f"{file}.sm_{architecture}.cubin"


def test_registers_and_spills(cubin):
    kernels = resources(cubin)
    assert len(kernels) >= 6
    for name, used in kernels.items():
        assert used["STACK"] == used["LOCAL"] == 0, f"{name} spills: {used}"
        (limit,) = (limit for pattern, limit in REGISTERS.items() if re.fullmatch(pattern, name))
        assert used["REG"] <= limit, f"{name} takes {used['REG']} registers"


def test_instructions(cubin):
    for name, text in code(cubin).items():
        for instruction in INSTRUCTIONS[cubin.name.split(".")[0]]:
            assert re.search(instruction, text), f"{name} has no {instruction}"
        assert not re.search(SPILLED, text), name
        assert not re.search(UNKNOWN_SPACE, text), name


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize(
    ("tile", "least"), [("128x128x64", 2.5), ("64x128x64", 2.5), ("32x64x128", 1.3)]
)
def test_fragments_are_used_again_from_registers(library, tile, least, architecture):
    """Products of 16x8x32 for every ldmatrix, which brings the operands of one and a half."""
    text = code(BUILD / "cuda" / f"linear_w8a8_gemm.sm_{architecture}.cubin")[
        f"linear_w8a8_gemm_{tile}_f16"
    ]
    products, loads = (len(re.findall(i, text)) for i in (r"\bIMMA\b", r"\bLDSM\b"))
    assert products / loads >= least


def test_every_build_has_the_kernels_of_the_emulator(library):
    symbols = run([tool("nm", brought_by="binutils"), "-D", "--defined-only", build_emulator()])
    emulated = {n for n in re.findall(r" T (\w+)", symbols) if n.startswith(FILES)}
    for architecture in ARCHITECTURES:
        cubins = [BUILD / "cuda" / f"{file}.sm_{architecture}.cubin" for file in FILES]
        assert set().union(*(resources(c) for c in cubins)) == emulated
    assert len(emulated) > 30


def test_the_library_holds_every_cubin_and_needs_no_cuda(library):
    content = library.read_bytes()
    for cubin in (BUILD / "cuda").glob("*.cubin"):
        if any(cubin.name.endswith(f"sm_{a}.cubin") for a in ARCHITECTURES):
            assert cubin.read_bytes() in content
    needed = run([tool("readelf", brought_by="binutils"), "-d", library])
    assert not re.search(r"NEEDED.*(cuda|nv)", needed)


@pytest.fixture
def fresh(library, tmp_path) -> Path:
    """A copy of the library that no driver has been opened in."""
    return Path(shutil.copy(library, tmp_path / "libllmopt_cuda.so"))


def test_the_built_launchers_over_the_emulated_driver(fresh, emulator):
    """The library as it ships, its own cubins handed to a driver that runs the kernels on the host."""
    shipped = Library(fresh, str(emulator.path))
    shipped.check()
    emulator.library = shipped
    for problem in (
        W8A8(3, 20, 64),
        W8A8(40, 70, 200),
        W4A16(2, 9, 64, 32, True),
        Decode(4, 2, 64, (50,), 2),
    ):
        assert_close(problem.run(emulator), problem.want())


@pytest.mark.parametrize("capability", [80, 86, 90, 120, 121])
def test_gpus_that_some_build_fits(fresh, emulator, capability):
    emulator.device(capability)
    Library(fresh, str(emulator.path)).check()


@pytest.mark.parametrize("capability", [75, 100, 130])
def test_other_gpus_are_refused(fresh, emulator, capability):
    emulator.device(capability)
    shipped = Library(fresh, str(emulator.path))
    wanted = f"this GPU is sm_{capability}; the kernels were built for sm_80, sm_90, sm_120"
    with pytest.raises(CudaError, match=wanted):
        shipped.check()
    p = W8A8(1, 8, 16)
    emulator.library = shipped
    with pytest.raises(CudaError, match=wanted):
        p.run(emulator)


def test_what_is_missing_is_said(fresh, emulator, tmp_path, monkeypatch):
    with pytest.raises(CudaError, match="no CUDA driver: libnothing"):
        Library(fresh, "libnothing.so.1")
    with pytest.raises(CudaError, match="lacks functions of the driver API"):
        Library(fresh, "libm.so.6")
    emulator.device(context=False)
    with pytest.raises(CudaError, match="no CUDA context is current"):
        Library(fresh, str(emulator.path)).check()
    with pytest.raises(CudaError, match="cannot be loaded"):
        Library(tmp_path / "nothing.so")
    monkeypatch.setattr(cuda, "RECORDS", dict(reversed(cuda.RECORDS.items())))
    with pytest.raises(CudaError, match="built from other sources"):
        Library(fresh, str(emulator.path))


def test_an_installation_without_the_kernels_says_how_to_build_them(tmp_path, monkeypatch):
    monkeypatch.setattr(cuda._C, "__file__", str(tmp_path / "_C.so"))
    cuda.library.cache_clear()
    assert "LLMOPT_CUDA=ON" in cuda.missing()


def test_shared_memory_fits_consumer_gpus_and_is_refused_where_it_does_not(emulator):
    emulator.device(shared=101376)  # sm_86, sm_89 and sm_120
    p = W8A8(150, 200, 100)
    assert_close(p.run(emulator), p.want())
    emulator.device(shared=65536)
    with pytest.raises(CudaError, match="needs 69632 bytes of shared memory; this GPU has 65536"):
        p.run(emulator)


def cmake_error(tmp_path: Path, *options: str, **environment: str) -> str:
    command = [str(c) for c in configure(tmp_path / "build", *options)]
    done = subprocess.run(
        command, env={**os.environ, **environment}, stderr=subprocess.PIPE, text=True
    )
    assert done.returncode != 0
    return " ".join(done.stderr.split())


def test_the_build_says_that_nvcc_is_missing(tmp_path):
    tools = tmp_path / "tools"
    tools.mkdir()
    for name in ("c++", "g++", "cc", "gcc", "ar", "ranlib", "ld", "as", "uname"):
        (tools / name).symlink_to(tool(name, brought_by="gcc"))
    # A launcher such as ccache, if the environment names one, is not among the tools.
    launchers = dict.fromkeys(("CMAKE_C_COMPILER_LAUNCHER", "CMAKE_CXX_COMPILER_LAUNCHER"), "")
    error = cmake_error(tmp_path, PATH=str(tools), CUDA_HOME="", CUDA_PATH="", **launchers)
    assert "LLMOPT_CUDA=ON needs nvcc of CUDA 12.8 or newer" in error
    assert "Without LLMOPT_CUDA the build is for CPUs" in error


def test_the_build_refuses_an_old_nvcc(tmp_path):
    old = tmp_path / "nvcc"
    old.write_text("#!/bin/sh\necho 'Cuda compilation tools, release 11.8, V11.8.89'\n")
    old.chmod(0o755)
    error = cmake_error(tmp_path, f"-DLLMOPT_NVCC={old}")
    assert "needs nvcc of CUDA 12.8 or newer" in error
    assert "release 11.8" in error
