"""What Dynamo read from a module while it traced a model, as facts that one call into C++ can look up.

A fact is a key of a dictionary that a module, or an object or a dictionary below it, owns. What Dynamo read in other ways (through a class,
a property, a list) is none and stays a guard of Dynamo's.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterable
from dataclasses import dataclass
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


@dataclass
class _Fact:
    """owner: the number of the fact whose value's dictionary has the key, or _ROOT."""

    owner: int
    key: str
    kind: FactKind
    value: Any  # what the key stands for now
    expected: object = None  # a constant, or the type of an object


class FactBuilder:
    """Collects facts of one module, each owner before what it owns."""

    def __init__(self, root: nn.Module, source: LocalSource) -> None:
        """source: the local variable of the compiled function that holds the root."""
        self._root, self._source = root, source
        self._facts: list[_Fact] = []
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
        rows = [(f.owner, f.key, f.kind, f.expected) for f in self._facts]
        return _C.ModuleFacts(
            rows, self._same, EXCHANGE, tuple(self.tensors()), Tensor.requires_grad
        )

    def tensors(self) -> list[Tensor]:
        """In the order in which the facts give them."""
        return [f.value for f in self._facts if f.kind is FactKind.TENSOR]

    def add_parameter(self, source: Source | None, tensor: Tensor) -> bool:
        """Makes a fact of a parameter, if that is what the source stands for, and if C++ can look at it. Of other tensors Dynamo
        also watches that no two of them become one."""
        if EXCHANGE is None or type(tensor) is not nn.Parameter or tensor.dtype not in _DTYPES:
            return False
        fact = self._fact(source)
        if fact is None or fact.value is not tensor or tensor.layout is not torch.strided:
            return False
        if not tensor.is_neg():
            fact.kind = FactKind.TENSOR
        return fact.kind is FactKind.TENSOR

    def cover(self, guards: Iterable[Guard]) -> set[Guard]:
        """Makes facts of what guards say; returns those that need not be looked at any more."""
        by_name = sorted(
            guards, key=lambda g: _name(g) == "TYPE_MATCH"
        )  # those of constants know more
        return {g for g in by_name if (covers := self._covering.get(_name(g))) and covers(g)}

    def _constant(self, guard: Guard) -> bool:
        fact = self._fact(guard.originating_source)
        if fact is None or type(fact.value) not in _CONSTANTS or fact.value != fact.value:
            return False
        fact.kind, fact.expected = FactKind.CONSTANT, fact.value
        return True

    def _tensor(self, guard: Guard) -> bool:
        fact = self._fact(guard.originating_source)
        return fact is not None and fact.kind is FactKind.TENSOR

    def _type(self, guard: Guard) -> bool:
        number = self._number(guard.originating_source)
        if number is None or number == _ROOT:
            return False
        said = self._facts[number].kind in (FactKind.CONSTANT, FactKind.TENSOR)
        return said or self._attributes(number) is not None or self._is_dict(number)

    def _absent(self, guard: Guard) -> bool:
        owner, key = self._number(guard.originating_source), _keyword(guard, "attr")
        held = None if owner is None else self._attributes(owner)
        if owner is None or held is None or key in held:
            return False
        return self._facts[self._add(owner, key, FactKind.ABSENT, None)].kind is FactKind.ABSENT

    def _present(self, guard: Guard) -> bool:
        owner = self._number(guard.originating_source)
        return owner is not None and self._attribute(owner, _keyword(guard, "attr")) is not None

    def _duplicate(self, guard: Guard) -> bool:
        """Of two places that hold one object."""
        pair = self._number(guard.originating_source), self._number(_keyword(guard, "source_b"))
        a, b = pair
        if a is None or b is None or _ROOT in pair:
            return False
        if self._facts[a].value is not self._facts[b].value:
            return False
        self._same.append((a, b))
        return True

    def _fact(self, source: Source | None) -> _Fact | None:
        number = self._number(source)
        return None if number is None or number == _ROOT else self._facts[number]

    def _number(self, source: Any) -> int | None:
        """The number of the fact of what a source stands for; None where that is none."""
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
        return self._item(owner, source.index, self._facts[owner].value)

    def _attribute(self, owner: int, name: str) -> int | None:
        """The fact of an attribute that is in the owner's own dictionary, and that its class leaves alone."""
        cls = type(self._root if owner == _ROOT else self._facts[owner].value)
        described = type(inspect.getattr_static(cls, name, None))
        held = self._attributes(owner)
        if held is None or hasattr(described, "__set__") or hasattr(described, "__delete__"):
            return None
        return self._item(owner, name, held)

    def _item(self, owner: int, key: str, held: dict) -> int | None:
        return self._add(owner, key, FactKind.PRESENT, held[key]) if key in held else None

    def _add(self, owner: int, key: str, kind: FactKind, value: Any) -> int:
        """The number of the fact about a key, which is a new one at first."""
        number = self._numbers.setdefault((owner, key), len(self._facts))
        if number == len(self._facts):
            self._facts.append(_Fact(owner, key, kind, value))
        return number

    def _attributes(self, number: int) -> dict | None:
        """The dictionary of an object's attributes, after its fact says of which type the object is; None where it has none."""
        if number == _ROOT:
            return vars(self._root) if _has_plain_attributes(type(self._root)) else None
        fact = self._facts[number]
        plain = _has_plain_attributes(type(fact.value))
        if fact.kind not in (FactKind.PRESENT, FactKind.OBJECT) or not plain:
            return None
        fact.kind, fact.expected = FactKind.OBJECT, type(fact.value)
        return vars(fact.value)

    def _is_dict(self, number: int) -> bool:
        """True where the fact says that it is of a dictionary."""
        fact = self._facts[number]
        if fact.kind is FactKind.PRESENT and type(fact.value) is dict:
            fact.kind = FactKind.DICT
        return fact.kind is FactKind.DICT


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
