"""What a readiness probe says of spool and ledger, and that it says it in time."""

from __future__ import annotations

import sqlite3
from contextlib import closing
from pathlib import Path

import pytest

from dicom_xai.service import role
from dicom_xai.service.role import Context, Stores
from tests.make.books import wait_until


@pytest.fixture
def stores(context: Context, monkeypatch: pytest.MonkeyPatch) -> Stores:
    """Asked each time."""
    monkeypatch.setattr(role, "_ASK_STORES_EVERY_S", 0.0)
    return Stores(context)


def test_a_spool_without_room_is_told_until_there_is_some(context: Context, stores: Stores) -> None:
    assert stores.problems() == []
    context.spool.keep_free(10**15)
    [problem] = stores.problems()
    assert problem.startswith("spool: ")
    assert problem.endswith(f"spool.min_free_bytes is {10**15}")
    context.spool.keep_free(0)
    assert stores.problems() == []


def test_a_ledger_that_somebody_holds_is_told_before_a_probe_gives_up(
    stores: Stores, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(role, "_STORES_ANSWER_IN_S", 0.1)
    with closing(sqlite3.connect(tmp_path / "ledger.db", isolation_level=None)) as other:
        other.execute("BEGIN IMMEDIATE")
        assert stores.problems() == ["spool and ledger did not answer in 0.1 s"]
        other.execute("ROLLBACK")
    wait_until(lambda: stores.problems() == [], "it is free again")


def test_of_an_error_that_is_not_ours_no_word_is_told(
    context: Context, stores: Stores, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail() -> None:
        raise ValueError("DOE^JANE")

    monkeypatch.setattr(context.ledger.upkeep, "tick", fail)
    [problem] = stores.problems()
    assert problem.startswith("ledger: ")
    assert "ValueError" in problem
    assert "DOE" not in problem
