"""What Dynamo read from a module while it traced a model, as facts that one call into C++ can look up.

A fact is a key of a dictionary that a module, or an object or a dictionary below it, owns. What Dynamo read in other ways (through a class,
a property, a list) is none and stays a guard of Dynamo's.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterable
from enum import IntEnum
from typing import Any

import torch
from torch import Tensor, nn
from torch._dynamo.source import (
    AttrSource,
    DictGetItemSource,
    GetItemSource,
    LocalSource,
    NNModuleSource,
    UnspecializedParamBufferSource,
)
from torch._guards import Guard, Source

from llmopt import _C
from llmopt.exchange import EXCHANGE


class FactKind(IntEnum):
    """What a fact says; as in csrc/python/module_facts.h."""

    ABSENT = 0  # the key is not there
    PRESENT = 1  # whatever it stands for
    CONSTANT = 2  # of the type that is expected, and equal
    OBJECT = 3  # of the type that is expected; may own further facts
    DICT = 4  # a dict; may own further facts
    TENSOR = 5  # a tensor of the class, dtype, size and stride that the first had, and as much in need of gradients


_DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64, torch.int8, torch.uint8)
_CONSTANTS = (bool, int, float, str, bytes, type(None), torch.dtype)
_ATTRIBUTES = (AttrSource, UnspecializedParamBufferSource)
_ITEMS = (DictGetItemSource, GetItemSource)
_ROOT = -1  # in the place of a fact's number


class FactBuilder:
    """Collects facts of one module, each owner before what it owns."""

    def __init__(self, root: nn.Module, source: LocalSource) -> None:
        """source: the local variable of the compiled function that holds the root."""
        self._root, self._source = root, source
        self._keys: list[tuple[int, str]] = []
        self._kinds: list[FactKind] = []
        self._expected: list[object] = []
        self._values: list[Any] = []
        self._numbers: dict[tuple[int, str], int] = {}
        self._same: list[tuple[int, int]] = []
        self._covering: dict[str, Callable[[Guard], bool]] = {
            "CONSTANT_MATCH": self._constant,
            "EQUALS_MATCH": self._constant,
            "TENSOR_MATCH": self._tensor,
            "TYPE_MATCH": self._type,
            "NOT_PRESENT_IN_GENERIC_DICT": self._absent,
            "HASATTR": self._present,
            "DUPLICATE_INPUT": self._duplicate,
        }

    def build(self) -> _C.ModuleFacts:
        owners = [owner for owner, _ in self._keys]
        keys = [key for _, key in self._keys]
        rows = [*zip(owners, keys, self._kinds, self._expected, strict=True)]
        return _C.ModuleFacts(
            rows, self._same, EXCHANGE, tuple(self.tensors()), Tensor.requires_grad
        )

    def tensors(self) -> list[Tensor]:
        """In the order in which the facts give them."""
        kinds = zip(self._kinds, self._values, strict=True)
        return [value for kind, value in kinds if kind == FactKind.TENSOR]

    def add_parameter(self, source: Source | None, tensor: Tensor) -> bool:
        """Makes a fact of a parameter, if that is what the source stands for, and if C++ can look at it. Of other tensors Dynamo
        also watches that no two of them become one."""
        if EXCHANGE is None or type(tensor) is not nn.Parameter or tensor.dtype not in _DTYPES:
            return False
        number = self._number(source)
        if number is None or number == _ROOT or self._values[number] is not tensor:
            return False
        if tensor.layout is torch.strided and not tensor.is_neg():
            self._kinds[number] = FactKind.TENSOR
        return self._kinds[number] == FactKind.TENSOR

    def cover(self, guards: Iterable[Guard]) -> set[Guard]:
        """Makes facts of what guards say; returns those that need not be looked at any more."""
        by_name = sorted(
            guards, key=lambda g: _name(g) == "TYPE_MATCH"
        )  # those of constants know more
        return {g for g in by_name if (covers := self._covering.get(_name(g))) and covers(g)}

    def _constant(self, guard: Guard) -> bool:
        number = self._number(guard.originating_source)
        if number is None or number == _ROOT:
            return False
        value = self._values[number]
        if type(value) not in _CONSTANTS or value != value:
            return False
        self._kinds[number], self._expected[number] = FactKind.CONSTANT, value
        return True

    def _tensor(self, guard: Guard) -> bool:
        number = self._number(guard.originating_source)
        return number is not None and number != _ROOT and self._kinds[number] == FactKind.TENSOR

    def _type(self, guard: Guard) -> bool:
        number = self._number(guard.originating_source)
        if number is None or number == _ROOT:
            return False
        said = self._kinds[number] in (FactKind.CONSTANT, FactKind.TENSOR)
        return said or self._dict_of(number, FactKind.OBJECT) is not None or self._is_dict(number)

    def _absent(self, guard: Guard) -> bool:
        owner = self._number(guard.originating_source)
        held = None if owner is None else self._dict_of(owner, FactKind.OBJECT)
        key = _keyword(guard, "attr")
        if owner is None or held is None or key in held:
            return False
        return self._add(owner, key, FactKind.ABSENT, None) is not None

    def _present(self, guard: Guard) -> bool:
        owner = self._number(guard.originating_source)
        return owner is not None and self._attribute(owner, _keyword(guard, "attr")) is not None

    def _duplicate(self, guard: Guard) -> bool:
        """Of two places that hold one object."""
        pair = self._number(guard.originating_source), self._number(_keyword(guard, "source_b"))
        a, b = pair
        if a is None or b is None or _ROOT in pair or self._values[a] is not self._values[b]:
            return False
        self._same.append((a, b))
        return True

    def _number(self, source: Any) -> int | None:
        """The fact of what a source stands for; None where it is none."""
        if isinstance(source, NNModuleSource):
            return self._number(source.base)
        if type(source) is LocalSource:
            return _ROOT if source.local_name == self._source.local_name else None
        if type(source) not in (*_ATTRIBUTES, *_ITEMS):
            return None
        owner = self._number(source.base)
        if owner is None:
            return None
        if type(source) in _ATTRIBUTES:
            return self._attribute(owner, source.member)
        if type(source.index) is not str or owner == _ROOT or not self._is_dict(owner):
            return None
        held = self._values[owner]
        return (
            self._add(owner, source.index, FactKind.PRESENT, held) if source.index in held else None
        )

    def _attribute(self, owner: int, name: str) -> int | None:
        """The fact of an attribute that is in the owner's own dictionary, and that its class leaves alone."""
        held = self._dict_of(owner, FactKind.OBJECT)
        if held is None or name not in held:
            return None
        cls = type(self._root if owner == _ROOT else self._values[owner])
        described = type(inspect.getattr_static(cls, name, None))
        if hasattr(described, "__set__") or hasattr(described, "__delete__"):
            return None
        return self._add(owner, name, FactKind.PRESENT, held)

    def _add(self, owner: int, key: str, kind: FactKind, held: dict | None) -> int | None:
        """The number of a fact about a key; None where one that is known says something else."""
        number = self._numbers.get((owner, key))
        if number is None:
            number = self._numbers[owner, key] = len(self._keys)
            self._keys.append((owner, key))
            self._kinds.append(kind)
            self._expected.append(None)
            self._values.append(None if held is None else held[key])
        return None if (self._kinds[number] == FactKind.ABSENT) != (held is None) else number

    def _dict_of(self, number: int, kind: FactKind) -> dict | None:
        """The dictionary of an object's attributes, after the fact says of which type the object is; None where it has none."""
        if number == _ROOT:
            return vars(self._root) if _has_plain_attributes(type(self._root)) else None
        value = self._values[number]
        if self._kinds[number] not in (FactKind.PRESENT, kind) or not _has_plain_attributes(
            type(value)
        ):
            return None
        self._kinds[number], self._expected[number] = kind, type(value)
        return vars(value)

    def _is_dict(self, number: int) -> bool:
        """True where the fact says that it is of a dictionary."""
        if self._kinds[number] == FactKind.PRESENT and type(self._values[number]) is dict:
            self._kinds[number] = FactKind.DICT
        return self._kinds[number] == FactKind.DICT


def _has_plain_attributes(cls: type) -> bool:
    """True for modules and others whose objects have a dictionary that Python looks into first."""
    lookup = (object.__getattribute__, nn.Module.__getattribute__)
    data = issubclass(cls, (Tensor, type)) or cls.__dictoffset__ == 0
    return not data and cls.__getattribute__ in lookup


def _name(guard: Guard) -> str:
    """What a guard is called in Dynamo."""
    create = guard.create_fn
    return getattr(create.func if isinstance(create, functools.partial) else create, "__name__", "")


def _keyword(guard: Guard, name: str) -> Any:
    return getattr(guard.create_fn, "keywords", {}).get(name)
