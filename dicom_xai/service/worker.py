"""The worker: one device; claims a job, runs the pipeline, makes its results durable.

A watcher thread renews the claim while the job runs, and notes when its deadline passes and in
which stage. Nothing that matters is in memory: killed at any instant, the job is claimed again.
"""

from __future__ import annotations

import hashlib
import json
import os
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field

from dicom_xai import pipeline
from dicom_xai.config import Config, load
from dicom_xai.encode.objects import Encoded
from dicom_xai.errors import (
    ConfigError,
    DicomXaiError,
    LedgerBusyError,
    OutOfResourcesError,
    StudyError,
    TransientError,
)
from dicom_xai.explain.served import ServedModel
from dicom_xai.infer.session import Device, resolve_device
from dicom_xai.service.ahead import Ahead
from dicom_xai.service.audited import note_created
from dicom_xai.service.modelfiles import ModelFiles, load_models
from dicom_xai.service.role import Context
from dicom_xai.service.warmup import warm_up
from dicom_xai.stages import Deadline, Stage
from dicom_xai.study import (
    Explanation,
    Instance,
    Job,
    Per,
    Prediction,
    Priority,
    Purpose,
    Result,
)
from dicom_xai.telemetry import Event, describe

LEASE_S = 10.0
#: The watcher looks at lease and deadline so often.
WATCH_EVERY_S = 0.05
#: A job that was claimed so often without an end is failed: it may be what kills the worker.
MAX_ATTEMPTS = 4
#: Safety net under the bell.
POLL_S = 0.5
#: First pause after a transient error; doubled for each further attempt.
RETRY_S = 0.5
#: At most so many decoding processes, unless the config says another number.
_DECODING_PROCESSES = 4
#: So many arrivals are asked for at once.
_ARRIVALS_AT_ONCE = 500
#: So often the model files are looked at.
FILES_EVERY_S = 30.0
#: Weight of the newest measurement in the running estimate of a job's other stages.
_NEWEST = 0.3
#: Expected seconds in the outbox and at the destination, until measured elsewhere.
_DELIVERY_S = 0.1


@dataclass
class _Watch:
    """A job in hand, as the watcher thread sees it."""

    job: Job
    stage: Stage = Stage.QUEUE
    is_overdue: bool = False
    moved_at: float = 0.0  #: when the job last came on, on the ledger's clock
    spent_s: dict[Stage, float] = field(default_factory=dict)
    overtaken_s: float = 0.0  #: spent on more urgent jobs meanwhile


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
        self._config = context.config
        self._asked_device = device
        self._models: Mapping[str, ServedModel] = {}
        decode = self._config.service.decode
        self._ahead = Ahead(
            self._open_stored,
            processes=decode.processes or min(_DECODING_PROCESSES, os.cpu_count() or 1),
            memory_bytes=decode.memory_bytes,
            limit_bytes=decode.limit_bytes,
            timeout_s=decode.timeout_s,
            on_death=self._note_decoder_death,
        )
        self._device = Device("cpu")
        self._rest_s: dict[str, float] = {}
        self._files = ModelFiles()
        self._files_seen_at = 0.0
        self._told_of: set[str] = set()
        self._bell = context.ledger.listen("worker")
        self._loading = threading.Lock()
        self._stopping = threading.Event()
        #: The jobs in hand; each one is overtaken by those after it.
        self._watches: list[_Watch] = []
        self._failure: BaseException | None = None
        self._arrivals = context.ledger.listen("ahead")
        self._loop = threading.Thread(target=self._work_forever, name="worker")
        self._feeder = threading.Thread(target=self._feed_forever, name="feeder", daemon=True)
        self._watcher = threading.Thread(target=self._watch_forever, name="watcher", daemon=True)

    # -------------------------------------------------------------- the role's life

    def start(self) -> None:
        """Load and test the models, then work."""
        self._device = resolve_device(self._asked_device)
        self._models = load_models(self._config, self._device)
        for model in self._models.values():
            for explainer in model.self_tests:
                warm_up(model, explainer)
        self._report_models()
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
        if self._context.ledger.now() - self._files_seen_at > FILES_EVERY_S:
            self._files_seen_at = self._context.ledger.now()
            self._look_at_model_files()

    def use(self, config: Config) -> None:
        """Load what is new; keep old models while jobs still name them."""
        with self._loading:
            if config.digest == self._config.digest:
                return
            loaded = load_models(config, self._device)
            live = self._context.ledger.jobs.live_model_digests()
            kept = {digest: model for digest, model in self._models.items() if digest in live}
            self._models = {**kept, **loaded}
            self._config = config
        self._report_models()

    def stop(self, grace_s: float) -> None:
        """Finish the job in hand within the grace time; else its lease runs out."""
        self._stopping.set()
        for bell in ("worker", "ahead"):
            self._context.ledger.ring(bell)
        if self._loop.is_alive():
            self._loop.join(grace_s)
        if self._feeder.is_alive():
            self._feeder.join(grace_s)
        self._ahead.stop()
        self._bell.close()
        self._arrivals.close()

    def _look_at_model_files(self) -> None:
        cards = [model.card for model in self._models.values()]
        for name, is_changed in self._files.changed(cards).items():
            self._context.metrics.model_file_changed.labels(name).set(is_changed)
            if is_changed and name not in self._told_of:
                self._context.log.error(Event.MODEL_FILE_CHANGED, model=name)
            (self._told_of.add if is_changed else self._told_of.discard)(name)

    def _report_models(self) -> None:
        metrics = self._context.metrics
        for model in self._models.values():
            card = model.card
            metrics.device.labels(card.name, self._device.name, model.provider).set(1)
            metrics.model_cost_seconds.labels(card.name).set(
                max(model.costs.seconds(name, 1) for name in model.costs.runs_s)
            )
            for explainer, test in model.self_tests.items():
                self._context.log.info(
                    Event.MODEL_LOADED,
                    model=card.name,
                    version=card.version,
                    device=self._device.name,
                    explainer=explainer,
                    layer=model.graph(explainer).layer,
                    backward=dict(test.backward_nodes),
                )

    # -------------------------------------------------------------- the loop

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
        job = self._context.ledger.jobs.claim(LEASE_S)
        if job is None:
            self._bell.wait(self._pause_s())
        else:
            self._work(job, *self._companions(job))

    def _pause_s(self) -> float:
        """Until a job can be claimed, at most `POLL_S`."""
        at = self._context.ledger.jobs.next_at()
        return POLL_S if at is None else max(0.002, min(POLL_S, at - self._context.ledger.now()))

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

    def _companions(self, job: Job) -> list[Job]:
        """More routine jobs about single images for the same runs on the device, if that pays."""
        model = self._models.get(job.model_digest)
        if (
            model is None
            or job.priority is Priority.STAT
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

    def _work(self, *jobs: Job) -> None:
        """Jobs of one model and route, in shared runs: each done, failed, or given back."""
        context = self._context
        now = context.ledger.now()
        watches = [_Watch(job, moved_at=now) for job in jobs]
        self._watches += watches
        context.ledger.ring("sender")  # opens its association while we compute
        try:
            begun: list[tuple[_Watch, pipeline.Begun]] = []
            for watch in watches:
                with self._answering(watch):
                    begun.append((watch, self._begin(watch)))
            shared = self._infer_together([each for _, each in begun])
            for (watch, each), prediction in zip(begun, shared, strict=True):
                with self._answering(watch):
                    self._finish(watch, each, prediction)
        finally:
            for watch in watches:
                self._watches.remove(watch)
                self._ahead.release(watch.job.job_id)

    @contextmanager
    def _answering(self, watch: _Watch) -> Iterator[None]:
        """Whatever goes wrong inside is the answer to this job alone."""
        job = watch.job
        try:
            yield
        except TransientError as error:
            self._retry(job, str(error))
        except (StudyError, ConfigError) as error:
            self._fail(watch, str(error), error)
        except Exception as error:  # one odd study must not end the role
            self._context.log.exception(
                Event.JOB_FAILED, error, job=job.job_id, route=job.route, model=job.model
            )
            self._retry(job, f"internal error: {type(error).__name__}")

    def _begin(self, watch: _Watch) -> pipeline.Begun:
        job, context = watch.job, self._context
        self._observe(watch, Stage.QUEUE, watch.moved_at - job.ready_at)
        context.log.info(
            Event.JOB_STARTED,
            job=job.job_id,
            route=job.route,
            model=job.model,
            purpose=job.purpose,
            attempts=job.attempts,
        )
        if job.attempts > MAX_ATTEMPTS:
            raise StudyError(f"{MAX_ATTEMPTS} attempts ended without a result")
        model = self._model(job)
        deadline = Deadline(job.deadline_at, job.deadline_at - job.ready_at, context.ledger.now)
        return pipeline.begin(job, model, deadline, self._tools(watch, model))

    def _infer_together(self, units: Sequence[pipeline.Begun]) -> Sequence[Prediction | None]:
        """Predictions from shared runs; None for all where they do not fit, or one spoils them."""
        kinds = {(unit.model.card.digest, unit.choice.explainer) for unit in units}
        if len(units) > 1 and len(kinds) == 1:
            # what went wrong is found again, and told, by the one that it belongs to
            with suppress(StudyError, TransientError):
                return pipeline.infer(units)
        return [None] * len(units)

    def _give_way(self, watch: _Watch) -> None:
        """Do what is more urgent than the job in hand: STAT overtakes routine, and nothing STAT."""
        watch.moved_at = started = self._context.ledger.now()
        if watch.job.priority is Priority.STAT:
            return
        while not self._stopping.is_set():
            urgent = self._context.ledger.jobs.claim(LEASE_S, only=Priority.STAT)
            if urgent is None:
                break
            self._work(urgent)
        watch.moved_at = self._context.ledger.now()
        watch.overtaken_s += watch.moved_at - started

    def _retry(self, job: Job, reason: str) -> None:
        delay_s = RETRY_S * 2 ** (job.attempts - 1)
        self._context.ledger.jobs.retry_later(job, delay_s, reason)
        self._context.log.warning(
            Event.JOB_RETRIED, job=job.job_id, reason=reason, attempts=job.attempts, delay_s=delay_s
        )

    def _finish(self, watch: _Watch, begun: pipeline.Begun, prediction: Prediction | None) -> None:
        job, model, context = watch.job, begun.model, self._context
        if prediction is None:
            [prediction] = pipeline.infer([begun])
        outcome = pipeline.finish(begun, prediction)
        results = [self._spooled(job, item) for item in outcome.objects]
        notes = [f"{kind} not made: {reason}" for kind, reason in outcome.skipped]
        notes += [*outcome.problems, *([outcome.degraded] if outcome.degraded else [])]
        is_ours = context.ledger.jobs.finish(
            job,
            results,
            "; ".join(notes),
            findings=_findings_json(outcome.explanation),
            stages=json.dumps({stage: round(s, 4) for stage, s in watch.spent_s.items()}),
            amend_because=outcome.degraded if outcome.owes_map else "",
        )
        if not is_ours:
            self._drop(job, results)
            return
        self._forget_replaced(job, results)
        context.ledger.ring("sender")
        if outcome.owes_map:
            context.ledger.ring("worker")
        self._learn(watch, model)
        metrics = context.metrics
        if outcome.degraded:
            how = "prediction-first" if outcome.owes_map else "cheaper-explainer"
            metrics.degraded.labels(job.route, how).inc()
            context.log.warning(Event.JOB_DEGRADED, job=job.job_id, reason=outcome.degraded)
        for kind, reason in outcome.skipped:
            metrics.results_skipped.labels(kind, job.route).inc()
            context.log.info(Event.RESULT_SKIPPED, job=job.job_id, kind=kind, reason=reason)
        for result in results:
            metrics.results.labels(result.kind, job.route).inc()
        metrics.studies.labels(job.route, "done").inc()
        context.log.info(
            Event.JOB_DONE,
            job=job.job_id,
            route=job.route,
            count=len(results),
            stages={stage: round(spent, 4) for stage, spent in watch.spent_s.items()},
        )
        note_created(context, job, results)

    def _fail(self, watch: _Watch, reason: str, error: DicomXaiError) -> None:
        """End a job that cannot be done; the note is the last thing tried."""
        job, context = watch.job, self._context
        results: list[Result] = []
        try:
            notes = pipeline.fail(job, reason, self._tools(watch, None))
            results = [self._spooled(job, item) for item in notes]
        except StudyError as unable:
            context.log.warning(
                Event.RESULT_SKIPPED, job=job.job_id, kind="note", reason=str(unable)
            )
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

    def _model(self, job: Job) -> ServedModel:
        """The model the job was made for; else, after a restart, the live one of the same name.

        A receiver may have read a new config before we did: then it is read here and now.
        """
        model = self._models.get(job.model_digest)
        if model is None:
            config, _ = load(self._config.path)
            if config.digest != self._config.digest:
                self.use(config)
                model = self._models.get(job.model_digest)
        if model is not None:
            return model
        card = self._config.cards.get(job.model)
        model = self._models.get(card.digest) if card is not None else None
        if model is None:
            raise StudyError(f"model {job.model!r} is not loaded any more")
        self._context.ledger.jobs.use_model(job, model.card.digest)
        return model

    def _tools(self, watch: _Watch, model: ServedModel | None) -> pipeline.Tools:
        name = model.card.name if model is not None else ""

        def read(instance: Instance) -> bytes:
            stored = self._open_stored(instance)
            with open(stored, "rb") as file:
                return file.read()

        @contextmanager
        def stage(which: Stage) -> Iterator[None]:
            watch.stage, watch.moved_at = which, self._context.ledger.now()
            started = self._context.ledger.now() - watch.overtaken_s
            try:
                yield
            finally:
                own_s = self._context.ledger.now() - watch.overtaken_s - started
                self._observe(watch, which, own_s)

        def give_way() -> None:
            self._give_way(watch)

        def fix_explainer(explainer: str) -> None:
            self._context.ledger.jobs.fix_explainer(watch.job, explainer)

        return pipeline.Tools(
            read=read,
            prepared=lambda: self._ahead.take(watch.job, give_way),
            give_way=give_way,
            destinations=self._config.service.destinations,
            stage=stage,
            fix_explainer=fix_explainer,
            rest_s=self._rest_s.get(name, 0.0),
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

    def _note_decoder_death(self, instance: Instance, reason: str) -> None:
        self._context.metrics.decoder_deaths.inc()
        self._context.log.error(
            Event.DECODER_DIED, sop_instance_uid=instance.sop_instance_uid, reason=reason
        )

    def _spooled(self, job: Job, item: Encoded) -> Result:
        """Make one object durable.

        Raises
        ------
        TransientError
            There is no room now.
        """
        try:
            spool_key = self._context.spool.put([item.file])
        except OutOfResourcesError as error:
            raise TransientError(f"no room for a result: {error}") from error
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

    def _drop(self, job: Job, results: list[Result]) -> None:
        """Forget results of a claim that somebody else has taken over."""
        for result in results:
            self._context.spool.delete(result.spool_key)
        self._context.log.warning(Event.LEASE_LOST, job=job.job_id)

    def _forget_replaced(self, job: Job, results: list[Result]) -> None:
        """Delete the files that an earlier try of the job made for the same objects."""
        for result in results:
            replaced = job.earlier_files.get(result.sop_instance_uid)
            if replaced:
                self._context.spool.delete(replaced)

    def _observe(self, watch: _Watch, stage: Stage, elapsed_s: float) -> None:
        watch.spent_s[stage] = watch.spent_s.get(stage, 0.0) + elapsed_s
        self._context.metrics.stage_seconds.labels(stage, watch.job.model).observe(elapsed_s)

    def _learn(self, watch: _Watch, model: ServedModel) -> None:
        """Update what explaining, encoding and delivering cost for this model."""
        spent = sum(watch.spent_s.get(stage, 0.0) for stage in (Stage.EXPLAIN, Stage.ENCODE))
        name = model.card.name
        before = self._rest_s.get(name, spent + _DELIVERY_S)
        self._rest_s[name] = before + _NEWEST * (spent + _DELIVERY_S - before)

    # -------------------------------------------------------------- the watcher

    def _watch_forever(self) -> None:
        renewed_at = 0.0
        while not self._stopping.wait(WATCH_EVERY_S):
            now = self._context.ledger.now()
            moving = max(self._watches, key=lambda watch: watch.moved_at, default=None)
            if moving is not None and now - moving.moved_at > self._config.service.work.hang_s:
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

    def _end_wedged(self, watch: _Watch) -> None:
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

    def _note_overdue(self, watch: _Watch) -> None:
        job = watch.job
        if job.purpose is not Purpose.TRIAGE or not self._context.ledger.jobs.note_overdue(job):
            return
        self._context.metrics.budget_exceeded.labels(job.route, watch.stage).inc()
        self._context.log.warning(
            Event.BUDGET_EXCEEDED, job=job.job_id, route=job.route, stage=watch.stage
        )


def _findings_json(explanation: Explanation) -> str:
    return json.dumps(
        [
            {"class": item.name, "score": round(item.score, 4), "is_positive": item.is_positive}
            for item in explanation.findings
        ]
    )
