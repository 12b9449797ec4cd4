"""Every end-to-end test starts with empty Dynamo caches, and a silent return to eager is an error."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
import transformers

transformers.logging.set_verbosity_error()


@pytest.fixture(autouse=True)
def fresh_dynamo() -> Iterator[None]:
    """Past its recompile limit Dynamo runs eager without a word, which would compare eager with itself."""
    torch._dynamo.reset()
    with torch._dynamo.config.patch(fail_on_recompile_limit_hit=True):
        yield
    torch._dynamo.reset()
