"""Every end-to-end test starts with empty Dynamo caches, and a silent return to eager is an error."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
import transformers
from llmopt import backend

transformers.logging.set_verbosity_error()
# Nobody reads a message, with its traceback, for each tensor of a cache that a graph replaces.
torch._dynamo.config.side_effect_replay_policy = "silent"


@pytest.fixture(scope="module", autouse=True)
def empty_dynamo() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.fixture(autouse=True)
def fresh_dynamo(request: pytest.FixtureRequest) -> Iterator[None]:
    """Past its recompile limit Dynamo runs eager without a word, which would compare eager with itself.

    The limit is Dynamo's own of 8 here, so that a model that compiles again and again fails. A module with KEEP_GRAPHS lets its
    tests share one compiled model.
    """
    if not getattr(request.module, "KEEP_GRAPHS", False):
        torch._dynamo.reset()
    with pytest.MonkeyPatch.context() as patch, torch._dynamo.config.patch(fail_on_recompile_limit_hit=True):  # fmt: skip
        patch.setattr(backend, "_RECOMPILE_LIMITS", (8, 8))
        yield
