"""What lies in the spool is checked again before it leaves; changed or mixed up it never does."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from prometheus_client import CollectorRegistry

from dicom_xai.config import parse_address
from dicom_xai.service.outlet import Outlet
from dicom_xai.service.role import Context, ledger_state
from dicom_xai.study import Instance, ObjectKind, Per, Result
from dicom_xai.telemetry import LedgerCollector
from tests.make.books import rows, wait_until
from tests.make.committing_peer import running
from tests.make.ledger import a_result, an_instance, claimed, receive, wanted
from tests.make.results import as_file, header, patched
from tests.make.scripted_peer import ScriptedPeer

Change = Callable[[Path, Path], object]


def flip_a_pixel(result: Path, source: Path) -> None:
    data = bytearray(result.read_bytes())
    data[-1] ^= 1
    result.write_bytes(data)


def put_another_patients_result_there(result: Path, source: Path) -> None:
    result.write_bytes(patched(result.read_bytes(), PatientID=b"OTHER-1 "))


def put_another_patients_source_there(result: Path, source: Path) -> None:
    source.write_bytes(patched(source.read_bytes(), PatientID=b"OTHER-1 "))


def put_another_issuers_source_there(result: Path, source: Path) -> None:
    source.write_bytes(patched(source.read_bytes(), IssuerOfPatientID=b"Ward 8"))


def cut_the_source(result: Path, source: Path) -> None:
    source.write_bytes(source.read_bytes()[:400])


@pytest.mark.promise("C2")
@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (flip_a_pixel, "changed on disk since it was made"),
        (put_another_patients_result_there, "changed on disk since it was made"),
        (put_another_patients_source_there, "result and source differ in PatientID;"),
        (put_another_issuers_source_there, "result and source differ in IssuerOfPatientID;"),
        (cut_the_source, "cannot be read for its identity"),
        (lambda result, source: result.unlink(), "bytes are gone"),
        (lambda result, source: source.unlink(), "bytes are gone"),
    ],
    ids=[
        *("a changed result", "another patient's result", "another patient's source"),
        *("another issuer's source", "a source cut short", "no result", "no source"),
    ],
)
def test_what_changed_while_the_pacs_was_away_is_a_dead_letter_and_never_on_the_wire(
    context: Context, tmp_path: Path, change: Change, reason: str
) -> None:
    (source, spoilt), (_, good) = a_result_for_pacs(context, 1), a_result_for_pacs(context, 2)
    peer = ScriptedPeer().start()
    peer.stop()
    place = parse_address(f"PACS@127.0.0.1:{peer.port}", "DICOM_XAI")
    try:
        with running(Outlet(context, "pacs", place, random.Random(1))):
            wait_until(lambda: delivery(tmp_path, spoilt)["reason"], "tried, and nobody is there")
        change(file_of(tmp_path, spoilt.spool_key), file_of(tmp_path, source.spool_key))
        peer.start()
        with running(Outlet(context, "pacs", place, random.Random(1))):
            wait_until(lambda: not context.ledger.upkeep.depths().outbox, "nothing waits")
    finally:
        peer.stop()
    dead = delivery(tmp_path, spoilt)
    assert (dead["state"], delivery(tmp_path, good)["state"]) == ("dead", "sent")
    assert reason in str(dead["reason"])
    assert "OTHER-1" not in str(dead["reason"])
    assert list(peer.kept) == [good.sop_instance_uid]
    assert peer.received == 1
    counted = {"destination": "pacs", "outcome": "dead"}
    value = context.metrics.registry.get_sample_value("dicom_xai_deliveries_total", counted)
    assert value == 1
    assert dead_letters(context) == 1  # what the rule DicomXaiDeadLetters alerts by


def a_result_for_pacs(context: Context, number: int) -> tuple[Instance, Result]:
    """An image, and what a worker made of it."""
    stored = context.spool.put([as_file(header(number=number))])
    source = replace(an_instance(study=number), spool_key=stored)
    receive(context.ledger, source, wanted(source, Per.INSTANCE))
    job = claimed(context.ledger)
    ds = header(number=100 + number)
    file, uid = as_file(ds), str(ds.SOPInstanceUID)
    made = a_result(job, 0, ObjectKind.SC, uid=uid, key=context.spool.put([file]))
    result = replace(made, sha256=hashlib.sha256(file).hexdigest())
    context.ledger.jobs.finish(job, [result])
    return source, result


def file_of(folder: Path, key: str) -> Path:
    return folder / "spool" / key[:2] / key


def delivery(folder: Path, result: Result) -> dict[str, object]:
    query = "SELECT delivery.* FROM delivery JOIN result ON result.id = delivery.result_id"
    [row] = rows(folder, f"{query} WHERE result.sop_instance_uid = ?", result.sop_instance_uid)
    return row


def dead_letters(context: Context) -> float | None:
    registry = CollectorRegistry()
    registry.register(LedgerCollector(lambda: ledger_state(context.ledger, context.spool)))
    name = "dicom_xai_dead_letters_objects"
    return registry.get_sample_value(name, {"destination": "pacs"})
