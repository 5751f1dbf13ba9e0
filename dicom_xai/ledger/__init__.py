"""The facts, durable: what came in, what is to be done, what was made, who has it.

Everything else can be killed at any instant. The verbs are grouped by who speaks:
`arrivals` (receiver), `jobs` (worker), `deliveries` (sender), `commitments` (promises to us) and
`reports` (ours to others), `upkeep` (nobody's turn), `admin` and `views` (people).
"""

from __future__ import annotations

from dicom_xai.ledger.admin import Admin
from dicom_xai.ledger.arrivals import Arrivals, Recorded, Wanted
from dicom_xai.ledger.commitments import Asking, Commitments, Reconciled
from dicom_xai.ledger.deliveries import Deliveries, Outgoing, Triaged
from dicom_xai.ledger.engine import Bell, Bells, Database
from dicom_xai.ledger.jobs import Jobs
from dicom_xai.ledger.reports import Owed, Reports
from dicom_xai.ledger.schema import Disposition
from dicom_xai.ledger.upkeep import ORPHAN_AGE_S, Expired, Overdue, Upkeep
from dicom_xai.ledger.views import Views

__all__ = [
    "ORPHAN_AGE_S",
    "Admin",
    "Arrivals",
    "Asking",
    "Bell",
    "Commitments",
    "Deliveries",
    "Disposition",
    "Expired",
    "Jobs",
    "Ledger",
    "Outgoing",
    "Overdue",
    "Owed",
    "Reconciled",
    "Recorded",
    "Reports",
    "Triaged",
    "Upkeep",
    "Views",
    "Wanted",
]


class Ledger:
    """All verbs over one database.

    Parameters
    ----------
    url : str
        ``sqlite:///`` and an absolute path.

    Raises
    ------
    ConfigError
        Another engine, or an unknown schema version.
    LedgerBusyError
        The database cannot be opened now.
    """

    def __init__(self, url: str) -> None:
        self._database = Database(url)
        self._bells = Bells(self._database.path.with_name(f"{self._database.path.name}-bells"))
        self.arrivals = Arrivals(self._database)
        self.jobs = Jobs(self._database)
        self.deliveries = Deliveries(self._database)
        self.commitments = Commitments(self._database)
        self.reports = Reports(self._database)
        self.upkeep = Upkeep(self._database)
        self.admin = Admin(self._database)
        self.views = Views(self._database)

    def now(self) -> float:
        """Seconds of the clock in which all of the ledger's times are given."""
        return self._database.now()

    def listen(self, role: str) -> Bell:
        """A bell that tells this role to look for work."""
        return self._bells.listen(role)

    def ring(self, role: str) -> None:
        """Tell a role to look for work."""
        self._bells.ring(role)

    def close(self) -> None:
        """Finish what is queued and let go of the database."""
        self._database.close()
