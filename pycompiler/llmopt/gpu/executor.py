"""Running a GPU segment: tensors for its buffers, then its launches one after the other; or recording what it would launch."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from llmopt.gpu.plan import planned_steps
from llmopt.gpu.run import check_runnable, run
from llmopt.gpu.segment import Call, GpuSegmentBuilder, evaluate, memory
from llmopt.gpu.weights import WeightCache
from llmopt.graph import fake
from llmopt.kv import groups_of
from llmopt.launch import Launch
from llmopt.types import Target


class GpuSegment(torch.nn.Module):
    """A GPU segment as a callable: values from outside in, values read outside out."""

    def __init__(
        self,
        builder: GpuSegmentBuilder,
        symbols: Sequence[tuple[int, int | None]],
        target: Target,
        name: str,
    ) -> None:
        """symbols: which argument, and which of its dimensions, gives each symbol's value."""
        super().__init__()
        self.name = name
        self._builder = builder
        self._symbols = symbols
        self._target = target
        ids = builder.builder.sizes.id
        self._results = [
            (fake(n).dtype, [ids(s) for s in fake(n).shape], [ids(s) for s in fake(n).stride()])
            for n in builder.results
        ]
        self._groups = [
            (group, [ids(s) for s in (spec.batch, spec.heads, spec.new_length)])
            for group in groups_of(builder.kv)
            for spec in [builder.kv[group.numbers[0]]]
        ]
        self._weights = WeightCache(builder.specs())

    def forward(self, *arguments: Any) -> tuple[Tensor, ...]:
        """Raises GpuMissing that says what is missing where the kernels cannot run."""
        device = next(a.device for a in arguments if isinstance(a, Tensor))
        symbols = [arguments[a] if d is None else arguments[a].shape[d] for a, d in self._symbols]
        if _recording.launches is None:
            check_runnable(device)
        values = evaluate(self._builder.builder.sizes.codes, symbols)
        results = [
            torch.empty_strided(
                [values[i] for i in size], [values[i] for i in stride], dtype=dtype, device=device
            )
            for dtype, size, stride in self._results
        ]
        caches: list[Any] = [None] * len(self._builder.kv)
        for group, numbers in self._groups:
            grown = group.grow(arguments, *(values[i] for i in numbers))
            for number, cache in zip(group.numbers, grown, strict=True):
                caches[number] = cache
        if _recording.launches is not None:
            for launches in planned_steps(self._builder, self._target, symbols):
                _recording.launches += launches
            return (*(r.zero_() for r in results), *(c.zero_() for c in caches))
        sources = {"argument": arguments, "result": results, "kv": caches}
        buffers = memory(self._builder, sources, values, device)
        call = Call(self._target, values, buffers, self._weights.get(arguments))
        for step in self._builder.steps:
            for launch in step(call):
                run(launch)
        return (*results, *caches)


class _Recording(threading.local):
    """Where this thread's segments put their launches instead of running them; None while nobody asks."""

    launches: list[Launch] | None = None


_recording = _Recording()


class recording:
    """Within it, GPU segments called by this thread give zeros and note what they would launch, on meta tensors.

    Works without a GPU. Yields the list of launches, in order.
    """

    def __enter__(self) -> list[Launch]:
        _recording.launches = []
        return _recording.launches

    def __exit__(self, *_: object) -> None:
        _recording.launches = None
