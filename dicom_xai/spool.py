"""Bytes, durable: put, read, delete by an opaque key.

A file's name is its identity, never its status. The key is random and made here; nothing from the
wire reaches a path. `put` returns only when the data, the name and the folder entry are on stable
storage: write to a temporary name in the same folder, fsync, rename, fsync of the folder.

A failed fsync is not retried on the same descriptor, because the kernel may have dropped the pages
("Can Applications Recover from fsync Failures?", ATC 2020): the spool refuses all further puts
until the process is replaced.
"""

from __future__ import annotations

import errno
import os
import re
import secrets
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from pathlib import Path

from dicom_xai import processes
from dicom_xai.errors import InvariantError, OutOfResourcesError

_KEY = re.compile(r"[0-9a-f]{32}")
_TEMP = re.compile(r"\.([0-9a-f]{32})\.([0-9a-f-]{36})\.(\d+-\d+)\.tmp")
_SHARDS = [f"{i:02x}" for i in range(256)]


class Spool:
    """A folder of files, one for each key.

    Parameters
    ----------
    directory : Path
        Made when absent, with mode 0700; on a local disk.
    min_free_bytes : int
        `put` refuses when less than this would be left.
    """

    def __init__(self, directory: Path, min_free_bytes: int = 0) -> None:
        self._directory = directory
        self._min_free_bytes = min_free_bytes
        self._is_broken = False
        # a new folder is durable once the folder that names it is
        made = [path for path in (directory, *directory.parents) if not path.exists()]
        directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        for shard in _SHARDS:
            (directory / shard).mkdir(mode=0o700, exist_ok=True)
        for folder in (directory, *(path.parent for path in made)):
            _fsync_folder(folder)
        self._owner = f"{processes.boot_id()}.{processes.name_of(os.getpid())}"

    def keep_free(self, min_free_bytes: int) -> None:
        """Refuse below another limit from now on."""
        self._min_free_bytes = min_free_bytes

    @property
    def is_healthy(self) -> bool:
        """False once an fsync has failed: what is written may not be there."""
        return not self._is_broken

    @property
    def free_bytes(self) -> int:
        """What the file system leaves to unprivileged users."""
        state = os.statvfs(self._directory)
        return state.f_bavail * state.f_frsize

    def check_room(self, size_bytes: int) -> None:
        """Refuse before anything is written.

        Raises
        ------
        OutOfResourcesError
            Less than `min_free_bytes` would be left, the disk does not answer, or an fsync has
            failed before.
        """
        if self._is_broken:
            raise OutOfResourcesError(
                "the spool's disk failed to sync; restart the role once the disk is sound",
                reason="spool-broken",
            )
        try:
            free = self.free_bytes
        except OSError as error:
            raise OutOfResourcesError(
                f"the spool's disk does not answer: {os.strerror(error.errno or 0)}",
                reason="spool-error",
            ) from error
        if free - size_bytes < self._min_free_bytes:
            raise OutOfResourcesError(
                f"{free} bytes free, {size_bytes} to store, spool.min_free_bytes is "
                f"{self._min_free_bytes}",
                reason="no-space",
            )

    def put(self, buffers: Sequence[bytes | memoryview]) -> str:
        """Store the buffers as one file and give its key, once it is durable.

        Raises
        ------
        OutOfResourcesError
            No room, or the disk failed; nothing is stored.
        """
        self.check_room(sum(len(buffer) for buffer in buffers))
        key = secrets.token_hex(16)
        final = self._path(key)
        temp = final.with_name(f".{key}.{self._owner}.tmp")
        try:
            fd = os.open(temp, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
            try:
                _write_all(fd, buffers)
                self._fsync(fd)
            finally:
                os.close(fd)
            os.rename(temp, final)
            _fsync_folder(final.parent, self._fsync)
        except OSError as error:
            with suppress(OSError):
                temp.unlink(missing_ok=True)
                final.unlink(missing_ok=True)
            reason = "no-space" if error.errno in (errno.ENOSPC, errno.EDQUOT) else "spool-error"
            raise OutOfResourcesError(
                f"the spool could not store an object: {os.strerror(error.errno or 0)}",
                reason="spool-broken" if self._is_broken else reason,
            ) from error
        return key

    def read(self, key: str) -> bytes:
        """The bytes of a key; FileNotFoundError when there are none."""
        return self._path(key).read_bytes()

    def open(self, key: str) -> int:
        """A descriptor of a key's bytes, for reading; FileNotFoundError when there are none."""
        return os.open(self._path(key), os.O_RDONLY)

    def delete(self, key: str) -> None:
        """Forget a key; one that is gone already is no error."""
        self._path(key).unlink(missing_ok=True)

    def entries(self) -> Iterator[tuple[str, float]]:
        """Every key with its modification time, seconds since the epoch."""
        for shard in _SHARDS:
            for entry in os.scandir(self._directory / shard):
                if _KEY.fullmatch(entry.name):
                    with suppress(FileNotFoundError):
                        yield entry.name, entry.stat().st_mtime

    def sweep(self) -> int:
        """Remove what dead processes left half written; gives how many files."""
        removed = 0
        boot = processes.boot_id()
        for shard in _SHARDS:
            for entry in os.scandir(self._directory / shard):
                match = _TEMP.fullmatch(entry.name)
                if match and (match[2] != boot or not processes.is_alive(match[3])):
                    with suppress(FileNotFoundError):
                        os.unlink(entry.path)
                        removed += 1
        return removed

    def _path(self, key: str) -> Path:
        if not _KEY.fullmatch(key):
            raise InvariantError("a spool key is 32 lower-case hexadecimal digits")
        return self._directory / key[:2] / key

    def _fsync(self, fd: int) -> None:
        try:
            os.fsync(fd)
        except OSError:
            self._is_broken = True
            raise


def _write_all(fd: int, buffers: Sequence[bytes | memoryview]) -> None:
    for buffer in buffers:
        view = memoryview(buffer)
        while view:
            view = view[os.write(fd, view) :]


def _fsync_folder(folder: Path, fsync: Callable[[int], None] = os.fsync) -> None:
    fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        fsync(fd)
    finally:
        os.close(fd)
