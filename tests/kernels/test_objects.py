"""What the kernel objects hold: one symbol each, only their tier's instructions, no spills.

Objects of different tiers are linked into one module. A weak symbol would be merged by the linker,
and the copy compiled for AVX-512 could then be called on a machine without it.
"""

from __future__ import annotations

import re
import subprocess
from collections import Counter
from functools import cache
from itertools import product
from pathlib import Path

import pytest
from build_tools import run, tool

ROOT = Path(__file__).resolve().parents[2]


def isa_rows() -> dict[str, tuple[str, list[str]]]:
    """The table of csrc/cpu/isas.cmake: tier → (header, compiler features)."""
    text = (ROOT / "csrc/cpu/isas.cmake").read_text()
    rows = re.findall(r'^\s*"(\w+)\|(\w+)\|([^"]*)"', text, re.MULTILINE)
    return {tier: (header, features.split()) for tier, header, features in rows}


def families() -> list[str]:
    """Every family of csrc/cpu/isas.cmake."""
    text = (ROOT / "csrc/cpu/isas.cmake").read_text()
    (names,) = re.findall(r"^set\(LLMOPT_CPU_FAMILIES (.*)\)", text, re.MULTILINE)
    return names.split()


def compile_family(family: str, tier: str, folder: Path) -> Path:
    """A kernel family compiled with the build's flags, for installs without a build folder."""
    header, features = isa_rows()[tier]
    out = folder / f"{family}_{tier}.o"
    flags = ["-O3", "-std=c++17", "-fPIC", "-fvisibility=hidden", "-fno-math-errno"]
    flags += [
        "-fno-trapping-math",
        "-ffp-contract=fast",
        "-fno-exceptions",
        *(f"-m{f}" for f in features),
    ]
    if header in ("avx512", "amx"):
        flags.append("-mprefer-vector-width=512")
    defines = [f"-DLLMOPT_ISA={tier}", f'-DLLMOPT_ISA_HEADER="cpu/isa/{header}.h"']
    source = ROOT / f"csrc/cpu/{family}.cpp"
    command = ["g++", *flags, *defines, f"-I{ROOT / 'csrc'}", "-c", source, "-o", out]
    subprocess.run(command, check=True)
    return out


@cache
def is_up_to_date(build: Path) -> bool:
    """True when ninja would compile nothing there."""
    return "no work to do" in run([tool("ninja"), "-C", build, "-n"])


@pytest.fixture(scope="session")
def objects(tmp_path_factory) -> dict[tuple[str, str], Path]:
    """(family, tier) → object file: those of a build that is up to date, or freshly compiled ones of two families."""
    found = {}
    for path in (ROOT / "build").glob("*/CMakeFiles/llmopt_*.dir/csrc/cpu/*.cpp.o"):
        family = path.name.split(".")[0]
        tier = path.parents[2].name.removesuffix(".dir").removeprefix(f"llmopt_{family}_")
        if is_up_to_date(path.parents[4]):
            found[family, tier] = path
    if not {"linear", "linear_quantized"} <= {family for family, _ in found}:
        folder = tmp_path_factory.mktemp("objects")
        pairs = product(("linear", "linear_quantized"), isa_rows())
        found = {(family, tier): compile_family(family, tier, folder) for family, tier in pairs}
    return found


def tiers_of(family: str, objects: dict[tuple[str, str], Path]) -> dict[str, Path]:
    """The objects of a family; skips where they would have to be compiled and take minutes."""
    found = {tier: path for (name, tier), path in objects.items() if name == family}
    if not found:
        pytest.skip(f"build/ has no {family} objects that are up to date: build first (make)")
    return found


def symbols(path: Path) -> list[tuple[str, str]]:
    """(kind, name) of every symbol, kinds as nm prints them."""
    text = subprocess.run(["nm", path], check=True, capture_output=True, text=True).stdout
    return [(line.split()[-2], line.split()[-1]) for line in text.splitlines()]


def disassemble(path: Path) -> dict[str, list[tuple[int, str]]]:
    """Function → its instructions as (address, text)."""
    command = ["objdump", "-d", "-C", "--no-show-raw-insn", path]
    text = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    functions: dict[str, list[tuple[int, str]]] = {}
    name = ""
    for line in text.splitlines():
        if head := re.match(r"^[0-9a-f]+ <(.*)>:$", line):
            name = head[1]
            functions[name] = []
        elif body := re.match(r"^ +([0-9a-f]+):\t(.*)$", line):
            functions[name].append((int(body[1], 16), body[2]))
    return functions


def inner_loops(code: list[tuple[int, str]]) -> list[list[str]]:
    """Bodies of the loops of a function that contain no other loop, or only such as fetch memory."""
    jumps = [
        (int(jump[1], 16), address)
        for address, text in code
        if (jump := re.match(r"j\w+ +([0-9a-f]+)", text)) and int(jump[1], 16) <= address
    ]
    jumps = [(s, e) for s, e in jumps if not only_fetches([t for at, t in code if s <= at <= e])]
    inner = [
        (start, end)
        for start, end in jumps
        if not any((s, e) != (start, end) and start <= s and e <= end for s, e in jumps)
    ]
    return [[text for address, text in code if start <= address <= end] for start, end in inner]


def only_fetches(loop: list[str]) -> bool:
    return any("prefetch" in text for text in loop) and not any("mm" in text for text in loop)


def stack_registers(code: list[tuple[int, str]]) -> str:
    """A pattern of operands on the stack; rbp counts only where it is the frame pointer."""
    framed = any(re.match(r"mov +%rsp,%rbp", text) for _, text in code)
    return r"\(%rsp|\(%rbp" if framed else r"\(%rsp"


every_family = pytest.mark.parametrize("family", families())


@every_family
def test_every_object_exports_its_one_symbol(objects, family):
    for tier, path in tiers_of(family, objects).items():
        exported = [name for kind, name in symbols(path) if kind.isupper() and kind != "U"]
        assert exported == [f"llmopt_{family}_{tier}"], path


@every_family
def test_no_object_has_weak_or_unique_symbols(objects, family):
    for path in tiers_of(family, objects).values():
        assert not [name for kind, name in symbols(path) if kind in "wWvVu"], path


@every_family
def test_no_object_calls_into_the_cpp_library(objects, family):
    for path in tiers_of(family, objects).values():
        assert not [n for kind, n in symbols(path) if kind == "U" and n.startswith("_Z")], path


@every_family
def test_lower_tiers_hold_no_higher_instructions(objects, family):
    higher = {
        "scalar": r"\bv[a-z0-9]+ .*%[xyz]mm|%[yz]mm",
        "avx2": r"%zmm|%k[0-7]\b|%[xy]mm(1[6-9]|[23]\d)",
    }
    paths = tiers_of(family, objects)
    for tier, wrong in higher.items():
        code = [(name, text) for name, body in disassemble(paths[tier]).items() for _, text in body]
        assert len(code) > (200 if family == "probe" else 5000)
        for name, text in code:
            assert not re.search(wrong, text), f"{family} {tier} {name}: {text}"


KEEPS_VECTORS_AWAKE = "vaddps %zmm16,%zmm16,%zmm16"  # csrc/cpu/isa/amx.h

# Micro-kernels over codes where bytes cannot be multiplied, and how many heights and panel counts of each there are.
CODE_KERNELS = {
    "avx2": {"pair_tile": 6, "nibble_tile": 12, "quantized_stream": 6, "nibble_stream": 6},
    "avx512": {"pair_tile": 6, "nibble_tile": 12, "quantized_stream": 18, "nibble_stream": 12},
}


@pytest.mark.parametrize("tier", [t for t in isa_rows() if t != "scalar"])
def test_hot_loops_keep_their_sums_in_registers(objects, tier):
    """A register tile that does not fit still computes the right answer, at half the speed."""
    functions = {n: c for n, c in disassemble(objects["linear", tier]).items() if "::tile<" in n}
    assert len(functions) >= (20 if tier == "avx2" else 40)
    if tier in CODE_KERNELS:  # codes become f32 there
        code = disassemble(objects["linear_quantized", tier])
        over_codes = {f"codes: {n}": c for n, c in code.items() if "::tile<" in n}
        assert len(over_codes) >= (6 if tier == "avx2" else 14)  # heights
        functions |= over_codes
    for name, code in functions.items():
        hot = [loop for loop in inner_loops(code) if sum("vfmadd" in text for text in loop) >= 2]
        assert hot, f"no multiplying loop found in {name}"
        stack = stack_registers(code)
        for loop in hot:
            spills = [t for t in loop if re.search(stack, t) and re.search("%[xyz]mm", t)]
            assert not spills, f"{name}: {spills}"


def test_tile_loops_keep_their_sums_in_registers(objects):
    """Between the steps of a product an epilogue is called: its state must not cross the loop in vectors."""
    functions = {
        name: code
        for family, kernel in (("linear", "term_tile"), ("linear_quantized", "code_tile"))
        for name, code in disassemble(objects[family, "amx"]).items()
        if f"::{kernel}<" in name
    }
    assert len(functions) >= 10
    for name, code in functions.items():
        hot = [loop for loop in inner_loops(code) if sum("tdp" in text for text in loop) >= 2]
        assert hot, f"no multiplying loop found in {name}"
        for loop in hot:
            own = [t for t in loop if t != KEEPS_VECTORS_AWAKE]
            assert len(own) + 1 == len(loop), name
            wrong = [t for t in own if re.search("%[xyz]mm", t) or "tilestored" in t]
            assert not wrong, f"{name}: {wrong}"


@pytest.mark.parametrize("tier", [t for t in isa_rows() if t != "scalar"])
def test_integer_loops_keep_their_sums_in_registers(objects, tier):
    """The same for codes: no vector goes to the stack between the products of a group."""
    code = disassemble(objects["linear_quantized", tier])
    functions = {}
    for kernel, least in CODE_KERNELS.get(
        tier, {"quantized_tile": 7, "quantized_stream": 18}
    ).items():
        found = {n: c for n, c in code.items() if f"::{kernel}<" in n}
        assert len(found) >= least, kernel
        functions |= found
    for name, body in functions.items():
        products = "vpdpbusd" if tier in ("amx", "avx512_vnni") else "vpmaddwd"
        if "::nibble_" in name:
            products = "vpmaddubsw"
        hot = [loop for loop in inner_loops(body) if sum(products in text for text in loop) >= 2]
        assert hot, f"no multiplying loop found in {name}"
        stack = stack_registers(body)
        for loop in hot:
            spills = [t for t in loop if re.search(stack, t) and re.search("%[xyz]mm", t)]
            assert not spills, f"{name}: {spills}"


# Kernels of attention that multiply, and how many loops of each there are at least; what is missing is inlined.
# Scores of decoding: one loop a dtype and number of rows, 4 x 4.
ATTENTION_KERNELS = {
    "avx2": {"dot_block": 16, "dot_keys": 2, "weigh": 80, "tile": 26},
    "avx512": {"dot_scores": 16, "dot_keys": 4, "weigh": 120, "tile": 58},
}  # fmt: skip
# Tiles of words too.
ATTENTION_KERNELS["avx512_vnni"] = {**ATTENTION_KERNELS["avx512"], "tile": 116}


def multiplies_whole_vectors(loop: list[str]) -> bool:
    """Parts of vectors may come by way of the stack: their loops branch much, mask, or add across lanes."""
    products = sum(bool(re.match("vfmadd|vpdpbusd|vpdpwssd|vpmadd", text)) for text in loop)
    branches = sum(text.startswith("j") for text in loop)
    has_parts = any(re.search(r"hadd|maskmov|%k[1-7]\}", text) for text in loop)
    return products >= 2 and branches <= 3 and not has_parts


@pytest.mark.parametrize("tier", [t for t in isa_rows() if t != "scalar"])
def test_attention_keeps_its_sums_in_registers(objects, tier):
    """The same for decoding and prefill."""
    kernels = ATTENTION_KERNELS.get(tier, ATTENTION_KERNELS["avx512"])
    checked = Counter()
    for name, body in disassemble(tiers_of("attention", objects)[tier]).items():
        found = re.search(r"(\w+)[<(]", name.replace("(anonymous namespace)::", ""))
        if not found or found[1] not in kernels:
            continue
        stack = stack_registers(body)
        for loop in filter(multiplies_whole_vectors, inner_loops(body)):
            spills = [t for t in loop if re.search(stack, t) and re.search("%[xyz]mm", t)]
            assert not spills, f"{name}: {spills}"
            checked[found[1]] += 1
    assert all(checked[kernel] >= least for kernel, least in kernels.items()), checked
