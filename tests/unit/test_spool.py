"""Bytes that are durable when `put` returns, and a disk that fails."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from dicom_xai import processes
from dicom_xai.errors import InvariantError, OutOfResourcesError
from dicom_xai.spool import Spool


@pytest.fixture
def spool(tmp_path: Path) -> Spool:
    return Spool(tmp_path / "spool")


def files(spool_folder: Path) -> list[Path]:
    return sorted(path for path in spool_folder.rglob("*") if path.is_file())


def test_what_was_put_is_read_and_gone_when_deleted(spool: Spool) -> None:
    key = spool.put([b"one ", memoryview(b"two"), b""])
    assert spool.read(key) == b"one two"
    spool.delete(key)
    spool.delete(key)
    with pytest.raises(FileNotFoundError):
        spool.read(key)


def test_a_second_spool_on_the_folder_sees_the_same(spool: Spool, tmp_path: Path) -> None:
    key = spool.put([b"data"])
    assert Spool(tmp_path / "spool").read(key) == b"data"
    assert [found for found, _ in spool.entries()] == [key]


def test_files_and_folders_are_for_their_owner_only(spool: Spool, tmp_path: Path) -> None:
    spool.put([b"data"])
    (file,) = files(tmp_path / "spool")
    assert file.stat().st_mode & 0o777 == 0o600
    for folder in (file.parent, file.parent.parent):
        assert folder.stat().st_mode & 0o777 == 0o700


@pytest.mark.promise("C1")
@pytest.mark.parametrize(
    "key",
    [
        "",
        "../../../etc/passwd",
        "..",
        "/etc/passwd",
        "0" * 31,
        "0" * 33,
        "A" * 32,
        "g" * 32,
        "0" * 31 + "/",
        "0" * 32 + "\n",
        "0" * 30 + "\0" + "0",
        "٠" * 32,
    ],
)
def test_only_a_key_of_ours_reaches_a_path(spool: Spool, key: str) -> None:
    for verb in (spool.read, spool.delete):
        with pytest.raises(InvariantError):
            verb(key)


def test_eight_threads_put_and_read_back_what_is_theirs(spool: Spool, tmp_path: Path) -> None:
    def put(number: int) -> tuple[bytes, str]:
        data = bytes([number % 256]) * (number + 1)
        return data, spool.put([data])

    with ThreadPoolExecutor(8) as pool:
        stored = list(pool.map(put, range(80)))
    assert len({key for _, key in stored}) == 80
    assert all(spool.read(key) == data for data, key in stored)
    assert len(files(tmp_path / "spool")) == 80


@pytest.mark.promise("D5")
def test_an_object_that_would_leave_too_little_is_refused_before_it_is_written(
    tmp_path: Path,
) -> None:
    Spool(tmp_path)
    free = os.statvfs(tmp_path).f_bavail * os.statvfs(tmp_path).f_frsize
    spool = Spool(tmp_path, min_free_bytes=free + 2**40)
    with pytest.raises(OutOfResourcesError, match=r"spool\.min_free_bytes is \d+") as caught:
        spool.put([b"x"])
    assert caught.value.reason == "no-space"
    assert files(tmp_path) == []
    assert spool.is_healthy


@pytest.mark.promise("D5")
def test_what_ends_work_in_hand_is_stored_while_what_comes_in_is_refused(tmp_path: Path) -> None:
    Spool(tmp_path)
    free = os.statvfs(tmp_path).f_bavail * os.statvfs(tmp_path).f_frsize
    spool = Spool(tmp_path, min_free_bytes=free + free // 2)
    with pytest.raises(OutOfResourcesError), spool.draft():
        pass
    assert spool.read(spool.put([b"result" * 10_000])) == b"result" * 10_000
    spool.keep_free(3 * free)
    with pytest.raises(OutOfResourcesError, match=rf"results stop at {3 * free // 2}$"):
        spool.put([b"result"])


def test_the_size_of_the_object_counts(tmp_path: Path) -> None:
    free = os.statvfs(tmp_path).f_bavail * os.statvfs(tmp_path).f_frsize
    spool = Spool(tmp_path, min_free_bytes=free // 2)
    spool.check_room(1)
    with pytest.raises(OutOfResourcesError):
        spool.check_room(free)


def test_a_spool_whose_disk_is_gone_refuses(spool: Spool, tmp_path: Path) -> None:
    shutil.rmtree(tmp_path / "spool")
    with pytest.raises(OutOfResourcesError) as caught:
        spool.put([b"data"])
    assert caught.value.reason == "spool-error"


LIMITED = """
import resource, sys
from pathlib import Path
from dicom_xai.errors import OutOfResourcesError
from dicom_xai.spool import Spool
spool = Spool(Path(sys.argv[1]))
resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))
kept = spool.put([b"x" * 1000])
try:
    spool.put([b"y" * 600, b"z" * 600])
except OutOfResourcesError as error:
    print(error.reason, spool.is_healthy)
spool.put([b"small"])
"""


def test_a_write_that_fails_halfway_leaves_nothing_and_the_next_one_works(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", LIMITED, str(tmp_path)], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "spool-error True"
    assert sorted(file.stat().st_size for file in files(tmp_path)) == [5, 1000]


PUT = """
import sys
from pathlib import Path
from dicom_xai.errors import OutOfResourcesError
from dicom_xai.spool import Spool
spool = Spool(Path(sys.argv[1]))
for part in sys.argv[2:]:
    try:
        sys.stderr.write("put\\n")
        spool.put([part.encode()])
        sys.stderr.write("durable\\n")
    except OutOfResourcesError as error:
        sys.stderr.write(f"refused {error.reason} {spool.is_healthy}\\n")
"""


def traced(tmp_path: Path, *options: str, parts: tuple[str, ...] = ("data",)) -> list[str]:
    """The system calls of a process that puts `parts`, from the first `put` on."""
    folder, log = tmp_path / "spool", tmp_path / "trace"
    Spool(folder)
    watched = "trace=openat,write,fsync,fdatasync,rename,renameat,renameat2,unlink"
    command = ["strace", "-f", "-y", "-s", "64", "-o", str(log), "-e", watched, *options]
    done = subprocess.run(
        [*command, sys.executable, "-c", PUT, str(folder), *parts], capture_output=True, text=True
    )
    assert done.returncode in (0, -9, 137), done.stderr
    lines = log.read_text("utf-8", "replace").splitlines()
    start = next(i for i, line in enumerate(lines) if '"put' in line)
    return [line.split(None, 1)[1] for line in lines[start:]]


def steps(calls: list[str]) -> list[str]:
    """The calls that matter, in words."""
    words = [
        (r"openat\(.*\.tmp\", O_RDWR\|O_CREAT\|O_EXCL.*, 0600\)", "create temp"),
        (r"write\(\d+<.*\.tmp>, \"data\"", "write temp"),
        (r"fsync\(\d+<[^>]*/[0-9a-f]{2}/[0-9a-f]{32}>\)\s+= 0", "sync file"),
        (r"rename\(.*\.tmp\", \"[^\"]*/[0-9a-f]{2}/[0-9a-f]{32}\"\)\s+= 0", "rename"),
        (r"fsync\(\d+<[^>]*/[0-9a-f]{2}>\)\s+= 0", "sync folder"),
        (r"fsync\(.*EIO", "sync fails"),
        (r"write\(2.*\"durable", "durable"),
        (r"write\(2.*\"refused", "refused"),
    ]
    return [word for call in calls for pattern, word in words if re.match(pattern, call)]


@pytest.mark.promise("D1")
@pytest.mark.peers("strace")
def test_data_name_and_folder_are_synced_in_this_order_before_put_returns(tmp_path: Path) -> None:
    assert steps(traced(tmp_path)) == [
        "create temp",
        "write temp",
        "rename",
        "sync file",
        "sync folder",
        "durable",
    ]


DRAFT = """
import sys
from pathlib import Path
from dicom_xai.spool import Spool
with Spool(Path(sys.argv[1])).draft() as draft:
    for _ in range(3):
        draft.write(bytes(1_000_000))
    draft.settle()
    draft.keep()
"""


@pytest.mark.peers("strace")
def test_the_disk_begins_with_a_draft_before_it_is_whole(tmp_path: Path) -> None:
    log = tmp_path / "trace"
    watched = "trace=sync_file_range,rename"
    command = ["strace", "-f", "-o", str(log), "-e", watched, sys.executable, "-c", DRAFT]
    subprocess.run([*command, str(tmp_path / "spool")], check=True)
    calls = re.findall(r"(sync_file_range|rename)\(.*\)\s+= 0", log.read_text("utf-8"))
    assert calls == ["sync_file_range"] * 4 + ["rename"]


@pytest.mark.peers("strace")
def test_the_folders_of_a_new_spool_are_durable_too(tmp_path: Path) -> None:
    folder, log = tmp_path / "var/lib/spool", tmp_path / "trace"
    command = ["strace", "-f", "-y", "-o", str(log), "-e", "trace=fsync"]
    subprocess.run([*command, sys.executable, "-c", PUT, str(folder)], check=True)
    synced = re.findall(r"fsync\(\d+<([^>]*)>\)\s+= 0", log.read_text("utf-8"))
    named = [folder, *folder.parents[:3]]
    assert {str(path) for path in named} <= set(synced)


def fault(tmp_path: Path, what: str) -> str:
    """strace's option that fails one fsync of the put: the file's or its folder's."""
    calls = traced(tmp_path / "dry")
    before = (tmp_path / "dry/trace").read_text().count("fsync(") - 2
    assert len([call for call in calls if call.startswith("fsync(")]) == 2
    return f"inject=fsync:error=EIO:when={before + {'file': 1, 'folder': 2}[what]}"


@pytest.mark.promise("D4")
@pytest.mark.peers("strace")
@pytest.mark.parametrize("what", ["file", "folder"])
def test_after_a_failed_sync_nothing_is_stored_and_nothing_more_is_taken(
    tmp_path: Path, what: str
) -> None:
    (tmp_path / "dry").mkdir()
    calls = traced(tmp_path, "-e", fault(tmp_path, what), parts=("data", "data"))
    said = steps(calls)
    assert said.count("sync fails") == 1
    assert "durable" not in said
    assert said[-2:] == ["refused", "refused"]
    assert said.count("create temp") == 1  # the second put does not touch the disk
    assert files(tmp_path / "spool") == []
    assert all("spool-broken False" in call for call in calls if '"refused' in call)


@pytest.mark.promise("D2")
@pytest.mark.peers("strace")
@pytest.mark.parametrize("call", ["write", "rename", "fsync"])
def test_a_process_killed_in_the_middle_leaves_no_half_file_under_a_key(
    tmp_path: Path, call: str
) -> None:
    (tmp_path / "dry").mkdir()
    option = {
        "write": f"inject=write:signal=KILL:when={_write_of_data(tmp_path / 'dry')}",
        "rename": "inject=rename:signal=KILL:when=1",
        "fsync": fault(tmp_path, "file").replace("error=EIO", "signal=KILL"),
    }[call]
    traced(tmp_path, "-e", option)
    spool = Spool(tmp_path / "spool")
    stored = [spool.read(key) for key, _ in spool.entries()]
    # a name is given only to what is written to the end
    assert stored == ([b"data"] if call == "fsync" else [])
    assert spool.sweep() == (0 if call == "fsync" else 1)
    assert len(files(tmp_path / "spool")) == len(stored)


def _write_of_data(folder: Path) -> int:
    """Which of the process's writes is the first into the file."""
    traced(folder)
    writes = [line for line in (folder / "trace").read_text().splitlines() if " write(" in line]
    return next(number for number, line in enumerate(writes, 1) if '"data"' in line)


def leave_temp(folder: Path, boot: str, process: str) -> Path:
    key = "ab" + "0" * 30
    path = folder / "ab" / f".{key}.{boot}.{process}.tmp"
    path.write_bytes(b"half")
    return path


@pytest.mark.promise("D9")
def test_what_dead_processes_left_is_swept_and_nothing_else(spool: Spool, tmp_path: Path) -> None:
    folder = tmp_path / "spool"
    boot = processes.boot_id()
    key = spool.put([b"data"])
    us = processes.name_of(os.getpid())
    dead = leave_temp(folder, boot, f"{os.getpid()}-1")  # our process id, used before us
    earlier = leave_temp(folder, "11111111-2222-3333-4444-555555555555", us)
    alive = leave_temp(folder, boot, us)
    foreign = folder / "ab/notes.txt"
    foreign.write_text("somebody's")
    assert spool.sweep() == 2
    assert [path.exists() for path in (dead, earlier, alive, foreign)] == [
        False,
        False,
        True,
        True,
    ]
    assert spool.read(key) == b"data"
    assert [found for found, _ in spool.entries()] == [key]
    assert spool.sweep() == 0


def test_an_entry_tells_when_it_was_written(spool: Spool) -> None:
    spool.put([b"data"])
    ((_, modified),) = spool.entries()
    # the file system's clock may be coarser than ours by some milliseconds
    assert abs(modified - time.time()) < 60
