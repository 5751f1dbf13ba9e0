"""Power is lost: what was not synced is gone, and nothing acknowledged was among it.

This is the check of the order of system calls too: an acknowledgement before the sync of file,
folder or ledger is a loss on the strict disk, at the moment between the two.
"""

from __future__ import annotations

import random
import shutil
import sqlite3
from collections.abc import Callable
from contextlib import closing
from pathlib import Path

import pytest

from dicom_xai.deliver.storage_scu import parse
from dicom_xai.demo.phantom import Phantom
from dicom_xai.demo.site import Site
from dicom_xai.ledger import Ledger
from dicom_xai.spool import Spool
from tests.chaos.account import Counts, check_round, check_site, sends_of
from tests.flow.conftest import ROUTES_TO_PACS
from tests.flow.test_crash import note_answers
from tests.make.books import rows, wait_until_idle
from tests.make.command import Running
from tests.make.disk import (
    Change,
    as_written,
    build_shim,
    note,
    read_journal,
    survivors,
    watching,
)
from tests.make.scripted_peer import ScriptedPeer
from tests.make.studies import a_head, a_radiograph

SEED = 20261123
CUTS = 60  #: moments at which power is lost, each on a strict and on a lazy disk
RESTARTS = 2  #: of them, so many with the whole service started on what is left


class _Noted(dict[str, bytes]):
    """Files by UID, each noted in the journal at the moment it was known."""

    def __init__(self, journal: Path, word: str) -> None:
        super().__init__()
        self._journal = journal
        self._word = word

    def __setitem__(self, uid: str, file: bytes) -> None:
        super().__setitem__(uid, file)
        note(self._journal, f"{self._word} {uid}")

    def before(self, changes: list[Change]) -> dict[str, bytes]:
        """Those that were known at the end of these changes."""
        lines = [each.path.split() for each in changes if each.op == "A"]
        return {uid: self[uid] for word, uid in lines if word == self._word}


@pytest.mark.slow
@pytest.mark.promise("D1")
@pytest.mark.promise("D2")
@pytest.mark.peers("cc")
def test_a_loss_of_power_at_any_moment_loses_nothing_acknowledged(
    new_site: Callable[..., Site], tmp_path: Path
) -> None:
    journal = tmp_path / "journal"
    acknowledged, kept = _Noted(journal, "sender"), _Noted(journal, "pacs")
    studies = [a_radiograph(), a_head(4), a_radiograph("CR", ("PA", "PA"))]
    with ScriptedPeer() as pacs:
        pacs.kept = kept
        site = new_site(destinations={"pacs": f"PACS@127.0.0.1:{pacs.port}"})
        site.write_config()
        watched = watching(build_shim(tmp_path), site.folder, journal)
        service = Running(site, environment=watched).wait_until_ready()
        for phantom in studies:
            note_answers(site, phantom, acknowledged, set())
        wait_until_idle(site.folder)
        assert service.stop() == 0
        changes = read_journal(journal)
        _check_journal_is_complete(site.folder, changes)
        first = next(at for at, each in enumerate(changes) if each.op == "A")
        rng = random.Random(SEED)
        moments = sorted(rng.sample(range(first, len(changes) + 1), CUTS))
        for moment in moments:
            for lazy in (None, random.Random(moment)):
                folder = tmp_path / "cut"
                _lay_out(survivors(changes[:moment], lazy), site.folder, folder)
                _check_nothing_acknowledged_is_gone(folder, acknowledged.before(changes[:moment]))
                shutil.rmtree(folder)
        for moment in rng.sample(moments, RESTARTS):
            _forget(site.folder)
            _lay_out(survivors(changes[:moment]), site.folder, site.folder)
            pacs.kept = kept.before(changes[:moment])
            _go_on(site, pacs, studies)


def _go_on(site: Site, pacs: ScriptedPeer, studies: list[Phantom]) -> None:
    """Start on what is left; the senders send everything once more, and the books must balance."""
    service = Running(site).wait_until_ready()
    counts, told = Counts(), []
    try:
        for phantom in studies:
            assert set(site.send(phantom.files)) == {0x0000}
            told.append(
                {
                    str(ds.SOPInstanceUID): file
                    for ds, file in zip(phantom.datasets, phantom.files, strict=True)
                }
            )
        wait_until_idle(site.folder)
        check_round(site.folder, {"pacs": pacs}, told, sends_of(ROUTES_TO_PACS), counts)
        check_site(site.folder, {"pacs": pacs}, counts)
    finally:
        assert service.stop() == 0


def _forget(folder: Path) -> None:
    for path in folder.glob("ledger.db*"):
        if path.is_file():
            path.unlink()
    shutil.rmtree(folder / "spool")


def _check_journal_is_complete(folder: Path, changes: list[Change]) -> None:
    """Everything played back gives the very files: no change went past the shim."""
    told = as_written(changes)
    there = {
        str(path): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file() and ("/spool/" in str(path) or path.name.startswith("ledger.db"))
        if not path.name.endswith("-shm")
    }
    assert {path: len(told.get(path, b"")) for path in there} == {
        path: len(data) for path, data in there.items()
    }
    assert all(told[path] == data for path, data in there.items())


def _lay_out(files: dict[str, bytes], root: Path, folder: Path) -> None:
    """Write what survived below `root` into another folder."""
    for path, data in files.items():
        inside = Path(path).relative_to(root)
        if inside.parts[0] == "spool" or inside.name.startswith("ledger.db"):
            place = folder / inside
            place.parent.mkdir(parents=True, exist_ok=True)
            place.write_bytes(data)


def _check_nothing_acknowledged_is_gone(folder: Path, acknowledged: dict[str, bytes]) -> None:
    with closing(sqlite3.connect(folder / "ledger.db")) as connection:
        assert connection.execute("PRAGMA integrity_check").fetchone() == ("ok",)
    Ledger(f"sqlite:///{folder / 'ledger.db'}").close()
    spool = Spool(folder / "spool")
    spool.sweep()
    stored = {str(row["sop_instance_uid"]): row for row in rows(folder, "SELECT * FROM instance")}
    assert stored.keys() >= acknowledged.keys(), "acknowledged and lost"
    named = [*stored.values(), *rows(folder, "SELECT * FROM result")]
    for row in named:
        data = spool.read(str(row["spool_key"]))
        assert len(data) >= int(str(row["size_bytes"])), "a row names a file that is cut"
        sent = acknowledged.get(str(row["sop_instance_uid"]))
        if sent is not None:
            assert data[parse(data).data_set_at :] == sent[parse(sent).data_set_at :]
    job_ids = {row["id"] for row in rows(folder, "SELECT id FROM job WHERE state = 'done'")}
    with_results = {row["job_id"] for row in rows(folder, "SELECT job_id FROM result")}
    assert job_ids <= with_results
