"""Cross-compiling launches to a GPU generation with no GPU and no driver, and reading what the compiler made of them.

Needs only triton, which brings the assemblers and disassemblers of both makers. A launch is specialised as triton's own launcher would:
pointers and sizes that are multiples of 16, sizes that are 1, arguments that are None.
"""

from __future__ import annotations

import functools
import hashlib
import json
import re
import subprocess
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch

from llmopt import settings
from llmopt.gpu.run import COMPILER_OPTIONS
from llmopt.launch import Descriptor, Launch
from llmopt.native.cuda_kernels import CudaFunction
from llmopt.types import Target

# Instructions worth knowing about, by maker: in PTX and in AMD's assembly.
_INSTRUCTIONS = {
    "cuda": {
        "tensor core": r"\b(?:mma\.sync|wgmma\.mma_async|tcgen05\.mma)[\w.:]*",
        "async copy": r"\bcp\.async\.(?:cg|ca)[\w.]*",
        "tma": r"\bcp\.async\.bulk\.tensor[\w.]*",
        # Eight bytes or more a thread.
        "wide load": r"\bld\.global[\w.:]*\.v[24]\.b(?:32|64)|\bcp\.async\.cg[\w.]*|\bcp\.async\.bulk\.tensor[\w.]*"
        r"|\bcp\.async\.ca[\w.]*[^;]*, (?:0x)?8\b",
    },
    "hip": {
        "tensor core": r"\bv_mfma_\w+",
        "wide load": r"\b(?:global|buffer)_load_dwordx[234]\b",
        "async copy": r"\bbuffer_load\w+.*\blds\b",
    },
}
_POINTERS = {
    torch.float32: "*fp32",
    torch.float16: "*fp16",
    torch.bfloat16: "*bf16",
    torch.int8: "*i8",
    torch.uint8: "*u8",
    torch.int32: "*i32",
    torch.int64: "*i64",
}


@dataclass(frozen=True)
class Compiled:
    """What one launch became on one target. Registers are those of one thread; spills are bytes on NVIDIA, registers on AMD."""

    kernel: str
    target: str
    shared: int
    registers: int
    spills: int
    num_warps: int
    global_scratch: int
    instructions: dict[str, int]  # kinds of _INSTRUCTIONS → how many

    def problems(self, target: Target) -> list[str]:
        """Why it should not be used, if so."""
        found = []
        assert target.gpu is not None
        if self.shared > target.gpu.smem_block:
            found.append(
                f"{self.shared} bytes of shared memory, {target} has {target.gpu.smem_block}"
            )
        if self.spills:
            found.append(f"{self.spills} spilled")
        return found


def signature(launch: Launch) -> tuple[dict[str, str], dict[str, Any], dict[tuple, list]]:
    """(types, constants, attributes) of a launch's parameters, by name and position, as triton's compiler takes them.

    attributes has the empty entries that triton's launcher has: its cache key includes them.
    """
    types: dict[str, str] = {}
    constants = dict(launch.constants)
    attributes: dict[tuple, list] = {}
    for position, name in enumerate(launch.function.arg_names):
        value = launch.arguments.get(name)
        if name in launch.constants or value is None or (_is_int(value) and value == 1):
            types[name] = "constexpr"
            constants.setdefault(name, value)
            if _lists_every_constant() or isinstance(constants[name], str):
                attributes[(position,)] = []
            continue
        types[name] = _type(value)
        if isinstance(value, torch.Tensor) or _is_int(value):
            attributes[(position,)] = [["tt.divisibility", 16]] if _divides_16(value) else []
    return types, constants, attributes


@functools.cache
def _lists_every_constant() -> bool:
    """Whether triton's launcher has an entry for every constant, as 3.9 does, or only for texts, as 3.6: asked of it for a 1."""
    from triton.runtime.jit import JITFunction

    function = SimpleNamespace(params=[])
    backend = SimpleNamespace(parse_options=lambda _: None, parse_attr=lambda _: [])
    *_, attributes = JITFunction._pack_args(
        function, backend, {}, {"one": 1}, [("constexpr", 1)], None
    )
    return bool(attributes)


def _is_int(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _type(value: Any) -> str:
    if isinstance(value, torch.Tensor):
        return _POINTERS[value.dtype]
    if isinstance(value, Descriptor):
        rows, columns = value.block
        return f"tensordesc<{_POINTERS[value.tensor.dtype][1:]}[{rows}, {columns}]>"
    if isinstance(value, float):
        return "fp32"
    return "i32" if -(2**31) <= value < 2**31 else "i64"


def _divides_16(value: Any) -> bool:
    if isinstance(value, torch.Tensor):
        return value.storage_offset() * value.element_size() % 16 == 0
    return _is_int(value) and value % 16 == 0


def specialisation(launch: Launch, target: Target) -> str:
    """What of a launch the compiled kernel depends on: equal texts share one binary."""
    import triton

    types, constants, attributes = signature(launch)
    parts = {
        "source": launch.function.cache_key,
        "target": str(target),
        "triton": triton.__version__,
        "types": types,
        "constants": {k: str(v) for k, v in constants.items()},
        "attributes": {str(k[0]): v for k, v in attributes.items() if v},
        "options": [launch.num_warps, launch.num_stages],
    }
    return json.dumps(parts, sort_keys=True)


def binary(launch: Launch, target: Target, generation: Any = None) -> Any:
    """triton's compiled kernel: `.asm`, `.metadata`. generation: triton's word for it where it is not the target's own, as 86.

    Raises RuntimeError while kernels are interpreted in this process.
    """
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    if not hasattr(launch.function, "cache_key"):
        raise RuntimeError("llmopt: TRITON_INTERPRET=1 is set: this process can only interpret")
    assert target.gpu is not None
    types, constants, attributes = signature(launch)
    positions = {
        (launch.function.arg_names.index(name),): value for name, value in constants.items()
    }
    source = ASTSource(launch.function, types, positions, attributes)
    own: Any = int(target.gpu.arch) if target.device == "cuda" else target.gpu.arch
    arch = own if generation is None else generation
    options = {
        "num_warps": launch.num_warps,
        "num_stages": launch.num_stages,
        **COMPILER_OPTIONS,
    }
    return triton.compile(
        source, GPUTarget(target.device, arch, target.gpu.warp_size), options=options
    )


def compiled(launch: Launch, target: Target) -> Compiled:
    """What a launch becomes on a target, from the cache directory where the same sources were compiled before."""
    text = specialisation(launch, target)
    path = settings.cache_dir() / "gpu" / f"{hashlib.sha256(text.encode()).hexdigest()[:32]}.json"
    counted = _INSTRUCTIONS[target.device]
    known = _read(path, text, counted)
    if known is not None:
        return known
    result = report(launch, target, binary(launch, target))
    _write(path, {"of": text, "counted": counted, "report": asdict(result)})
    return result


def report(launch: Launch, target: Target, kernel: Any) -> Compiled:
    """Resources and instructions of triton's compiled kernel."""
    assembly = kernel.asm["ptx" if target.device == "cuda" else "amdgcn"]
    read = _nvidia_resources if target.device == "cuda" else _amd_resources
    registers, spills = read(kernel)
    metadata = kernel.metadata
    counts = {
        name: len(re.findall(p, assembly)) for name, p in _INSTRUCTIONS[target.device].items()
    }
    scratch = getattr(metadata, "global_scratch_size", 0) or 0
    return Compiled(
        launch.kernel, str(target), metadata.shared, registers, spills, launch.num_warps, scratch, counts
    )  # fmt: skip


@functools.lru_cache(maxsize=1)
def _tools() -> Path:
    import triton

    return Path(triton.__file__).parent / "backends" / "nvidia" / "bin"


def _nvidia_resources(kernel: Any) -> tuple[int, int]:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(kernel.asm["cubin"])
        file.flush()
        command = [str(_tools() / "cuobjdump"), "--dump-resource-usage", file.name]
        text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    found = re.search(r"REG:(\d+) STACK:(\d+) SHARED:\d+ LOCAL:(\d+)", text)
    if found is None:
        raise RuntimeError(f"llmopt: cuobjdump says nothing about resources: {text!r}")
    registers, stack, local = map(int, found.groups())
    return registers, stack + local


def _amd_resources(kernel: Any) -> tuple[int, int]:
    text = kernel.asm["amdgcn"]
    numbers = {
        name: int(value)
        for name, value in re.findall(r"\.(vgpr_count|vgpr_spill_count):\s+(\d+)", text)
    }  # fmt: skip
    return numbers["vgpr_count"], numbers["vgpr_spill_count"]


def _read(path: Path, text: str, counted: dict[str, str]) -> Compiled | None:
    """A cached report; anything that is not one of this very source, by these patterns, counts as none."""
    try:
        entry = json.loads(path.read_text())
        is_this = entry["of"] == text and entry["counted"] == counted
        return Compiled(**entry["report"]) if is_this else None
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _write(path: Path, entry: dict[str, Any]) -> None:
    """Whole or not at all; a folder that cannot be written is no cache."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(
            "w", dir=path.parent, suffix=".part", delete=False
        ) as file:
            json.dump(entry, file)
        Path(file.name).replace(path)
    except OSError:
        return


def unique(
    launches: list[Launch], target: Target, uses: dict[str, int] | None = None
) -> dict[str, Launch]:
    """One launch for every distinct Triton binary, by specialisation; `uses` counts how many share each.

    Kernels in CUDA C++ are in the library that launches them.
    """
    found: dict[str, Launch] = {}
    counts = {} if uses is None else uses
    for launch in launches:
        if isinstance(launch.function, CudaFunction):
            continue
        text = specialisation(launch, target)
        found.setdefault(text, launch)
        counts[text] = counts.get(text, 0) + 1
    return found


def assembler_version() -> str:
    """The release of the assembler for sm_90 and newer that triton brings."""
    command = [str(_tools() / "ptxas-blackwell"), "--version"]
    text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    found = re.search(r"release ([\d.]+)", text)
    return found.group(1) if found else text.strip()
