"""Instances are prepared as they arrive, in processes that may die, and kept for their job.

What is kept is a cache: losing it, or any process, costs time only. It is bounded in bytes and in
number: work ahead of any job stops at the limits, and what is prepared for nobody yet makes room
for what is more urgent. What a claimed job waits for goes first.

Threads: one for each decoding process; it hands the process one object at a time and waits.
"""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import threading
import time
from collections import OrderedDict
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field

from dicom_xai.errors import DecodeError, StudyError, TransientError
from dicom_xai.prepare import Prepared
from dicom_xai.service import decoder
from dicom_xai.study import Instance, Job, Priority

#: A process that dies once may be a victim (of a full machine, say): its object is tried again.
_TRIES = 2
#: What was prepared and that no job has asked for since makes room for newer arrivals.
_KEEP_S = 120.0
#: Beyond so many instances something makes room for each that is prepared ahead, or it is not.
_MOST_ENTRIES = 5000
#: So often a waiting job looks whether something more urgent has come.
_MEANWHILE_S = 0.02

#: Opens the stored bytes of an instance for reading; gives a descriptor, or raises StudyError.
OpenStored = Callable[[Instance], int]


@dataclass(eq=False)
class _Entry:
    """One instance: wanted, in work, prepared or given up."""

    instance: Instance
    priority: Priority
    is_in_work: bool = False
    tries: int = 0
    made: Prepared | None = None
    failure: StudyError | None = None
    size_bytes: int = 0
    done_at: float = 0.0
    users: set[int] = field(default_factory=set)  #: jobs that hold it
    queue: _Queue | None = None  #: the one that it stands in, if any

    @property
    def key(self) -> str:
        return _key(self.instance)

    @property
    def rank(self) -> int:
        return _rank(self.priority, is_claimed=bool(self.users))

    @property
    def is_done(self) -> bool:
        return self.made is not None or self.failure is not None


def _key(instance: Instance) -> str:
    return instance.sop_instance_uid + instance.sha256


def _rank(priority: Priority, *, is_claimed: bool) -> int:
    """The order of service: STAT before routine, and within each what a job waits for first."""
    return 2 * priority.rank + (not is_claimed)


#: The ranks of what no job holds.
_AHEAD = [_rank(priority, is_claimed=False) for priority in Priority]


@dataclass(eq=False)
class _Hold:
    """What one job holds, until it is released or refused."""

    job: Job
    entries: list[_Entry] = field(default_factory=list)
    count: int = 0  #: of those that are prepared
    size_bytes: int = 0  #: of these
    refusal: StudyError | None = None

    def count_in(self, entry: _Entry) -> None:
        self.count += entry.made is not None
        self.size_bytes += entry.size_bytes


#: Entries by key, the first one first.
_Queue = OrderedDict[str, _Entry]


class Ahead:
    """Prepared instances, and the processes that prepare them.

    Parameters
    ----------
    open_stored : callable
    processes : int
        How many decoding processes.
    memory_bytes : int
        What prepared instances that no job holds yet may take together.
    limit_bytes : int
        Largest object, decoded.
    unit_bytes : int
        Largest unit, decoded.
    timeout_s : float
        A process that takes longer for one object is killed.
    on_death : callable
        Told each time that a process died or was killed over an object, and how.
    most_entries : int
        How many instances may wait, or be kept, for jobs to come.
    clock : callable
        Seconds, monotonic.
    """

    def __init__(
        self,
        open_stored: OpenStored,
        processes: int,
        memory_bytes: int,
        limit_bytes: int,
        unit_bytes: int,
        timeout_s: float,
        on_death: Callable[[Instance, str], None],
        most_entries: int = _MOST_ENTRIES,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._open_stored = open_stored
        self._memory_bytes = memory_bytes
        self._limit_bytes = limit_bytes
        self._unit_bytes = unit_bytes
        self._timeout_s = timeout_s
        self._on_death = on_death
        self._most_entries = most_entries
        self._clock = clock
        self._entries: dict[str, _Entry] = {}
        #: What waits for a process, by rank.
        self._waiting: list[_Queue] = [OrderedDict() for _ in range(2 * len(Priority))]
        #: What is done and held by no job, by rank; the oldest is the first.
        self._idle: dict[int, _Queue] = {rank: OrderedDict() for rank in _AHEAD}
        self._holds: dict[int, _Hold] = {}  #: by job
        self._held_bytes = 0
        self._changed = threading.Condition()
        self._is_closed = False
        #: What ended a thread here, where it should have gone on: for the role to raise.
        self.broken_by: BaseException | None = None
        self._threads = [
            threading.Thread(target=self._work_forever, name=f"decoder-{number}", daemon=True)
            for number in range(processes)
        ]

    def start(self) -> None:
        """Start the processes."""
        for thread in self._threads:
            thread.start()

    def stop(self) -> None:
        """End the processes; what was prepared is forgotten."""
        with self._changed:
            self._is_closed = True
            for entry in list(self._entries.values()):
                self._forget(entry)
            self._changed.notify_all()
        for thread in self._threads:
            if thread.is_alive():
                thread.join(self._timeout_s)

    def expect(self, instance: Instance, priority: Priority) -> None:
        """Prepare it when there is nothing more urgent, and room for it."""
        key, rank = _key(instance), _rank(priority, is_claimed=False)
        with self._changed:
            if key not in self._entries:
                if self._count_ahead >= self._most_entries and not self._make_place(rank):
                    return
                self._entries[key] = _Entry(instance, priority)
            self._want(self._entries[key], priority)
            self._changed.notify_all()

    def take(self, job: Job, meanwhile: Callable[[], None]) -> list[Prepared]:
        """Hold a job's instances and wait until all are prepared.

        Parameters
        ----------
        job : Job
            Claimed.
        meanwhile : callable
            Called now and then while it waits.

        Raises
        ------
        StudyError
            One of them cannot be prepared, or all together are too large; the message says why.
        TransientError
            The worker stops.
        """
        with self._changed:
            hold = self._holds[job.job_id] = _Hold(job)
            for instance in job.instances:
                entry = self._entries.setdefault(_key(instance), _Entry(instance, job.priority))
                entry.users.add(job.job_id)
                self._want(entry, job.priority)
                hold.entries.append(entry)
                hold.count_in(entry)
            self._refuse_too_large(hold)
            self._changed.notify_all()
        return [self._wait_for(entry, hold, meanwhile) for entry in hold.entries]

    def release(self, job_id: int) -> None:
        """Forget what only this job held."""
        with self._changed:
            hold = self._holds.pop(job_id, None)
            for entry in hold.entries if hold is not None else ():
                entry.users.discard(job_id)
                if not entry.users:
                    self._forget(entry)
            self._changed.notify_all()

    @property
    def held_bytes(self) -> int:
        """Bytes of all prepared instances."""
        return self._held_bytes

    def _wait_for(self, entry: _Entry, hold: _Hold, meanwhile: Callable[[], None]) -> Prepared:
        while True:
            with self._changed:
                if not (entry.is_done or hold.refusal or self._is_closed):
                    self._changed.wait(_MEANWHILE_S)
                if hold.refusal is not None:
                    raise hold.refusal
                if entry.failure is not None:
                    raise entry.failure
                if entry.made is not None:
                    return entry.made
                if self._is_closed:
                    raise TransientError("the worker stops")
            meanwhile()

    def _refuse_too_large(self, hold: _Hold) -> None:
        """Let a job go whose unit takes too much by now: no more of it is prepared."""
        if hold.size_bytes > self._unit_bytes:
            hold.refusal = StudyError(
                f"{hold.job.unit.key}: {hold.count} of {len(hold.entries)} images take "
                f"{hold.size_bytes} bytes decoded; a unit may take {self._unit_bytes}, see "
                "decode.unit_bytes"
            )
            self.release(hold.job.job_id)

    def _want(self, entry: _Entry, priority: Priority) -> None:
        entry.priority = min(entry.priority, priority, key=lambda each: each.rank)
        self._queue(entry)

    def _queue(self, entry: _Entry) -> None:
        """Let it stand where it belongs now; where it stands already it keeps its turn."""
        queue = None
        if entry.is_done and not entry.users:
            queue = self._idle[entry.rank]
        elif not entry.is_done and not entry.is_in_work:
            queue = self._waiting[entry.rank]
        if queue is not entry.queue:
            if entry.queue is not None:
                del entry.queue[entry.key]
            if queue is not None:
                queue[entry.key] = entry
            entry.queue = queue

    def _forget(self, entry: _Entry) -> None:
        if self._entries.get(entry.key) is entry:
            del self._entries[entry.key]
            self._held_bytes -= entry.size_bytes
        if entry.queue is not None:
            del entry.queue[entry.key]
            entry.queue = None

    @property
    def _count_ahead(self) -> int:
        """How many entries wait, or are kept, for jobs to come."""
        return sum(len(self._waiting[rank]) + len(self._idle[rank]) for rank in _AHEAD)

    def _make_place(self, rank: int) -> bool:
        """Forget one entry that no job holds, for one of this rank; False when none may go."""
        if self._forget_idle(rank):
            return True
        for other in reversed(_AHEAD):
            if other > rank and self._waiting[other]:
                self._forget(next(reversed(self._waiting[other].values())))
                return True
        return False

    def _forget_idle(self, rank: int) -> bool:
        """Forget the oldest that is done and either kept long enough, or less urgent than this."""
        latest = self._clock() - _KEEP_S
        for other in reversed(_AHEAD):
            oldest = next(iter(self._idle[other].values()), None)
            if oldest is not None and (other > rank or oldest.done_at <= latest):
                self._forget(oldest)
                return True
        return False

    def _next(self) -> _Entry | None:
        """Wait for the next object to prepare; None when it is over."""
        with self._changed:
            while not self._is_closed:
                entry = self._most_urgent()
                if entry is not None:
                    entry.is_in_work = True
                    self._queue(entry)
                    return entry
                self._changed.wait(_KEEP_S if any(self._waiting) else None)
        return None

    def _most_urgent(self) -> _Entry | None:
        """What waits and may be prepared: all that a job holds, the rest while memory is left."""
        for rank, queue in enumerate(self._waiting):
            if not queue:
                continue
            while self._held_bytes >= self._memory_bytes and self._forget_idle(rank):
                pass
            entry = next(iter(queue.values()))
            if entry.users or self._held_bytes < self._memory_bytes:
                return entry
        return None

    def _work_forever(self) -> None:
        child: list[_Child] = []
        try:
            self._prepare_forever(child)
        except BaseException as error:  # noqa: BLE001  # ends the role, and whoever waits
            with self._changed:
                self.broken_by = error
                self._is_closed = True
                self._changed.notify_all()
        finally:
            for left in child:
                left.end()

    def _prepare_forever(self, child: list[_Child]) -> None:
        """Work with one process at a time: the only item of `child`, replaced when it dies."""
        child.append(_Child(self._limit_bytes, self._timeout_s))  # no image waits for its start
        while (entry := self._next()) is not None:
            if not child:
                child.append(_Child(self._limit_bytes, self._timeout_s))
            made, failure, size_bytes = None, None, 0
            try:
                made, size_bytes = self._ask(child[0], entry.instance)
            except StudyError as error:
                failure = error
            except (EOFError, TimeoutError) as error:
                reason = child.pop().end(is_late=isinstance(error, TimeoutError))
                entry.tries += 1
                self._on_death(entry.instance, reason)
                if entry.tries == _TRIES:
                    failure = DecodeError(
                        f"SOP Instance {entry.instance.sop_instance_uid}: the decoding process "
                        f"{reason}, {_TRIES} times; the file is damaged, or too costly to decode"
                    )
            with self._changed:
                entry.made, entry.failure = made, failure
                entry.is_in_work, entry.done_at = False, self._clock()
                if self._entries.get(entry.key) is entry:  # else it was forgotten meanwhile
                    entry.size_bytes = size_bytes
                    self._held_bytes += size_bytes
                    self._queue(entry)
                    for hold in [self._holds[job_id] for job_id in entry.users]:
                        hold.count_in(entry)
                        self._refuse_too_large(hold)
                self._changed.notify_all()

    def _ask(self, child: _Child, instance: Instance) -> tuple[Prepared, int]:
        stored = self._open_stored(instance)
        try:
            return child.ask(instance, stored)
        finally:
            os.close(stored)


class _Child:
    """One decoding process and our end of its socket."""

    def __init__(self, limit_bytes: int, timeout_s: float) -> None:
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        ours.settimeout(timeout_s)
        self._channel = ours
        with theirs:
            self._process = subprocess.Popen(
                [sys.executable, "-m", decoder.__name__, str(theirs.fileno()), str(limit_bytes)],
                pass_fds=[theirs.fileno()],
                stdin=subprocess.DEVNULL,
            )

    def ask(self, instance: Instance, stored: int) -> tuple[Prepared, int]:
        decoder.ask(self._channel, instance, stored)
        made, size_bytes = decoder.take(self._channel)
        assert isinstance(made, Prepared)
        return made, size_bytes

    def end(self, *, is_late: bool = False) -> str:
        """Make sure that it is gone; say how it went, in words."""
        self._channel.close()
        if is_late:
            self._process.kill()
        with suppress(subprocess.TimeoutExpired):
            self._process.wait(1.0)
        if self._process.poll() is None:
            self._process.kill()
        status = self._process.wait()
        if is_late:
            return "did not answer in time"
        return f"was ended by signal {-status}" if status < 0 else f"ended with status {status}"
