"""A follower's work: it does what the leader says, in order, until the leader is gone.

Enters: the leader's commands. Leaves: its part of the group's sums, and answers where they are asked for. A follower
that cannot do a command tells the leader why and ends.
"""

import contextlib
import ctypes
import os
import signal
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import Any

from ...errors import ArrieroError, shortened_text
from ..backends.interface import Binding, DecoderBackend
from .meeting import Meeting
from .segment import FAILED

PR_SET_PDEATHSIG = 1


def bind_to_leader(parent: int) -> None:
    """Ends this process with the leader's, however that ends."""
    ctypes.CDLL(None, use_errno=True).prctl(PR_SET_PDEATHSIG, int(signal.SIGKILL), 0, 0, 0)
    if os.getppid() != parent:  # it ended before
        os._exit(1)


def follow_leader(channel: Connection, open_decoder: Callable[[], DecoderBackend], meeting: Meeting) -> None:
    """Opens this rank's decoder and follows.

    Args:
        channel: The leader's end of it sends commands.
        open_decoder: Opens the decoder.
        meeting: This rank's part in the group.
    """
    try:
        decoder = open_decoder()
        channel.send(("ready", None))
        _follow(channel, decoder, meeting)
    except EOFError:
        return  # the leader is gone
    except BaseException as error:
        meeting.segment.end(FAILED, meeting.rank)
        said = str(error) if isinstance(error, ArrieroError) else f"{type(error).__name__}: {error}"
        with contextlib.suppress(OSError):
            channel.send(("failed", shortened_text(said)))
        os._exit(1)


def _follow(channel: Connection, decoder: DecoderBackend, meeting: Meeting) -> None:
    caches: dict[int, Any] = {}
    bindings: dict[int, dict[tuple[int, int], Binding]] = {}
    while True:
        match channel.recv():
            case ("step" | "decode") as name, number, rows, *inputs:
                bound = bindings[number]
                if rows not in bound:
                    bound[rows] = decoder.bind(caches[number], slice(*rows))
                meeting.arrive()
                getattr(bound[rows], name)(*inputs)
            case ("check",):
                decoder.check_files()
            case "caches", number, batch, positions, sparse:
                caches[number], bindings[number] = decoder.caches(batch, positions, sparse=sparse), {}
            case "drop", number:
                del caches[number], bindings[number]
            case "copy", number, *rows:
                caches[number].copy(*rows)
            case "release", number, row:
                caches[number].release(row)
            case "read", number, *place:
                channel.send(("slots", caches[number].read(*place)))
            case "write", number, *content:
                caches[number].write(*content)
            case command:
                raise AssertionError(f"unknown command {command!r}")
