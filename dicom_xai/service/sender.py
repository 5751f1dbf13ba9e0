"""The sender: one thread for each peer, so that a dead one never slows another."""

from __future__ import annotations

import random
from collections.abc import Mapping

from dicom_xai.config import Config, Destination, Requester
from dicom_xai.errors import LedgerBusyError
from dicom_xai.service.commitments import Committer
from dicom_xai.service.loop import Loop, end
from dicom_xai.service.outlet import Outlet
from dicom_xai.service.reports import Debtor, drop_unaddressed
from dicom_xai.service.role import Context
from dicom_xai.telemetry import Event

#: How long a reload lets a changed destination finish the object under way.
RELOAD_GRACE_S = 5.0


class Sender:
    """The role.

    Parameters
    ----------
    context : Context
    rng : Random
        Jitters the pauses.
    """

    def __init__(self, context: Context, rng: random.Random | None = None) -> None:
        self._context = context
        self._rng = rng or random.Random()
        self._outlets: dict[str, Outlet] = {}
        self._committers: dict[str, Committer] = {}
        self._debtors: dict[str, Debtor] = {}
        self._released: set[str] = set()  # destinations that need not commit
        self._requesters = context.config.service.receive.commitment

    def start(self) -> None:
        """Open one outlet for each destination, and what storage commitment needs."""
        self._open(self._context.config.service.destinations)
        self._owe(self._requesters)

    def tick(self) -> None:
        """End the role when one of its threads has failed."""
        for loop in self._loops():
            if loop.failure is not None:
                raise loop.failure
            loop.watch_certificate()
        try:
            self._settle()
        except LedgerBusyError as error:  # the next tick tries again
            self._context.log.exception(Event.LEDGER_BUSY, error)

    def _settle(self) -> None:
        """Let go of promises that nobody is asked for, and of reports that nobody can be told."""
        commitments = self._context.ledger.commitments
        for name in self._outlets.keys() - self._committers.keys() - self._released:
            commitments.release(name)
            self._released.add(name)
        drop_unaddressed(self._context, list(self._requesters))

    def use(self, config: Config) -> None:
        """Close the outlets that changed or went, open the new ones."""
        wanted = config.service.destinations
        changed = [
            name for name, outlet in self._outlets.items() if wanted.get(name) != outlet.destination
        ]
        asked = config.service.receive.commitment
        ending: list[Loop] = [self._outlets.pop(name) for name in changed]
        ending += [self._committers.pop(name) for name in changed if name in self._committers]
        self._released -= set(changed)
        gone = [ae for ae in self._debtors if asked.get(ae) != self._requesters[ae]]
        ending += [self._debtors.pop(ae) for ae in gone]
        end(ending, RELOAD_GRACE_S)
        self._open({n: d for n, d in wanted.items() if n not in self._outlets})
        self._owe({ae: each for ae, each in asked.items() if ae not in self._debtors})
        self._requesters = asked

    def stop(self, grace_s: float) -> None:
        """Finish the objects under way; what is left waits in the ledger."""
        end(self._loops(), grace_s)

    def _loops(self) -> list[Loop]:
        return [*self._outlets.values(), *self._committers.values(), *self._debtors.values()]

    def _open(self, destinations: Mapping[str, Destination]) -> None:
        for name, destination in destinations.items():
            self._outlets[name] = Outlet(self._context, name, destination, self._rng)
            self._outlets[name].start()
            if destination.commitment:
                self._committers[name] = Committer(self._context, name, destination, self._rng)
                self._committers[name].start()

    def _owe(self, requesters: Mapping[str, Requester]) -> None:
        for ae_title, requester in requesters.items():
            self._debtors[ae_title] = Debtor(self._context, ae_title, requester, self._rng)
            self._debtors[ae_title].start()
