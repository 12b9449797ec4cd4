"""Problems of GPU kernels as the tuner sees them: sizes in buckets, keys of the database, operands to compile and to measure with."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from llmopt.launch import AttentionProblem, Launch, LinearProblem, Problem, Tile
from llmopt.registry import Kernel
from llmopt.tune.lookup import BUCKETS
from llmopt.types import Target

OPS = ("linear", "linear_quantized", "attention")  # whose tiles are tuned: rows take one block each
KEYS = (128, 256, 512, 1024, 2048, 4096, 8192, 16384, 32768, 65536, 131072)  # buckets of KV lengths
_SIZE = 4096  # that stands for all multiples of 16
_DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16, "i8": torch.int8}
Operands = tuple[tuple[Any, ...], dict[str, Any]]  # of a kernel's launch, by position and by name


@dataclass(frozen=True)
class Asked:
    """One problem of a plan and the op it belongs to."""

    op: str
    problem: LinearProblem | AttentionProblem


def bucketed(problem: Problem) -> LinearProblem | AttentionProblem | None:
    """The problem that is measured for this one and those near to it; None where tiles are not tuned."""
    if isinstance(problem, LinearProblem):
        return dataclasses.replace(problem, m=edge(problem.m, BUCKETS))
    if isinstance(problem, AttentionProblem):
        return dataclasses.replace(
            problem,
            batch=edge(problem.batch, BUCKETS),
            q_len=edge(problem.q_len, BUCKETS),
            kv_len=edge(problem.kv_len, KEYS),
            window=edge(problem.window, KEYS) if problem.window else 0,
        )
    return None


def edge(size: int, buckets: tuple[int, ...]) -> int:
    """The largest size of the bucket a size is in; the last bucket also has all above it."""
    return next((b for b in buckets if size <= b), buckets[-1])


def standing_for(kernel: Kernel, problem: Any, target: Target) -> Any:
    """The problem whose code takes what this one's takes: sizes that divide alike share it, and an activation comes when sums are done."""
    if not isinstance(problem, LinearProblem):
        lengths = {n: 1024 for n in ("q_len", "kv_len") if getattr(problem, n) > 16}
        return dataclasses.replace(problem, batch=2, **lengths)
    n, k = (_SIZE if size % 16 == 0 else size for size in (problem.n, problem.k))
    rows = 16 if problem.m <= 16 else _SIZE
    found = dataclasses.replace(problem, m=rows, n=n, k=k, act="none")
    # A kernel for very few rows.
    return dataclasses.replace(found, m=2) if kernel.reject(found, target) else found


def is_empty(problem: Problem) -> bool:
    sizes = dataclasses.asdict(problem)
    names = ("m", "n", "k", "batch", "heads", "q_len", "kv_len")
    return any(sizes.get(name) == 0 for name in names)


def facts(kernel: Kernel, problem: Problem, source: str = "") -> dict[str, str | int]:
    """A problem of a kernel as plain values: what an entry of the database is found by. source: of the kernel as it was measured.

    What is as usual is left out: a new field of problems leaves what is known true.
    """
    given: dict[str, str | int] = {}
    for field in dataclasses.fields(problem):
        value = getattr(problem, field.name)
        if value != field.default:
            given[field.name] = int(value) if isinstance(value, bool) else value
    return {"kernel": kernel.name, **({"source": source} if source else {}), **given}


def source_of(kernel: Kernel) -> str:
    """A digest of a kernel's source and of all that it calls; "" while kernels are interpreted, which nobody times."""
    if kernel.source is not None:
        return kernel.source()[:16]
    key = getattr(kernel.function, "cache_key", None)
    return "" if key is None else hashlib.sha256(key.encode()).hexdigest()[:16]


def tile_of(kernel: Kernel, given: Mapping[str, Any], problem: Problem, target: Target) -> Tile:
    """The tile with these fields; raises ValueError for fields and values that do not exist."""
    kind = type(kernel.configs(problem, target)[0])
    known = [f.name for f in dataclasses.fields(kind)]
    if unknown := set(given) - set(known):
        raise ValueError(f"a tile of {kernel.name} has no field {min(unknown)!r}")
    bad = next((n for n, v in given.items() if type(v) is not int or v < 1), None)
    if bad is not None:
        raise ValueError(f"{bad}={given[bad]!r} is not a whole number of at least 1")
    required = [f.name for f in dataclasses.fields(kind) if f.default is dataclasses.MISSING]
    if missing := [name for name in required if name not in given]:
        raise ValueError(f"a tile of {kernel.name} without {missing[0]}")
    return kind(**given)


def words(tile: Tile) -> str:
    """A tile in few words: 64x128x64 w4 s3, splits where there are any."""
    given = dataclasses.asdict(tile)
    sizes = "x".join(str(v) for n, v in given.items() if n.startswith("block_"))
    splits = "".join(f" split={v}" for n, v in given.items() if n.startswith("split") and v > 1)
    group = f" group={given['group_m']}" if given.get("group_m", 8) != 8 else ""
    return f"{sizes} w{tile.num_warps} s{tile.num_stages}{splits}{group}"


def shape(problem: LinearProblem | AttentionProblem) -> str:
    """A problem's sizes in few words."""
    if isinstance(problem, LinearProblem):
        p = problem
        group = f"/{p.group}" if p.group else ""
        return f"{p.m}x{p.n}x{p.k} {p.dtype}{'' if p.scheme == 'f16' else f' {p.scheme}{group}'}"
    a = problem
    kind = f"{a.dtype}·{a.kv_dtype}" if a.kv_dtype != a.dtype else a.dtype
    return f"{a.batch}x{a.heads}/{a.kv_heads}x{a.q_len}x{a.kv_len}x{a.head_dim} {kind}"


def operands(op: str, problem: Any, device: torch.device) -> Operands:
    """What a launch of a problem takes: on "meta" to compile it, on a GPU to measure it."""
    if op == "linear":
        return _linear(problem, device)
    return _quantized(problem, device) if op == "linear_quantized" else _attention(problem, device)


def example(kernel: Kernel, problem: Any, tile: Tile, target: Target, given: Operands) -> Launch:
    """A launch of a problem on operands made for it."""
    arguments, more = given
    return kernel.launch(problem, tile, target, *arguments, **more)


def _linear(p: LinearProblem, device: torch.device) -> Operands:
    weight, up = _weight(p, device), _weight(p, device) if p.gated else None
    return (_tensor(p.m, p.k, dtype=p.dtype, device=device), weight, _result(p, device), _around(p, device)), {"up": up}  # fmt: skip


def _quantized(p: LinearProblem, device: torch.device) -> Operands:
    groups = p.k // p.group if p.group else 1
    names = ("w", "up") if p.gated else ("w",)
    columns, kind = (p.k // 2, "u8") if p.scheme.startswith("w4") else (p.k, "i8")
    given: dict[str, Any] = {"y": _result(p, device), "around": _around(p, device)}
    for name in names:
        given[name] = _tensor(p.n, columns, dtype=kind, device=device)
        given[f"{name}_scale"] = torch.full((p.n, groups), 1e-2 * p.k**-0.5, device=device)
        given[f"{name}_offset"] = torch.zeros(p.n, groups, device=device) if p.offsets else None
    if p.scheme in ("w8a8", "w4a8"):
        given["x"] = _tensor(p.m, p.k, dtype="i8", device=device)
        given["x_scale"] = torch.full((p.m, groups), 1e-2, device=device)
    else:
        given["x"] = _tensor(p.m, p.k, dtype=p.dtype, device=device)
    return (), given


def _attention(p: AttentionProblem, device: torch.device) -> Operands:
    from llmopt.kernels.attention import Scores

    def heads(count: int, length: int, width: int, dtype: str) -> torch.Tensor:
        return _tensor(p.batch, length, count, width, dtype=dtype, device=device).transpose(1, 2)

    q = heads(p.heads, p.q_len, p.head_dim, p.dtype)
    k_dtype = "i8" if p.qk == "i8" else p.kv_dtype
    k = heads(p.kv_heads, p.kv_len, p.head_dim, k_dtype)
    v = heads(p.kv_heads, p.kv_len, p.value_dim, p.kv_dtype)
    o = heads(p.heads, p.q_len, p.value_dim, p.dtype)
    k_scale, v_scale = (
        _tensor(p.batch, p.kv_heads, p.kv_len, dtype="fp32", device=device)
        if name == "i8"
        else None
        for name in (k_dtype, p.kv_dtype)
    )
    scores = Scores(
        scale=p.head_dim**-0.5, causal=p.causal, offset=p.kv_len - p.q_len, window=p.window, k_scale=k_scale, v_scale=v_scale
    )  # fmt: skip
    return (q, k, v, o, scores), {}


def _around(p: LinearProblem, device: torch.device) -> Any:
    from llmopt.kernels.operands import Around

    def vector() -> torch.Tensor:
        return torch.ones(p.k, dtype=_DTYPES[p.dtype], device=device)

    weight = vector() if p.norm != "none" else None
    return Around(norm_weight=weight, norm_bias=vector() if p.norm == "layer" else None, norm_eps=1e-5)  # fmt: skip


def _result(p: LinearProblem, device: torch.device) -> torch.Tensor:
    return torch.empty(p.m, p.n, dtype=_DTYPES[p.dtype], device=device)


def _weight(p: LinearProblem, device: torch.device) -> torch.Tensor:
    """Results are about 1 whatever K is: silu(gate) · up of larger ones leaves fp16, and inf equals nothing."""
    return _tensor(p.n, p.k, dtype=p.dtype, device=device) * p.k**-0.5


def _tensor(*size: int, dtype: str, device: torch.device) -> torch.Tensor:
    """Ordinary numbers, not zeros: what a multiplier switches costs power, and power is clock."""
    if dtype == "u8":  # two codes of 4 bits
        return torch.randint(0, 256, size, dtype=torch.uint8, device=device)
    if dtype == "i8":
        return torch.randint(-127, 128, size, dtype=torch.int8, device=device)
    return torch.randn(size, dtype=torch.float32, device=device).to(_DTYPES[dtype])
