"""Facts of a module by themselves: what each kind lets pass, and what is said of lists that make no sense."""

from __future__ import annotations

import weakref
from typing import Any

import pytest
import torch
from llmopt import _C
from llmopt.exchange import EXCHANGE
from llmopt.module_facts import FactKind
from torch import nn


class Part:
    pass


def module(**attributes: Any) -> nn.Module:
    made = nn.Module()
    vars(made).update(attributes)
    return made


def hold(facts: list[tuple], root: nn.Module, same: list[tuple[int, int]] = []) -> bool:  # noqa: B006
    return _C.ModuleFacts(facts, same, EXCHANGE, (), torch.Tensor.requires_grad).hold(root, ())


@pytest.mark.parametrize(
    ("expected", "value", "holds"),
    [
        (1, 1, True),
        (1, True, False),
        (1, 1.0, False),
        (0.1, float("0.1"), True),
        (0.1, 0.2, False),
        ("a", "".join("a"), True),
        (None, None, True),
        (None, 0, False),
        (torch.float32, torch.float16, False),
        (1 << 70, 1 << 70, True),
    ],
)
def test_constants_are_of_one_type_and_equal(expected: Any, value: Any, holds: bool) -> None:
    fact = (-1, "x", FactKind.CONSTANT, expected)
    assert hold([fact], module(x=value)) is holds
    assert not hold([fact], module())


def test_absent_and_present() -> None:
    absent, present = [(-1, "x", kind, None) for kind in (FactKind.ABSENT, FactKind.PRESENT)]
    assert hold([absent], module())
    assert not hold([absent], module(x=None))
    assert hold([present], module(x=None))
    assert not hold([present], module())


def test_below_objects_and_dictionaries() -> None:
    facts = [
        (-1, "part", FactKind.OBJECT, Part),
        (0, "table", FactKind.DICT, None),
        (1, "n", FactKind.CONSTANT, 3),
    ]
    part = Part()
    part.table = {"n": 3}
    assert hold(facts, module(part=part))
    part.table = {"n": 4}
    assert not hold(facts, module(part=part))
    part.table = type("Other", (dict,), {})(n=3)
    assert not hold(facts, module(part=part))
    assert not hold(facts, module(part=type("Part", (Part,), {})()))
    assert not hold([(-1, "x", FactKind.OBJECT, int)], module(x=1.0))
    below_a_number = [(-1, "x", FactKind.OBJECT, int), (0, "y", FactKind.ABSENT, None)]
    assert not hold(below_a_number, module(x=1)), "a number has no dictionary"


def test_two_keys_of_one_object() -> None:
    facts = [(-1, name, FactKind.PRESENT, None) for name in "ab"]
    part = Part()
    assert hold(facts, module(a=part, b=part), [(0, 1)])
    assert not hold(facts, module(a=part, b=Part()), [(0, 1)])


def test_tensors_by_form() -> None:
    first = torch.zeros(3, 4)
    rows, grad = [(-1, "w", FactKind.TENSOR, None)], torch.Tensor.requires_grad
    facts = _C.ModuleFacts(rows, [], EXCHANGE, (first,), grad)
    root = module(w=first)
    known = (weakref.ref(first),)
    assert facts.hold(root, known)
    assert not facts.hold(root, ()), "nobody knows it"
    for other in (
        torch.zeros(4, 3),
        torch.zeros(4, 3).t(),
        first.int(),
        first[0],
        Part(),
        nn.Parameter(first),
    ):
        vars(root)["w"] = other
        assert not facts.hold(root, (weakref.ref(other),))
        assert facts.tensors(root) is None
    vars(root)["w"] = torch.ones(3, 4)
    assert not facts.hold(root, known), "another tensor"
    assert facts.tensors(root) == (root.w,)
    del first
    assert not facts.hold(root, known)
    known = (weakref.ref(root.w),)
    root.w.requires_grad_()
    assert not facts.hold(root, known)
    root.w.requires_grad_(False)
    assert facts.hold(root, known)
    root.w.data = torch.ones(4, 3).t()
    assert not facts.hold(root, known)


def test_lists_that_make_no_sense() -> None:
    with pytest.raises(ValueError, match="fact 0 has no owner before it"):
        hold([(0, "x", FactKind.ABSENT, None)], module())
    with pytest.raises(ValueError, match="fact 1 has no owner before it"):
        hold([(-1, "x", FactKind.PRESENT, None), (0, "y", FactKind.ABSENT, None)], module())
    with pytest.raises(ValueError, match="does not exist"):
        hold([(-1, "x", FactKind.PRESENT, None)], module(), [(0, 1)])
    with pytest.raises(ValueError, match="as many tensors"):
        hold([(-1, "x", FactKind.TENSOR, None)], module())


def test_arguments_in_their_order() -> None:
    a, b = torch.zeros(1), torch.zeros(2)
    order = _C.ArgumentOrder([1, -1, 0, -2])
    held = (weakref.ref(a), weakref.ref(b))
    assert [id(x) for x in order.all(held, ("x", "y"))] == [id(x) for x in (b, "x", a, "y")]
    with pytest.raises(IndexError, match="beyond the arguments"):
        order.all(held, ("x",))
    with pytest.raises(TypeError):
        order.all((a, b), ("x", "y"))
    del a
    assert order.all(held, ("x", "y")) is None
