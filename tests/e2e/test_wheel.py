"""The wheel by itself: unpacked elsewhere and run in lower tiers, with nothing of this folder."""

from __future__ import annotations

import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from llmopt import _C

ROOT = Path(__file__).parents[2]

# An editable install puts its own finder first; the wheel's files must be what is imported.
PROGRAM = """
import sys
sys.meta_path[:] = [f for f in sys.meta_path if "Redirecting" not in type(f).__name__
                    and "scikit" not in type(f).__module__.lower()]
import torch
model = torch.nn.Sequential(torch.nn.Linear(33, 65), torch.nn.GELU(), torch.nn.Linear(65, 17))
x = torch.randn(5, 33)
with torch.inference_mode():
    want = model(x)
    got = torch.compile(model, backend="llmopt")(x)
torch.testing.assert_close(got, want, atol=1e-5, rtol=1e-4)
import llmopt
print(llmopt.__file__)
print(llmopt.target())
"""


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "--quiet"]
    done = subprocess.run(
        [*command, "--wheel-dir", str(folder), str(ROOT)], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    (path,) = folder.glob("*.whl")
    return path


def test_the_wheel_holds_the_package_and_nothing_else(wheel):
    names = zipfile.ZipFile(wheel).namelist()
    top = {name.split("/")[0] for name in names}
    assert {name.split("-")[0] for name in top} == {"llmopt"}
    assert any(name.startswith("llmopt/_C.") and name.endswith(".so") for name in names)
    assert "llmopt/backend.py" in names
    assert "llmopt/kernels/linear.py" in names
    assert "llmopt/kernels/tuned/h100.json" in names
    assert not [name for name in names if name.endswith((".cpp", ".h", ".o"))]
    assert any(name.endswith("licenses/LICENSE") for name in names)


@pytest.mark.parametrize("tier", _C.tiers()[-2:])
def test_the_wheel_runs_elsewhere_in_a_lower_tier(wheel, tmp_path, tier):
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(tmp_path)
    environment = {**os.environ, "PYTHONPATH": str(tmp_path), "LLMOPT_CPU_ISA": tier}
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env=environment,
    )
    assert done.returncode == 0, done.stderr
    path, target = done.stdout.split()
    assert Path(path).is_relative_to(tmp_path)
    assert target == f"cpu:{tier}"
