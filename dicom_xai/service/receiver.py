"""The receiver: bytes in, durable; routed in the same transaction; units made ready in time."""

from __future__ import annotations

import resource
import threading
import time
from collections.abc import Callable, Hashable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import partial
from math import inf

from dicom_xai import dimse, identity
from dicom_xai.commitment import CommitmentReport, CommitmentRequest
from dicom_xai.config import Config, Route, TriggerKind, read_route
from dicom_xai.errors import (
    ConfigError,
    DicomXaiError,
    DuplicateInstanceError,
    LedgerBusyError,
)
from dicom_xai.ledger import ORPHAN_AGE_S, Disposition, Owed, Recorded, Wanted
from dicom_xai.receive import completion
from dicom_xai.receive.storage_scp import Arrival, StorageSCP, TransferEnd
from dicom_xai.route.match import tags_of
from dicom_xai.route.plan import plan_instance, unit_of
from dicom_xai.service.audited import Tally, note_received
from dicom_xai.service.commitments import take_report
from dicom_xai.service.pressure import Pressure, limits_of
from dicom_xai.service.refusals import Refusals
from dicom_xai.service.reports import REPORT_LEASE_S, note_reported
from dicom_xai.service.role import Context, report_rotation, watch_certificate
from dicom_xai.spool import Draft
from dicom_xai.stages import Stage
from dicom_xai.study import Candidate, Instance, Per, Sender
from dicom_xai.telemetry import Event

#: An association that its receiver has not renewed for so long is lost.
TRANSFER_LEASE_S = 15.0
#: Between two looks at deadlines and timers when nothing rings.
LONGEST_WAIT_S = 1.0
#: Associations may finish for so long when a reload changes who may send.
RELOAD_GRACE_S = 5.0
#: A report of storage commitment is left to the association of its request for so long.
REPORT_HOLD_S = 2.0
#: Headers whose answers are remembered; one has some hundred bytes.
MOST_ANSWERS = 1_000
#: Between two rounds of retention.
RETENTION_EVERY_S = 600.0


@dataclass(frozen=True, slots=True)
class _Answers:
    """What an object's header is asked."""

    is_ours: bool
    routes: tuple[Route, ...]
    trace: str


@dataclass(frozen=True, slots=True)
class _Policy:
    """What of the config decides about an instance; swapped as one on reload."""

    config: Config
    default_per: Mapping[str, Per]
    route_jsons: Mapping[str, str]  #: by route
    digests: Mapping[str, str]  #: by model
    asked: tuple[int, ...]  #: all elements that an answer depends on
    answers: dict[Hashable, _Answers]  #: by these elements, as encoded, and the sender


class Receiver:
    """The role.

    Parameters
    ----------
    context : Context
    """

    def __init__(self, context: Context) -> None:
        self._context = context
        self._policy = _policy(context.config)
        self._refusals = Refusals(context)
        self._scp = self._make_scp(context.config)
        self._pressure = Pressure(context.ledger, limits_of(context.config.service))
        self._bell = context.ledger.listen("receiver")
        self._transfers: dict[int, tuple[Sender, Tally]] = {}
        self._reporting: dict[int, Owed] = {}
        self._lock = threading.Lock()
        self._stopping = threading.Event()
        self._loop = threading.Thread(target=self._complete_forever, name="completion")
        self._looks_at = inf  # when the completion loop looks by itself
        self._failure: BaseException | None = None
        self._swept_at = float("-inf")
        self._retention = threading.Thread(target=self._forget)

    @property
    def ports(self) -> tuple[int, ...]:
        """The ports in the order of the config's listeners."""
        return self._scp.ports

    def start(self) -> None:
        """Recover what an earlier process left, then listen."""
        _allow_many_files()
        self._look_at_pressure()
        self._loop.start()
        self._scp.start()
        for listener, port in zip(
            self._policy.config.service.receive.listeners, self.ports, strict=True
        ):
            self._context.log.info(
                Event.LISTENING, ae_title=listener.ae_title, host=listener.host, port=port
            )

    def tick(self) -> None:
        """Keep the associations' leases and the clock; forget what is old."""
        self._refusals.tick()
        if self._failure is not None:
            raise self._failure
        self._context.metrics.associations.set(self._scp.associations)
        try:
            self._keep_books()
        except LedgerBusyError as error:  # a restart would make no room, and end associations
            self._context.log.exception(Event.LEDGER_BUSY, error)

    def _keep_books(self) -> None:
        ledger = self._context.ledger
        with self._lock:
            transfers = list(self._transfers)
        ledger.arrivals.renew_transfers(transfers, TRANSFER_LEASE_S)
        freed = ledger.upkeep.release_dead()
        if freed:
            self._context.log.warning(Event.RECOVERED, count=freed)
            ledger.ring("worker")
            ledger.ring("sender")
        lost = ledger.arrivals.lose_transfers()
        if lost:
            self._context.log.warning(Event.RECOVERED, count=lost)
            ledger.ring("receiver")
        ledger.upkeep.tick()
        for credentials in self._scp.credentials:
            if credentials is not None:
                watch_certificate(self._context, credentials)
        self._look_at_pressure()
        if ledger.now() - self._swept_at > RETENTION_EVERY_S and not self._retention.is_alive():
            self._swept_at = ledger.now()
            # a thread of its own: a large spool takes longer than a role may be silent
            self._retention = threading.Thread(target=self._forget, name="retention", daemon=True)
            self._retention.start()

    def _look_at_pressure(self) -> None:
        """Measure what may run out, and say what changed."""
        context = self._context
        begun, ended = self._pressure.look()
        for scarce in begun | ended:
            context.metrics.back_pressure.labels(scarce).set(scarce in begun)
        for scarce in begun:
            context.log.warning(Event.BACK_PRESSURE, reason=scarce, outcome="refusing")
        for scarce in ended:
            context.log.info(Event.BACK_PRESSURE, reason=scarce, outcome="taking")

    def use(self, config: Config) -> None:
        """Route by another config; listen anew only when the receive section changed."""
        old = self._policy.config
        policy = _policy(config)
        if config.service.receive != old.service.receive:
            self._scp.stop(RELOAD_GRACE_S)
            try:
                scp = self._make_scp(config)
                scp.start()
            except DicomXaiError:
                self._scp = self._make_scp(old)
                self._scp.start()
                raise
            self._scp = scp
        self._context.spool.keep_free(config.service.spool.min_free_bytes)
        self._pressure.use(limits_of(config.service))
        self._policy = policy

    def stop(self, grace_s: float) -> None:
        """Stop listening, let associations end, stop the completion loop."""
        self._scp.stop(grace_s)
        self._refusals.end()
        self._stopping.set()
        self._context.ledger.ring("receiver")
        if self._loop.is_alive():
            self._loop.join()
        self._bell.close()

    def _make_scp(self, config: Config) -> StorageSCP:
        report = partial(report_rotation, self._context.metrics, self._context.log)
        return StorageSCP(config.service.receive, self, self._refusals.add, rotated=report)

    def draft(self) -> AbstractContextManager[Draft]:
        """A file for an object that is about to come; OutOfResourcesError without room for it."""
        self._pressure.check()
        return self._context.spool.draft()

    def opened(self, sender: Sender) -> int:
        """An association is about to store its first object; gives the transfer's id."""
        transfer = self._context.ledger.arrivals.open_transfer(sender, TRANSFER_LEASE_S)
        with self._lock:
            self._transfers[transfer] = sender, Tally()
        return transfer

    def accept(self, arrival: Arrival, transfer: int) -> Callable[[], None]:
        """Store an instance and make it known; returns only when both are durable.

        Gives what may wait until the peer has its answer.

        Raises
        ------
        RefusedError
            Nothing is kept, but for a conflicting duplicate, which is quarantined.
        """
        context = self._context
        started = context.ledger.now()
        disposition, wanted, trace = self._route(arrival)
        key = arrival.draft.keep()
        instance = Instance(
            sop_instance_uid=arrival.sop_instance_uid,
            sop_class_uid=arrival.sop_class_uid,
            series_instance_uid=arrival.series_instance_uid,
            study_instance_uid=arrival.study_instance_uid,
            transfer_syntax_uid=arrival.transfer_syntax_uid,
            spool_key=key,
            sha256=arrival.data_set_sha256,
            size_bytes=arrival.size_bytes,
            sender=arrival.sender,
        )
        recorded = context.ledger.arrivals.record(instance, disposition, transfer, wanted, trace)
        if recorded in (Recorded.DUPLICATE, Recorded.KNOWN_CONFLICT):
            context.spool.delete(key)
        elif recorded is Recorded.CONFLICT:
            self._pressure.stored(arrival.size_bytes)
        if recorded in (Recorded.CONFLICT, Recorded.KNOWN_CONFLICT):
            raise DuplicateInstanceError(
                f"SOP Instance {arrival.sop_instance_uid} is here with other content; the new "
                "one is quarantined"
            )
        elapsed_s = context.ledger.now() - started
        outcome = disposition if recorded is Recorded.STORED else recorded
        news = wanted if recorded is Recorded.STORED else []
        return partial(self._tell_of, instance, transfer, outcome, elapsed_s, news)

    def _tell_of(
        self,
        instance: Instance,
        transfer: int,
        outcome: Disposition | Recorded,
        elapsed_s: float,
        wanted: list[Wanted],
    ) -> None:
        """Wake who has to do with an instance that is stored, and count it."""
        if wanted:
            self._ring_for(wanted)
        context = self._context
        with self._lock:
            _, tally = self._transfers[transfer]
        tally.add(
            instance.study_instance_uid,
            instance.sop_class_uid,
            instance.spool_key,
            is_new=outcome is not Recorded.DUPLICATE,
        )
        context.metrics.instances_received.labels(outcome).inc()
        context.metrics.received_bytes.inc(instance.size_bytes)
        self._pressure.stored(instance.size_bytes)
        context.metrics.stage_seconds.labels(Stage.RECEIVE, "").observe(elapsed_s)
        context.log.info(
            Event.INSTANCE_STORED,
            sop_instance_uid=instance.sop_instance_uid,
            study_instance_uid=instance.study_instance_uid,
            outcome=outcome,
            size_bytes=instance.size_bytes,
            elapsed_s=round(elapsed_s, 4),
        )

    def _ring_for(self, wanted: list[Wanted]) -> None:
        """Wake those who have something to do now; for most slices of a series, few have."""
        ledger = self._context.ledger
        if any(want.fires_at_once for want in wanted):
            ledger.ring("worker")
        else:
            quiet_s = min(min(want.quiet_s or inf, want.max_wait_s) for want in wanted)
            if ledger.now() + quiet_s < self._looks_at:
                ledger.ring("receiver")
        ledger.ring("ahead")

    def closed(self, transfer: int, how: TransferEnd) -> None:
        """An association ended; the units it held may be complete now."""
        with self._lock:
            sender, tally = self._transfers.pop(transfer)
        waiting = self._context.ledger.arrivals.close_transfer(
            transfer, is_released=how is TransferEnd.RELEASED
        )
        for candidate in waiting:
            self._decide(candidate)
        is_whole = how is TransferEnd.RELEASED
        note_received(self._context, sender, tally, is_whole=is_whole)

    def promise(self, request: CommitmentRequest, sender: Sender) -> int:
        """Somebody asks for storage commitment; gives the report's number once it is durable."""
        config = self._policy.config.service.receive
        has_address = sender.calling_ae_title in config.commitment
        hold_s = REPORT_HOLD_S if has_address else config.network_timeout_s
        number = self._context.ledger.reports.owe(
            request, sender.calling_ae_title, sender.called_ae_title, hold_s
        )
        self._context.metrics.commitment_reports.labels("asked").inc()
        self._context.log.info(
            Event.COMMITMENT_ASKED,
            ae_title=sender.calling_ae_title,
            count=len(request.references),
        )
        return number

    def report(self, number: int) -> CommitmentReport | None:
        """What to report on the association of the request; None where the sender is at it."""
        owed = self._context.ledger.reports.claim(REPORT_LEASE_S, report_id=number)
        if owed is None:
            return None
        with self._lock:
            self._reporting[number] = owed
        return owed.report

    def reported(self, number: int, is_taken: bool) -> None:
        """The peer took the report, refused it, or went without a word."""
        with self._lock:
            owed = self._reporting.pop(number)
        reports = self._context.ledger.reports
        if is_taken:
            reports.reported(owed)
            note_reported(self._context, owed)
        else:
            reports.retry_later(owed, 0.0, "not taken on the association of the request")
            self._context.ledger.ring("sender")

    def unreported(self, numbers: list[int]) -> None:
        """The association is over: reports go by associations of ours."""
        self._context.ledger.reports.hand_over(numbers)
        self._context.ledger.ring("sender")

    def take_report(self, report: CommitmentReport, sender: Sender) -> bool:
        """A destination reports about our request; False where there was none to it."""
        destinations = self._policy.config.service.destinations
        reporters = [
            name
            for name, place in destinations.items()
            if place.commitment and place.ae_title == sender.calling_ae_title
        ]
        return take_report(self._context, report, reporters)

    def _route(self, arrival: Arrival) -> tuple[Disposition, list[Wanted], str]:
        """What becomes of an instance, and which routes want its unit."""
        policy = self._policy
        started = self._context.ledger.now()
        found = _answers(policy, arrival)
        elapsed_s = self._context.ledger.now() - started
        self._context.metrics.stage_seconds.labels(Stage.ROUTE, "").observe(elapsed_s)
        if found.is_ours:
            return Disposition.OWN, [], ""
        if dimse.ignored_kind(arrival.sop_class_uid) is not None:
            return Disposition.IGNORED, [], ""
        uids = (
            arrival.study_instance_uid,
            arrival.series_instance_uid,
            arrival.sop_instance_uid,
        )
        wanted = [_wanted(route, policy, uids) for route in found.routes]
        return (Disposition.ROUTED if wanted else Disposition.UNROUTED), wanted, found.trace

    def _complete_forever(self) -> None:
        try:
            while not self._stopping.is_set():
                try:
                    self._complete_due()
                except LedgerBusyError as error:
                    self._context.log.exception(Event.LEDGER_BUSY, error)
                    self._stopping.wait(LONGEST_WAIT_S)
        except BaseException as error:  # noqa: BLE001  # handed to tick, which ends the role
            self._failure = error

    def _complete_due(self) -> None:
        """Look at all timers that ran out, then wait for the next."""
        for candidate in self._context.ledger.arrivals.due():
            self._decide(candidate)
        self._count_overdue()
        self._looks_at = inf  # what is recorded from here on may be missed: ring
        pause_s = self._pause_s()
        self._looks_at = self._context.ledger.now() + pause_s
        self._bell.wait(pause_s)

    def _pause_s(self) -> float:
        """Until the next timer or deadline, at most `LONGEST_WAIT_S`."""
        ledger = self._context.ledger
        moments = (ledger.arrivals.next_due_at(), ledger.upkeep.next_deadline_at())
        soonest = min((at for at in moments if at is not None), default=inf)
        return max(0.002, min(LONGEST_WAIT_S, soonest - ledger.now()))

    def _decide(self, candidate: Candidate) -> None:
        """Ask `completion` about one unit and tell the ledger what it said."""
        arrivals = self._context.ledger.arrivals
        try:
            policy = read_route(candidate.route_json)
        except ConfigError as error:
            if arrivals.hold(candidate, "unreadable route"):
                unit, route = candidate.unit.key, candidate.route
                self._context.log.exception(Event.UNIT_HELD, error, unit=unit, route=route)
            return
        verdict = completion.decide(candidate, policy, self._context.ledger.now())
        fields = {"unit": candidate.unit.key, "route": candidate.route, "trigger": verdict.fired}
        if verdict.step is completion.Step.WAIT:
            arrivals.look_again(candidate, verdict.at)
        elif verdict.step is completion.Step.HOLD:
            if arrivals.hold(candidate, verdict.fired):
                self._context.log.warning(Event.UNIT_HELD, **fields)
        elif arrivals.make_ready(
            candidate, verdict.fired, verdict.at, policy.priority, policy.budget_s
        ):
            self._context.ledger.ring("worker")
            self._context.log.info(Event.UNIT_READY, **fields)
        else:
            # it changed meanwhile, or an earlier job of the unit still runs: look again soon
            arrivals.look_again(candidate, self._context.ledger.now() + 0.1)

    def _count_overdue(self) -> None:
        for overdue in self._context.ledger.upkeep.overdue():
            self._context.metrics.budget_exceeded.labels(overdue.route, overdue.stage).inc()
            self._context.log.warning(
                Event.BUDGET_EXCEEDED,
                job=overdue.job_id,
                route=overdue.route,
                stage=overdue.stage,
            )

    def _forget(self) -> None:
        """Delete what is delivered and old, and files that no row knows."""
        try:
            self._forget_now()
        except (DicomXaiError, OSError) as error:  # the next round tries again
            self._context.log.exception(Event.SWEPT, error)

    def _forget_now(self) -> None:
        context = self._context
        kept = self._policy.config.service.spool
        expired = context.ledger.upkeep.expire(kept.keep_days, kept.keep_failed_days)
        if expired.unanswered_units:
            context.metrics.units_forgotten.inc(expired.unanswered_units)
            context.log.warning(Event.UNITS_FORGOTTEN, count=expired.unanswered_units)
        keys = expired.spool_keys
        now = time.time()  # file times are in it; ORPHAN_AGE_S allows for its jumps
        keys += [
            key
            for key, modified in context.spool.entries()
            if now - modified > ORPHAN_AGE_S and not context.ledger.upkeep.is_known_key(key)
        ]
        for key in keys:
            context.spool.delete(key)
        if keys:
            self._pressure.sum_again()
            context.log.info(Event.SWEPT, count=len(keys))


def _allow_many_files() -> None:
    """Raise the soft limit on open files to the hard one: a connection takes about three."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


def _policy(config: Config) -> _Policy:
    return _Policy(
        config=config,
        default_per={name: card.default_per for name, card in config.cards.items()},
        route_jsons={
            route.name: route.model_dump_json(by_alias=True, exclude_none=True)
            for route in config.routes.routes
        },
        digests={name: card.digest for name, card in config.cards.items()},
        asked=tuple(tags_of(config.routes.routes) | identity.MARK_TAGS),
        answers={},
    )


def _answers(policy: _Policy, arrival: Arrival) -> _Answers:
    """Asked once for all objects that cannot differ in the answers: the slices of a series."""
    key = (
        arrival.transfer_syntax_uid,
        arrival.sender,
        *[arrival.header.element(tag) for tag in policy.asked],
    )
    known = policy.answers.get(key)
    if known is None:
        header = arrival.header.data_set
        plan = plan_instance(header, arrival.sender, policy.config.routes)
        known = _Answers(identity.is_ours(header), plan.routes, plan.trace)
        if len(policy.answers) >= MOST_ANSWERS:
            policy.answers.clear()
        policy.answers[key] = known
    return known


def _wanted(route: Route, policy: _Policy, uids: tuple[str, str, str]) -> Wanted:
    return Wanted(
        unit=unit_of(route, policy.default_per, uids),
        route=route.name,
        route_json=policy.route_jsons[route.name],
        model=route.model,
        model_digest=policy.digests[route.model],
        fires_at_once=route.trigger is TriggerKind.INSTANCE,
        quiet_s=route.quiet_s if route.trigger is TriggerKind.QUIET else None,
        max_wait_s=route.max_wait_s,
        priority=route.priority,
        budget_s=route.budget_s,
    )
