"""The append-only file: one message a line, numbered, each chained to the one before by a hash.

All processes of a host append to one folder. `audit.log` takes what comes; a file that is large or
old is renamed to `audit-N.log`, N being its last message's number, and is never written or deleted
by us again. The chain shows a line that was changed, removed or put in between (`verify`); a cut at
the very end shows only beside the collector's copy.

Rule: `append` holds a lock of the folder for one short write and one fsync.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import re
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import IO

ACTIVE = "audit.log"
_ROTATED = re.compile(r"audit-(\d{12})\.log")
_LOCK = "audit.lock"
#: What the first message is chained to.
BEGINNING = "0" * 64
#: So much is read at first to find the last line, more where that has no whole one; ours have 2 kB.
_TAIL_BYTES = 16_000


@dataclass(frozen=True, slots=True)
class Record:
    """One line: `chain` is over the chain before it, the number, the time and the message."""

    number: int
    at: str
    chain: str
    message: str

    def line(self) -> bytes:
        """As it stands in the file."""
        values = {"n": self.number, "at": self.at, "chain": self.chain, "message": self.message}
        return json.dumps(values, ensure_ascii=False).encode() + b"\n"

    def follows(self, chain: str) -> bool:
        """Whether it was chained to what had this chain."""
        return self.chain == _chained(chain, self.number, self.at, self.message)


@dataclass(frozen=True, slots=True)
class Verdict:
    """What a look through the whole trail found."""

    first: int
    last: int
    problems: tuple[str, ...]


class Trail:
    """The folder, for writing.

    Parameters
    ----------
    directory : Path
        Made when absent, mode 0700; on a local disk.
    rotate_bytes : int
    rotate_days : float
    clock : callable
        Seconds since the epoch.
    """

    def __init__(
        self,
        directory: Path,
        rotate_bytes: int,
        rotate_days: float,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self.directory = directory
        self._rotate_bytes = rotate_bytes
        self._rotate_s = rotate_days * 86_400
        self._clock = clock

    def append(self, compose: Callable[[str], str]) -> Record:
        """Write one message; returns when it is on disk.

        Parameters
        ----------
        compose : callable
            Gives the message for a time (ISO 8601); called under the lock, so that times rise.

        Raises
        ------
        OSError
            It is not in the file, or not surely.
        """
        self.directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        with _locked(self.directory):
            self._rotate_if_due()
            previous = newest(self.directory)
            number = previous.number + 1 if previous else 1
            now = self._clock()
            at = datetime.fromtimestamp(now, UTC).isoformat(timespec="milliseconds")
            message = compose(at)
            chain = _chained(previous.chain if previous else BEGINNING, number, at, message)
            record = Record(number, at, chain, message)
            self._write(record.line())
        return record

    def _write(self, line: bytes) -> None:
        path = self.directory / ACTIVE
        is_new = not path.exists()
        fd = os.open(path, os.O_RDWR | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            size = os.fstat(fd).st_size
            if size and os.pread(fd, 1, size - 1) != b"\n":
                line = b"\n" + line  # a line that a power cut left torn stays, and stays alone
            left = memoryview(line)
            while left:
                left = left[os.write(fd, left) :]
            os.fsync(fd)
        finally:
            os.close(fd)
        if is_new:
            _fsync_folder(self.directory)

    def _rotate_if_due(self) -> None:
        path = self.directory / ACTIVE
        try:
            with path.open("rb") as file:
                first = _parse(file.readline())
                size = os.fstat(file.fileno()).st_size
        except FileNotFoundError:
            return
        began_s = datetime.fromisoformat(first.at).timestamp() if first else self._clock()
        if size < self._rotate_bytes and self._clock() - began_s < self._rotate_s:
            return
        last = newest(self.directory)
        if last is not None:
            path.rename(self.directory / f"audit-{last.number:012d}.log")
            _fsync_folder(self.directory)


class Follower:
    """Reads on, message by message, across rotations.

    Parameters
    ----------
    directory : Path
    after : int
        The number of the last message that is not wanted any more.
    """

    def __init__(self, directory: Path, after: int) -> None:
        self._directory = directory
        self._after = after
        self._file: IO[bytes] | None = None
        self._last = 0  # of the open file, where it is rotated

    def next(self) -> Record | None:
        """The next message, or None while there is none."""
        while True:
            if self._file is None and not self._open():
                return None
            assert self._file is not None
            line = self._file.readline()
            if line.endswith(b"\n"):
                record = _parse(line)
                if record is not None and record.number > self._after:
                    self._after = record.number
                    return record
                continue
            if line:  # just being written
                self._file.seek(-len(line), os.SEEK_CUR)
            if not self._is_at_end_of_rotated():
                return None

    def close(self) -> None:
        """Let go of the file."""
        if self._file is not None:
            self._file.close()
            self._file = None

    def _open(self) -> bool:
        for last, path in rotated(self._directory):
            if last > self._after:
                self._file, self._last = path.open("rb"), last
                return True
        with suppress(FileNotFoundError):
            self._file, self._last = (self._directory / ACTIVE).open("rb"), 0
            return True
        return False

    def _is_at_end_of_rotated(self) -> bool:
        """Close a file that takes no more; the next message is in another."""
        assert self._file is not None
        if self._last:  # read to its end: what it should have had and has not is not to come
            self._after = max(self._after, self._last)
            self.close()
            return True
        with suppress(FileNotFoundError):
            active = (self._directory / ACTIVE).stat()
            if active.st_ino == os.fstat(self._file.fileno()).st_ino:
                return False
        self.close()  # renamed meanwhile; it may have grown before, so it is opened again
        return (
            any(last > self._after for last, _ in rotated(self._directory))
            or (self._directory / ACTIVE).exists()
        )


def verify(directory: Path) -> Verdict:
    """Follow the chain from the oldest message that is here to the newest.

    Older files may have been moved away: the first message's own link is then taken as it is.
    """
    problems: list[str] = []
    first, previous = 0, None
    for path in (*(path for _, path in rotated(directory)), directory / ACTIVE):
        if not path.exists():
            continue
        with path.open("rb") as file:
            for count, line in enumerate(file, start=1):
                record = _parse(line)
                where = f"{path.name}:{count}"
                if record is None:
                    if line.strip():
                        problems.append(f"{where}: not a message (torn by a power cut, or changed)")
                    continue
                if previous is None:
                    first = record.number
                    if first == 1 and not record.follows(BEGINNING):
                        problems.append(f"{where}: message 1 was changed")
                elif record.number != previous.number + 1:
                    problems.append(f"{where}: message {record.number} after {previous.number}")
                elif not record.follows(previous.chain):
                    problems.append(f"{where}: message {record.number} does not follow its chain")
                previous = record
    return Verdict(first, previous.number if previous else 0, tuple(problems))


def newest(directory: Path) -> Record | None:
    """The last whole message."""
    for path in (directory / ACTIVE, *(path for _, path in reversed(rotated(directory)))):
        record = _last_of(path)
        if record is not None:
            return record
    return None


def rotated(directory: Path) -> list[tuple[int, Path]]:
    """The files that were set aside, oldest first, each with its last message's number."""
    found = [(match[1], path) for path in directory.glob("audit-*.log") if (match := _name(path))]
    return sorted((int(number), path) for number, path in found)


def _name(path: Path) -> re.Match[str] | None:
    return _ROTATED.fullmatch(path.name)


def _last_of(path: Path) -> Record | None:
    """The last whole message of a file, however long it is and whatever was torn after it."""
    try:
        with path.open("rb") as file:
            size = start = os.fstat(file.fileno()).st_size
            tail_bytes = _TAIL_BYTES
            while start:
                start = max(0, size - tail_bytes)
                file.seek(start)
                lines = file.read().splitlines(keepends=True)
                whole = lines[1:] if start else lines
                for line in reversed(whole):
                    record = _parse(line)
                    if record is not None:
                        return record
                tail_bytes *= 4
    except FileNotFoundError:
        pass
    return None


def _parse(line: bytes) -> Record | None:
    try:
        values = json.loads(line)
        record = Record(values["n"], values["at"], values["chain"], values["message"])
    except (ValueError, TypeError, KeyError):
        return None
    return record if line.endswith(b"\n") and isinstance(record.number, int) else None


def _chained(previous: str, number: int, at: str, message: str) -> str:
    return hashlib.sha256(f"{previous}\n{number}\n{at}\n{message}".encode()).hexdigest()


@contextmanager
def _locked(directory: Path) -> Iterator[None]:
    fd = os.open(directory / _LOCK, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX)
        yield
    finally:
        os.close(fd)


def _fsync_folder(folder: Path) -> None:
    fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
