"""The one class that only a GPU runs: what it asks of torch.cuda, with the signatures torch has, in the right order."""

from __future__ import annotations

from unittest import mock

import pytest
import torch
from llmopt.gpu import graphs

CUDA = torch.device("cuda:0")


@pytest.fixture
def calls(monkeypatch):
    """torch.cuda with autospecs; every call is noted by name."""
    noted: list[str] = []
    side = mock.NonCallableMock(spec=torch.cuda.Stream, device=CUDA)
    outside = mock.NonCallableMock(spec=torch.cuda.Stream)
    side.wait_stream.side_effect = lambda s: noted.append(f"side waits for {'outside' if s is outside else s}")  # fmt: skip
    outside.wait_stream.side_effect = lambda s: noted.append(f"outside waits for {'side' if s is side else s}")  # fmt: skip
    graph = mock.NonCallableMock(spec=torch.cuda.CUDAGraph)
    graph.replay.side_effect = lambda: noted.append("replay")
    monkeypatch.setattr(torch.cuda, "Stream", mock.Mock(return_value=side))
    monkeypatch.setattr(torch.cuda, "CUDAGraph", mock.Mock(return_value=graph))
    monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: (0, 1))
    for name, made in (("current_stream", outside), ("stream", mock.MagicMock()), ("graph", mock.MagicMock())):  # fmt: skip
        replaced = mock.create_autospec(getattr(torch.cuda, name), return_value=made)
        monkeypatch.setattr(torch.cuda, name, replaced)
    made.__enter__.side_effect = lambda: noted.append("capture begins")
    made.__exit__.side_effect = lambda *_: noted.append("capture ends")
    return noted


def test_captures_and_replays_are_ordered_on_one_stream(calls):
    recorder = graphs.CudaRecorder(CUDA)
    replay = recorder.capture(lambda: calls.append("launches"))
    with recorder.ordered():
        replay()
    captured = ["capture begins", "launches", "capture ends"]
    assert calls == [*captured, "side waits for outside", "replay", "outside waits for side"]
    options = torch.cuda.graph.call_args.kwargs
    assert options["pool"] == (0, 1)
    assert options["capture_error_mode"] == "thread_local"


def test_a_device_has_one_recorder(calls, monkeypatch):
    monkeypatch.setattr(graphs, "_recorders", {})
    assert graphs.recorder_of(CUDA) is graphs.recorder_of(torch.device("cuda:0"))
