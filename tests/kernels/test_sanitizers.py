"""The kernel tests under AddressSanitizer and UndefinedBehaviorSanitizer.

Builds csrc at -O0, which optimises no access away, into build/sanitize, which is kept, and runs a sample of
the tests of every family in one process: what they find is reads past a tail, scratch misuse, shifts,
overflows. The suite takes the best tier of this machine, beside tiles the best without, and a small sample; --slow adds
avx2 and a larger one.
"""

from __future__ import annotations

import os
import re
import shutil
import sys
from pathlib import Path

import pybind11
import pytest
from build_tools import ROOT, run, tool
from llmopt import _C

BUILD = ROOT / "build" / "sanitize"
# About object files or speed, or long and without any access of their own. The test_cuda_* files run none of this code.
LEFT_OUT = {"test_sanitizers.py", "test_objects.py", "test_probe.py", "test_vec_math.py"}
LEFT_OUT |= {f.name for f in (ROOT / "tests/kernels").glob("test_cuda_*.py")}


def gcc_library(name: str) -> str:
    compiler = os.environ.get("CXX", "c++")
    return run([compiler, f"-print-file-name={name}"]).strip()


def build(folder: Path, tiers: list[str]) -> Path:
    """The sanitized extension module; only what changed is compiled again."""
    configure = [tool("cmake"), "-S", ROOT, "-B", folder, "-G", "Ninja", "-DLLMOPT_SANITIZE=ON"]
    configure += [f"-DCMAKE_MAKE_PROGRAM={tool('ninja')}"]
    configure += [f"-DLLMOPT_TIERS={';'.join(tiers)}", f"-Dpybind11_DIR={pybind11.get_cmake_dir()}"]
    # RelWithDebInfo, because pybind11 links Release builds with LTO, which takes a minute here.
    configure += ["-DCMAKE_BUILD_TYPE=RelWithDebInfo"]
    run([*configure, f"-DPython_EXECUTABLE={sys.executable}"])
    run([tool("cmake"), "--build", folder, "--parallel", str(os.cpu_count())])
    return next(folder.glob("_C.*.so"))


def stage(module: Path) -> Path:
    """A folder with the package of the tree, and the sanitized module in it."""
    packages = module.parent / "packages"
    shutil.rmtree(packages, ignore_errors=True)
    package = packages / "llmopt"
    package.mkdir(parents=True)
    for entry in (ROOT / "pycompiler" / "llmopt").iterdir():
        if not entry.name.startswith("_C."):
            (package / entry.name).symlink_to(entry)
    (package / module.name).symlink_to(module)
    return packages


@pytest.mark.parametrize(
    ("form", "share", "least"),  # share: one test in this many; least: fewer say little
    [("short", 48, 10), pytest.param("full", 6, 50, marks=pytest.mark.slow)],
)
def test_kernels_under_sanitizers(form: str, share: int, least: int):
    # A tier with tiles has no kernels of words.
    best = next(t for t in _C.tiers() if t != "amx")
    wanted = {_C.tiers()[0], best} | ({"avx2"} if form == "full" else set())
    tiers = [t for t in _C.tiers() if t in wanted]
    packages = stage(build(BUILD / form, tiers))
    files = [
        f for f in sorted((ROOT / "tests/kernels").glob("test_*.py")) if f.name not in LEFT_OUT
    ]
    output = run(
        [
            sys.executable,
            ROOT / "tests/kernels/sanitized_run.py",
            packages,
            str(share),
            *files,
            "--import-mode=importlib",
            "-x",
            "--capture=sys",  # the sanitizers write to the process's stderr
            "-p",
            "no:cacheprovider",
        ],
        # libstdc++ too: the sanitizer looks for __cxa_throw when it starts, and Python is plain C.
        LD_PRELOAD=f"{gcc_library('libasan.so')}:{gcc_library('libstdc++.so')}",
        ASAN_OPTIONS="detect_leaks=0",
        UBSAN_OPTIONS="print_stacktrace=1",
        PYTHONPATH=str(ROOT),
    )
    passed = re.search(r"(\d+) passed", output)
    assert passed, output[-2000:]
    assert int(passed[1]) >= least, "the sample has become too small to mean anything"
    covered = output.splitlines()[-1].removeprefix("passed in: ").split()
    assert covered == [f.name for f in files], "a family has no test in the sample"
