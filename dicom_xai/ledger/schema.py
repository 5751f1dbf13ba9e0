"""The ledger's tables: states are spelled in CHECK constraints, guarantees are unique indexes.

Times named `*_at` are seconds of the ledger's clock (`engine.Database.now`), which wall-clock
jumps cannot move; `*_utc` are wall-clock text for people. `event` is append-only: the history.
"""

from __future__ import annotations

from enum import StrEnum

from sqlalchemy import (
    CheckConstraint,
    Column,
    Float,
    ForeignKey,
    Index,
    Integer,
    MetaData,
    Table,
    Text,
    UniqueConstraint,
    text,
)

from dicom_xai.study import ObjectKind, Purpose

#: Refused when a database says a number that neither this one nor a migration knows.
SCHEMA_VERSION = 4

#: From a version to the next, in one transaction at start-up.
MIGRATIONS: dict[int, tuple[str, ...]] = {
    1: (
        "ALTER TABLE candidate ADD COLUMN holder TEXT NOT NULL DEFAULT ''",
        "ALTER TABLE job ADD COLUMN holder TEXT NOT NULL DEFAULT ''",
    ),
    2: (
        "ALTER TABLE delivery ADD COLUMN commitment TEXT NOT NULL DEFAULT 'none' "
        "CHECK (commitment IN ('none', 'wanted', 'committed', 'refused'))",
        "ALTER TABLE delivery ADD COLUMN commitment_id INTEGER",
        "ALTER TABLE delivery ADD COLUMN asks INTEGER NOT NULL DEFAULT 0",
        "ALTER TABLE delivery ADD COLUMN ask_at FLOAT",
        "ALTER TABLE delivery ADD COLUMN resends INTEGER NOT NULL DEFAULT 0",
        "ALTER TABLE delivery ADD COLUMN committed_at FLOAT",
        "CREATE INDEX delivery_uncommitted ON delivery (destination, ask_at) "
        "WHERE commitment = 'wanted'",
    ),
    3: (
        # there already where the table itself is new
        "CREATE INDEX IF NOT EXISTS commitment_kept ON commitment (asked_utc)",
        "CREATE INDEX IF NOT EXISTS commitment_report_kept ON commitment_report (requested_utc) "
        "WHERE state IN ('reported', 'dead')",
    ),
}

metadata = MetaData()


class TransferState(StrEnum):
    """An association, as far as completeness cares."""

    OPEN = "open"
    RELEASED = "released"
    ABORTED = "aborted"
    LOST = "lost"  #: its receiver died


class Disposition(StrEnum):
    """What became of an instance."""

    ROUTED = "routed"
    UNROUTED = "unrouted"  #: no route matched; the trace says why
    IGNORED = "ignored"  #: a kind that is kept and never routed
    OWN = "own"  #: one of our own results, come back
    QUARANTINED = "quarantined"  #: UID known with other content


class CandidateState(StrEnum):
    """A unit on its way to a job."""

    WAITING = "waiting"
    READY = "ready"
    HELD = "held"  #: incomplete at max_wait_s, and the route says hold


class JobState(StrEnum):
    """A job's life."""

    QUEUED = "queued"
    RUNNING = "running"
    DONE = "done"
    FAILED = "failed"


class DeliveryState(StrEnum):
    """A delivery's life."""

    PENDING = "pending"
    SENDING = "sending"
    SENT = "sent"
    DEAD = "dead"
    SKIPPED = "skipped"


class Commitment(StrEnum):
    """Whether a destination has promised to keep an object that it was sent."""

    NONE = "none"  #: not asked for
    WANTED = "wanted"
    COMMITTED = "committed"
    REFUSED = "refused"  #: it said no for good


class TransactionState(StrEnum):
    """One request for commitment that we made."""

    ASKED = "asked"
    OVERDUE = "overdue"  #: asked again since; a late report still counts
    FAILED = "failed"  #: the request was not taken
    REPORTED = "reported"


class ReportState(StrEnum):
    """A report that we owe to somebody who asked us."""

    OWED = "owed"
    REPORTING = "reporting"
    REPORTED = "reported"
    DEAD = "dead"


#: Said word for word in a query, these let SQLite use the partial indexes of the queues
#: (sqlite.org/partialindex.html): ended rows stay for ever, and no verb may read them all.
TRANSFER_IS_OPEN = text("state = 'open'")
JOB_IS_LIVE = text("state IN ('queued', 'running')")
DELIVERY_IS_OPEN = text("state IN ('pending', 'sending')")
DELIVERY_IS_UNCOMMITTED = text("commitment = 'wanted'")
REPORT_IS_OPEN = text("state IN ('owed', 'reporting')")
REPORT_IS_ENDED = text("state IN ('reported', 'dead')")


def _one_of(column: str, states: type[StrEnum]) -> CheckConstraint:
    words = ", ".join(f"'{state}'" for state in states)
    return CheckConstraint(f"{column} IN ({words})", name=f"{column}_is_known")


meta = Table(
    "meta",
    metadata,
    Column("key", Text, primary_key=True),
    Column("value", Text, nullable=False),
)

event = Table(
    "event",
    metadata,
    Column("id", Integer, primary_key=True),
    Column("at_utc", Text, nullable=False),
    Column("kind", Text, nullable=False),
    Column("subject", Text, nullable=False),
    Column("detail", Text, nullable=False, server_default=""),
    Index("event_subject", "subject"),
)

transfer = Table(
    "transfer",
    metadata,
    Column("id", Integer, primary_key=True),
    Column("state", Text, nullable=False),
    Column("calling_ae_title", Text, nullable=False),
    Column("called_ae_title", Text, nullable=False),
    Column("source_address", Text, nullable=False),
    Column("listener", Text, nullable=False),
    Column("opened_at", Float, nullable=False),
    Column("owner", Text, nullable=False),
    Column("lease_until", Float, nullable=False),
    Column("closed_at", Float),
    _one_of("state", TransferState),
    Index("transfer_open", "lease_until", sqlite_where=TRANSFER_IS_OPEN),
)

instance = Table(
    "instance",
    metadata,
    Column("id", Integer, primary_key=True),
    Column("sop_instance_uid", Text, nullable=False),
    Column("sop_class_uid", Text, nullable=False),
    Column("series_instance_uid", Text, nullable=False),
    Column("study_instance_uid", Text, nullable=False),
    Column("transfer_syntax_uid", Text, nullable=False),
    Column("spool_key", Text),  # NULL once deleted
    Column("sha256", Text, nullable=False),
    Column("size_bytes", Integer, nullable=False),
    Column("calling_ae_title", Text, nullable=False),
    Column("called_ae_title", Text, nullable=False),
    Column("source_address", Text, nullable=False),
    Column("store_priority", Integer, nullable=False),
    Column("listener", Text, nullable=False),
    Column("disposition", Text, nullable=False),
    Column("transfer_id", Integer, ForeignKey("transfer.id"), nullable=False),
    Column("received_at", Float, nullable=False),
    Column("received_utc", Text, nullable=False),
    Column("duplicates", Integer, nullable=False, server_default="0"),
    Column("trace", Text, nullable=False, server_default=""),  # why each route did or did not match
    _one_of("disposition", Disposition),
    UniqueConstraint("sop_instance_uid", "sha256", name="same_bytes_once"),
    Index(
        "one_content_per_uid",
        "sop_instance_uid",
        unique=True,
        sqlite_where=text("disposition <> 'quarantined'"),
    ),
    Index("instance_study", "study_instance_uid"),
    Index("instance_transfer", "transfer_id"),
    Index("instance_bytes", "spool_key", sqlite_where=text("spool_key IS NOT NULL")),
    Index("instance_kept", "received_utc", sqlite_where=text("spool_key IS NOT NULL")),
    Index("instance_quarantined", "id", sqlite_where=text("disposition = 'quarantined'")),
)

candidate = Table(
    "candidate",
    metadata,
    Column("id", Integer, primary_key=True),
    Column("unit_key", Text, nullable=False),
    Column("per", Text, nullable=False),
    Column("study_instance_uid", Text, nullable=False),
    Column("series_instance_uid", Text, nullable=False),
    Column("sop_instance_uid", Text, nullable=False),
    Column("route", Text, nullable=False),
    Column("route_json", Text, nullable=False),
    Column("model", Text, nullable=False),
    Column("model_digest", Text, nullable=False),
    Column("generation", Integer, nullable=False),
    Column("state", Text, nullable=False),
    Column("fired", Text, nullable=False, server_default=""),  # what made it ready, or held it
    Column("first_at", Float, nullable=False),
    Column("last_at", Float, nullable=False),
    Column("fire_at", Float, nullable=False),  # when to look again at the latest
    Column("holder", Text, nullable=False, server_default=""),  # process that prepares its images
    _one_of("state", CandidateState),
    UniqueConstraint("unit_key", "route", "generation", name="one_candidate_per_generation"),
    Index("candidate_due", "fire_at", sqlite_where=text("state = 'waiting'")),
    Index("candidate_held", "id", sqlite_where=text("state = 'held'")),
)

member = Table(
    "candidate_instance",
    metadata,
    Column("candidate_id", Integer, ForeignKey("candidate.id"), primary_key=True),
    Column("instance_id", Integer, ForeignKey("instance.id"), primary_key=True),
    Index("member_instance", "instance_id"),
)

job = Table(
    "job",
    metadata,
    Column("id", Integer, primary_key=True),
    Column("candidate_id", Integer, ForeignKey("candidate.id"), nullable=False),
    Column("unit_key", Text, nullable=False),
    Column("route", Text, nullable=False),
    Column("model", Text, nullable=False),
    Column("model_digest", Text, nullable=False),
    Column("purpose", Text, nullable=False),
    Column("generation", Integer, nullable=False),
    Column("priority", Text, nullable=False),
    Column("rank", Integer, nullable=False),  # of the priority; lower goes first
    Column("state", Text, nullable=False),
    Column("token", Integer, nullable=False, server_default="0"),
    Column("owner", Text, nullable=False, server_default=""),
    Column("holder", Text, nullable=False, server_default=""),  # the candidate's, when it was ready
    Column("lease_until", Float),
    Column("attempts", Integer, nullable=False, server_default="0"),
    Column("not_before", Float, nullable=False),
    Column("ready_at", Float, nullable=False),
    Column("deadline_at", Float, nullable=False),
    Column("first_byte_at", Float, nullable=False),
    Column("last_byte_at", Float, nullable=False),
    Column("created_at", Text, nullable=False),  # DICOM DT: all results carry it
    Column("explainer", Text, nullable=False, server_default=""),
    Column("note", Text, nullable=False, server_default=""),
    Column("findings", Text, nullable=False, server_default="[]"),  # JSON: what the model said
    Column("stages", Text, nullable=False, server_default="{}"),  # JSON: seconds in each stage
    Column("done_at", Float),
    Column("triaged_at", Float),
    Column("overdue_at", Float),
    _one_of("state", JobState),
    _one_of("purpose", Purpose),
    UniqueConstraint(
        *("unit_key", "route", "model_digest", "purpose", "generation"), name="one_job_each"
    ),
    Index(
        "one_live_job",
        *("unit_key", "route", "model_digest", "purpose"),
        unique=True,
        sqlite_where=JOB_IS_LIVE,
    ),
    Index("job_queue", *("rank", "deadline_at"), sqlite_where=JOB_IS_LIVE),
    Index("job_failed", "id", sqlite_where=text("state = 'failed'")),
    Index("job_candidate", "candidate_id"),
    Index(
        "job_deadline",
        "deadline_at",
        sqlite_where=text("triaged_at IS NULL AND overdue_at IS NULL"),
    ),
)

result = Table(
    "result",
    metadata,
    Column("id", Integer, primary_key=True),
    Column("job_id", Integer, ForeignKey("job.id"), nullable=False),
    Column("kind", Text, nullable=False),
    Column("ordinal", Integer, nullable=False),
    Column("sop_class_uid", Text, nullable=False),
    Column("sop_instance_uid", Text, nullable=False, unique=True),
    Column("series_instance_uid", Text, nullable=False),
    Column("study_instance_uid", Text, nullable=False),
    Column("transfer_syntax_uid", Text, nullable=False),
    Column("spool_key", Text),
    Column("sha256", Text, nullable=False),
    Column("size_bytes", Integer, nullable=False),
    Column("source_instance_id", Integer, ForeignKey("instance.id"), nullable=False),
    Column("created_utc", Text, nullable=False),
    _one_of("kind", ObjectKind),
    UniqueConstraint("job_id", "kind", "ordinal", name="one_result_each"),
    Index("result_bytes", "spool_key", sqlite_where=text("spool_key IS NOT NULL")),
    Index("result_kept", "created_utc", sqlite_where=text("spool_key IS NOT NULL")),
)

delivery = Table(
    "delivery",
    metadata,
    Column("id", Integer, primary_key=True),
    Column("result_id", Integer, ForeignKey("result.id"), nullable=False),
    Column("job_id", Integer, ForeignKey("job.id"), nullable=False),
    Column("destination", Text, nullable=False),
    Column("state", Text, nullable=False),
    Column("rank", Integer, nullable=False),
    Column("token", Integer, nullable=False, server_default="0"),
    Column("owner", Text, nullable=False, server_default=""),
    Column("lease_until", Float),
    Column("attempts", Integer, nullable=False, server_default="0"),
    Column("not_before", Float, nullable=False),
    Column("queued_at", Float, nullable=False),
    Column("status", Integer),
    Column("reason", Text, nullable=False, server_default=""),
    Column("sent_at", Float),
    Column("commitment", Text, nullable=False, server_default="none"),
    Column("commitment_id", Integer),  # the newest transaction about it
    Column("asks", Integer, nullable=False, server_default="0"),  # since it was sent
    Column("ask_at", Float),  # when to ask, or to ask again
    Column("resends", Integer, nullable=False, server_default="0"),  # after a negative report
    Column("committed_at", Float),
    _one_of("state", DeliveryState),
    _one_of("commitment", Commitment),
    UniqueConstraint("result_id", "destination", name="one_delivery_each"),
    Index("delivery_queue", *("destination", "rank", "id"), sqlite_where=DELIVERY_IS_OPEN),
    Index("delivery_dead", "destination", sqlite_where=text("state = 'dead'")),
    Index("delivery_job", "job_id"),
    Index("delivery_uncommitted", *("destination", "ask_at"), sqlite_where=DELIVERY_IS_UNCOMMITTED),
)

commitment = Table(
    "commitment",
    metadata,
    Column("id", Integer, primary_key=True),
    Column("transaction_uid", Text, nullable=False, unique=True),
    Column("job_id", Integer, ForeignKey("job.id"), nullable=False),
    Column("destination", Text, nullable=False),
    Column("state", Text, nullable=False),
    Column("asked_at", Float, nullable=False),
    Column("asked_utc", Text, nullable=False),
    Column("reason", Text, nullable=False, server_default=""),
    _one_of("state", TransactionState),
    Index("commitment_job", *("job_id", "destination")),
    Index("commitment_kept", "asked_utc"),
)

commitment_delivery = Table(
    "commitment_delivery",
    metadata,
    Column("commitment_id", Integer, ForeignKey("commitment.id"), primary_key=True),
    Column("delivery_id", Integer, ForeignKey("delivery.id"), primary_key=True),
)

commitment_report = Table(
    "commitment_report",
    metadata,
    Column("id", Integer, primary_key=True),
    Column("transaction_uid", Text, nullable=False),
    Column("ae_title", Text, nullable=False),  # who asked
    Column("called_ae_title", Text, nullable=False),  # ours
    Column("objects", Text, nullable=False),  # JSON: [SOP class, SOP instance] of each
    Column("state", Text, nullable=False),
    Column("token", Integer, nullable=False, server_default="0"),
    Column("owner", Text, nullable=False, server_default=""),
    Column("lease_until", Float),
    Column("attempts", Integer, nullable=False, server_default="0"),
    Column("not_before", Float, nullable=False),
    Column("requested_at", Float, nullable=False),
    Column("requested_utc", Text, nullable=False),
    Column("reason", Text, nullable=False, server_default=""),
    _one_of("state", ReportState),
    UniqueConstraint("ae_title", "transaction_uid", name="one_report_each"),
    Index("commitment_report_open", *("ae_title", "not_before"), sqlite_where=REPORT_IS_OPEN),
    Index("commitment_report_kept", "requested_utc", sqlite_where=REPORT_IS_ENDED),
)
