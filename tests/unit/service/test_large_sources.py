"""Who a large source belongs to is read from its head: no role holds 2 GB for it."""

from __future__ import annotations

import hashlib
import os
import random
import tracemalloc
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest

from dicom_xai import identity
from dicom_xai.audit import Participant
from dicom_xai.config import parse_address
from dicom_xai.service.audited import Tally, note_sent
from dicom_xai.service.outlet import Outlet
from dicom_xai.service.role import Context
from dicom_xai.service.worker import Worker
from dicom_xai.study import ObjectKind, Per
from tests.make.books import rows, wait_until
from tests.make.committing_peer import running
from tests.make.config_files import Folder
from tests.make.ledger import a_result, an_instance, claimed, receive, wanted
from tests.make.results import as_file, header
from tests.make.scripted_peer import ScriptedPeer

LARGE = 2_000_000_000
#: A look at a header takes kilobytes; modules that a role loads meanwhile took 110 MB.
A_LOOK = 400_000_000


@pytest.fixture
def files(files: Folder) -> Folder:
    """With its one route off, so that no model is loaded."""
    files.spoil("routes.yaml", "trigger: instance", "trigger: instance\n    enabled: false")
    files.texts["dicom-xai.yaml"] += "audit: {include_patient_id: true}\n"
    return files


@contextmanager
def a_look() -> Iterator[None]:
    """Nobody may take more memory meanwhile than a look at a header does."""
    tracemalloc.start()
    try:
        yield
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < A_LOOK


def a_large_source(context: Context, folder: Path) -> str:
    """An image with holes for pixels; gives its key."""
    key = context.spool.put([as_file(header())])
    os.truncate(folder / "spool" / key[:2] / key, LARGE)
    return key


def test_a_view_gives_what_is_asked_for(context: Context, tmp_path: Path) -> None:
    key = a_large_source(context, tmp_path)
    whole = as_file(header())
    with a_look(), context.spool.view(key) as view:
        assert len(view) == LARGE
        assert view[128:132] == b"DICM"
        assert view[LARGE - 3 : LARGE + 5] == bytes(3)
        assert view[LARGE:] == view[9:9] == b""
        for start in (0, 700, 130, 1):
            assert view[start : start + 600] == whole[start : start + 600]
        assert identity.read_block(view) == identity.read_block(whole)
    with pytest.raises(FileNotFoundError), context.spool.view("0" * 32):
        pass


def test_a_view_of_a_file_that_ended_early_is_an_error(context: Context, tmp_path: Path) -> None:
    key = a_large_source(context, tmp_path)
    with context.spool.view(key) as view:
        os.truncate(tmp_path / "spool" / key[:2] / key, 100)
        with pytest.raises(OSError, match="ended early"):
            identity.read_block(view)


def test_the_check_before_sending_looks_at_the_head_of_the_source(
    context: Context, tmp_path: Path
) -> None:
    source = replace(an_instance(), spool_key=a_large_source(context, tmp_path))
    receive(context.ledger, source, wanted(source, Per.INSTANCE))
    job = claimed(context.ledger)
    ds = header(number=2)
    file, uid = as_file(ds), str(ds.SOPInstanceUID)
    made = a_result(job, 0, ObjectKind.SC, uid=uid, key=context.spool.put([file]))
    context.ledger.jobs.finish(job, [replace(made, sha256=hashlib.sha256(file).hexdigest())])
    peer = ScriptedPeer().start()
    place = parse_address(f"PACS@127.0.0.1:{peer.port}", "DICOM_XAI")
    try:
        with a_look(), running(Outlet(context, "pacs", place, random.Random(1))):
            wait_until(lambda: not context.ledger.upkeep.depths().outbox, "sent")
    finally:
        peer.stop()
    assert list(peer.kept) == [uid]


def test_the_audit_trail_looks_at_the_head_of_the_source(context: Context, tmp_path: Path) -> None:
    sent = Tally()
    sent.add("1.2.3", "1.2.840.10008.5.1.4.1.1.7", a_large_source(context, tmp_path))
    with a_look():
        note_sent(context, Participant("DICOM_XAI"), Participant("PACS"), sent)
    trail = "".join(path.read_text() for path in (tmp_path / "audit").iterdir())
    assert "ID-4711" in trail


def test_a_note_looks_at_the_head_of_the_source(context: Context, tmp_path: Path) -> None:
    source = replace(an_instance(), spool_key=a_large_source(context, tmp_path), size_bytes=LARGE)
    [route] = context.config.routes.routes
    want = wanted(source, Per.INSTANCE, route=route.name, digest="not loaded any more")
    written = route.model_dump_json(by_alias=True, exclude_none=True)
    worker = Worker(context, "cpu")
    with a_look():
        worker.start()
        try:
            receive(context.ledger, source, replace(want, route_json=written))
            wait_until(
                lambda: rows(tmp_path, "SELECT state FROM job")[0]["state"] == "failed", "answered"
            )
        finally:
            worker.stop(10.0)
    assert [row["kind"] for row in rows(tmp_path, "SELECT kind FROM result")] == ["note"]
