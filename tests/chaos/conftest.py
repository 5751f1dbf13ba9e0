"""The counts of the short form, told at its end: they are what it was played for."""

from __future__ import annotations

import pytest

from tests.chaos.account import Counts

_COUNTS = pytest.StashKey[Counts]()


@pytest.fixture(scope="session")
def total(pytestconfig: pytest.Config) -> Counts:
    """Of all that this run plays."""
    return pytestconfig.stash.setdefault(_COUNTS, Counts())


def pytest_terminal_summary(
    terminalreporter: pytest.TerminalReporter, config: pytest.Config
) -> None:
    total = config.stash.get(_COUNTS, None)
    if total is not None:
        for line in str(total).splitlines():
            terminalreporter.write_line(f"chaos: {line}")
