"""mode="reduce-overhead" with a stand-in for CUDA graphs that keeps launches as they were captured: addresses and numbers included."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from llmopt.compiled import alive
from llmopt.gpu import graphs, launching
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import DynamicCache, StaticCache

from tests.gpu.interpret.test_models import build, rms_error
from tests.tolerance import assert_close


class _OnlyAllocates(TorchDispatchMode):
    """A capture records launches; arithmetic of torch in it would run once here and at every replay on a GPU."""

    def __torch_dispatch__(self, function, types, arguments=(), keywords=None):
        name = function.overloadpacket.__name__
        assert function.is_view or name in ("empty", "empty_strided", "detach"), (
            f"{name} in a capture"
        )
        return function(*arguments, **(keywords or {}))


class FakeRecorder:
    """Captures by noting launches and replays by running just those; counts both."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self._patch = patch
        self.captures = self.replays = 0
        self.fails = ""

    def ordered(self) -> contextlib.AbstractContextManager[None]:
        return contextlib.nullcontext()

    def capture(self, body: Callable[[], None]) -> Callable[[], None]:
        if self.fails:
            raise RuntimeError(self.fails)
        run, launches = launching.run, []
        with self._patch.context() as patch, _OnlyAllocates():
            patch.setattr(launching, "run", launches.append)
            body()
        self.captures += 1
        assert launches

        def replay() -> None:
            self.replays += 1
            for launch in launches:
                run(launch)

        return replay


@pytest.fixture
def recorder(monkeypatch):
    fake = FakeRecorder(monkeypatch)
    monkeypatch.setattr(graphs, "recorder_of", lambda _: fake)
    return fake


def reduced(model: torch.nn.Module) -> Any:
    # torch.compile takes either a mode or options: a GPU would be the tensors' own.
    return torch.compile(model, backend="llmopt", mode="reduce-overhead")


@pytest.fixture(autouse=True)
def _on_a_gpu(monkeypatch):
    """The interpreter's CPU tensors count as an H100's."""
    from llmopt.gpu import device
    from llmopt.gpu.device import Gpu

    monkeypatch.setattr(device, "gpu_of", lambda _: Gpu("cuda", "90", "H100", 132, 232448))


def test_a_graph_is_captured_at_the_second_call_and_gives_what_launches_give(recorder):
    model = build("bert", torch.float16, layers=1)
    exact, run = copy.deepcopy(model).double(), reduced(model)
    with torch.no_grad():
        for call in range(4):
            ids = torch.randint(0, 100, (1, 9))
            got = run(input_ids=ids).last_hidden_state
            assert_close(got, exact(input_ids=ids).last_hidden_state)
            assert recorder.replays == call
    assert recorder.captures == 1
    assert "1 CUDA graph(s), replayed 3 times" in alive()[-1].cuda_graphs()[0]


def test_results_of_one_call_outlive_the_next(recorder):
    model = build("bert", torch.float16, layers=1)
    run = reduced(model)
    with torch.no_grad():
        results = [run(input_ids=torch.full((1, 5), i)).last_hidden_state for i in (1, 1, 2, 3)]
    assert recorder.replays == 3
    assert torch.equal(results[0], results[1])
    assert not torch.equal(results[1], results[2])
    assert not torch.equal(results[2], results[3])


def test_an_edited_weight_and_another_length_are_seen(recorder):
    model = build("bert", torch.float16, layers=1)
    run = reduced(model)
    ids = torch.randint(0, 100, (1, 9))
    with torch.no_grad():
        before = [run(input_ids=ids).last_hidden_state for _ in range(3)][-1]
        model.encoder.layer[0].output.dense.weight.mul_(-2)
        exact = copy.deepcopy(model).double()
        want = exact(input_ids=ids).last_hidden_state
        for _ in range(3):
            assert_close(run(input_ids=ids).last_hidden_state, want)
        assert rms_error(before, want) > 0.01
        longer = torch.randint(0, 100, (1, 11))
        for _ in range(2):
            got = run(input_ids=longer).last_hidden_state
            assert_close(got, exact(input_ids=longer).last_hidden_state)


def test_decoding_with_a_static_cache_replays_one_graph(recorder):
    model = build("llama", torch.float16, layers=1)
    exact, run = copy.deepcopy(model).double(), reduced(model)
    cache, reference = (StaticCache(config=model.config, max_cache_len=16) for _ in range(2))
    with torch.no_grad():
        for step in range(5):
            ids = torch.randint(0, 100, (1, 4 if step == 0 else 1))
            got = run(input_ids=ids, past_key_values=cache, use_cache=True).logits
            want = exact(input_ids=ids, past_key_values=reference, use_cache=True).logits
            assert_close(got, want)
    assert recorder.captures >= 1
    assert recorder.replays >= 2


def test_a_growing_cache_is_launched_and_says_why(recorder):
    model = build("llama", torch.float16, layers=1)
    exact, run = copy.deepcopy(model).double(), reduced(model)
    cache, reference = DynamicCache(), DynamicCache()
    with torch.no_grad():
        for length in (4, 1, 1):
            ids = torch.randint(0, 100, (1, length))
            got = run(input_ids=ids, past_key_values=cache, use_cache=True).logits
            assert_close(
                got, exact(input_ids=ids, past_key_values=reference, use_cache=True).logits
            )
    assert recorder.captures == 0
    assert "a cache that grows" in alive()[-1].cuda_graphs()[0]


def test_a_capture_that_fails_is_launched_and_says_why(recorder):
    recorder.fails = "operation not permitted when stream is capturing"
    model = build("bert", torch.float16, layers=1)
    exact, run = copy.deepcopy(model).double(), reduced(model)
    ids = torch.randint(0, 100, (1, 9))
    with torch.no_grad():
        for _ in range(3):
            assert_close(
                run(input_ids=ids).last_hidden_state, exact(input_ids=ids).last_hidden_state
            )
    assert "capturing failed: operation not permitted" in alive()[-1].cuda_graphs()[0]


def test_memory_of_a_graph_is_laid_out_as_what_it_stands_for():
    """Captured launches have the strides of the call's own results, gaps included."""
    rows = torch.empty(4, 8)
    for like in (rows[:, :5], rows.t(), rows[:1].expand(4, 8)):
        made = graphs._memory_like(like)
        assert (made.shape, made.stride()) == (like.shape, like.stride())
        assert made.data_ptr() != like.data_ptr()
