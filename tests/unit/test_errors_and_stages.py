"""The error tree as its docstring draws it, and the deadline."""

from __future__ import annotations

import re

from dicom_xai import errors
from dicom_xai.errors import DicomXaiError, RefusedError
from dicom_xai.stages import Deadline


def test_the_docstring_draws_every_error() -> None:
    drawn = set(re.findall(r"\b\w+Error\b", errors.__doc__ or ""))
    defined = {
        name
        for name, item in vars(errors).items()
        if isinstance(item, type) and issubclass(item, DicomXaiError)
    }
    assert defined == drawn


def test_every_refusal_has_a_reason_of_its_own() -> None:
    kinds = RefusedError.__subclasses__()
    reasons = {kind.reason for kind in kinds}
    assert len(reasons) == len(kinds) >= 4
    assert all(re.fullmatch(r"[a-z-]+", reason) for reason in reasons)


def test_a_refusal_can_say_its_reason_more_closely() -> None:
    assert errors.OutOfResourcesError("full", reason="no-space").reason == "no-space"
    assert errors.OutOfResourcesError("full").reason == "out-of-resources"


def test_a_deadline_counts_down_and_below_zero() -> None:
    now = [100.0]
    deadline = Deadline(at_s=102.0, clock=lambda: now[0])
    assert deadline.remaining_s == 2.0
    now[0] = 102.5
    assert deadline.remaining_s == -0.5
