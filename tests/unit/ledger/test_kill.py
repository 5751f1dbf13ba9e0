"""kill -9 at an exact system call of a transaction: afterwards all of it is there, or nothing."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

from dicom_xai.ledger import Ledger
from tests.make.ledger import LEASE_S, a_result, outgoing, rows, url_in

pytestmark = pytest.mark.peers("strace")

FINISH = """
import os, sys
from dicom_xai.ledger import Ledger
from tests.make.ledger import a_job, a_result
ledger = Ledger(sys.argv[1])
job = a_job(ledger, lease_s=-1.0)
os.write(2, b"finishing")
assert ledger.jobs.finish(job, [a_result(job, i, to=["pacs", "archive"]) for i in range(3)])
os.write(2, b"finished")
os._exit(0)
"""
CALLS = "pwrite64,fsync,fdatasync"


def run(folder: Path, empty_ledger: Path, *options: str) -> list[str]:
    """A process that finishes a job under strace; gives its calls."""
    folder.mkdir(exist_ok=True)
    shutil.copyfile(empty_ledger, folder / "ledger.db")
    log = folder / "trace"
    command = ["strace", "-f", "-o", str(log), "-e", f"trace={CALLS},write", *options]
    subprocess.run([*command, sys.executable, "-c", FINISH, url_in(folder)], capture_output=True)
    return log.read_text("utf-8", "replace").splitlines()


@pytest.mark.promise("D2")
def test_a_kill_inside_finish_leaves_all_of_it_or_nothing(
    tmp_path: Path, empty_ledger: Path
) -> None:
    calls = run(tmp_path / "dry", empty_ledger)
    begins = next(i for i, call in enumerate(calls) if '"finishing"' in call)
    ends = next(i for i, call in enumerate(calls) if '"finished"' in call)
    made = re.compile(r"(\d+) +(pwrite64|fsync|fdatasync)\(")
    before: Counter[tuple[str, str]] = Counter()  # strace counts for each thread on its own
    faults = []
    for i, call in enumerate(calls[:ends]):
        if found := made.match(call):
            thread, name = found.groups()
            before[thread, name] += 1
            if i > begins:
                faults.append((name, before[thread, name]))
    assert any(name != "pwrite64" for name, _ in faults)  # the commit is synced
    outcomes = set()
    # the first and the last write, one between, and the sync: each is another kind of half
    writes = [fault for fault in faults if fault[0] == "pwrite64"]
    syncs = [fault for fault in faults if fault[0] != "pwrite64"]
    for name, number in (writes[0], writes[len(writes) // 2], writes[-1], syncs[-1]):
        folder = tmp_path / f"{name}-{number}"
        killed = run(folder, empty_ledger, "-e", f"inject={name}:signal=KILL:when={number}")
        assert any("killed by SIGKILL" in call for call in killed)
        assert any('"finishing"' in call for call in killed)
        assert not any('"finished"' in call for call in killed)
        ledger = Ledger(url_in(folder))
        results = rows(folder, "SELECT count(*) FROM result")[0][0]
        deliveries = rows(folder, "SELECT count(*) FROM delivery")[0][0]
        job = ledger.jobs.claim(LEASE_S)
        outcomes.add((results, deliveries, job is None))
        if job is not None:  # its lease has run out: the work is done again, with the same UIDs
            assert ledger.jobs.finish(job, [a_result(job, i) for i in range(3)])
        assert outgoing(ledger).attempts == 1
        ledger.close()
    assert outcomes <= {(0, 0, False), (3, 6, True)}
    assert (0, 0, False) in outcomes
