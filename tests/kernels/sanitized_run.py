"""Runs a share of the kernel tests against a sanitized build.

Arguments: PACKAGES (a folder whose `llmopt` holds that module), SHARE, then those of pytest.
One test in SHARE is run, chosen by a hash of its name, and at least one of each file: the sample is the same each time. The last
line names the files it had tests of.
"""

from __future__ import annotations

import sys
import zlib
from pathlib import Path

import pytest


class Sample:
    """Keeps the tests whose hash falls into the share, and the nearest of each file that would have none."""

    def __init__(self, share: int) -> None:
        self.share = share
        self.passed: set[str] = set()  # names of files

    def pytest_collection_modifyitems(self, items: list[pytest.Item]) -> None:
        nearest = {i.path: i for i in sorted(items, key=self._distance, reverse=True)}
        items[:] = [i for i in items if self._distance(i) == 0 or nearest[i.path] is i]

    def _distance(self, item: pytest.Item) -> int:
        return zlib.crc32(item.name.encode()) % self.share

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.when == "call" and report.passed:
            self.passed.add(Path(report.fspath).name)


def main(packages: str, share: str, *arguments: str) -> int:
    # An editable install finds llmopt through a hook of its own, which would win over the path.
    sys.meta_path[:] = [f for f in sys.meta_path if "Redirecting" not in type(f).__name__]
    sys.path.insert(0, packages)
    from llmopt import _C

    if not Path(_C.__file__).is_relative_to(packages):
        raise SystemExit(f"not the sanitized module: {_C.__file__}")
    sample = Sample(int(share))
    code = int(pytest.main(list(arguments), plugins=[sample]))
    print("passed in:", *sorted(sample.passed))
    return code


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
