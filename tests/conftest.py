"""What every test may use: `--backend` and `--slow`."""

from __future__ import annotations

import gc
import logging
import os
from collections.abc import Iterator

import pytest

os.environ["LLMOPT_TUNE"] = "0"  # what somebody measured on this machine is no part of a test
# Teams of the suite's processes share the cores: one that spins while it waits takes them from the others.
os.environ["OMP_WAIT_POLICY"] = "passive"
# Dynamo collects garbage after every graph, which takes some percent of the suite's time; Python's own rounds do.
os.environ["TORCH_DYNAMO_RUN_GC_AFTER_COMPILE"] = "0"
# A process either interprets GPU kernels or compiles them: see the Makefile.
collect_ignore = [] if os.environ.get("TRITON_INTERPRET") == "1" else ["gpu/interpret"]


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--backend",
        default="llmopt",
        help="the torch.compile backend of tests/e2e; 'eager' tells a fault of ours from one of Dynamo's",
    )
    parser.addoption(
        "--accept-plans", action="store_true", help="write tests/golden from the plans made now"
    )
    parser.addoption("--slow", action="store_true", help="run the tests marked slow too")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if config.getoption("--slow"):
        return
    slow = [item for item in items if item.get_closest_marker("slow")]
    config.hook.pytest_deselected(items=slow)
    items[:] = [item for item in items if item not in slow]


def pytest_collection_finish() -> None:
    """Tracing makes cycles by the hundred thousand and keeps most: looking at them less often frees as much."""
    _pass_over()
    gc.set_threshold(50_000, 20, 50)
    # Nobody reads Dynamo's trace of every compilation: without a handler it is not made, nor printed with a failure. pytest gives its
    # own to every logger that does not propagate.
    trace = logging.getLogger("torch.__trace")
    trace.handlers.clear()
    trace.propagate = True


def pytest_sessionfinish() -> None:
    """Libraries complain at exit of what was never freed."""
    gc.unfreeze()


@pytest.fixture(scope="session", autouse=True)
def _unmeasured_guards() -> Iterator[None]:
    """Dynamo measures the guards of every graph, for its own statistics, after it has emptied the caches with 32 MB of new memory: of five
    thousand graphs that is more than a minute."""
    import torch._dynamo.guards as dynamo

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dynamo, "profile_guard_manager", lambda *_: 0.0, raising=False)
        yield


@pytest.fixture(scope="module", autouse=True)
def _forget_graphs() -> Iterator[None]:
    """What a module compiled goes with it. What PyTorch keeps of it, half a million objects in the end, is not walked again."""
    yield
    import torch  # not above: the process that only hands out tests needs none

    torch._dynamo.reset()
    _pass_over()


def _pass_over() -> None:
    """What is there now stays until the end, so that no later garbage collection need walk it."""
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="session")
def backend(request: pytest.FixtureRequest) -> str:
    return request.config.getoption("--backend")
