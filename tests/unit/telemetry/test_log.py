"""Log lines that cannot hold a patient."""

from __future__ import annotations

import io
import json
import re
import subprocess
import sys

import pytest

from dicom_xai.errors import DecodeError, InvariantError, StudyError
from dicom_xai.telemetry import FIELDS, Event, Log, describe


def lines(stream: io.StringIO) -> list[dict[str, object]]:
    return [json.loads(line) for line in stream.getvalue().splitlines()]


def test_a_line_is_one_json_object_with_event_level_and_time() -> None:
    stream = io.StringIO()
    log = Log(stream, role="receiver").bind(port=11112)
    log.info(Event.LISTENING, ae_title="DICOM_XAI")
    log.warning(Event.SWEPT, count=3)
    log.error(Event.ROLE_CRASHED)
    first, second, third = lines(stream)
    assert {key: first[key] for key in ("event", "level", "role", "port", "ae_title")} == {
        "event": "listening",
        "level": "info",
        "role": "receiver",
        "port": 11112,
        "ae_title": "DICOM_XAI",
    }
    assert (second["level"], third["level"]) == ("warning", "error")
    assert str(first["timestamp"]).endswith("Z")


@pytest.mark.promise("C1")
def test_a_value_cannot_break_out_of_its_line() -> None:
    stream = io.StringIO()
    Log(stream).info(Event.JOB_DONE, reason="a\n{")
    assert len(lines(stream)) == 1


@pytest.mark.parametrize("field", ["patient_name", "patient_id", "birth_date", "name", "path"])
def test_a_field_outside_the_closed_set_is_refused(field: str) -> None:
    stream = io.StringIO()
    log = Log(stream)
    with pytest.raises(InvariantError, match=rf"{field}.*telemetry\.FIELDS"):
        log.info(Event.JOB_DONE, **{field: "Doe"})
    with pytest.raises(InvariantError):
        log.bind(**{field: "Doe"})
    with pytest.raises(InvariantError):
        Log(stream, **{field: "Doe"})
    assert stream.getvalue() == ""


def test_no_field_is_made_for_a_person() -> None:
    assert not [
        field for field in FIELDS for word in ("patient", "birth", "person", "sex") if word in field
    ]


def a_failure() -> BaseException:
    try:
        try:
            raise ValueError("PatientName 'Doe^Jane' is too long")
        except ValueError as cause:
            raise DecodeError("frame 3 cannot be decoded") from cause
    except DecodeError as error:
        return error


def test_an_error_is_described_without_what_libraries_say() -> None:
    text = describe(a_failure())
    assert "DecodeError: frame 3 cannot be decoded" in text
    assert "ValueError" in text
    assert "Doe" not in text
    assert re.search(r"test_log\.py:\d+ a_failure", text)


def raised_while_handling(is_hidden: bool) -> BaseException:
    try:
        try:
            raise KeyError("Doe^Jane")
        except KeyError:
            if is_hidden:
                raise StudyError("second") from None
            raise StudyError("second")  # noqa: B904  # the context is the point
    except StudyError as error:
        return error


@pytest.mark.parametrize("is_hidden", [False, True])
def test_an_error_while_handling_another_names_both_unless_told_otherwise(is_hidden: bool) -> None:
    text = describe(raised_while_handling(is_hidden))
    assert ("KeyError" in text) is not is_hidden
    assert "Doe" not in text


def test_an_exception_is_logged_as_an_error_of_one_line() -> None:
    stream = io.StringIO()
    Log(stream).exception(Event.JOB_FAILED, a_failure(), job=1)
    (line,) = lines(stream)
    assert (line["level"], line["job"]) == ("error", 1)
    assert "Doe" not in stream.getvalue()


LOUD = """
import logging, sys, warnings
if sys.argv[1] == "quiet":
    from dicom_xai.telemetry import quiet_libraries
    quiet_libraries()
for name in ("pydicom", "pynetdicom.acse", "highdicom.sc"):
    logging.getLogger(name).error("PatientName Doe^Jane")
warnings.warn("Invalid value for VR DA: '19551224x'")
"""


@pytest.mark.parametrize(("how", "is_heard"), [("loud", True), ("quiet", False)])
def test_libraries_that_quote_data_sets_are_not_heard(how: str, is_heard: bool) -> None:
    done = subprocess.run([sys.executable, "-c", LOUD, how], capture_output=True, text=True)
    assert done.returncode == 0
    assert ("Doe" in done.stderr) is is_heard
    assert ("19551224" in done.stderr) is is_heard
