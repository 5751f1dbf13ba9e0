"""How a job ends: results durable, then its row, then who is to know of it.

A result's file is in the spool before the ledger names it. Where the ledger does not take the end,
because somebody else has the claim now, the files go again.

A job that is given back is tried again within a minute. What may pass by itself (no room, a ledger
or device that is busy) uses up none of its attempts, however long it lasts: a full disk must not
turn work into "not performed". A device that had no room for it for an hour never will have.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence

from dicom_xai.encode.objects import Encoded
from dicom_xai.errors import (
    DeviceBusyError,
    DicomXaiError,
    LedgerBusyError,
    OutOfResourcesError,
    TransientError,
)
from dicom_xai.pipeline import Outcome
from dicom_xai.service.audited import note_created
from dicom_xai.service.role import Context
from dicom_xai.service.watch import Watch
from dicom_xai.study import Explanation, Job, Result
from dicom_xai.telemetry import Event, describe

#: First pause of a job that is given back; doubled for each further one, up to the longest.
RETRY_S, LONGEST_RETRY_S = 0.5, 60.0
#: After so many claims, about an hour of them, it counts as an attempt that the device had no room.
DEVICE_TRIES = 66


class Answers:
    """What the worker tells ledger, metrics, log and audit trail about its jobs.

    Parameters
    ----------
    context : Context
    """

    def __init__(self, context: Context) -> None:
        self._context = context
        #: What a busy ledger was not told yet.
        self._owed: list[tuple[Job, Exception]] = []

    def done(self, watch: Watch, outcome: Outcome) -> bool:
        """End a job with its results; False when somebody else has it now.

        Raises
        ------
        TransientError
            There is no room for a result now.
        """
        job, context = watch.job, self._context
        results = self._spooled(job, outcome.objects)
        notes = [f"{kind} not made: {reason}" for kind, reason in outcome.skipped]
        notes += [*outcome.problems, *([outcome.degraded] if outcome.degraded else [])]
        stages = {stage: round(spent, 4) for stage, spent in watch.spent_s.items()}
        is_ours = context.ledger.jobs.finish(
            job,
            results,
            "; ".join(notes),
            findings=_findings_json(outcome.explanation),
            stages=json.dumps(stages),
            amend_because=outcome.degraded if outcome.owes_map else "",
        )
        if not is_ours:
            self._drop(job, results)
            return False
        self._forget_replaced(job, results)
        context.ledger.ring("sender")
        if outcome.owes_map:
            context.ledger.ring("worker")
        metrics = context.metrics
        if outcome.degraded:
            how = "prediction-first" if outcome.owes_map else "cheaper-explainer"
            metrics.degraded.labels(job.route, how).inc()
            context.log.warning(Event.JOB_DEGRADED, job=job.job_id, reason=outcome.degraded)
        if outcome.reformatted:
            context.log.warning(
                Event.PATIENT_REFORMATTED,
                job=job.job_id,
                route=job.route,
                study_instance_uid=job.unit.study_instance_uid,
                reason=f"images differ in the formatting of {', '.join(outcome.reformatted)}",
            )
        for kind, reason in outcome.skipped:
            metrics.results_skipped.labels(kind, job.route).inc()
            context.log.info(Event.RESULT_SKIPPED, job=job.job_id, kind=kind, reason=reason)
        for result in results:
            metrics.results.labels(result.kind, job.route).inc()
        metrics.studies.labels(job.route, "done").inc()
        context.log.info(
            Event.JOB_DONE, job=job.job_id, route=job.route, count=len(results), stages=stages
        )
        note_created(context, job, results)
        return True

    def failed(self, job: Job, notes: Sequence[Encoded], error: DicomXaiError) -> None:
        """End a job that cannot be done, with the notes that say so.

        Raises
        ------
        TransientError
            There is no room for a note now.
        """
        context, reason = self._context, str(error)
        results = self._spooled(job, notes)
        if not context.ledger.jobs.finish(job, results, reason, is_failure=True):
            self._drop(job, results)
            return
        self._forget_replaced(job, results)
        context.ledger.ring("sender")
        context.metrics.studies.labels(job.route, type(error).__name__).inc()
        context.log.error(
            Event.JOB_FAILED, job=job.job_id, route=job.route, reason=reason, error=describe(error)
        )
        note_created(context, job, results, reason)

    def later(self, job: Job, error: Exception) -> None:
        """Give a job back, for what went wrong may pass; `settle` does it if the ledger is busy."""
        self._owed.append((job, error))
        try:
            self.settle()
        except LedgerBusyError as busy:
            self._context.log.exception(Event.LEDGER_BUSY, busy, job=job.job_id)

    def settle(self) -> None:
        """Give back what could not be given back, before its lease runs out and counts against it.

        Raises
        ------
        LedgerBusyError
            Nor can it be now.
        """
        while self._owed:
            self._give_back(*self._owed[0])
            del self._owed[0]

    def _give_back(self, job: Job, error: Exception) -> None:
        # the token counts all claims, also those whose attempt was taken back
        is_device_at_fault = isinstance(error, DeviceBusyError) and job.token > DEVICE_TRIES
        is_passing = isinstance(error, TransientError) and not is_device_at_fault
        delay_s = min(LONGEST_RETRY_S, RETRY_S * 2.0 ** min(job.token - 1, 32))
        reason = reason_of(error)
        jobs = self._context.ledger.jobs
        if not jobs.retry_later(job, delay_s, reason, is_counted=not is_passing):
            self._context.log.warning(Event.LEASE_LOST, job=job.job_id)
            return
        self._context.log.warning(
            Event.JOB_RETRIED, job=job.job_id, reason=reason, attempts=job.attempts, delay_s=delay_s
        )

    def _spooled(self, job: Job, items: Sequence[Encoded]) -> list[Result]:
        """Make all objects durable, or none."""
        keys: list[str] = []
        try:
            for item in items:
                keys.append(self._context.spool.put([item.file]))
        except OutOfResourcesError as error:
            for key in keys:  # else each try would take more of what room there is
                self._context.spool.delete(key)
            raise TransientError(f"no room for a result: {error}") from error
        return [_result(job, item, key) for item, key in zip(items, keys, strict=True)]

    def _drop(self, job: Job, results: Sequence[Result]) -> None:
        """Forget results of a claim that somebody else has taken over."""
        for result in results:
            self._context.spool.delete(result.spool_key)
        self._context.log.warning(Event.LEASE_LOST, job=job.job_id)

    def _forget_replaced(self, job: Job, results: Sequence[Result]) -> None:
        """Delete the files that an earlier try of the job made for the same objects."""
        for result in results:
            replaced = job.earlier_files.get(result.sop_instance_uid)
            if replaced:
                self._context.spool.delete(replaced)


def _result(job: Job, item: Encoded, spool_key: str) -> Result:
    return Result(
        kind=item.kind,
        ordinal=item.ordinal,
        purpose=job.purpose,
        sop_class_uid=item.sop_class_uid,
        sop_instance_uid=item.sop_instance_uid,
        series_instance_uid=item.series_instance_uid,
        study_instance_uid=item.study_instance_uid,
        transfer_syntax_uid=item.transfer_syntax_uid,
        spool_key=spool_key,
        sha256=hashlib.sha256(item.file).hexdigest(),
        size_bytes=len(item.file),
        source=item.source,
        references=item.references,
        destinations=item.destinations,
    )


def reason_of(error: Exception) -> str:
    """What a person is told of an error; of one that is not ours no more than its name."""
    if isinstance(error, DicomXaiError):
        return str(error)
    return f"internal error: {type(error).__name__}"


def _findings_json(explanation: Explanation) -> str:
    return json.dumps(
        [
            {"class": item.name, "score": round(item.score, 4), "is_positive": item.is_positive}
            for item in explanation.findings
        ]
    )
