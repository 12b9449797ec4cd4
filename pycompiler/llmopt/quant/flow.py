"""Which layer alone feeds which linears, so that a scale can move from one into the other without changing the model.

The model runs on a sample; norms, linears and products are watched by the identity of the tensors they pass on. A norm feeds
linears when its output goes nowhere else; a linear feeds them through a product (gate · up → down) when both outputs go nowhere
else. A tensor whose other readers are unknown is never touched; what nobody saw reading it shows in the result, once scales have moved
on trial.
"""

from __future__ import annotations

import contextlib
import enum
import logging
from collections import Counter, defaultdict
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree

from llmopt.quant.calibration import Sample, call, evaluating
from llmopt.quant.layers import bias_of, set_weight, weight_of

log = logging.getLogger("llmopt")

# What a result may hold beside tensors and objects with attributes.
_PLAIN = (str, bytes, int, float, complex, type, enum.Enum, torch.dtype, torch.device, torch.Size)


@dataclass(frozen=True)
class Feed:
    """Scaling the source's output channels by 1/s and the targets' input channels by s changes nothing."""

    source: str
    targets: tuple[str, ...]
    norm_offset: (
        float | None
    )  # of a norm: its output is (weight + norm_offset) · x̂ [+ bias]; None: a linear


def feeds_of(
    model: nn.Module, samples: Sequence[Sample], linears: Mapping[str, nn.Module]
) -> list[Feed]:
    """Every feed of these linears that the first sample shows and no sample disproves, in the order of the model.

    None, with a warning, when a result is an object that may hide tensors, which anything may read, or holds no floats, which would
    show what happens to them.
    """
    watch, name = _Watch(model, linears), type(model).__name__
    with evaluating(model):
        try:
            with watch:
                returned = _result(model, samples[0])
            wanted = [_copies(returned), *(_copies(_result(model, s)) for s in samples[1:])]
        except _Opaque as error:
            log.warning("%s: who reads the tensors in a result of type %s is not known, so no scale can move", name, error)  # fmt: skip
            return []
        watch.read_by(returned, "the result")
        found = watch.feeds()
    if found and not all(
        any(t.is_floating_point() and t.numel() for t in result) for result in wanted
    ):
        log.warning("%s gives a result without floats, which shows nobody who reads what, so no scale can move", name)  # fmt: skip
        return []
    trial = _Trial(model, samples, wanted)
    proven = trial.proven(found)
    if len(proven) < len(found) and not trial.changes_nothing(()):
        log.warning("%s gives another result at each call, so no scale can be shown to change nothing", name)  # fmt: skip
    elif len(proven) < len(found):
        sources = ", ".join(f.source for f in found if f not in proven)
        log.warning("the outputs of these layers are read where nobody sees it, and keep their scale: %s", sources)  # fmt: skip
    return proven


def _result(model: nn.Module, sample: Sample) -> list[Tensor]:
    """Raises _Opaque."""
    return list(_tensors_in(call(model, sample), set()))


def _copies(tensors: Sequence[Tensor]) -> list[Tensor]:
    return [t.detach().clone() for t in tensors]


@dataclass(frozen=True)
class _Trial:
    """What the model gives for some samples, each after the one before it."""

    model: nn.Module
    samples: Sequence[Sample]
    wanted: Sequence[Sequence[Tensor]]

    def proven(self, feeds: Sequence[Feed]) -> list[Feed]:
        """Those along which scales move without changing results: tried all at once, and where that changes one by halves."""
        if not feeds or self.changes_nothing(feeds):
            return list(feeds)
        half = len(feeds) // 2
        halves = (feeds[:half], feeds[half:]) if half else ()
        return [feed for part in halves for feed in self.proven(part)]

    def changes_nothing(self, feeds: Sequence[Feed]) -> bool:
        """Whether results are the wanted ones while scales have moved along the feeds, but for what parameters lose so."""
        modules = dict(self.model.named_modules())
        scaled = [modules[name] for feed in feeds for name in (feed.source, *feed.targets)]
        coarsest = max((_eps(p) for m in scaled for p in m.parameters(False)), default=0.0)
        is_lossless = all(not feed.norm_offset for feed in feeds)
        with evaluating(self.model), _scaled(modules, feeds):
            return all(
                _are_same(_result(self.model, sample), wanted, coarsest, is_lossless)
                for sample, wanted in zip(self.samples, self.wanted, strict=True)
            )


def _eps(t: Tensor) -> float:
    return torch.finfo(t.dtype).eps if t.is_floating_point() else 0.0


def _are_same(got: Sequence[Tensor], wanted: Sequence[Tensor], eps: float, lossless: bool) -> bool:
    return len(got) == len(wanted) and all(
        _is_same(a, b, max(eps, _eps(b)), lossless) for a, b in zip(got, wanted, strict=True)
    )


def _is_same(got: Tensor, wanted: Tensor, eps: float, lossless: bool) -> bool:
    """eps: of the coarsest dtype on the way; lossless: parameters of it hold what has moved as it was. Small values count by
    themselves: constants such as those of masked logits must not hide what happens to the others."""
    if got.shape != wanted.shape or not wanted.is_floating_point():
        return got.shape == wanted.shape and torch.equal(got, wanted)
    a, b = (t.detach().double().nan_to_num(0.0, 0.0, 0.0).flatten() for t in (got, wanted))
    is_short = eps > torch.finfo(torch.float32).eps
    tolerance = 1e-4 if not is_short else 2e-3 if lossless else 5e-2
    some = b.abs()[:: max(1, b.numel() // 100_000)]
    usual = some[some > 0].quantile(0.1) if some.any() else 0.0
    is_small = b.abs() <= 1e3 * usual
    return all(
        bool((a[part] - b[part]).norm() <= tolerance * b[part].norm())
        for part in (is_small, ~is_small)
    )


@contextlib.contextmanager
def _scaled(modules: Mapping[str, nn.Module], feeds: Sequence[Feed]) -> Iterator[None]:
    """Scales of 1/2, 1 and 2 have moved along the feeds for the while."""
    touched = {name for feed in feeds for name in (feed.source, *feed.targets)}
    before = {name: dict(modules[name]._parameters) for name in touched}
    try:
        for feed in feeds:
            width = weight_of(modules[feed.targets[0]]).shape[1]
            powers = torch.arange(width, device=weight_of(modules[feed.targets[0]]).device) % 3 - 1
            apply(feed, modules, torch.exp2(powers.float()))
        yield
    finally:
        for name, parameters in before.items():
            modules[name]._parameters.update(parameters)


def apply(feed: Feed, modules: Mapping[str, nn.Module], s: Tensor) -> None:
    """Moves the scale s [K] float32 > 0 from the source's output into the targets' weights."""
    source = modules[feed.source]
    if feed.norm_offset is None:
        set_weight(source, weight_of(source).float() / s[:, None])
        bias = bias_of(source)
        new = {} if bias is None else {"bias": (bias.float() / s).to(bias.dtype)}
    else:
        new = divided(source, feed.norm_offset, s)
    for name, value in new.items():
        setattr(source, name, nn.Parameter(value, getattr(source, name).requires_grad))
    for target in feed.targets:
        set_weight(modules[target], weight_of(modules[target]).float() * s)


class _Watch(TorchFunctionMode):
    """Notes who makes and who reads the tensors that pass between norms, products and linears."""

    def __init__(self, model: nn.Module, linears: Mapping[str, nn.Module]) -> None:
        super().__init__()
        self.linears = linears
        self.modules = {n: m for n, m in model.named_modules() if n in linears or _like_a_norm(m)}
        self.calls: Counter[str] = Counter()
        self.made: dict[int, tuple[str, Any]] = {}  # id of a tensor → what made it
        self.readers: defaultdict[int, list[str]] = defaultdict(list)  # id of a tensor → names
        self.inputs: dict[str, Tensor] = {}  # of norms
        self.alive: list[Tensor] = []  # what has an id above stays, so that ids stay unique
        self.depth = 0
        self.handles = []
        for name, module in self.modules.items():
            entering = self._entering(name)
            self.handles.append(module.register_forward_pre_hook(entering, with_kwargs=True))
            self.handles.append(module.register_forward_hook(self._leaving(name)))

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        for handle in self.handles:
            handle.remove()

    def read_by(self, values: Any, name: str) -> None:
        for tensor in pytree.tree_leaves(values):
            if isinstance(tensor, Tensor):
                self.readers[id(tensor)].append(name)

    def _entering(self, name: str) -> Any:
        def hook(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            self.read_by((args, kwargs), name)
            given = (*args, *kwargs.values())
            if name not in self.linears and len(given) == 1 and isinstance(given[0], Tensor):
                self.inputs[name] = given[0]
            self.calls[name] += 1
            self.depth += 1

        return hook

    def _leaving(self, name: str) -> Any:
        def hook(_: nn.Module, __: Any, out: Any) -> None:
            self.depth -= 1
            if isinstance(out, Tensor):
                self._made(out, "module", name)

        return hook

    def _made(self, tensor: Tensor, how: str, source: Any) -> None:
        if id(tensor) not in self.made:
            self.readers.pop(id(tensor), None)  # those of a dead tensor that had this id
        self.made[id(tensor)] = (how, source)
        self.alive.append(tensor)

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if self.depth or not _has_tensor(out):
            return out
        if func is Tensor.__getitem__ and _keeps_channels(args[1]):
            self.readers[id(args[0])].append(f"slice {id(out)}")
            self._made(out, "slice", id(args[0]))
            return out
        self.read_by((args, kwargs), str(func))
        if getattr(func, "__name__", "") in ("mul", "__mul__", "__rmul__"):
            factors = [a for a in args[:2] if isinstance(a, Tensor)]
            if len(factors) == 2 and all(f.shape == out.shape for f in factors):
                self._made(out, "product", [id(f) for f in factors])
                self.alive += factors
        return out

    def feeds(self) -> list[Feed]:
        targets: defaultdict[int, list[str]] = defaultdict(list)
        for tensor in self.made:
            names = self._linear_readers(tensor)
            if names is not None and self.made[tensor][0] != "slice":
                targets[tensor] = names
        found = [self._feed(tensor, names) for tensor, names in targets.items() if names]
        return [feed for feed in found if feed is not None]

    def _linear_readers(self, tensor: int) -> list[str] | None:
        """The linears that read a tensor, through slices too; None when something else does."""
        names: list[str] = []
        for reader in self.readers[tensor]:
            if reader.startswith("slice "):
                through = self._linear_readers(int(reader.split()[1]))
                if through is None:
                    return None
                names += through
            elif reader in self.linears and self.calls[reader] == 1:
                names.append(reader)
            else:
                return None
        return names

    def _feed(self, tensor: int, names: list[str]) -> Feed | None:
        how, source = self.made[tensor]
        if how == "product":
            for factor in source:
                maker_kind, maker = self.made.get(factor, ("", None))
                only_here = len(self.readers[factor]) == 1 and maker_kind == "module"
                if only_here and maker in self.linears and self.calls[maker] == 1:
                    return Feed(maker, tuple(names), None)
            return None
        if self.calls[source] != 1:
            return None
        if source in self.linears:
            return Feed(source, tuple(names), None)
        offset = _norm_offset(self.modules[source], self.inputs.get(source))
        return None if offset is None else Feed(source, tuple(names), offset)


def _like_a_norm(module: nn.Module) -> bool:
    weight = getattr(module, "weight", None)
    return isinstance(weight, Tensor) and weight.dim() == 1 and not any(module.children())


def _norm_offset(norm: nn.Module, x: Tensor | None) -> float | None:
    """0 for y = weight · x̂ + bias, 1 for y = (1 + weight) · x̂ + bias (Gemma), None for anything else: found by trying."""
    weight: Tensor = norm.weight  # type: ignore[assignment]
    if x is None or x.shape[-1] != weight.numel():
        return None
    s = torch.linspace(0.5, 2.0, weight.numel(), device=weight.device)
    with torch.no_grad():
        y = norm(x).float()
        if not y.any():
            return None
        for offset in (0.0, 1.0):
            scaled = functional_call(norm, divided(norm, offset, s), (x,)).float() * s
            if (scaled - y).abs().max() <= 8 * torch.finfo(x.dtype).eps * y.abs().max():
                return offset
    return None


def divided(norm: nn.Module, norm_offset: float, s: Tensor) -> dict[str, Tensor]:
    """The parameters that make a norm give its output divided by s."""
    weight: Tensor = norm.weight.detach()  # type: ignore[operator]
    new = {"weight": ((weight.float() + norm_offset) / s - norm_offset).to(weight.dtype)}
    bias: Tensor | None = getattr(norm, "bias", None)
    if bias is not None:
        new["bias"] = (bias.detach().float() / s).to(bias.dtype)
    return new


def _keeps_channels(index: Any) -> bool:
    """Slices of leading dimensions only."""
    parts = index if isinstance(index, tuple) else (index,)
    return all(isinstance(p, slice) for p in parts) and parts[-1] == slice(None)


class _Opaque(Exception):
    """An object of this type may hold tensors that nobody can list."""


def _tensors_in(value: Any, seen: set[int]) -> Iterator[Tensor]:
    """The tensors in a model's result, through containers and attributes. Raises _Opaque."""
    for leaf in pytree.tree_leaves(value):
        if isinstance(leaf, Tensor):
            yield leaf
        elif leaf is not None and not isinstance(leaf, _PLAIN) and id(leaf) not in seen:
            seen.add(id(leaf))
            if isinstance(leaf, Collection):
                items = leaf.values() if isinstance(leaf, Mapping) else leaf
                yield from _tensors_in(list(items), seen)
            slots = any(getattr(c, "__slots__", ()) for c in type(leaf).__mro__)
            if slots or callable(leaf) or not hasattr(leaf, "__dict__"):
                raise _Opaque(type(leaf).__name__)
            yield from _tensors_in(vars(leaf), seen)


def _has_tensor(out: Any) -> bool:
    return isinstance(out, Tensor) or (
        isinstance(out, tuple | list) and any(isinstance(o, Tensor) for o in out)
    )
