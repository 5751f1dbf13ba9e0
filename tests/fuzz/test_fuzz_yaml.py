"""Any text in any of the three config files: a config, or problems that each have a place."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import strategies as st

from dicom_xai.config import ProblemsError, load
from tests.make.config_files import CARD, MODEL, ROUTES, SERVICE
from tests.make.fuzzing import Fuzz, spoilt

#: The first byte of an input chooses the file that is spoilt; the others stay whole.
FILES = {"dicom-xai.yaml": SERVICE, "routes.yaml": ROUTES, "models/phantom-cxr.yaml": CARD}
_WORDS = (
    *("&a [*a]", "*a", "<<: {}", "!!python/object:os.system x", "? [a]", "- ", "  ", "\t", "|"),
    *("null", "~", "true", "NO", "0123", "12:30", "1e999", ".nan", "-1", "''", "{}", "[]", "["),
    *("\u2028", "é", "\x07", "---", "...", "%YAML 1.1", "#", "@", "`", "routes:", "name:", "../"),
)


@st.composite
def reworded(draw: st.DrawFn) -> bytes:
    """A file with some of its words exchanged for others, its own or hostile ones."""
    number = draw(st.integers(0, len(FILES) - 1))
    lines = list(FILES.values())[number].splitlines(keepends=True)
    for _ in range(draw(st.integers(1, 5))):
        at = draw(st.integers(0, len(lines) - 1))
        words = lines[at].split(" ")
        word = draw(st.one_of(st.sampled_from(_WORDS), st.text(max_size=6)))
        words[draw(st.integers(0, len(words) - 1))] = word
        lines[at] = " ".join(words)
        if draw(st.booleans()):
            lines.insert(at, lines.pop(draw(st.integers(0, len(lines) - 1))))
    return bytes([number]) + "".join(lines).encode("utf-8", "replace")


@pytest.mark.promise("K1")
@pytest.mark.promise("K3")
def test_every_text_is_a_config_or_has_problems_with_a_place(fuzz: Fuzz, tmp_path: Path) -> None:
    (tmp_path / "models").mkdir()
    (tmp_path / "models/phantom-cxr.onnx").write_bytes(MODEL)

    def trial(data: bytes) -> None:
        chosen = list(FILES)[data[0] % len(FILES)] if data else "dicom-xai.yaml"
        for name, text in FILES.items():
            (tmp_path / name).write_bytes(data[1:] if name == chosen else text.encode())
        try:
            problems = load(tmp_path / "dicom-xai.yaml")[1]
        except ProblemsError as error:
            problems = error.problems
        assert all(each.message and each.line >= 1 and each.column >= 1 for each in problems)

    wholes = [bytes([number]) + text.encode() for number, text in enumerate(FILES.values())]
    fuzz.run("yaml", trial, st.one_of(reworded(), spoilt(wholes)), 300)
