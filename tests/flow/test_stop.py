"""SIGTERM while peers on both sides are stuck in every way: the service ends, and in time."""

from __future__ import annotations

import signal
import socket
import subprocess
from collections.abc import Callable, Iterator
from contextlib import ExitStack

import pytest

from dicom_xai.demo.site import Site
from dicom_xai.service.role import GRACE_S
from tests.make.associations import association_request, connected, negotiated, store_request
from tests.make.books import wait_until
from tests.make.command import Running
from tests.make.scripted_peer import STALLS, ScriptedPeer
from tests.make.studies import a_radiograph

#: The supervisor's own 2 s, and as much again for a loaded machine to end five processes.
ENDED_S = GRACE_S + 6.0
_STUCK = sorted(STALLS)


def _names() -> list[str]:
    return ["pacs", *(f"stuck-{number}" for number in range(1, len(_STUCK)))]


def _routes() -> str:
    sent = ", ".join(f"{{object: sc, to: [{name}]}}" for name in _names())
    return f"""
routes:
  - name: chest
    when: {{Modality: {{equals: DX}}}}
    trigger: instance
    model: phantom-cxr
    explain: [grad-cam]
    send: [{sent}]
    budget_s: 30
"""


def _stuck_senders(port: int) -> list[socket.socket]:
    """Peers that began something and go no further."""
    asked = association_request(called="DICOM_XAI")
    stored = store_request(bytes(200_000), "1.2.840.10008.5.1.4.1.1.2", "1.2.3")
    half = negotiated(port)
    half.sendall(stored[: len(stored) // 2])
    return [
        connected(port),
        connected(port, asked[:3]),
        connected(port, asked[: len(asked) // 2]),
        negotiated(port),
        half,
    ]


@pytest.fixture
def stuck(new_site: Callable[..., Site]) -> Iterator[Running]:
    """A service with a stuck peer of every kind on both sides."""
    with ExitStack() as stack:
        peers = {name: stack.enter_context(ScriptedPeer()) for name in _names()}
        for peer, lie in zip(peers.values(), _STUCK, strict=True):
            peer.tell(*[lie] * 20)
        site = new_site(
            routes=_routes(),
            destinations={name: f"LIAR@127.0.0.1:{peer.port}" for name, peer in peers.items()},
        )
        site.write_config()
        running = Running(site).wait_until_ready()
        assert site.send(a_radiograph().files) == [0x0000]
        for sock in _stuck_senders(site.port):
            stack.enter_context(sock)
        wait_until(lambda: all(peer.attempts for peer in peers.values()), "every outlet is held")
        yield running
        running.process.kill()


@pytest.mark.promise("N9")
def test_sigterm_ends_a_service_whose_peers_are_all_stuck(stuck: Running) -> None:
    family = stuck.family()
    stuck.process.send_signal(signal.SIGTERM)
    assert stuck.process.wait(ENDED_S) == 0
    assert not any(process.is_running() for process in family)


@pytest.mark.promise("N9")
def test_a_second_sigterm_ends_it_at_once(stuck: Running) -> None:
    family = stuck.family()
    stuck.process.send_signal(signal.SIGTERM)
    with pytest.raises(subprocess.TimeoutExpired):
        stuck.process.wait(1.0)
    stuck.process.send_signal(signal.SIGTERM)
    assert stuck.process.wait(3.0) == 1
    wait_until(lambda: not any(process.is_running() for process in family), "all are gone", 5.0)
