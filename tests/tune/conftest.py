"""Tuning is on, in a directory of the test's own."""

from __future__ import annotations

from pathlib import Path

import pytest


@pytest.fixture(autouse=True)
def cache_dir(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("LLMOPT_TUNE", "1")
    monkeypatch.setenv("LLMOPT_CACHE_DIR", str(tmp_path / "cache"))
    return tmp_path / "cache"
