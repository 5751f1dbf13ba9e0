"""What the roles put into the audit trail about instances, a study at a time."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator

from dicom_xai import identity
from dicom_xai.audit import Participant, Study
from dicom_xai.audit.messages import instances_created, instances_transferred
from dicom_xai.errors import IdentityError
from dicom_xai.service.role import Context
from dicom_xai.study import Job, Result, Sender

#: What `Door` and listener refuse because of the peer. Objects that cannot be kept or read are no
#: matter of security: ledger and log have them.
SECURITY_REASONS = frozenset(
    """
    called-ae not-allowed certificate tls association-limit source-limit connection-limit half-open
    no-association-request stalled pdu-too-long unknown-pdu malformed-pdu malformed-message
    message-too-long
    """.split()
)


class Tally:
    """Instances of one transfer by study and SOP class."""

    def __init__(self) -> None:
        self._counts: dict[str, Counter[str]] = {}
        self._new: dict[str, str] = {}  #: a spool key by study

    def __len__(self) -> int:
        """How many instances."""
        return sum(count.total() for count in self._counts.values())

    def add(
        self, study_instance_uid: str, sop_class_uid: str, spool_key: str, *, is_new: bool = True
    ) -> None:
        """Count one; `spool_key` leads to a file of the study that names its patient.

        The file of one that is not new is gone again.
        """
        if is_new:
            self._new.setdefault(study_instance_uid, spool_key)
        self._counts.setdefault(study_instance_uid, Counter())[sop_class_uid] += 1

    def has_new(self, study: Study) -> bool:
        """Whether one of a study's instances was not here before."""
        return study.study_instance_uid in self._new

    def studies(self, context: Context) -> Iterator[Study]:
        """Each study, with its patient where the trail shall hold it."""
        for uid, counts in self._counts.items():
            key = self._new.get(uid)
            yield Study(uid, counts, "" if key is None else _patient_id(context, key))


def note_received(context: Context, sender: Sender, tally: Tally, *, is_whole: bool) -> None:
    """Instances came in by one association."""
    source = node_of(sender)
    here = Participant(sender.called_ae_title, address=context.audit.process.address)
    problem = "" if is_whole else "the association was aborted"
    for study in tally.studies(context):
        is_new = tally.has_new(study)
        context.audit.record(instances_transferred(source, here, study, problem, is_new=is_new))


def note_sent(context: Context, source: Participant, destination: Participant, sent: Tally) -> None:
    """A destination took our results; whether it had them already, it alone knows."""
    for study in sent.studies(context):
        context.audit.record(instances_transferred(source, destination, study))


def note_created(context: Context, job: Job, results: list[Result], problem: str = "") -> None:
    """A job made results."""
    made = Tally()
    for result in results:
        made.add(job.unit.study_instance_uid, result.sop_class_uid, job.instances[0].spool_key)
    for study in made.studies(context):
        context.audit.record(instances_created(context.audit.process, study, problem))


def node_of(sender: Sender) -> Participant:
    """A sender, as it calls itself and as the network knows it."""
    return Participant(sender.calling_ae_title, address=sender.source_address)


def _patient_id(context: Context, spool_key: str) -> str:
    if not context.audit.includes_patient_id:
        return ""
    try:
        with context.spool.view(spool_key) as file:
            block = identity.read_block(file)
    except (IdentityError, OSError):  # gone, or unreadable: the study's UID is in the message
        return ""
    return identity.text_of(block, "PatientID")
