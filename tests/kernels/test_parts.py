"""Tensors over parts of another tensor's memory."""

from __future__ import annotations

import gc

import pytest
import torch
from llmopt import _C
from torch.multiprocessing.reductions import StorageWeakRef

EXCHANGE = torch.Tensor.__dlpack_c_exchange_api__
SIZE, STRIDE = (1, 2, 3, 4), (8, 4, 8, 1)  # 24 elements, two heads in turn


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.int8])
def test_parts_hold_what_the_memory_holds(dtype):
    memory = torch.arange(100).to(dtype)
    parts = _C.Parts(EXCHANGE, memory).over(3, 4, 30, SIZE, STRIDE)
    for i, part in enumerate(parts):
        want = memory.as_strided(SIZE, STRIDE, 4 + 30 * i)
        assert torch.equal(part, want)
        assert (part.dtype, part.stride(), part.data_ptr()) == (dtype, STRIDE, want.data_ptr())
        assert part.storage_offset() == 0
        assert part._base is None
    parts[1].zero_()
    assert memory[34:58].count_nonzero() == 0


def test_the_last_tensor_lets_the_memory_go():
    memory = torch.arange(60.0)
    storage, start = StorageWeakRef(memory.untyped_storage()), memory.data_ptr()
    maker = _C.Parts(EXCHANGE, memory)
    del memory
    first, second = maker.over(2, 0, 30, SIZE, STRIDE)
    assert first.data_ptr() == start
    del first
    (third,) = maker.over(1, 0, 30, SIZE, STRIDE)
    del second
    gc.collect()
    assert not storage.expired()
    assert third.sum() == sum(range(24))
    del third
    gc.collect()
    assert storage.expired()
    with pytest.raises(ValueError, match="memory is gone"):
        maker.over(1, 0, 30, SIZE, STRIDE)


def test_inference_tensors_are_made_in_inference_mode():
    maker = _C.Parts(EXCHANGE, torch.zeros(60))
    with torch.inference_mode():
        (inside,) = maker.over(1, 0, 0, SIZE, STRIDE)
    (outside,) = maker.over(1, 0, 0, SIZE, STRIDE)
    assert (inside.is_inference(), outside.is_inference()) == (True, False)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((3, 17, 30, SIZE, STRIDE), "do not fit"),
        ((1, 0, 0, (1, 2, 8, 4), (8, 4, 16, 1)), "do not fit"),
        ((-1, 0, 30, SIZE, STRIDE), "four sizes"),
        ((1, -1, 30, SIZE, STRIDE), "four sizes"),
        ((1, 0, 30, (2, 3, 4), (12, 4, 1)), "four sizes"),
        ((1, 0, 30, SIZE, (8, 4, -8, 1)), "not negative"),
    ],
)
def test_what_does_not_fit_is_refused(arguments, message):
    maker = _C.Parts(EXCHANGE, torch.zeros(100))
    fitting = maker.over(3, 16, 30, SIZE, STRIDE)
    assert [t.storage_offset() for t in fitting] == [0, 0, 0]
    assert maker.over(2, 0, 30, (1, 2, 0, 4), STRIDE)[1].shape == (1, 2, 0, 4)
    with pytest.raises(ValueError, match=message):
        maker.over(*arguments)


def test_parts_are_known_again():
    memory = torch.arange(100.0)
    maker = _C.Parts(EXCHANGE, memory)
    first, second, third = maker.over(3, 4, 30, SIZE, STRIDE)

    def hold(*tensors, start=4, step=30, size=SIZE, stride=STRIDE):
        return maker.hold(tensors, start, step, size, stride)

    assert hold(first, second, third)
    assert hold(second, third, start=34)
    assert hold(memory.as_strided(SIZE, STRIDE, 4))  # another tensor at the same place
    assert not hold(first, third, second)
    assert not hold(first, second, start=5)
    assert not hold(first, second, step=29)
    assert not hold(first, second.clone())
    assert not hold(first, second[:, :, :2])
    assert not hold(first, second.transpose(1, 2))
    assert not hold(first, second.flatten())
    assert not hold(first, second.view(torch.int32))
    assert not hold(first, second.to_sparse())
    assert hold(first, second, third)  # no error of the others is left


def test_nothing_is_held_when_the_memory_is_gone():
    maker = _C.Parts(EXCHANGE, torch.arange(60.0))
    (made,) = maker.over(1, 0, 0, SIZE, STRIDE)
    copy = made.clone()
    del made
    gc.collect()
    assert not maker.hold((copy,), 0, 0, SIZE, STRIDE)


def test_only_a_dense_row_is_taken():
    for wrong in (torch.zeros(4, 4), torch.zeros(8)[::2]):
        with pytest.raises(ValueError, match="no dense row"):
            _C.Parts(EXCHANGE, wrong)


def test_other_functions_are_known_and_refused():
    """A PyTorch may have none, or those of another DLPack."""
    assert _C.knows_exchange(EXCHANGE)
    for other in (None, 7, torch.zeros(3).__dlpack__()):
        assert not _C.knows_exchange(other)
        with pytest.raises(ValueError, match="not those of DLPack 1"):
            _C.Parts(other, torch.zeros(3))
