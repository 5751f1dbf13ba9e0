"""The promises in scope, and which tests prove each: `deploy/promises.md`, kept true by a test.

``python -m tests.make.promises`` writes the file; ``--missing`` prints the promises that no test
names. A test names one by ``@pytest.mark.promise("D1")``, a module by its `pytestmark`; they are
read from the source, so that no tier has to run for it.
"""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

TESTS = Path(__file__).parents[1]
MATRIX = TESTS.parent / "deploy/promises.md"


@dataclass(frozen=True, slots=True)
class Promise:
    """What a user may rely on; must (first release) or should."""

    text: str
    is_must: bool = True


PROMISES: Mapping[str, Promise] = {
    "D1": Promise("Success is answered only when the object and its row are on stable storage."),
    "D2": Promise("A kill at any instant loses nothing acknowledged, shows nothing half written."),
    "D3": Promise("The same work makes results with the same UIDs: a second run adds nothing."),
    "D4": Promise("After a failed fsync nothing more is accepted on that disk."),
    "D5": Promise("A full disk refuses before it is full, and takes again without a restart."),
    "D6": Promise("A data set that is cut off or unreadable is never answered with Success."),
    "D7": Promise("The bytes that are kept are the bytes that were sent."),
    "D8": Promise("One UID with two contents: both are kept, it is said, none replaces.", False),
    "D9": Promise("What dead processes left half written is removed at start.", False),
    "P1": Promise("A PACS that is away for hours gets everything later, once, in order."),
    "P2": Promise("A destination that misbehaves ends its attempt in time and frees its thread."),
    "P3": Promise("A destination's answer is sorted: delivered, try again, or give up."),
    "P4": Promise("A destination can be asked to commit to what it holds.", False),
    "P5": Promise("A slow or dead destination delays no other."),
    "P6": Promise("Work that kills its worker is set aside after some tries, and said.", False),
    "N1": Promise("A peer that makes no progress is dropped by a deadline."),
    "N2": Promise("A good peer is served within a second while a thousand bad ones press."),
    "N3": Promise("No association makes memory grow without bound."),
    "N4": Promise("No PDU and no message is longer than what was agreed."),
    "N5": Promise("Sixty associations at once are all answered within two seconds."),
    "N6": Promise("A connection whose other end vanished is freed."),
    "N7": Promise("Malformed PDUs end in an abort or a close, with one line of log."),
    "N8": Promise("Jumps of the wall clock change nothing."),
    "N9": Promise("SIGTERM ends the service in time, whatever its peers do."),
    "N10": Promise("TLS by BCP 195: mutual, renewed without restart, tied to AE titles.", False),
    "N11": Promise("Who may send is decided before anything is stored; default is nobody."),
    "N12": Promise("Limits for each peer and for all keep a greedy one from the others.", False),
    "C1": Promise("Nothing from the wire reaches a path, a shell, a log or HTML as it came."),
    "C2": Promise("A result belongs to one study of one patient; a conflict stops it."),
    "C3": Promise("Pictures that would fill the memory are refused by arithmetic."),
    "C4": Promise("Odd, missing or nested attributes end in a result or a reason, never stuck."),
    "C5": Promise("Text in results is the source's text, in any character set.", False),
    "C6": Promise("Every number in a result is finite, or the result says there is none."),
    "G1": Promise("The device that was asked for computes, or the service is not ready."),
    "G2": Promise("A model file is what its card says, at load and afterwards."),
    "G3": Promise("A crash of the model costs one try, not the receiver."),
    "G4": Promise("A model that hangs is ended, and the study goes on or gets a reason."),
    "G5": Promise("A new model is loaded beside the old one and can be taken back.", False),
    "K1": Promise("A bad config never replaces a good one, and says where it is wrong."),
    "K2": Promise("A study keeps the config with which it started."),
    "K3": Promise("YAML's traps are errors, and AE titles are text."),
    "K5": Promise("Metrics hold no patient and no more series than the config has names."),
    "K6": Promise("Who did what is in an audit trail, in a file and at a collector.", False),
    "K7": Promise("Secrets come from files or the environment and are shown nowhere.", False),
}


def proofs() -> dict[str, list[str]]:
    """Each promise that a test names, with the tests as `path::name`."""
    found: dict[str, list[str]] = {}
    for path in sorted(TESTS.rglob("test_*.py")):
        name = path.relative_to(TESTS.parent).as_posix()
        for test, promise in _named_in(ast.parse(path.read_text("utf-8"))):
            found.setdefault(promise, []).append(f"{name}::{test}")
    return found


def missing() -> list[str]:
    """Promises that no test names, in order."""
    named = proofs()
    return [promise for promise in PROMISES if promise not in named]


def matrix() -> str:
    """The file's text."""
    named = proofs()
    lines = [
        "# Promises and their tests",
        "",
        "Generated by `make promises`; a test keeps it true. M: must, S: should. A promise without",
        "a test is not kept yet, or not shown.",
        "",
    ]
    for promise, what in PROMISES.items():
        lines += [f"## {promise} ({'M' if what.is_must else 'S'})", "", what.text, ""]
        lines += [f"- `{test}`" for test in named.get(promise, ())] or ["- no test names it"]
        lines.append("")
    return "\n".join(lines)


def _named_in(module: ast.Module) -> Iterator[tuple[str, str]]:
    of_module = [
        promise
        for node in module.body
        if isinstance(node, ast.Assign)
        and any(isinstance(each, ast.Name) and each.id == "pytestmark" for each in node.targets)
        for promise in _promises_in(node.value)
    ]
    for node in module.body:
        if isinstance(node, ast.FunctionDef) and node.name.startswith("test"):
            own = [promise for mark in node.decorator_list for promise in _promises_in(mark)]
            for promise in dict.fromkeys([*own, *of_module]):
                yield node.name, promise


def _promises_in(tree: ast.expr) -> Iterator[str]:
    for node in ast.walk(tree):
        if (
            isinstance(node, ast.Call)
            and isinstance(node.func, ast.Attribute)
            and node.func.attr == "promise"
        ):
            for argument in node.args:
                assert isinstance(argument, ast.Constant)
                yield str(argument.value)


if __name__ == "__main__":
    if "--missing" in sys.argv:
        without = missing()
        print(f"promises that no test names: {', '.join(without) or 'none'}")
    else:
        MATRIX.write_text(matrix(), "utf-8")
