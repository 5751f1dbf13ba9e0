"""The worker: one device; claims a job, runs the pipeline, makes its results durable.

`watch` renews the claim while a job runs, `answers` ends it, `livemodels` knows its model. Nothing
that matters is in memory: killed at any instant, the job is claimed again.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from dicom_xai import identity, pipeline
from dicom_xai.config import Config
from dicom_xai.encode.objects import Encoded
from dicom_xai.errors import (
    ConfigError,
    DicomXaiError,
    LedgerBusyError,
    StudyError,
    TransientError,
)
from dicom_xai.explain.served import ServedModel
from dicom_xai.service.ahead import Ahead
from dicom_xai.service.answers import Answers, reason_of
from dicom_xai.service.livemodels import LiveModels
from dicom_xai.service.role import Context
from dicom_xai.service.watch import LEASE_S, Watch, Watcher
from dicom_xai.spool import View
from dicom_xai.stages import Deadline, Stage
from dicom_xai.study import Instance, Job, Per, Prediction, Priority
from dicom_xai.telemetry import Event, describe

#: A job with so many attempts that nobody took back is failed: it may be what kills the worker.
MAX_ATTEMPTS = 4
#: Safety net under the bell.
POLL_S = 0.5
#: A job in hand looks at most so often whether something more urgent has come.
_LOOK_EVERY_S = 0.02
#: At most so many decoding processes, unless the config says another number.
_DECODING_PROCESSES = 4
#: So many arrivals are asked for at once.
_ARRIVALS_AT_ONCE = 500
#: Weight of the newest measurement in the running estimate of a job's other stages.
_NEWEST = 0.3
#: Expected seconds in the outbox and at the destination, until measured elsewhere.
_DELIVERY_S = 0.1


class Worker:
    """The role.

    Parameters
    ----------
    context : Context
    device : str
        A word of the config's `devices`.
    """

    def __init__(self, context: Context, device: str = "auto") -> None:
        self._context = context
        self._device = device
        self._models = LiveModels(context)
        self._watcher = Watcher(context, lambda: self._models.config.service.work.hang_s)
        self._answers = Answers(context)
        decode = context.config.service.decode
        self._ahead = Ahead(
            self._open_stored,
            processes=decode.processes or min(_DECODING_PROCESSES, os.cpu_count() or 1),
            memory_bytes=decode.memory_bytes,
            limit_bytes=decode.limit_bytes,
            unit_bytes=decode.unit_bytes,
            timeout_s=decode.timeout_s,
            on_death=self._note_decoder_death,
        )
        self._rest_s: dict[str, float] = {}
        self._look_at = 0.0  #: for something more urgent, not before
        self._stopping = threading.Event()
        self._failure: BaseException | None = None
        self._bell = context.ledger.listen("worker")
        self._arrivals = context.ledger.listen("ahead")
        self._loop = threading.Thread(target=self._work_forever, name="worker")
        self._feeder = threading.Thread(target=self._feed_forever, name="feeder", daemon=True)

    def start(self) -> None:
        """Load and test the models, then work."""
        self._models.load(self._device)
        self._ahead.start()
        self._loop.start()
        self._feeder.start()
        self._watcher.start()

    def tick(self) -> None:
        """End the role when its loop has ended."""
        for failure in (self._failure, self._ahead.broken_by):
            if failure is not None:
                raise failure
        self._context.metrics.prepared_bytes.set(self._ahead.held_bytes)
        self._models.look_at_files()

    def use(self, config: Config) -> None:
        """Load what is new; keep old models while jobs still name them."""
        self._models.use(config)
        self._context.spool.keep_free(config.service.spool.min_free_bytes)

    def stop(self, grace_s: float) -> None:
        """Finish the job in hand within the grace time; else its lease runs out."""
        self._stopping.set()
        self._watcher.stop()
        for bell in ("worker", "ahead"):
            self._context.ledger.ring(bell)
        if self._loop.is_alive():
            self._loop.join(grace_s)
        if self._feeder.is_alive():
            self._feeder.join(grace_s)
        self._ahead.stop()
        self._bell.close()
        self._arrivals.close()

    def _feed_forever(self) -> None:
        """Have what arrives prepared while its unit waits for more."""
        last = 0
        while not self._stopping.is_set():
            try:
                while arrived := self._context.ledger.jobs.incoming(last, _ARRIVALS_AT_ONCE):
                    last = arrived[-1].number
                    for each in arrived:
                        self._ahead.expect(each.instance, each.priority)
            except TransientError as error:
                self._context.log.exception(Event.LEDGER_BUSY, error)
            self._arrivals.wait(POLL_S)

    def _note_decoder_death(self, instance: Instance, reason: str) -> None:
        self._context.metrics.decoder_deaths.inc()
        self._context.log.error(
            Event.DECODER_DIED, sop_instance_uid=instance.sop_instance_uid, reason=reason
        )

    def _open_stored(self, instance: Instance) -> int:
        """A descriptor of an instance's bytes.

        Raises
        ------
        StudyError
            They are gone.
        """
        uid = instance.sop_instance_uid
        if not instance.spool_key:
            raise StudyError(
                f"the bytes of SOP Instance {uid} were deleted after spool.keep_days; "
                "send the study again"
            )
        try:
            return self._context.spool.open(instance.spool_key)
        except OSError as error:
            raise StudyError(f"the bytes of SOP Instance {uid} are gone from the spool") from error

    def _work_forever(self) -> None:
        try:
            while not self._stopping.is_set():
                try:
                    self._work_or_wait()
                except LedgerBusyError as error:  # a job in hand comes back with its lease
                    self._context.log.exception(Event.LEDGER_BUSY, error)
                    self._stopping.wait(POLL_S)
        except BaseException as error:  # noqa: BLE001  # handed to tick, which ends the role
            self._failure = error

    def _work_or_wait(self) -> None:
        self._answers.settle()
        job = self._context.ledger.jobs.claim(LEASE_S)
        if job is None:
            self._bell.wait(self._pause_s())
        else:
            self._work(job, *self._companions(job))

    def _pause_s(self) -> float:
        """Until a job can be claimed, at most `POLL_S`."""
        at = self._context.ledger.jobs.next_at()
        return POLL_S if at is None else max(0.002, min(POLL_S, at - self._context.ledger.now()))

    def _companions(self, job: Job) -> list[Job]:
        """More routine jobs about single images for the same runs on the device, if that pays."""
        model = self._models.get(job.model_digest)
        if (
            model is None
            or job.priority is Priority.STAT
            or job.attempts > 1  # what ended the worker last time may do so again: alone
            or job.unit.per is not Per.INSTANCE
            or not all(map(model.costs.gains_from_sharing, model.costs.runs_s))
        ):
            return []
        found: list[Job] = []
        while len(found) + 1 < min(map(model.costs.batch_size, model.costs.runs_s)):
            another = self._context.ledger.jobs.claim(LEASE_S, like=job)
            if another is None:
                break
            found.append(another)
        return found

    def _give_way(self, watch: Watch) -> None:
        """Do what is more urgent than the job in hand: STAT overtakes routine, and nothing STAT."""
        jobs, now = self._context.ledger.jobs, self._context.ledger.now
        with self._watcher.overtaken(watch):  # which says too that the job comes on
            if watch.job.priority is Priority.STAT or now() < self._look_at:
                return
            while not self._stopping.is_set():
                at = jobs.next_at(only=Priority.STAT)
                urgent = (
                    None if at is None or at > now() else jobs.claim(LEASE_S, only=Priority.STAT)
                )
                if urgent is None:
                    break
                self._work(urgent)
        self._look_at = now() + _LOOK_EVERY_S

    def _work(self, *jobs: Job) -> None:
        """Jobs of one model and route, in shared runs: each done, failed, or given back."""
        with self._watcher.over(jobs) as watches:
            self._context.ledger.ring("sender")  # opens its association while we compute
            try:
                begun: list[tuple[Watch, pipeline.Begun]] = []
                for watch in watches:
                    with self._answering(watch):
                        begun.append((watch, self._begin(watch)))
                shared = self._infer_together([each for _, each in begun])
                for (watch, each), prediction in zip(begun, shared, strict=True):
                    with self._answering(watch):
                        self._finish(watch, each, prediction)
            finally:
                for job in jobs:
                    self._ahead.release(job.job_id)

    @contextmanager
    def _answering(self, watch: Watch) -> Iterator[None]:
        """Whatever goes wrong inside is the answer to this job alone."""
        job = watch.job
        try:
            try:
                yield
            except (StudyError, ConfigError) as error:
                self._answers.failed(job, self._notes(watch, error), error)
        except TransientError as error:
            self._answers.later(job, error)
        except Exception as error:  # one odd study must not end the role
            self._context.log.exception(
                Event.JOB_FAILED, error, job=job.job_id, route=job.route, model=job.model
            )
            self._answer_unforeseen(job, error)
            if self._models.device.is_lost:
                raise  # the jobs that wait would fail here too; the next process begins anew

    def _answer_unforeseen(self, job: Job, error: Exception) -> None:
        """Try again; where the attempts are used up it was the failing itself that failed."""
        if job.attempts <= MAX_ATTEMPTS:
            self._answers.later(job, error)
            return
        words = reason_of(error)
        self._skip_note(job, words)
        reason = f"{MAX_ATTEMPTS} attempts ended without a result, and without a note: {words}"
        self._answers.failed(job, (), StudyError(reason))

    def _begin(self, watch: Watch) -> pipeline.Begun:
        job, context = watch.job, self._context
        self._watcher.observe(watch, Stage.QUEUE, watch.moved_at - job.ready_at)
        context.log.info(
            Event.JOB_STARTED,
            job=job.job_id,
            route=job.route,
            model=job.model,
            purpose=job.purpose,
            attempts=job.attempts,
        )
        if job.attempts > MAX_ATTEMPTS:
            raise StudyError(
                f"{MAX_ATTEMPTS} attempts ended without a result, the last: {job.note}"
            )
        model = self._models.of(job)
        deadline = Deadline(job.deadline_at, context.ledger.now)
        return pipeline.begin(job, model, deadline, self._tools(watch, model))

    def _infer_together(self, units: Sequence[pipeline.Begun]) -> Sequence[Prediction | None]:
        """Predictions from shared runs; None for all where they do not fit, or anything fails."""
        kinds = {(unit.model.card.digest, unit.choice.explainer) for unit in units}
        if len(units) > 1 and len(kinds) == 1:
            try:
                return pipeline.infer(units)
            except Exception as error:  # noqa: BLE001  # the job that it belongs to meets it again
                self._context.log.warning(
                    Event.RUN_NOT_SHARED,
                    model=units[0].model.card.name,
                    count=len(units),
                    error=describe(error),
                )
        return [None] * len(units)

    def _finish(self, watch: Watch, begun: pipeline.Begun, prediction: Prediction | None) -> None:
        if prediction is None:
            [prediction] = pipeline.infer([begun])
        outcome = pipeline.finish(begun, prediction)
        if self._answers.done(watch, outcome):
            self._learn(watch, begun.model)

    def _notes(self, watch: Watch, error: DicomXaiError) -> Sequence[Encoded]:
        """What tells a radiologist that there is no result; the last thing tried."""
        try:
            return pipeline.fail(watch.job, str(error), self._tools(watch, None))
        except (StudyError, ConfigError) as unable:
            self._skip_note(watch.job, str(unable))
            return ()

    def _skip_note(self, job: Job, reason: str) -> None:
        self._context.metrics.results_skipped.labels("note", job.route).inc()
        self._context.log.warning(Event.RESULT_SKIPPED, job=job.job_id, kind="note", reason=reason)

    def _tools(self, watch: Watch, model: ServedModel | None) -> pipeline.Tools:
        name = model.card.name if model is not None else ""

        def identity_of(instance: Instance) -> identity.Block:
            stored = self._open_stored(instance)
            try:
                return identity.read_block(View(stored))
            finally:
                os.close(stored)

        def give_way() -> None:
            self._give_way(watch)

        def fix_explainer(explainer: str) -> None:
            self._context.ledger.jobs.fix_explainer(watch.job, explainer)

        return pipeline.Tools(
            identity_of=identity_of,
            prepared=lambda: self._ahead.take(watch.job, give_way),
            give_way=give_way,
            destinations=self._models.config.service.destinations,
            stage=lambda which: self._watcher.stage(watch, which),
            fix_explainer=fix_explainer,
            rest_s=self._rest_s.get(name, 0.0),
        )

    def _learn(self, watch: Watch, model: ServedModel) -> None:
        """Update what explaining, encoding and delivering cost for this model."""
        spent = sum(watch.spent_s.get(stage, 0.0) for stage in (Stage.EXPLAIN, Stage.ENCODE))
        name = model.card.name
        before = self._rest_s.get(name, spent + _DELIVERY_S)
        self._rest_s[name] = before + _NEWEST * (spent + _DELIVERY_S - before)
