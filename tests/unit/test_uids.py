"""Derived UIDs: the same inputs, the same UID; and what a well-formed UID is."""

from __future__ import annotations

import subprocess
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydicom.uid import UID

from dicom_xai import uids


@given(st.lists(st.text(max_size=20), max_size=5))
def test_a_derived_uid_is_valid_and_repeats(inputs: list[str]) -> None:
    uid = uids.derive(*inputs)
    assert uid == uids.derive(*inputs)
    assert uid.startswith("2.25.")
    assert uids.is_valid(uid)
    assert UID(uid).is_valid


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (("a", "bc"), ("ab", "c")),
        (("a", "b"), ("b", "a")),
        (("a",), ("a", "")),
        ((), ("",)),
        (("ä",), ("a\u0308",)),
    ],
)
def test_other_inputs_give_another_uid(one: tuple[str, ...], other: tuple[str, ...]) -> None:
    assert uids.derive(*one) != uids.derive(*other)


@pytest.mark.promise("D3")
def test_another_process_derives_the_same() -> None:
    script = "from dicom_xai import uids; print(uids.derive('1.2.3', 'route', 'sc'))"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.stdout.strip() == uids.derive("1.2.3", "route", "sc")


def test_derived_uids_never_change_between_versions() -> None:
    # a changed derivation would duplicate every result in the PACS on the next retry
    assert uids.derive("1.2.3", "chest") == PINNED


PINNED = "2.25.30270690815053565177596140657568511821"


def test_a_changed_model_is_another_device() -> None:
    assert uids.device_uid("0" * 64) != uids.device_uid("1" * 64)
    assert uids.device_uid("0" * 64) != uids.derive("0" * 64)


def test_the_implementations_own_names_fit_their_fields() -> None:
    assert uids.is_valid(uids.IMPLEMENTATION_CLASS_UID)
    assert 1 <= len(uids.IMPLEMENTATION_VERSION_NAME) <= 16


@pytest.mark.parametrize(
    ("uid", "expected"),
    [
        ("1.2.840.10008.1.2", True),
        ("0.1", True),
        ("1.0.2", True),
        ("1." + "2" * 62, True),
        ("1." + "2" * 63, False),
        ("", False),
        ("1", False),
        (".1.2", False),
        ("1.2.", False),
        ("1..2", False),
        ("1.02", False),
        ("1.2.x", False),
        ("../1.2", False),
        ("1.2/3", False),
        ("1.2 ", False),
        ("1.2\n", False),
        ("1.2\0", False),
        ("1.٣", False),
        ("-1.2", False),
    ],
)
def test_a_uid_is_digits_and_dots_without_leading_zeros(uid: str, expected: bool) -> None:
    assert uids.is_valid(uid) is expected
