"""What every test may use: `--backend` runs the end-to-end tests through another torch.compile backend."""

from __future__ import annotations

import pytest


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--backend",
        default="llmopt",
        help="the torch.compile backend of tests/e2e; 'eager' tells a fault of ours from one of Dynamo's",
    )


@pytest.fixture(scope="session")
def backend(request: pytest.FixtureRequest) -> str:
    return request.config.getoption("--backend")
