"""Bytes, durable: put, read, delete by an opaque key.

A file's name is its identity, never its status. The key is random and made here; nothing from the
wire reaches a path. A `Draft` grows under a temporary name; `keep` renames it within its folder,
syncs the file, then the folder, and only then gives the key away. The rename goes first because
the file's sync then makes both durable in one go on most file systems. Until the key is given
nobody knows the file: after a loss of power one may lie half written under its final name, but no
row names it, and retention sweeps it.

A failed fsync is not retried on the same descriptor, because the kernel may have dropped the pages
("Can Applications Recover from fsync Failures?", ATC 2020): the spool refuses all further puts
until the process is replaced, which a role sees to by itself (`service.role`).
"""

from __future__ import annotations

import ctypes
import errno
import mmap
import os
import re
import secrets
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

from dicom_xai import processes
from dicom_xai.errors import InvariantError, OutOfResourcesError

_KEY = re.compile(r"[0-9a-f]{32}")
_TEMP = re.compile(r"\.([0-9a-f]{32})\.([0-9a-f-]{36})\.(\d+-\d+)\.tmp")
_SHARDS = [f"{i:02x}" for i in range(256)]
#: A draft looks for room again whenever it has grown by so much.
_CHECK_EVERY_BYTES = 16_000_000
#: The disk begins to write a draft whenever it has grown by so much.
_SETTLE_EVERY_BYTES = 1_000_000
#: Enough for most headers.
_VIEWED_AT_ONCE_BYTES = 16_384
_SYNC_FILE_RANGE_WRITE = 2  # sync_file_range(2)


class Spool:
    """A folder of files, one for each key.

    Parameters
    ----------
    directory : Path
        Made when absent, with mode 0700; on a local disk.
    min_free_bytes : int
        A draft, for what comes in, is refused when less than this would be left; what is `put`, and
        ends work in hand, may use half of it.
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
        """Refuse what comes in before anything is written.

        Raises
        ------
        OutOfResourcesError
            Less than `min_free_bytes` would be left, the disk does not answer, or an fsync has
            failed before.
        """
        self._check_room(size_bytes, self._min_free_bytes)

    def _check_room(self, size_bytes: int, floor_bytes: int) -> None:
        if self._is_broken:
            raise OutOfResourcesError(
                "the spool's disk failed to sync; the role must begin anew, and does by itself",
                reason="spool-broken",
            )
        try:
            free = self.free_bytes
        except OSError as error:
            raise OutOfResourcesError(
                f"the spool's disk does not answer: {os.strerror(error.errno or 0)}",
                reason="spool-error",
            ) from error
        if free - size_bytes < floor_bytes:
            share = (
                "" if floor_bytes == self._min_free_bytes else f", results stop at {floor_bytes}"
            )
            raise OutOfResourcesError(
                f"{free} bytes free, {size_bytes} to store, spool.min_free_bytes is "
                f"{self._min_free_bytes}{share}",
                reason="no-space",
            )

    def put(self, buffers: Sequence[bytes | memoryview]) -> str:
        """Store the buffers as one file and give its key, once it is durable.

        For results: half of `min_free_bytes` is theirs. A spool that takes nothing more must still
        end what it took, or nothing is ever delivered and nothing deleted.

        Raises
        ------
        OutOfResourcesError
            No room, or the disk failed; nothing is stored.
        """
        floor_bytes = self._min_free_bytes // 2
        self._check_room(sum(len(buffer) for buffer in buffers), floor_bytes)
        with self._draft(floor_bytes) as draft:
            for buffer in buffers:
                draft.write(buffer)
            return draft.keep()

    @contextmanager
    def draft(self) -> Iterator[Draft]:
        """A file to be written piece by piece; gone at the end unless it was kept.

        Raises
        ------
        OutOfResourcesError
            No room, or the disk failed.
        """
        self.check_room(0)
        with self._draft(self._min_free_bytes) as draft:
            yield draft

    @contextmanager
    def _draft(self, floor_bytes: int) -> Iterator[Draft]:
        key = secrets.token_hex(16)
        final = self._path(key)
        with self._refusing():
            draft = Draft(
                self, key, final.with_name(f".{key}.{self._owner}.tmp"), final, floor_bytes
            )
        try:
            yield draft
        finally:
            draft.close()

    def read(self, key: str) -> bytes:
        """The bytes of a key; FileNotFoundError when there are none."""
        return self._path(key).read_bytes()

    def open(self, key: str) -> int:
        """A descriptor of a key's bytes, for reading; FileNotFoundError when there are none."""
        return os.open(self._path(key), os.O_RDONLY)

    @contextmanager
    def view(self, key: str) -> Iterator[View]:
        """A key's bytes without reading them all; the file is closed at the end of the context.

        Raises
        ------
        FileNotFoundError
            There are none.
        """
        fd = self.open(key)
        try:
            yield View(fd)
        finally:
            os.close(fd)

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

    @contextmanager
    def _refusing(self) -> Iterator[None]:
        """Tell what a disk does not do in our words."""
        try:
            yield
        except OSError as error:
            reason = "no-space" if error.errno in (errno.ENOSPC, errno.EDQUOT) else "spool-error"
            raise OutOfResourcesError(
                f"the spool could not store an object: {os.strerror(error.errno or 0)}",
                reason="spool-broken" if self._is_broken else reason,
            ) from error


class View:
    """A stored file's bytes, read as they are asked for: for the head of a large one.

    Not a mapping: what the disk does not give is an error of one object's here, and there a signal
    that ends the process (SIGBUS).

    Parameters
    ----------
    fd : int
        Of a file that does not change any more; whoever opened it closes it, after the last look.
    """

    def __init__(self, fd: int) -> None:
        self._fd = fd
        self._size_bytes = os.fstat(fd).st_size
        self._at, self._block = 0, b""

    def __len__(self) -> int:
        return self._size_bytes

    def __getitem__(self, part: slice) -> bytes:
        """These bytes; raises OSError where the disk does not give them."""
        start, stop, _ = part.indices(self._size_bytes)
        if start >= stop:
            return b""
        if start < self._at or stop > self._at + len(self._block):
            wanted = min(max(stop - start, _VIEWED_AT_ONCE_BYTES), self._size_bytes - start)
            self._at, self._block = start, os.pread(self._fd, wanted, start)
            if len(self._block) < stop - start:
                raise OSError(errno.EIO, "a stored file ended early")
        return self._block[start - self._at : stop - self._at]


class Draft:
    """A file under way into the spool; one thread's. Made by `Spool.draft`.

    Attributes
    ----------
    size_bytes : int
        Written so far.
    """

    def __init__(self, spool: Spool, key: str, temp: Path, final: Path, floor_bytes: int) -> None:
        self._spool, self._key, self._temp, self._final = spool, key, temp, final
        self._floor_bytes = floor_bytes
        self._is_kept = False
        self._checked_bytes = 0
        self._settled_bytes = 0
        self.size_bytes = 0
        self._fd = os.open(temp, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o600)

    def write(self, data: bytes | memoryview) -> None:
        """Append.

        Raises
        ------
        OutOfResourcesError
            No room any more, or the disk failed.
        """
        if self.size_bytes - self._checked_bytes >= _CHECK_EVERY_BYTES:
            self._checked_bytes = self.size_bytes
            self._spool._check_room(0, self._floor_bytes)
        with self._spool._refusing():
            view = memoryview(data)
            self.size_bytes += len(view)
            while view:
                view = view[os.write(self._fd, view) :]
        if self.size_bytes - self._settled_bytes >= _SETTLE_EVERY_BYTES:
            self.settle()

    def settle(self) -> None:
        """Let the disk begin with what was written; `keep` then waits for that much less.

        A hint: nothing is durable by it, and what fails is told by the sync of `keep`.
        """
        self._settled_bytes = self.size_bytes
        _sync_file_range(self._fd, 0, 0, _SYNC_FILE_RANGE_WRITE)

    @contextmanager
    def mapped(self, start: int) -> Iterator[memoryview]:
        """What was written from byte `start` on, without reading it all.

        The view and whatever is cut from it must be let go of by the end.
        """
        with self._spool._refusing():
            mapping = mmap.mmap(self._fd, self.size_bytes, prot=mmap.PROT_READ)
        with mapping, memoryview(mapping) as whole, whole[start:] as part:
            yield part

    def keep(self) -> str:
        """The key, once data, name and folder entry are durable.

        Raises
        ------
        OutOfResourcesError
            The disk failed; nothing is stored.
        """
        with self._spool._refusing():
            os.rename(self._temp, self._final)
            self._spool._fsync(self._fd)
            _fsync_folder(self._final.parent, self._spool._fsync)
        self._is_kept = True
        return self._key

    def close(self) -> None:
        """Let go of the file, and of its bytes unless they were kept."""
        os.close(self._fd)
        if not self._is_kept:
            with suppress(OSError):
                self._temp.unlink(missing_ok=True)
                self._final.unlink(missing_ok=True)


# posix_fadvise starts writing too, but throws pages away that a worker reads next
_sync_file_range = ctypes.CDLL(None).sync_file_range
_sync_file_range.argtypes = (ctypes.c_int, ctypes.c_int64, ctypes.c_int64, ctypes.c_uint)


def _fsync_folder(folder: Path, fsync: Callable[[int], None] = os.fsync) -> None:
    fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        fsync(fd)
    finally:
        os.close(fd)
