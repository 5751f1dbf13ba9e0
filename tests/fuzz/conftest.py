"""One count for the whole run, told at its end."""

from __future__ import annotations

import pytest

from tests.make.fuzzing import Fuzz

_FUZZ = pytest.StashKey[Fuzz]()


@pytest.fixture(scope="session")
def fuzz(pytestconfig: pytest.Config) -> Fuzz:
    """The run's inputs and their count."""
    return pytestconfig.stash.setdefault(_FUZZ, Fuzz())


def pytest_terminal_summary(
    terminalreporter: pytest.TerminalReporter, config: pytest.Config
) -> None:
    made = config.stash.get(_FUZZ, None)
    if made is None:
        return
    counts = ", ".join(f"{count} {name}" for name, count in made.tried.items())
    terminalreporter.write_line(f"fuzz: seed {made.seed}, inputs tried: {counts}")
