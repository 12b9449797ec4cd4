"""Running a GPU segment: tensors for its results and caches, then its launches; or recording what it would launch."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from llmopt.gpu import device as gpu_device
from llmopt.gpu.graphs import SegmentGraphs
from llmopt.gpu.launching import Launcher
from llmopt.gpu.plan import planned_steps
from llmopt.gpu.run import check_runnable
from llmopt.gpu.segment import GpuSegmentBuilder, evaluate
from llmopt.gpu.weights import WeightCache
from llmopt.graph import fake
from llmopt.kv import groups_of
from llmopt.launch import Launch
from llmopt.sizes import Size
from llmopt.types import Target

_MOST_VALUES = 32
_Spec = tuple[torch.dtype, list[int], list[int]]  # a tensor's sizes and strides by their numbers


def _spec_of(value: Tensor, ids: Callable[[Size], int]) -> _Spec:
    return value.dtype, [ids(s) for s in value.shape], [ids(s) for s in value.stride()]


class GpuSegment(torch.nn.Module):
    """A GPU segment as a callable: values from outside in, values read outside out."""

    def __init__(
        self,
        builder: GpuSegmentBuilder,
        symbols: Sequence[tuple[int, int | None]],
        target: Target,
        name: str,
        mode: str,
    ) -> None:
        """symbols: which argument, and which of its dimensions, gives each symbol's value. mode: see options.MODES.

        Raises ImportError that says how to get triton where it is missing.
        """
        from llmopt import kernels

        kernels.load()
        super().__init__()
        self.name = name
        self._builder = builder
        self._symbols = symbols
        self._target = target
        ids = builder.builder.sizes.id
        self._results, self._caches = (
            [_spec_of(fake(n), ids) for n in nodes]
            for nodes in (builder.results, builder.kv_results)
        )
        self._groups = [
            (group, [ids(s) for s in (spec.batch, spec.heads, spec.new_length)])
            for group in groups_of(builder.kv)
            for spec in [builder.kv[group.numbers[0]]]
        ]
        self._weights = WeightCache(builder.specs())
        self.launcher = Launcher(builder, target)
        self._values: OrderedDict[tuple[int, ...], list[int]] = OrderedDict()
        self.graphs = SegmentGraphs(builder, name) if mode == "reduce-overhead" else None

    def forget_weights(self) -> None:
        """Makes the next call prepare every weight anew."""
        self._weights.forget()

    def forward(self, *arguments: Any) -> tuple[Tensor, ...]:
        """Raises GpuMissing that says what is missing where the kernels cannot run."""
        device = next(a.device for a in arguments if isinstance(a, Tensor))
        symbols = [arguments[a] if d is None else arguments[a].shape[d] for a, d in self._symbols]
        values = self._values_of(tuple(symbols))
        if _recording.launches is not None:
            for launches in planned_steps(self._builder, self._target, symbols):
                _recording.launches += launches
            made = _allocate((*self._results, *self._caches), values, device)
            return tuple(t.zero_() for t in made)
        check_runnable(device)
        with gpu_device.on(device):
            results = _allocate(self._results, values, device)
            caches = self._grow(arguments, values, device)
            weights = self._weights.get(arguments)

            def launch(given: Sequence[Any], made: Sequence[Tensor]) -> Any:
                sources = {"argument": given, "result": made, "kv": caches}
                return self.launcher.run(sources, symbols, values, weights, device)

            if self.graphs is None or not self.graphs.run(
                arguments, symbols, weights, results, launch
            ):
                launch(arguments, results)
        return (*results, *caches)

    def _grow(
        self, arguments: Sequence[Any], values: Sequence[int], device: torch.device
    ) -> list[Tensor]:
        """The caches with room for this call's keys and values."""
        caches: list[Any] = [None] * len(self._builder.kv)
        for group, numbers in self._groups:
            grown = group.grow(arguments, *(values[i] for i in numbers), device=device)
            for number, cache in zip(group.numbers, grown, strict=True):
                caches[number] = cache
        return caches

    def _values_of(self, symbols: tuple[int, ...]) -> list[int]:
        """The values of all sizes; those of recent calls are remembered."""
        values = self._values.get(symbols)
        if values is None:
            values = evaluate(self._builder.builder.sizes.codes, symbols)
            self._values[symbols] = values
            if len(self._values) > _MOST_VALUES:
                self._values.popitem(last=False)
        return values


def _allocate(specs: Sequence[_Spec], values: Sequence[int], device: torch.device) -> list[Tensor]:
    return [
        torch.empty_strided(
            [values[i] for i in size], [values[i] for i in stride], dtype=dtype, device=device
        )
        for dtype, size, stride in specs
    ]


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
