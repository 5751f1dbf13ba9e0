"""Randomised rounds against one running site: senders, kills, a full disk, lies, clock jumps.

A round is planned from the seed alone (`plan_round`) and then played. What the machine makes of the
timing differs from run to run, but the same seed gives the same studies, faults and moments. Each
round ends in one check over spool, ledger and destinations (`account.py`).
"""

from __future__ import annotations

import random
import shutil
import signal
import socket
import struct
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from enum import StrEnum
from functools import partial
from pathlib import Path

from pydicom.uid import UID

from dicom_xai import uids
from dicom_xai.deliver.storage_scu import StorageSCU, Timeouts, parse
from dicom_xai.demo.site import Site
from dicom_xai.errors import DestinationUnavailableError
from tests.chaos.account import (
    SETTLED_S,
    Counts,
    check_round,
    check_site,
    sends_of,
    wait_until_settled,
)
from tests.make.associations import association_request, next_pdu, store_request
from tests.make.command import Running
from tests.make.disk import clock_of, full_of, watching
from tests.make.marks import marked
from tests.make.scripted_peer import STALLS, Lie, ScriptedPeer
from tests.make.studies import a_head, a_radiograph, changed

ROUTES = """
routes:
  - name: chest
    when: {Modality: {equals: DX}}
    trigger: instance
    model: phantom-cxr
    explain: [grad-cam]
    send: [{object: sc, to: [pacs, archive]}, {object: seg, to: [pacs]}]
    budget_s: 30
  - name: head
    when: {Modality: {equals: CT}}
    trigger: association_release
    quiet_s: 0.5
    max_wait_s: 5
    model: phantom-ct-head
    explain: [grad-cam]
    findings: 1
    send: [{object: sc, to: [archive]}]
    budget_s: 30
"""
#: What each route makes of a unit of one patient: these models find something in every image.
SENDS = sends_of(ROUTES)
KILL_EVERY = 7  #: a role that dies again within 30 s is kept waiting by its supervisor
QUICK_LIES = tuple(lie for lie in Lie if lie not in STALLS and lie is not Lie.GARBAGE_RESPONSE)
SENDER = Timeouts(connect_s=2, associate_s=2, answer_s=10, stall_s=5)


class Fault(StrEnum):
    """What goes wrong in a round, besides what the senders do."""

    NONE = "none"
    KILL_RECEIVER = "kill receiver"
    KILL_SENDER = "kill sender"
    KILL_WORKER = "kill worker"
    KILL_ALL = "kill all"
    FULL_DISK = "full disk"
    DEAD = "dead destination"
    LYING = "lying destination"
    BUSY = "destination out of resources"
    SILENT = "silent destination"
    CLOCK = "clock jump"
    RELOAD = "reload"


_KILLS = (Fault.KILL_SENDER, Fault.KILL_RECEIVER, Fault.KILL_WORKER, Fault.KILL_ALL)
_OTHERS = {
    Fault.NONE: 1.0,
    Fault.FULL_DISK: 3.0,
    Fault.DEAD: 2.0,
    Fault.LYING: 6.0,
    Fault.BUSY: 2.0,
    Fault.SILENT: 0.5,
    Fault.CLOCK: 2.0,
    Fault.RELOAD: 1.5,
}


@dataclass(frozen=True, slots=True)
class StudyPlan:
    """One sender's study and how it behaves."""

    slices: int  #: 0 is a radiograph
    breaks_off: bool  #: first a connection that ends in the middle of an object
    splits: bool  #: over two associations
    repeats: bool  #: sends all of it again
    corrects: bool  #: sends other content under a UID that is acknowledged
    mixes: bool  #: its last image is another patient's, in the same study and series


@dataclass(frozen=True, slots=True)
class RoundPlan:
    """All of one round."""

    number: int
    studies: tuple[StudyPlan, ...]
    fault: Fault
    at_s: float
    for_s: float
    lies: tuple[Lie, ...]


def plan_round(seed: int, number: int) -> RoundPlan:
    """The `number`-th round of a seed; always the same one."""
    rng = random.Random(f"{seed}/{number}")
    if number % KILL_EVERY == KILL_EVERY - 1:
        fault = _KILLS[number // KILL_EVERY % len(_KILLS)]
    else:
        fault = rng.choices(list(_OTHERS), list(_OTHERS.values()))[0]
    studies = [
        StudyPlan(
            slices=rng.choice((0, 0, 0, 3)),
            breaks_off=rng.random() < 0.15,
            splits=rng.random() < 0.3,
            repeats=rng.random() < 0.3,
            corrects=rng.random() < 0.15,
            mixes=rng.random() < 0.15,
        )
        for _ in range(rng.randint(1, 3))
    ]
    return RoundPlan(
        number,
        tuple(studies),
        fault,
        at_s=rng.uniform(0.0, 0.8),
        for_s=rng.uniform(0.2, 1.0),
        lies=tuple(rng.choices(QUICK_LIES, k=rng.randint(1, 2))),
    )


@dataclass
class SentStudy:
    """What one sender holds and what it was told."""

    plan: StudyPlan
    files: dict[str, bytes]
    acknowledged: dict[str, bytes] = field(default_factory=dict)


class Storm:
    """One site under all this.

    Parameters
    ----------
    folder : Path
        Takes everything; emptied by nobody.
    models : Path
    shim : Path
        From `disk.build_shim`.
    seed : int
    """

    def __init__(self, folder: Path, models: Path, shim: Path, seed: int) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.seed = seed
        self.peers = {"pacs": ScriptedPeer(seed).start(), "archive": ScriptedPeer(seed).start()}
        self.site = Site(
            folder / "site",
            models=models,
            routes=ROUTES,
            destinations={n: f"{n.upper()}@127.0.0.1:{p.port}" for n, p in self.peers.items()},
        )
        self.site.write_config()
        environment = watching(shim, self.site.folder)
        self._environment = environment
        self._templates = {0: a_radiograph().files, 3: a_head(3).files}
        self.service = Running(self.site, environment=environment).wait_until_ready()
        self.counts = Counts()

    def close(self) -> None:
        """Stop everything; the service must end as it should."""
        status = self.service.stop()
        for peer in self.peers.values():
            peer.stop()
        assert status == 0, f"the service ended with {status}"

    def play(self, plan: RoundPlan) -> None:
        """Play one round and check what it left; AssertionError tells what is wrong."""
        rng = random.Random(f"{self.seed}/{plan.number}/play")
        studies = [self._study(each, rng) for each in plan.studies]
        with ThreadPoolExecutor(len(studies), "sender") as pool:
            senders = [pool.submit(self._send, each) for each in studies]
            time.sleep(plan.at_s)  # not waiting for anything: the moment is the plan's
            heal = self._break(plan)
        heal()
        met = [error for sender in senders if (error := sender.exception())]
        if met:
            told = "; ".join(f"{type(error).__name__}: {error}" for error in met)
            raise AssertionError(f"seed {self.seed}, round {plan.number}: {told}") from met[0]
        deadline = time.monotonic() + SETTLED_S
        while any(each.files.keys() != each.acknowledged.keys() for each in studies):
            assert time.monotonic() < deadline, "a sender is refused for ever"
            for each in studies:
                self._store(each, each.files)
        wait_until_settled(self.site.folder, [each.acknowledged for each in studies])
        acknowledged = [each.acknowledged for each in studies]
        check_round(self.site.folder, self.peers, acknowledged, SENDS, self.counts)
        self.counts.rounds += 1
        self.counts.faults[plan.fault] = self.counts.faults.get(plan.fault, 0) + 1

    def check(self) -> Counts:
        """The last check, over all rounds."""
        check_site(self.site.folder, self.peers, self.counts)
        return self.counts

    def _study(self, plan: StudyPlan, rng: random.Random) -> SentStudy:
        """The template as another patient's study, each image marked as itself."""
        words = [str(rng.random()) for _ in range(3)]
        study, series = uids.derive("storm", words[0]), uids.derive("storm", words[1])
        templates = self._templates[plan.slices]
        if plan.mixes and len(templates) == 1:
            templates = templates * 2
        files = {}
        for number, template in enumerate(templates, start=1):
            uid = uids.derive("storm", words[2], str(number))
            is_others = plan.mixes and number == len(templates)
            file = changed(
                template,
                StudyInstanceUID=study,
                SeriesInstanceUID=series,
                SOPInstanceUID=uid,
                PatientID=f"storm-{words[2 if is_others else 0]}",
                PatientName=f"Storm^{words[1]}",
            )
            files[uid] = marked(file)
        return SentStudy(plan, files)

    def _send(self, study: SentStudy) -> None:
        plan = study.plan
        names = list(study.files)
        if plan.breaks_off:
            self._break_off(study.files[names[0]])
        parts = [names[:1], names[1:]] if plan.splits else [names]
        for part in parts:
            self._store(study, {uid: study.files[uid] for uid in part})
        if plan.repeats:
            self._repeat(study.acknowledged)
        if plan.corrects and names[0] in study.acknowledged:
            self._correct(study.files[names[0]])

    def _store(self, study: SentStudy, files: Mapping[str, bytes]) -> None:
        """Send over one association what is not acknowledged yet."""
        scu = StorageSCU("service", self.site.address(), timeouts=SENDER)
        try:
            for uid, file in files.items():
                if uid not in study.acknowledged and scu.send(file).status == 0x0000:
                    study.acknowledged[uid] = file
        except DestinationUnavailableError:
            return  # what is left is sent again at the end of the round
        finally:
            scu.close()

    def _repeat(self, files: Mapping[str, bytes]) -> None:
        scu = StorageSCU("service", self.site.address(), timeouts=SENDER)
        try:
            for file in files.values():
                assert scu.send(file).status == 0x0000, "a duplicate is no error"
                self.counts.repeated += 1
        except DestinationUnavailableError:
            return
        finally:
            scu.close()

    def _correct(self, file: bytes) -> None:
        scu = StorageSCU("service", self.site.address(), timeouts=SENDER)
        try:
            status = scu.send(changed(file, PatientComments="corrected")).status
            assert status == 0x0111, f"other content under a known UID got 0x{status:04X}"
            self.counts.corrected += 1
        except DestinationUnavailableError:
            return
        finally:
            scu.close()

    def _break_off(self, file: bytes) -> None:
        """Half an object, then a reset."""
        stored = parse(file)
        try:
            with socket.create_connection(("127.0.0.1", self.site.port), timeout=5) as sock:
                classes = (UID(stored.sop_class_uid),)
                sock.sendall(association_request(classes, called="DICOM_XAI"))
                if next_pdu(sock)[:1] != b"\x02":
                    return
                whole = store_request(
                    file[stored.data_set_at :], stored.sop_class_uid, stored.sop_instance_uid
                )
                sock.sendall(whole[: len(whole) // 2])
                sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        except OSError:
            return  # it was down
        self.counts.broken_off += 1

    def _break(self, plan: RoundPlan) -> Callable[[], object]:
        """Do the fault, for as long as it lasts; gives what makes it good again.

        Lies that nobody was told in this round are for the next ones.
        """
        fault, peer = plan.fault, self.peers[("pacs", "archive")[plan.number % 2]]
        if fault in (Fault.KILL_RECEIVER, Fault.KILL_SENDER, Fault.KILL_WORKER):
            process = self.service.role_process(fault.split()[1])
            if process is not None:
                process.kill()
        elif fault is Fault.KILL_ALL:
            return self._kill_all()
        elif fault is Fault.FULL_DISK:
            full_of(self.site.folder).touch()
            time.sleep(plan.for_s)
            full_of(self.site.folder).unlink()
        elif fault is Fault.DEAD:
            peer.stop()
            time.sleep(plan.for_s)
            peer.start()
        elif fault is Fault.LYING:
            peer.tell(*plan.lies)
        elif fault is Fault.BUSY:
            peer.answer(0xA700, 0x0110, 0xA701)
        elif fault is Fault.SILENT:
            peer.tell(Lie.NO_ANSWER)
        elif fault is Fault.CLOCK:
            clock_of(self.site.folder).write_text(("3600", "-3600", "0")[plan.number % 3])
        elif fault is Fault.RELOAD:
            return self._reload(plan.number)
        return lambda: None

    def _kill_all(self) -> Callable[[], object]:
        for process in self.service.family():
            process.kill()
        self.service.process.wait()
        self.service = Running(self.site, environment=self._environment)
        return self.service.wait_until_ready

    def _reload(self, number: int) -> Callable[[], object]:
        """A good config, then a bad one that must change nothing; the good one stays."""
        routes = self.site.folder / "routes.yaml"
        good = ROUTES.replace("budget_s: 30", f"budget_s: {30 + number % 5}")
        routes.write_text(good if number % 2 else f"{good}\n  - nonsense")
        self.service.process.send_signal(signal.SIGHUP)
        return partial(routes.write_text, good)


def run(
    folder: Path, models: Path, shim: Path, seed: int, rounds: int, say: Callable[[str], None]
) -> Counts:
    """Play the rounds of one seed on one site.

    Raises
    ------
    AssertionError
        Something was lost, doubled, mixed or stuck; the folder is left for somebody to look at.
    """
    storm = Storm(folder, models, shim, seed)
    started = time.monotonic()
    try:
        for number in range(rounds):
            plan = plan_round(seed, number)
            try:
                storm.play(plan)
            except Exception as error:
                error.add_note(f"seed {seed}, round {number}: {plan}")
                raise
            if number % 20 == 19:
                took_s = time.monotonic() - started
                say(f"seed {seed}: {number + 1} rounds, {took_s:.0f} s; {storm.counts}")
        counts = storm.check()
    finally:
        storm.close()
    shutil.rmtree(folder)
    return counts
