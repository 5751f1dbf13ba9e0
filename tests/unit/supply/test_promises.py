"""The matrix of promises, and the table of hazards, say what is so."""

from __future__ import annotations

import ast
import re
from pathlib import Path

from tests.make.promises import MATRIX, PROMISES, matrix, missing, proofs

REPOSITORY = Path(__file__).parents[3]
HAZARDS = REPOSITORY / "deploy/hazards.md"


def test_the_committed_matrix_is_what_the_tests_say() -> None:
    assert MATRIX.read_text("utf-8") == matrix(), "make promises"


def test_tests_name_promises_that_exist() -> None:
    assert proofs().keys() <= PROMISES.keys()


def test_a_promise_without_a_test_is_told() -> None:
    assert set(missing()) == PROMISES.keys() - proofs().keys()
    for promise in missing():
        section = matrix().partition(f"## {promise} (")[2].partition("\n## ")[0]
        assert "no test names it" in section


def test_every_hazard_has_a_cause_a_control_that_exists_and_a_test_that_exists() -> None:
    lines = HAZARDS.read_text("utf-8").splitlines()
    table = [
        [cell.strip() for cell in line.strip("|").split("|")]
        for line in lines
        if "`" in line and line.startswith("|")
    ]
    assert len(table) >= 10
    for row in table:
        number, hazard, cause, control, proof = row
        assert number
        assert hazard
        assert cause
        for path, name in re.findall(r"`([\w/]+\.py)(?:::(\w+))?`", control):
            assert _defines(REPOSITORY / "dicom_xai" / path, name), (number, path, name)
        named = re.findall(r"`([\w/]+\.py)::(\w+)`", proof)
        assert named, number
        for path, name in named:
            assert _defines(REPOSITORY / "tests" / path, name), (number, path, name)


def _defines(path: Path, name: str) -> bool:
    """Whether a file exists, and holds a function or class of that name where one is given."""
    if not path.is_file():
        return False
    if not name:
        return True
    tree = ast.parse(path.read_text("utf-8"))
    return any(
        isinstance(node, ast.FunctionDef | ast.ClassDef) and node.name == name
        for node in ast.walk(tree)
    )
