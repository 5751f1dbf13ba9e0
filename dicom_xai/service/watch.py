"""The jobs in hand, watched from a thread of its own: lease, deadline, hang.

Nothing of it is in the job's way: who works says which stage it is in, and goes on.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

from dicom_xai.errors import DicomXaiError
from dicom_xai.service.role import Context
from dicom_xai.stages import Stage
from dicom_xai.study import Job, Purpose
from dicom_xai.telemetry import Event

LEASE_S = 10.0
#: Lease and deadline are looked at so often.
WATCH_EVERY_S = 0.05


@dataclass(eq=False)
class Watch:
    """A job in hand, as the watcher's thread sees it."""

    job: Job
    stage: Stage = Stage.QUEUE
    is_overdue: bool = False
    moved_at: float = 0.0  #: when the job last came on, on the ledger's clock
    spent_s: dict[Stage, float] = field(default_factory=dict)
    overtaken_s: float = 0.0  #: spent on more urgent jobs meanwhile


class Watcher:
    """Renews the claims of the jobs in hand, and notes when a deadline passes and in which stage.

    Parameters
    ----------
    context : Context
    hang_s : callable
        So long without coming on counts as hung, seconds, as the config says now.
    """

    def __init__(self, context: Context, hang_s: Callable[[], float]) -> None:
        self._context = context
        self._hang_s = hang_s
        #: Each one is overtaken by those after it.
        self._watches: list[Watch] = []
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._watch_forever, name="watcher", daemon=True)

    def start(self) -> None:
        """Watch from now on."""
        self._thread.start()

    def stop(self) -> None:
        """Renew no claim any more."""
        self._stopping.set()

    @contextmanager
    def over(self, jobs: Sequence[Job]) -> Iterator[list[Watch]]:
        """Watch claimed jobs as long as they are in hand."""
        now = self._context.ledger.now()
        watches = [Watch(job, moved_at=now) for job in jobs]
        self._watches += watches
        try:
            yield watches
        finally:
            for watch in watches:
                self._watches.remove(watch)

    @contextmanager
    def stage(self, watch: Watch, which: Stage) -> Iterator[None]:
        """A stage of a job, timed without what overtook it."""
        watch.stage, watch.moved_at = which, self._context.ledger.now()
        started = self._context.ledger.now() - watch.overtaken_s
        try:
            yield
        finally:
            own_s = self._context.ledger.now() - watch.overtaken_s - started
            self.observe(watch, which, own_s)

    @contextmanager
    def overtaken(self, watch: Watch) -> Iterator[None]:
        """A job rests while others run."""
        watch.moved_at = started = self._context.ledger.now()
        yield
        watch.moved_at = self._context.ledger.now()
        watch.overtaken_s += watch.moved_at - started

    def observe(self, watch: Watch, stage: Stage, elapsed_s: float) -> None:
        """Note what a stage of a job took."""
        watch.spent_s[stage] = watch.spent_s.get(stage, 0.0) + elapsed_s
        self._context.metrics.stage_seconds.labels(stage, watch.job.model).observe(elapsed_s)

    def _watch_forever(self) -> None:
        renewed_at = 0.0
        while not self._stopping.wait(WATCH_EVERY_S):
            now = self._context.ledger.now()
            moving = max(self._watches, key=lambda watch: watch.moved_at, default=None)
            if moving is not None and now - moving.moved_at > self._hang_s():
                self._end_wedged(moving)
            is_due = now - renewed_at > LEASE_S / 4
            for watch in list(self._watches):
                try:
                    if is_due:
                        self._context.ledger.jobs.renew(watch.job, LEASE_S)
                        renewed_at = now
                    if now > watch.job.deadline_at and not watch.is_overdue:
                        watch.is_overdue = True
                        self._note_overdue(watch)
                except DicomXaiError as error:
                    self._context.log.exception(Event.LEASE_LOST, error, job=watch.job.job_id)

    def _end_wedged(self, watch: Watch) -> None:
        """End the process: a thread that hangs in a device's driver cannot be ended alone.

        The claim is free as soon as the process is gone; the job counts one more attempt.
        """
        self._context.log.error(
            Event.WORKER_WEDGED,
            job=watch.job.job_id,
            route=watch.job.route,
            stage=watch.stage,
            elapsed_s=round(self._context.ledger.now() - watch.moved_at, 1),
        )
        os._exit(1)

    def _note_overdue(self, watch: Watch) -> None:
        job = watch.job
        if job.purpose is not Purpose.TRIAGE or not self._context.ledger.jobs.note_overdue(job):
            return
        self._context.metrics.budget_exceeded.labels(job.route, watch.stage).inc()
        self._context.log.warning(
            Event.BUDGET_EXCEEDED, job=job.job_id, route=job.route, stage=watch.stage
        )
