"""House rules nobody should have to check by eye: who imports whom, file length, side effects."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "pycompiler" / "llmopt"
MAX_LINES = 500

# Lowest first. A file imports only its own group and the groups of lower rows: groups that share a
# row do not know each other, so passes never see kernels.
LAYERS = (
    ("_C", "types", "launch", "settings", "sizes", "files", "source_lines", "tracing"),
    ("target", "graph", "memory", "exchange", "counters", "registry", "messages", "offload"),
    ("gpus", "parameters", "effects", "program"),
    ("casts", "keywords", "inplace_views"),
    ("ops", "writes"),
    ("mirrors",),
    ("autocast",),
    ("quant", "contexts", "constants", "regions", "windows"),
    ("passes", "native", "kernels"),
    ("packing", "lossless"),
    ("kv", "weights", "options"),
    ("tune", "watch", "overlaps", "module_facts"),
    ("gpu", "guards"),
    ("auto",),
    ("plan",),
    ("executor",),
    ("compiled",),
    ("backend",),
    ("explain", "layers", "report"),
    ("llmopt",),  # the package itself: its public names
    ("models",),
    ("benchmark",),
    ("cli",),
)
RANK = {group: rank for rank, groups in enumerate(LAYERS) for group in groups}
MAY_WRITE_FILES = {
    "models",
    "benchmark",
    "cli",
    "explain",
    "gpu",
    "offload",
    "quant",
    "report",
    "tune",
}


def python_files() -> list[Path]:
    return sorted(PACKAGE.rglob("*.py")) + sorted((ROOT / "kernels").rglob("*.py"))


def group_of(path: Path) -> str:
    """The group a file belongs to: its folder's or its own name directly under the package."""
    if path.is_relative_to(ROOT / "kernels"):
        return "kernels"
    first = path.relative_to(PACKAGE).parts[0].removesuffix(".py")
    return "llmopt" if first == "__init__" else first


def imported_groups(path: Path) -> set[str]:
    """The groups of llmopt that a file names in its import statements, wherever they stand."""
    groups = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            modules = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            modules = [f"{node.module}.{alias.name}" for alias in node.names]
        else:
            continue
        for module in modules:
            parts = module.split(".")
            if parts[0] == "llmopt":
                groups.add(parts[1] if len(parts) > 1 and parts[1] in RANK else "llmopt")
    return groups


@pytest.mark.parametrize("path", python_files(), ids=lambda p: str(p.relative_to(ROOT)))
def test_imports_point_downwards(path):
    group = group_of(path)
    assert group in RANK, f"{group} is new: give it a row in LAYERS"
    for other in imported_groups(path) - {group}:
        assert RANK[other] < RANK[group], f"{group} imports {other}, which is not below it"


def test_the_import_check_sees_what_it_should(tmp_path):
    source = (
        "import llmopt\nfrom llmopt import ops, _C\ndef f():\n    from llmopt.plan import Plan\n"
    )
    (tmp_path / "x.py").write_text(source)
    assert imported_groups(tmp_path / "x.py") == {"llmopt", "ops", "_C", "plan"}


def test_no_file_is_too_long():
    files = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT,
        capture_output=True,
        text=True,
    ).stdout.split("\n")
    if not any(files):  # an unpacked archive
        files = [str(p.relative_to(ROOT)) for d in ("pycompiler", "csrc", "tests", "bench")
                 for p in (ROOT / d).rglob("*") if p.is_file()]  # fmt: skip
    sources = [ROOT / f for f in files if f.endswith((".py", ".cpp", ".h", ".inc", ".cmake"))]
    assert len(sources) > 50
    long = {p.name: n for p in sources if p.exists() and (n := _lines(p)) > MAX_LINES}
    assert not long, f"files above {MAX_LINES} lines: {long}"


def _lines(path: Path) -> int:
    return len(path.read_text().splitlines())


def test_every_file_says_what_it_is():
    silent = [str(p) for p in python_files() if not ast.get_docstring(ast.parse(p.read_text()))]
    assert not silent, f"no docstring: {silent}"


def test_only_settings_reads_the_environment():
    reads = re.compile(r"\bos\.(environ|getenv|putenv)\b|from os import .*\b(environ|getenv)\b")
    found = [
        str(p) for p in python_files() if p.name != "settings.py" and reads.search(p.read_text())
    ]
    assert not found, f"environment read outside settings.py: {found}"


def test_at_most_eight_environment_variables():
    from llmopt import settings

    assert 1 <= len(settings.variables()) <= 8
    text = (PACKAGE / "settings.py").read_text()
    named = set(re.findall(r"LLMOPT_[A-Z_]+", text))
    assert named == set(settings.variables()), "the list on top of settings.py is not complete"
    csrc = "".join(p.read_text() for p in (ROOT / "csrc").rglob("*") if p.is_file())
    assert "getenv" not in csrc


def test_the_readme_lists_the_environment_variables():
    from llmopt import settings

    readme = (ROOT / "README.md").read_text()
    assert [name for name in settings.variables() if f"`{name}`" not in readme] == []


def test_only_some_groups_write_files():
    writes = re.compile(
        r"\.write_text\(|\.write_bytes\(|open\([^)]*['\"][wax]b?['\"]|mkdtemp|savefig"
    )
    found = {group_of(p) for p in python_files() if writes.search(p.read_text())}
    assert found <= MAY_WRITE_FILES


def test_csrc_sees_neither_torch_nor_python_outside_its_bindings():
    for path in (ROOT / "csrc").rglob("*"):
        if path.is_file() and path.name != "bind.cpp" and path.parent.name != "python":
            includes = re.findall(r'#include\s+[<"]([^>"]+)', path.read_text())
            assert not [
                i
                for i in includes
                if i.startswith(("torch/", "ATen", "c10", "pybind11", "Python.h"))
            ]


def test_the_types_of_the_native_module_are_complete():
    from llmopt import _C

    stub = ast.parse((PACKAGE / "_C.pyi").read_text())
    names = {n.name for n in stub.body if isinstance(n, ast.FunctionDef | ast.ClassDef)}
    assert names == {name for name in dir(_C) if not name.startswith("_")}
    for cls in (n for n in stub.body if isinstance(n, ast.ClassDef)):
        members = {n.name for n in cls.body if isinstance(n, ast.FunctionDef)} - {"__init__"}
        assert members == {m for m in vars(getattr(_C, cls.name)) if not m.startswith("_")}


HEAVY = ("triton", "transformers", "sympy", "matplotlib", "rich", "numpy.testing", "onnx")


def test_import_llmopt_loads_nothing_heavy():
    """What torch itself has loaded already is free; anything else heavy waits until it is used."""
    code = (
        "import sys, torch; before = set(sys.modules); import llmopt; "
        "print(*sorted(set(sys.modules) - before))"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    loaded = run.stdout.split()
    assert any(name.startswith("llmopt") for name in loaded)
    assert [n for n in loaded if n.split(".")[0] in HEAVY or n.startswith("torch._inductor")] == []
