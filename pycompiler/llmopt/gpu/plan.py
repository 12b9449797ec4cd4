"""What a GPU plan says: launches in words, bytes they move, and the least they could."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, fx

from llmopt.gpu.segment import Call, GpuSegmentBuilder, evaluate, memory, slot_bytes
from llmopt.gpu.weights import prepare
from llmopt.graph import fake
from llmopt.launch import Descriptor, Launch
from llmopt.types import Target

_SHORT = {
    "float32": "f32",
    "float16": "f16",
    "bfloat16": "bf16",
    "int8": "s8",
    "uint8": "u8",
    "int64": "i64",
}


def planned_steps(
    segment: GpuSegmentBuilder, target: Target, symbols: Sequence[int]
) -> list[list[Launch]]:
    """The launches of a call with these symbol values, on meta tensors: a list per step, in the order of `records`."""
    from llmopt import kernels

    kernels.load()
    sizes = segment.builder.sizes
    device = torch.device("meta")

    def meta(node: fx.Node) -> Any:
        value = fake(node)
        if not isinstance(value, Tensor):
            return value
        shape, stride = ([values[sizes.id(s)] for s in t] for t in (value.shape, value.stride()))
        return torch.empty_strided(shape, stride, dtype=value.dtype, device=device)

    values = evaluate(sizes.codes, symbols)
    arguments = [meta(n) for n in segment.inputs]
    sources = {
        "argument": arguments,
        "result": [meta(n) for n in segment.results],
        "kv": [meta(n) for n in segment.kv_results],
    }
    weights = [prepare(spec, arguments) for spec in segment.specs()]
    buffers = memory(segment, sources, values, device)
    call = Call(target, values, buffers, weights, segment.choose)
    return [step(call) for step in segment.steps]


def hints(symbol_nodes: Sequence[tuple[fx.Node, int | None]]) -> list[int]:
    """The symbols' values in the call the graph was traced with."""
    sizes = [fake(node) if d is None else fake(node).shape[d] for node, d in symbol_nodes]
    return [s if isinstance(s, int) else int(s.node.hint) for s in sizes]


def lines(segment: GpuSegmentBuilder, target: Target, symbols: Sequence[int]) -> list[str]:
    """A segment's launches in words, after a line about its memory."""
    steps = planned_steps(segment, target, symbols)
    arena = sum(slot_bytes(segment, evaluate(segment.builder.sizes.codes, symbols)))
    launches = [launch for step in steps for launch in step]
    moved = sum(map(traffic, launches))
    text = [
        f"   {len(launches)} launches, arena {arena:,} bytes, {moved:,} bytes moved (predicted)"
    ]
    text += [f"{number:3d}  {describe(launch)}" for number, launch in enumerate(launches)]
    return text + [f"   tiles: {count} {source}" for source, count in sources(launches).items()]


def sources(launches: Iterable[Launch]) -> dict[str, int]:
    """Where tiles come from → of how many launches; the most frequent first, launches that have no choice left out."""
    found = Counter(launch.config_source for launch in launches if launch.config_source)
    return dict(sorted(found.items(), key=lambda pair: (-pair[1], pair[0])))


def tensors(launch: Launch, names: Iterable[str]) -> list[Tensor]:
    """The tensors among a launch's arguments of these names."""
    values = [launch.arguments.get(name) for name in names]
    found = [v.tensor if isinstance(v, Descriptor) else v for v in values]
    return [t for t in found if isinstance(t, Tensor)]


def traffic(launch: Launch) -> int:
    """Bytes a launch moves to and from memory when every operand is read or written once; shares of split work go both ways."""
    shared = 2 * sum(_bytes(t) for t in tensors(launch, ("partial_ptr",)))
    return shared + sum(_bytes(t) for t in tensors(launch, (*launch.reads, *launch.writes)))


def _bytes(tensor: Tensor) -> int:
    """Bytes of the distinct elements: a dimension of stride 0 is one."""
    count = tensor.element_size()
    for size, stride in zip(tensor.shape, tensor.stride(), strict=True):
        count *= size if stride else min(size, 1)
    return count


def describe(launch: Launch) -> str:
    """One line: kernel, grid, tile, operands in words."""
    blocks = "x".join(map(str, launch.grid))
    tile = " ".join(
        f"{name.lower().removeprefix('block_')}={value}"
        for name, value in launch.constants.items()
        if name.startswith(("BLOCK_M", "BLOCK_N", "BLOCK_K", "SPLIT"))
    )
    inputs = ", ".join(map(_words, tensors(launch, launch.reads)))
    outputs = ", ".join(map(_words, tensors(launch, launch.writes)))
    options = f"w{launch.num_warps} s{launch.num_stages}"
    return f"{launch.kernel:24s} grid {blocks:9s} {tile} {options}  {inputs} -> {outputs}"


def _words(tensor: Tensor) -> str:
    name = str(tensor.dtype).removeprefix("torch.")
    return f"[{','.join(map(str, tensor.shape))}]{_SHORT.get(name, name)}"
