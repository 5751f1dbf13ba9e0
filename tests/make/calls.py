"""A process's system calls in the order in which they began and ended, by strace."""

from __future__ import annotations

import codecs
import re
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

from tests.make.books import wait_until

_LINE = re.compile(r"(?P<thread>\d+) +(?P<rest>.*)", re.DOTALL)
_BEGUN = re.compile(r"(?P<name>\w+)\((?P<words>.*)")
_RESUMED = re.compile(r"<\.\.\. (?P<name>\w+) resumed>")
_FAILED = re.compile(r"= -1 [A-Z]|\) += \?")
#: What strace shows of each string: more than a page of the ledger.
_SHOWN_BYTES = 5000


@dataclass(frozen=True, slots=True)
class Call:
    """One call that succeeded.

    `words` are its arguments as strace writes them, descriptors with their paths, at most 5,000
    bytes of each string; `began` and `ended` are places in one order over all threads.
    """

    thread: int
    name: str
    words: str
    began: int
    ended: int

    @property
    def data(self) -> bytes:
        """The first string among the arguments: what was written, sent or read."""
        quoted = re.search(r'"((?:[^"\\]|\\.)*)"', self.words)
        return b"" if quoted is None else codecs.escape_decode(quoted[1].encode("latin-1"))[0]

    def is_of(self, path: Path) -> bool:
        """Whether its first argument is a descriptor of this file or folder."""
        return re.match(rf"\d+<{re.escape(str(path))}>", self.words) is not None


class Watch:
    """Writes down the calls of a process and all its threads, from now until `stop`.

    Parameters
    ----------
    pid : int
    calls : str
        System calls, separated by commas.
    folder : Path
        Takes strace's log and own words.
    """

    def __init__(self, pid: int, calls: str, folder: Path) -> None:
        strace = shutil.which("strace")
        assert strace is not None
        self._log = folder / "calls"
        words = folder / "strace.log"
        with words.open("wb") as out:
            self._process = subprocess.Popen(
                [
                    *(strace, "-f", "-y", "-s", str(_SHOWN_BYTES), "-p", str(pid)),
                    *("-o", str(self._log), "-e", f"trace={calls}"),
                ],
                stderr=out,
            )
        wait_until(lambda: "attached" in words.read_text(), f"strace attached to {pid}")

    def stop(self) -> list[Call]:
        """Let the process go on alone; gives what it did, in the order in which calls ended."""
        self._process.terminate()
        self._process.wait()
        found: list[Call] = []
        begun: dict[int, tuple[str, str, int]] = {}
        for at, line in enumerate(self._log.read_text("latin-1").splitlines()):
            split = _LINE.match(line)
            assert split is not None, line
            thread, rest = int(split["thread"]), split["rest"]
            if _RESUMED.match(rest):
                name, words, began = begun.pop(thread, ("", "", at))
            elif call := _BEGUN.match(rest):
                name, words, began = call["name"], call["words"], at
                if rest.endswith("<unfinished ...>"):
                    begun[thread] = name, words, began
                    continue
            else:
                continue  # a signal, or the end of a thread
            if name and not _FAILED.search(rest[rest.rfind(")") :]):
                found.append(Call(thread, name, words, began, at))
        return found
