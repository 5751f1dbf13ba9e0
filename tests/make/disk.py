"""What would be left on a disk after a loss of power, at any moment; a full disk; a wrong clock.

`disk.c`, loaded into the processes under test, writes down every change of their files and when
each sync began and ended. From that journal the surviving files are rebuilt for any moment. A
strict disk keeps what was synced and nothing else; a lazy one keeps, besides, whatever it likes of
the rest, in no order. No folder's entry is kept by syncing the file alone, which is stricter than
most file systems (Pillai et al., OSDI 2014, Table 1).
"""

from __future__ import annotations

import os
import random
import shutil
import struct
import subprocess
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

_SOURCES = [Path(__file__).with_name(name) for name in ("disk.c", "clock.c")]
_HEAD = struct.Struct("<Ic3xIIQQQ")


def build_shim(folder: Path) -> Path:
    """The shared library, compiled into a folder."""
    made = folder / "disk.so"
    compiler = shutil.which("cc")
    assert compiler is not None
    options = ["-shared", "-fPIC", "-O1", "-Wall", "-Werror", "-o", str(made), *map(str, _SOURCES)]
    subprocess.run([compiler, *options, "-ldl", "-pthread"], check=True)
    return made


def watching(shim: Path, root: Path, journal: Path | None = None) -> dict[str, str]:
    """Environment of a process whose disk is watched; it is full while `full_of(root)` exists.

    Its wall clock is off by the seconds that stand in `clock_of(root)`.
    """
    found = {"LD_PRELOAD": str(shim), "DISK_ROOT": str(root), "DISK_FULL": str(full_of(root))}
    found["DISK_UNSYNCED"] = str(_unsynced_of(root))
    found["CLOCK_FILE"] = str(clock_of(root))
    return found if journal is None else {**found, "DISK_JOURNAL": str(journal)}


def full_of(root: Path) -> Path:
    """While this file exists nothing can be written below the root."""
    return root.with_name(f"{root.name}.full")


@contextmanager
def failing_syncs(root: Path, word: str, reason: int) -> Iterator[None]:
    """Meanwhile every sync of a file or folder with this word in its path fails.

    Parameters
    ----------
    root : Path
        The watched folder.
    word : str
    reason : int
        The errno.
    """
    path = _unsynced_of(root)
    draft = path.with_suffix(".draft")
    draft.write_text(f"{reason} {word}")
    draft.rename(path)
    try:
        yield
    finally:
        path.unlink()


def _unsynced_of(root: Path) -> Path:
    return root.with_name(f"{root.name}.unsynced")


def clock_of(root: Path) -> Path:
    """Holds the seconds by which the wall clock is wrong; right without it."""
    return root.with_name(f"{root.name}.clock")


@dataclass(frozen=True, slots=True)
class Change:
    """One line of the journal.

    `op`: Create, Write, Truncate, Rename, Unlink, s and S for the beginning and end of a sync, and
    A for what the test itself noted.
    """

    op: str
    path: str
    other: str
    inode: int
    offset: int
    token: int
    data: bytes


def note(journal: Path, text: str) -> None:
    """Write down that something happened now, from the test's own process."""
    path = text.encode()
    with journal.open("ab", buffering=0) as out:
        out.write(_HEAD.pack(len(path), b"A", len(path), 0, 0, 0, 0) + path)


def read_journal(journal: Path) -> list[Change]:
    """All changes in order; a last line cut short by a kill is left out."""
    data, at, found = journal.read_bytes(), 0, []
    while at + _HEAD.size <= len(data):
        size, op, path, other, inode, offset, token = _HEAD.unpack_from(data, at)
        at += _HEAD.size
        if at + size > len(data):
            break
        first, second = at + path, at + path + other
        found.append(
            Change(
                op.decode(),
                data[at:first].decode(),
                data[first:second].decode(),
                *(inode, offset, token),
                data[second : at + size],
            )
        )
        at += size
    return found


@dataclass
class _File:
    """One inode: what is safe, and what was done to it since."""

    safe: bytearray = field(default_factory=bytearray)
    pending: list[Change] = field(default_factory=list)


@dataclass
class _Disk:
    """Files and names, each with what is not safe yet."""

    files: dict[int, _File] = field(default_factory=dict)
    now: dict[str, _File] = field(default_factory=dict)
    safe: dict[str, _File] = field(default_factory=dict)
    #: by folder: names that were changed together, each with its file or None
    pending: dict[str, list[dict[str, _File | None]]] = field(
        default_factory=lambda: defaultdict(list)
    )
    begun: dict[int, int] = field(default_factory=dict)

    def play(self, change: Change) -> None:
        folder = os.path.dirname(change.path)
        if change.op == "C":
            self._file(change)
        elif change.op in "WT":
            self._file(change).pending.append(change)
        elif change.op == "R":
            moved = self.now.pop(change.path, None)
            if moved is None:
                return  # a named pipe
            self.now[change.other] = moved
            self.pending[folder].append({change.path: None, change.other: moved})
        elif change.op == "U":
            if self.now.pop(change.path, None) is not None:
                self.pending[folder].append({change.path: None})
        elif change.op == "s":
            self.begun[change.token] = len(self._waiting(change))
        elif change.op == "S":
            self._sync(change)

    def _file(self, change: Change) -> _File:
        known = self.now.get(change.path)
        if known is None:
            known = self.files[change.inode] = self.now[change.path] = _File()
            self.pending[os.path.dirname(change.path)].append({change.path: known})
        return known

    def _waiting(self, change: Change) -> Sequence[object]:
        if change.path in self.now:
            return self.now[change.path].pending
        return self.pending[change.path]

    def _sync(self, change: Change) -> None:
        count = self.begun.pop(change.token)
        file = self.now.get(change.path)
        if file is not None:
            for each in file.pending[:count]:
                _apply(file.safe, each)
            del file.pending[:count]
        else:
            names = self.pending[change.path]
            for each in names[:count]:
                _enter(self.safe, each)
            del names[:count]


def _apply(data: bytearray, change: Change) -> None:
    if change.op == "T":
        data[change.offset :] = bytes(max(0, change.offset - len(data)))
        return
    end = change.offset + len(change.data)
    data.extend(bytes(max(0, end - len(data))))
    data[change.offset : end] = change.data


def _enter(names: dict[str, _File], changed: dict[str, _File | None]) -> None:
    for path, file in changed.items():
        if file is None:
            names.pop(path, None)
        else:
            names[path] = file


def survivors(changes: Iterable[Change], rng: random.Random | None = None) -> dict[str, bytes]:
    """What is left by path when power is lost after these changes.

    Parameters
    ----------
    changes : iterable of Change
        From an empty folder on.
    rng : Random, optional
        Chooses what a lazy disk keeps of what was not synced; without it, nothing is kept.
    """
    disk = _Disk()
    for change in changes:
        disk.play(change)
    names = dict(disk.safe)
    for waiting in disk.pending.values():
        for each in waiting:
            if rng is not None and rng.random() < 0.5:
                _enter(names, each)
    found = {}
    for path, file in names.items():
        data = bytearray(file.safe)
        for each in file.pending:
            if rng is not None and rng.random() < 0.5:
                _apply(data, each)
        found[path] = bytes(data)
    return found


def as_written(changes: Iterable[Change]) -> dict[str, bytes]:
    """What is there without any loss; differs from the real files when the shim missed a change."""
    disk = _Disk()
    for change in changes:
        disk.play(change)
    found = {}
    for path, file in disk.now.items():
        data = bytearray(file.safe)
        for each in file.pending:
            _apply(data, each)
        found[path] = bytes(data)
    return found
