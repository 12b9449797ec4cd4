"""Signs that a weight changed: samples of memory show an edit of all of it at once, one of an end within 16 looks; a sweep shows any
edit within as many looks as there are windows; arguments show another object, another address, another count of edits."""

from __future__ import annotations

import pytest
import torch
from llmopt import _C

LOOKS = 16


def samples_of(*tensors: torch.Tensor) -> _C.Samples:
    return _C.Samples(
        [t.data_ptr() for t in tensors], [t.numel() * t.element_size() for t in tensors]
    )


@pytest.mark.parametrize("size", [0, 1, 7, 64, 65, 4096, 100_003])
def test_an_edit_of_everything_shows_at_once(size: int) -> None:
    memory = torch.arange(size, dtype=torch.int64).to(torch.uint8)
    other = torch.ones(80)
    samples = samples_of(memory, other)
    for _ in range(2 * LOOKS):
        samples.fetch()
        assert samples.unchanged()
    memory += 1
    assert all(samples.unchanged() == (size == 0) for _ in range(LOOKS))


@pytest.mark.parametrize("place", [0, -1])
def test_an_edit_of_an_end_shows_soon(place: int) -> None:
    memory = torch.zeros(1000)
    samples = samples_of(memory)
    memory[place] = 1
    assert not all(samples.unchanged() for _ in range(LOOKS))


WINDOW = 32 * 1024  # bytes


@pytest.mark.parametrize("place", [0, 7, WINDOW - 1, WINDOW, 100_000, 100_002])
@pytest.mark.parametrize("bit", [0, 7])
def test_a_sweep_finds_any_byte(place: int, bit: int) -> None:
    memory = torch.arange(100_003, dtype=torch.int64).to(torch.uint8)
    others = [torch.ones(80), torch.ones(0)]
    contents = [
        _C.Content([t.data_ptr() for t in some], [t.nbytes for t in some])
        for some in ([others[0]], [], [others[1], memory])
    ]
    assert [c.windows for c in contents] == [1, 0, 4]
    sweep = _C.Sweep(contents)
    assert all(sweep.unchanged() for _ in range(10))
    memory[place] ^= 1 << bit
    assert [sweep.unchanged() for _ in range(5)].count(False) == 1
    assert [c.all_unchanged() for c in contents] == [True, True, False]
    memory[place] ^= 1 << bit
    assert all(sweep.unchanged() for _ in range(5)), "it is what it was"


def test_flips_that_could_cancel_are_found() -> None:
    """The highest bits of words a line apart: a chain of products alone would lose both."""
    memory = torch.arange(1024.0)
    content = _C.Content([memory.data_ptr()], [memory.nbytes])
    memory[1::16] *= -1
    assert not content.all_unchanged()


def test_a_sweep_of_nothing_sees_no_change() -> None:
    assert _C.Sweep([]).unchanged()
    assert _C.Sweep([_C.Content([], [])]).unchanged()


@pytest.mark.parametrize("kind", [_C.Samples, _C.Content])
def test_each_range_needs_a_size(kind: type) -> None:
    with pytest.raises(ValueError, match="as many sizes"):
        kind([1, 2], [3])


def arguments_of(*tensors: torch.Tensor, counted: bool = True) -> _C.Arguments:
    """Watches a call's tensors, in front of which a number stands."""
    rows, flags = list(range(1, 1 + len(tensors))), [counted] * len(tensors)
    return _C.Arguments((7, *tensors), rows, torch.Tensor.data_ptr, torch.Tensor._version, flags)


def test_arguments_are_the_same_until_one_is_replaced_edited_or_moved() -> None:
    first, second = torch.nn.Parameter(torch.ones(3), requires_grad=False), torch.ones(3)
    seen = arguments_of(first, second)
    assert seen.same((7, first, second))
    assert seen.same((8, first, second)), "nobody watches the number"
    assert not seen.same((7, first, second.clone())), "another object"
    assert not seen.same((7, first)), "too few arguments"
    second += 1
    assert not seen.same((7, first, second)), "edited"
    seen = arguments_of(first, second)
    first.data = torch.ones(3)
    assert not seen.same((7, first, second)), "moved, which counts as no edit"


def test_tensors_of_inference_mode_have_no_count_of_edits() -> None:
    with torch.inference_mode():
        tensor = torch.ones(3)
    assert arguments_of(tensor, counted=False).same((7, tensor))
    with pytest.raises(RuntimeError, match="version counter"):
        arguments_of(tensor)


def test_an_argument_that_cannot_be_asked_is_not_the_same() -> None:
    plain = torch.ones(3)
    with torch.inference_mode():
        inference = torch.ones(3)
    seen = arguments_of(plain)
    torch.utils.swap_tensors(plain, inference)
    assert not seen.same((7, plain))


def test_positions_of_arguments_must_exist() -> None:
    with pytest.raises(IndexError, match="beyond the arguments"):
        _C.Arguments((1,), [1], torch.Tensor.data_ptr, torch.Tensor._version, [True])
    with pytest.raises(ValueError, match="as many flags"):
        _C.Arguments((1,), [0], torch.Tensor.data_ptr, torch.Tensor._version, [])
