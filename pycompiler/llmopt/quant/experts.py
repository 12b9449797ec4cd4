"""The experts of a mixture, as transformers keeps them: one module whose parameters hold the weights of all experts of a layer."""

from __future__ import annotations

import functools
import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from llmopt.quant.module import QuantizedExperts
from llmopt.quant.rounding import round_weight
from llmopt.quant.schemes import Scheme

_PROJECTIONS = ("gate_up_proj", "up_proj", "down_proj")
_ROUTER = re.compile(r"(^|\.)[^.]*(router|gate)(\.|$)")


@dataclass(frozen=True)
class Projection:
    """One parameter of such a module: the weights of one projection, [E, N, K] or [E, K, N]."""

    module: nn.Module
    name: str

    @property
    def transposed(self) -> bool:
        return bool(self.module.is_transposed)

    @property
    def parameter(self) -> nn.Parameter:
        return self.module._parameters[self.name]  # type: ignore[return-value]

    @property
    def weight(self) -> Tensor:
        """[E, N, K]; a view, detached."""
        weight = self.parameter.detach()
        return weight.transpose(1, 2) if self.transposed else weight


def projections_of(model: nn.Module) -> dict[str, Projection]:
    """Every such parameter inside a model by its name, in the model's order.

    Only of modules that say how they lie, as transformers' do (`is_transposed`), and whose forward reads them as attributes.
    """
    found = {}
    seen: set[nn.Parameter] = set()
    for prefix, module in model.named_modules():
        if not isinstance(getattr(module, "is_transposed", None), bool) or not prefix:
            continue
        for name in _PROJECTIONS:
            parameter = module._parameters.get(name)
            if parameter is None or parameter.dim() != 3 or not parameter.is_floating_point():
                continue
            if parameter.numel() and parameter not in seen:
                found[f"{prefix}.{name}"] = Projection(module, name)
                seen.add(parameter)
    return found


def counts_of(model: nn.Module) -> dict[str, int]:
    """Every module of experts by its name, "" for the model itself, with how many it has, quantised or not, also where each is a module."""
    found = {}
    for name, module in model.named_modules():
        if isinstance(module, nn.ModuleList | nn.ModuleDict):
            alike = Counter(type(child) for child in module.children()).most_common(1)
            if name.rpartition(".")[2] == "experts" and alike:
                found[name] = alike[0][1]
            continue
        codes = [c.codes for c in module.children() if isinstance(c, QuantizedExperts)]
        weights = [w for w in module._parameters.values() if w is not None and w.dim() == 3]
        count = getattr(module, "num_experts", None)
        if any(w.shape[0] == count for w in weights):
            found[name] = count  # type: ignore[assignment]
        elif (weights or codes) and isinstance(getattr(module, "is_transposed", None), bool):
            found[name] = (weights or codes)[0].shape[0]
    return found


def routers_of(model: nn.Module, layers: Mapping[str, nn.Module | Projection]) -> set[str]:
    """Those of a model's layers that choose experts: beside a module of these, with an output for each.

    Where one of them is called a router or a gate, the others are something else; else it stands right beside that module.
    """
    routers: set[str] = set()
    for name, count in counts_of(model).items():
        around, dot, _ = name.rpartition(".")
        inside = {n: x for n, x in layers.items() if n.startswith(around + dot)}
        fitting = [n for n, x in inside.items() if getattr(x, "out_features", None) == count]
        called = [n for n in fitting if _ROUTER.search(n.removeprefix(around))]
        routers.update(called or (n for n in fitting if n.rpartition(".")[0] == around))
    return routers


def rounded(projection: Projection, scheme: Scheme) -> QuantizedExperts:
    """The weights as codes. Raises ValueError when one is NaN or infinite, or the group does not divide K."""
    codes = round_weight(projection.weight, scheme)
    return QuantizedExperts(codes, projection.transposed, scheme, projection.parameter.dtype)


def put(module: nn.Module, name: str, weights: QuantizedExperts) -> None:
    """Gives a module codes in the place of a parameter; who reads the attribute gets the weights they stand for."""
    del module._parameters[name]
    module._modules[name] = weights
    cls: Any = type(module)
    plain = getattr(cls, "_without_codes", cls)
    module.__class__ = _reading_codes(plain, (*getattr(cls, "_read_as_codes", ()), name))


@functools.cache
def _reading_codes(cls: Any, names: tuple[str, ...]) -> type[nn.Module]:
    """The class with attributes that are computed from the codes in their places."""

    def rebuilt(self: nn.Module, protocol: Any) -> Any:
        return _empty, (cls, names), self.__getstate__()

    namespace: dict[str, Any] = {
        name: property(functools.partial(_weights, name=name)) for name in names
    }
    namespace |= {"_without_codes": cls, "_read_as_codes": names, "__reduce_ex__": rebuilt}
    namespace |= {"__module__": cls.__module__, "__doc__": cls.__doc__}
    return type(cls.__name__, (cls,), namespace)


def _weights(module: nn.Module, name: str) -> Tensor:
    codes = module._modules.get(name)
    if codes is None:
        raise AttributeError(f"{type(module).__name__} has no codes for {name} any more")
    return codes()


def _empty(cls: Any, names: tuple[str, ...]) -> nn.Module:
    """A module without anything in it, for pickle and copy to fill."""
    own = _reading_codes(cls, names)
    return own.__new__(own)
