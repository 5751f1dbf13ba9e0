"""The process in which untrusted files are decoded: it may die, and costs one object when it does.

It is given open files over a socket and gives back memory: no path, no ledger, no network. What it
prepared lies in an anonymous file of the kernel's (memfd_create(2)), whose descriptor travels back;
arrays are mapped there by the asker, never copied (pickle protocol 5, out-of-band buffers). Memory
without a name cannot leak: it is gone with the last process that holds it.

It ends when its asker's end of the socket closes, so it cannot outlive a worker that was killed.
"""

from __future__ import annotations

import mmap
import os
import pickle
import resource
import signal
import socket
import struct
import sys
from collections.abc import Callable

from dicom_xai.errors import DecodeError, StudyError
from dicom_xai.study import Instance

#: One request or answer on the socket; files travel beside it.
MESSAGE_BYTES = 8192
#: Out-of-band buffers start at multiples of it.
_ALIGNMENT = 64
_COUNT = struct.Struct("<Q")
#: What the interpreter and the codecs themselves may map, beside what they decode.
_OWN_BYTES = 4 * 1024**3

_OK, _FAILED = b"+", b"-"


def serve(channel: socket.socket, prepare: Callable[[Instance, bytes], object]) -> None:
    """Answer requests until the asker is gone.

    Parameters
    ----------
    channel : socket
        Of kind SOCK_SEQPACKET: a request is a pickled Instance with its open file beside it.
    prepare : callable
        What to make of an instance and its bytes; a StudyError is passed on, anything else ends
        the process.
    """
    while True:
        request, files, _, _ = socket.recv_fds(channel, MESSAGE_BYTES, 1)
        if not request:
            return
        try:
            with open(files[0], "rb") as file:
                answer = _share(prepare(pickle.loads(request), file.read()))
        except StudyError as error:
            _refuse(channel, type(error), str(error))
        except MemoryError:
            # the limit of this process, not the machine's: see `limit`
            _refuse(channel, DecodeError, "it needs more memory than decode.limit_bytes allows")
        else:
            socket.send_fds(channel, [_OK], [answer])
            os.close(answer)


def ask(channel: socket.socket, instance: Instance, stored: int) -> None:
    """The asker's side: hand over an instance and its open file.

    Raises
    ------
    EOFError
        The process is gone.
    """
    try:
        socket.send_fds(channel, [pickle.dumps(instance)], [stored])
    except ConnectionError as error:
        raise EOFError from error


def take(channel: socket.socket) -> tuple[object, int]:
    """The asker's side: wait for one answer.

    Returns
    -------
    object
        What was prepared; its arrays lie in the shared memory.
    int
        Bytes of that memory.

    Raises
    ------
    StudyError
        The object cannot be prepared; the kind is the one that the process raised.
    EOFError
        The process is gone.
    TimeoutError
        It did not answer within the channel's timeout.
    """
    try:
        answer, files, _, _ = socket.recv_fds(channel, MESSAGE_BYTES, 1)
    except ConnectionError as error:
        raise EOFError from error
    if answer[:1] == _FAILED:
        name, _, text = answer[1:].decode("utf-8", "replace").partition(":")
        kinds: list[type[StudyError]] = [StudyError, *StudyError.__subclasses__()]
        raise {kind.__name__: kind for kind in kinds}.get(name, DecodeError)(text)
    if answer[:1] != _OK or len(files) != 1:
        raise EOFError
    try:
        return _mapped(files[0])
    finally:
        os.close(files[0])


def limit(decoded_bytes: int) -> None:
    """Bound what this process can take, whatever a file makes of it."""
    room = _OWN_BYTES + 4 * decoded_bytes
    resource.setrlimit(resource.RLIMIT_AS, (room, room))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))  # a core file would hold patient data
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the supervisor's to handle


def _refuse(channel: socket.socket, kind: type[StudyError], reason: str) -> None:
    text = f"{kind.__name__}:{reason}".encode()
    socket.send_fds(channel, [_FAILED + text[: MESSAGE_BYTES - 1]], [])


def _share(made: object) -> int:
    """Write a value and its arrays to anonymous memory: sizes, pickle, then each buffer."""
    buffers: list[pickle.PickleBuffer] = []
    head = pickle.dumps(made, protocol=5, buffer_callback=buffers.append)
    parts = [memoryview(head), *(buffer.raw() for buffer in buffers)]
    sizes = _COUNT.pack(len(parts)) + b"".join(_COUNT.pack(part.nbytes) for part in parts)
    at = _aligned(len(sizes))
    offsets = []
    for part in parts:
        offsets.append(at)
        at = _aligned(at + part.nbytes)
    fd = os.memfd_create("prepared", os.MFD_CLOEXEC)
    try:
        os.ftruncate(fd, at)
        for offset, part in zip((0, *offsets), (memoryview(sizes), *parts), strict=True):
            while part:
                written = os.pwrite(fd, part, offset)
                part, offset = part[written:], offset + written
    except BaseException:
        os.close(fd)
        raise
    return fd


def _mapped(fd: int) -> tuple[object, int]:
    memory = mmap.mmap(fd, 0, flags=mmap.MAP_PRIVATE, prot=mmap.PROT_READ | mmap.PROT_WRITE)
    view = memoryview(memory)
    (count,) = _COUNT.unpack_from(view)
    at = _aligned(_COUNT.size * (count + 1))
    parts = []
    for index in range(count):
        (size,) = _COUNT.unpack_from(view, _COUNT.size * (index + 1))
        parts.append(view[at : at + size])
        at = _aligned(at + size)
    return pickle.loads(parts[0], buffers=parts[1:]), len(memory)


def _aligned(size: int) -> int:
    return -(-size // _ALIGNMENT) * _ALIGNMENT


def main() -> None:
    """Serve the socket whose descriptor is the first argument."""
    from dicom_xai.prepare import prepare

    channel = socket.socket(fileno=int(sys.argv[1]))
    decoded_bytes = int(sys.argv[2])
    limit(decoded_bytes)
    serve(channel, lambda instance, data: prepare(instance, data, limit_bytes=decoded_bytes))


if __name__ == "__main__":
    main()
