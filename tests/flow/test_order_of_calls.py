"""What the kernel was asked for, and in which order, before a sender was told Success."""

from __future__ import annotations

import struct
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from dicom_xai.demo.phantom import Phantom
from dicom_xai.demo.site import Site
from tests.make.books import rows
from tests.make.calls import Call, Watch
from tests.make.command import Running
from tests.make.studies import a_head, a_radiograph

SENDERS = 4  #: at the same time, so that they share the ledger's commits
WATCHED = "write,pwrite64,rename,fsync,fdatasync,sendto"
#: (0000,0100) Command Field C-STORE-RSP and (0000,0900) Status 0x0000, PS3.7 9.3.1.2.
IS_STORED = struct.pack("<HHLH", 0, 0x0100, 2, 0x8001), struct.pack("<HHLH", 0, 0x0900, 2, 0)


@pytest.mark.promise("D1")
@pytest.mark.peers("strace")
def test_file_folder_and_row_are_synced_before_the_answer_leaves(
    new_site: Callable[..., Site], tmp_path: Path
) -> None:
    site = new_site()
    site.pacs.start()
    site.write_config()
    receiver = Running(site, "receiver").wait_until_ready()
    studies = [a_radiograph("CR", ("PA",) * 4) if n % 2 else a_head(4) for n in range(SENDERS)]
    watch = Watch(receiver.process.pid, WATCHED, tmp_path)
    try:
        with ThreadPoolExecutor(SENDERS) as senders:
            told = list(senders.map(lambda phantom: site.send(phantom.files), studies))
    finally:
        calls = watch.stop()
        assert receiver.stop() == 0
    assert told == [[0x0000] * 4] * SENDERS
    for phantom in studies:
        for uid in uids_of(phantom):
            check_order(site.folder, calls, uid)


def uids_of(phantom: Phantom) -> list[str]:
    return [str(ds.SOPInstanceUID) for ds in phantom.datasets]


def check_order(folder: Path, calls: list[Call], uid: str) -> None:
    """Data, name, sync of the file, of its folder; row, sync of the log; then the answer.

    Each step must have ended before the next one began, whichever thread did it.
    """
    name = uid.encode()
    [row] = rows(folder, "SELECT spool_key FROM instance WHERE sop_instance_uid = ?", uid)
    key = str(row["spool_key"])
    log, file = folder / "ledger.db-wal", folder / "spool" / key[:2] / key
    [answer] = [
        call
        for call in calls
        if call.name == "sendto" and name in call.data and all(e in call.data for e in IS_STORED)
    ]
    data = [call for call in calls if call.name == "write" and f"/.{key}." in call.words]
    assert any(name in call.data for call in data)
    [named] = [call for call in calls if call.name == "rename" and f', "{file}"' in call.words]
    [file_synced] = [call for call in calls if call.name == "fsync" and call.is_of(file)]
    written = next(
        call for call in calls if call.name == "pwrite64" and call.is_of(log) and name in call.data
    )
    assert max(call.ended for call in data) < named.began
    assert named.ended < file_synced.began
    assert any(
        call.name == "fsync"
        and call.is_of(file.parent)
        and call.thread == answer.thread
        and file_synced.ended < call.began
        and call.ended < written.began
        for call in calls
    ), "the folder is synced before the row is written"
    assert any(
        call.name == "fdatasync"
        and call.is_of(log)
        and written.ended < call.began
        and call.ended < answer.began
        for call in calls
    ), "the row is synced before the answer leaves"
