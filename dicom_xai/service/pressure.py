"""Back-pressure: whether one more object may come in, asked before its bytes are read.

Four things run out: the disk (`Spool.check_room`, asked each time), the spool's quota, the queue
and memory. The latter three are measured once a second or less, for measuring them costs more than
an object; what came in since then is added. Each refuses with 0xA700, which tells a sender to come
back, and each recovers by itself when its figure does.
"""

from __future__ import annotations

import threading
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path

from dicom_xai.config import ServiceConfig
from dicom_xai.errors import OutOfResourcesError
from dicom_xai.ledger import Ledger

#: Between two sums over all that the spool holds: a query over every row with bytes.
SUM_EVERY_S = 60.0


class Scarce(StrEnum):
    """What may run out; the word is the refusal's reason and a metric's label."""

    SPOOL = "spool-quota"
    QUEUE = "queue-full"
    MEMORY = "memory"


@dataclass(frozen=True, slots=True)
class Limits:
    """From the config; None is no limit."""

    max_spool_bytes: int | None
    max_waiting: int
    min_free_memory_bytes: int


def limits_of(config: ServiceConfig) -> Limits:
    """The limits that a config sets."""
    receive = config.receive
    return Limits(config.spool.max_bytes, receive.max_waiting, receive.min_free_memory_bytes)


class Pressure:
    """What is scarce now.

    Parameters
    ----------
    ledger : Ledger
    limits : Limits
    system : Path
        Root of the file system that holds ``proc`` and ``sys``; tests give another.
    """

    def __init__(self, ledger: Ledger, limits: Limits, system: Path = Path("/")) -> None:
        self._ledger = ledger
        self._limits = limits
        self._system = system
        self._lock = threading.Lock()
        self._spool_bytes = 0
        self._sum_again_at = 0.0
        self._scarce: dict[Scarce, str] = {}
        self._told: frozenset[Scarce] = frozenset()

    def use(self, limits: Limits) -> None:
        """Go on with other limits, from the next `look` on."""
        self._limits = limits
        self.sum_again()

    def sum_again(self) -> None:
        """Sum the spool at the next `look`: something was deleted."""
        self._sum_again_at = 0.0

    def stored(self, size_bytes: int) -> None:
        """Count what was stored since the last sum."""
        with self._lock:
            self._spool_bytes += size_bytes
            self._weigh_spool()

    def look(self) -> tuple[frozenset[Scarce], frozenset[Scarce]]:
        """Measure; gives what has become scarce and what is scarce no more, since the last look.

        Raises
        ------
        LedgerBusyError
            The ledger cannot be asked now; what was known stays.
        """
        limits = self._limits
        now = self._ledger.now()
        waiting = self._ledger.upkeep.waiting()
        free = free_memory_bytes(self._system)
        is_due = limits.max_spool_bytes is not None and now >= self._sum_again_at
        spool_bytes = self._ledger.upkeep.stored_bytes() if is_due else None
        with self._lock:
            if spool_bytes is not None:
                self._spool_bytes, self._sum_again_at = spool_bytes, now + SUM_EVERY_S
            self._weigh_spool()
            self._weigh(
                Scarce.QUEUE,
                waiting >= limits.max_waiting,
                f"{waiting} units wait, receive.max_waiting is {limits.max_waiting}",
            )
            self._weigh(
                Scarce.MEMORY,
                free < limits.min_free_memory_bytes,
                f"{free} bytes of memory free, receive.min_free_memory_bytes is "
                f"{limits.min_free_memory_bytes}",
            )
            before, self._told = self._told, frozenset(self._scarce)
        return self._told - before, before - self._told

    def check(self) -> None:
        """Let one more object in.

        Raises
        ------
        OutOfResourcesError
            Something is scarce; the reason names it.
        """
        with self._lock:
            for scarce, words in self._scarce.items():
                raise OutOfResourcesError(words, reason=scarce)

    def _weigh_spool(self) -> None:
        limit = self._limits.max_spool_bytes
        self._weigh(
            Scarce.SPOOL,
            limit is not None and self._spool_bytes >= limit,
            f"the spool holds {self._spool_bytes} bytes, spool.max_bytes is {limit}",
        )

    def _weigh(self, what: Scarce, is_scarce: bool, words: str) -> None:
        if is_scarce:
            self._scarce[what] = words
        else:
            self._scarce.pop(what, None)


def free_memory_bytes(system: Path = Path("/")) -> int:
    """What can be had without swapping: of the machine, or of our control group if that is less.

    Source: proc_meminfo(5), MemAvailable; the kernel's cgroup-v2.rst, memory.max. A control group's
    inactive file pages are given back when asked for, so they count as free.
    """
    for line in (system / "proc/meminfo").read_text().splitlines():
        if line.startswith("MemAvailable:"):
            free = 1024 * int(line.split()[1])
            break
    else:
        raise OSError("no MemAvailable in /proc/meminfo: Linux 3.14 or later is wanted")
    group = system / "sys/fs/cgroup"
    try:
        most = (group / "memory.max").read_text().strip()
        used = int((group / "memory.current").read_text())
        stat = (group / "memory.stat").read_text()
    except FileNotFoundError:  # no group of our own
        return free
    if most == "max":
        return free
    given_back = sum(
        int(line.split()[1]) for line in stat.splitlines() if line.startswith("inactive_file ")
    )
    return min(free, int(most) - used + given_back)
