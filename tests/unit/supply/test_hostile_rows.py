"""The table of hostile peers names tests that exist."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parents[3]
TABLE = REPOSITORY / "deploy/hostile-peers.md"
ROWS = [
    line.strip("|").split("|") for line in TABLE.read_text("utf-8").splitlines() if "::" in line
]


def test_every_attack_has_its_row() -> None:
    assert [int(row[0]) for row in ROWS] == list(range(1, len(ROWS) + 1))
    assert len(ROWS) >= 31


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row[1].strip())
def test_every_row_names_tests_that_exist(row: list[str]) -> None:
    assert all(cell.strip() for cell in row)
    named = re.findall(r"`([\w/]+\.py)::(\w+)`", row[-1])
    assert named
    for path, name in named:
        module = ast.parse((REPOSITORY / "tests" / path).read_text("utf-8"))
        assert name in {each.name for each in module.body if isinstance(each, ast.FunctionDef)}
