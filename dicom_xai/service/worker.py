"""The worker: one device; claims a job, runs the pipeline, makes its results durable.

A watcher thread renews the claim while the job runs, and notes when its deadline passes and in
which stage. Nothing that matters is in memory: killed at any instant, the job is claimed again.
"""

from __future__ import annotations

import hashlib
import json
import os
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field

from dicom_xai import pipeline
from dicom_xai.config import Config, load, nearest
from dicom_xai.encode.objects import Encoded
from dicom_xai.errors import (
    ConfigError,
    DicomXaiError,
    ModelCardError,
    OutOfResourcesError,
    StudyError,
    TransientError,
)
from dicom_xai.explain import EXPLAINERS
from dicom_xai.explain.cache import CompiledCache
from dicom_xai.explain.served import ServedModel
from dicom_xai.infer.session import Device, resolve_device
from dicom_xai.service.ahead import Ahead
from dicom_xai.service.audited import note_created
from dicom_xai.service.role import Context
from dicom_xai.service.warmup import warm_up
from dicom_xai.stages import Deadline, Stage
from dicom_xai.study import Explanation, Instance, Job, Purpose, Result
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
#: Weight of the newest measurement in the running estimate of a job's other stages.
_NEWEST = 0.3
#: Expected seconds in the outbox and at the destination, until measured elsewhere.
_DELIVERY_S = 0.1


def load_models(config: Config, device: Device) -> dict[str, ServedModel]:
    """Every model that a route uses, loaded, self-tested and warm, by card digest.

    Raises
    ------
    ConfigError
        A model, an explainer's name or the device; nothing is half loaded.
    """
    served: dict[str, ServedModel] = {}
    for name in dict.fromkeys(route.model for route in config.routes.routes if route.enabled):
        routes = [route for route in config.routes.routes if route.model == name and route.enabled]
        wanted = dict.fromkeys(word for route in routes for word in route.explain)
        for word in wanted:
            if word not in EXPLAINERS:
                known = list(EXPLAINERS)
                raise ModelCardError(
                    f"route {routes[0].name!r}: no explainer {word!r}{nearest(word, known)}"
                    f" (known: {', '.join(known)})"
                )
        card = config.cards[name]
        served[card.digest] = ServedModel(
            card,
            device,
            [EXPLAINERS[word] for word in wanted],
            max(route.findings for route in routes),
            cache=CompiledCache(config.service.spool.directory.with_name("compiled")),
        )
    return served


@dataclass
class _Watch:
    """The job in hand, as the watcher thread sees it."""

    job: Job
    stage: Stage = Stage.QUEUE
    is_overdue: bool = False
    is_lost: bool = False
    spent_s: dict[Stage, float] = field(default_factory=dict)


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
        self._bell = context.ledger.listen("worker")
        self._loading = threading.Lock()
        self._stopping = threading.Event()
        self._watch: _Watch | None = None
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
        if self._failure is not None:
            raise self._failure
        self._context.metrics.prepared_bytes.set(self._ahead.held_bytes)

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

    def _report_models(self) -> None:
        metrics = self._context.metrics
        for model in self._models.values():
            card = model.card
            metrics.device.labels(card.name, self._device.name, model.provider).set(1)
            metrics.model_cost_seconds.labels(card.name).set(
                max(model.costs.explained_s.values(), default=model.costs.plain_s)
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
                job = self._context.ledger.jobs.claim(LEASE_S)
                if job is None:
                    self._bell.wait(self._pause_s())
                else:
                    self._work(job)
        except BaseException as error:  # noqa: BLE001  # handed to tick, which ends the role
            self._failure = error

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
                    last = arrived[-1][0]
                    self._ahead.expect([instance for _, instance in arrived])
            except TransientError as error:
                self._context.log.exception(Event.LEDGER_BUSY, error)
            self._arrivals.wait(POLL_S)

    def _work(self, job: Job) -> None:
        """One job: done, failed, or given back."""
        context = self._context
        now = context.ledger.now()
        watch = _Watch(job)
        self._watch = watch
        self._observe(watch, Stage.QUEUE, now - job.ready_at)
        context.ledger.ring("sender")  # opens its association while we compute
        fields = {"job": job.job_id, "route": job.route, "model": job.model}
        context.log.info(Event.JOB_STARTED, **fields, purpose=job.purpose, attempts=job.attempts)
        try:
            if job.attempts > MAX_ATTEMPTS:
                raise StudyError(f"{MAX_ATTEMPTS} attempts ended without a result")
            self._run(watch)
        except TransientError as error:
            self._retry(job, str(error))
        except (StudyError, ConfigError) as error:
            self._fail(watch, str(error), error)
        except Exception as error:  # one odd study must not end the role
            context.log.exception(Event.JOB_FAILED, error, **fields)
            self._retry(job, f"internal error: {type(error).__name__}")
        finally:
            self._watch = None
            self._ahead.release(job.job_id)

    def _retry(self, job: Job, reason: str) -> None:
        delay_s = RETRY_S * 2 ** (job.attempts - 1)
        self._context.ledger.jobs.retry_later(job, delay_s, reason)
        self._context.log.warning(
            Event.JOB_RETRIED, job=job.job_id, reason=reason, attempts=job.attempts, delay_s=delay_s
        )

    def _run(self, watch: _Watch) -> None:
        job, context = watch.job, self._context
        model = self._model(job)
        tools = self._tools(watch, model)
        route_budget_s = job.deadline_at - job.ready_at
        deadline = Deadline(job.deadline_at, route_budget_s, context.ledger.now)
        outcome = pipeline.run(job, model, deadline, tools)
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
            watch.stage = which
            started = self._context.ledger.now()
            try:
                yield
            finally:
                self._observe(watch, which, self._context.ledger.now() - started)

        def fix_explainer(explainer: str) -> None:
            self._context.ledger.jobs.fix_explainer(watch.job, explainer)

        return pipeline.Tools(
            read=read,
            prepared=lambda instances: self._ahead.take(watch.job.job_id, instances),
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
            watch = self._watch
            if watch is None:
                continue
            now = self._context.ledger.now()
            try:
                if now - renewed_at > LEASE_S / 4:
                    renewed_at = now
                    watch.is_lost = not self._context.ledger.jobs.renew(watch.job, LEASE_S)
                if now > watch.job.deadline_at and not watch.is_overdue:
                    watch.is_overdue = True
                    self._note_overdue(watch)
            except DicomXaiError as error:
                self._context.log.exception(Event.LEASE_LOST, error, job=watch.job.job_id)

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
