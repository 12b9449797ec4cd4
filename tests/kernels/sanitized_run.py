"""Runs a share of the kernel tests against a sanitized build.

Arguments: PACKAGES (a folder whose `llmopt` holds that module), SHARE, then those of pytest.
One test in SHARE is run, chosen by a hash of its name: every family and tier is in the sample, and
the sample is the same each time.
"""

from __future__ import annotations

import sys
import zlib
from pathlib import Path

import pytest


class Sample:
    """Keeps the tests whose hash falls into the share."""

    def __init__(self, share: int) -> None:
        self.share = share

    def pytest_collection_modifyitems(self, items: list[pytest.Item]) -> None:
        items[:] = [i for i in items if zlib.crc32(i.name.encode()) % self.share == 0]


def main(packages: str, share: str, *arguments: str) -> int:
    # An editable install finds llmopt through a hook of its own, which would win over the path.
    sys.meta_path[:] = [f for f in sys.meta_path if "Redirecting" not in type(f).__name__]
    sys.path.insert(0, packages)
    from llmopt import _C

    if not Path(_C.__file__).is_relative_to(packages):
        raise SystemExit(f"not the sanitized module: {_C.__file__}")
    return int(pytest.main(list(arguments), plugins=[Sample(int(share))]))


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
