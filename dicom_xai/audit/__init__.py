"""The audit trail: who sent what, who got what, who was refused, who changed or retried something.

`messages` are the words (PS3.15 A.5, from RFC 3881), `trail` the append-only file, `syslog` the way
to a collector, `recorder` what a role speaks to.

The file comes first and is the collector's queue: a message is on disk when `record` returns, and
is sent from there in order, by one process of the host at a time, when the collector answers. So a
collector that is down costs nobody anything and loses nothing. A file that cannot be written loses
messages, which is counted and alarmed, and never stops care.
"""

from dicom_xai.audit.messages import Message, Outcome, Participant, Study
from dicom_xai.audit.recorder import Recorder

__all__ = ["Message", "Outcome", "Participant", "Recorder", "Study"]
