"""The processes of the ranks behind the first, as the leader sees them: started, commanded, and ended.

A rank's end is noticed by a thread that waits for all of them; a rank that is alive and does not answer is given up
after a while. Invariant: no follower outlives the leader. The kernel ends them with the thread that started them, which
lives as long as the group, and so with the leader's process however it ends.
"""

import contextlib
import json
import os
import select
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from multiprocessing.connection import Connection, Pipe
from pathlib import Path
from typing import Any

from ...errors import SessionError

BOOT = (
    "import signal; signal.signal(signal.SIGINT, signal.SIG_IGN)\n"
    "hasattr(signal, 'SIGHUP') and signal.signal(signal.SIGHUP, signal.SIG_IGN)\n"
    "import json, sys; given = json.loads(sys.argv[1]); sys.path[:] = given.pop('path')\n"
    "from arriero.loading import follow; follow(**given)"
)
"""The program of a follower. An interrupt from the terminal, and its end, are the leader's to answer."""

LOOK = 500
"""Milliseconds after which the thread looks whether a step takes too long."""

GRACE = 2.0
"""Seconds in which a follower ends by itself, once the leader is gone or wants it to."""


class Followers:
    """The processes of ranks 1 and up.

    Args:
        group: The group's folder.
        settings: What each follower is given: JSON-ready arguments of `arriero.loading.follow`.
        descriptors: File descriptors that each inherits.
        patience: Seconds that a follower may take to answer.
        on_end: Called from another thread with the rank of a follower that ended while it was needed.
        on_silence: Called from there once `deadline` has passed.
    """

    def __init__(
        self,
        group: Path,
        settings: Sequence[dict[str, Any]],
        descriptors: Sequence[int],
        patience: float,
        on_end: Callable[[int], None],
        on_silence: Callable[[], None] = lambda: None,
        boot: str = BOOT,
    ) -> None:
        self.group, self.patience, self.boot = group, patience, boot
        self.on_end, self.on_silence = on_end, on_silence
        self.deadline: float | None = None
        self.processes: list[subprocess.Popen[bytes]] = []
        self.channels: list[Connection] = []
        self.is_closing = False
        self.wake, waker = os.pipe()
        self.waker = waker
        self.lock = threading.Lock()
        started = threading.Event()
        failures: list[OSError] = []
        self.thread = threading.Thread(
            target=self._start_and_watch,
            args=(settings, tuple(descriptors), started, failures),
            name="arriero-ranks",
            daemon=True,
        )
        self.thread.start()
        started.wait()
        if failures:
            self.close()
            raise SessionError(f"{group}: a rank cannot be started ({failures[0].strerror}): free some memory")

    def _start_and_watch(
        self,
        settings: Sequence[dict[str, Any]],
        descriptors: tuple[int, ...],
        started: threading.Event,
        failures: list[OSError],
    ) -> None:
        """Starts the processes, and waits for the first that ends."""
        try:
            for given in settings:
                ours, theirs = Pipe()
                _limit_sending(ours, self.patience)
                arguments = json.dumps({**given, "channel": theirs.fileno(), "parent": os.getpid(), "path": sys.path})
                self.processes.append(
                    subprocess.Popen(
                        [sys.executable, "-c", self.boot, arguments],
                        stdin=subprocess.DEVNULL,
                        stdout=subprocess.DEVNULL,
                        pass_fds=(theirs.fileno(), *descriptors),
                    )
                )
                theirs.close()
                self.channels.append(ours)
        except OSError as error:
            failures.append(error)
            return
        finally:
            started.set()
        self._watch()

    def _watch(self) -> None:
        watched = select.poll()
        watched.register(self.wake, select.POLLIN | select.POLLHUP)
        handles: dict[int, int] = {}
        for rank, process in enumerate(self.processes, start=1):
            handle = os.pidfd_open(process.pid)
            handles[handle] = rank
            watched.register(handle, select.POLLIN)
        try:
            while not self.is_closing:
                if (deadline := self.deadline) is not None and time.monotonic() > deadline:
                    self.deadline = None
                    self.on_silence()
                for handle, _ in watched.poll(LOOK):
                    if handle in handles and not self.is_closing:
                        self.processes[handles[handle] - 1].poll()  # reaped
                        self.on_end(handles[handle])
                        watched.unregister(handle)
        finally:
            for handle in handles:
                os.close(handle)
            os.close(self.wake)

    def send(self, commands: Sequence[tuple[Any, ...]] | tuple[Any, ...]) -> None:
        """Sends one command to all, or a list of one for each.

        Raises:
            LostRankError: One has ended, or does not take it.
        """
        for index, channel in enumerate(self.channels):
            command = commands if isinstance(commands, tuple) else commands[index]
            try:
                channel.send(command)
            except BlockingIOError as error:
                raise LostRankError(index + 1, "does not answer") from error
            except (OSError, ValueError) as error:
                raise self.lost(index + 1) from error

    def receive(self, *, patience: float | None = None) -> list[Any]:
        """Each follower's answer.

        Args:
            patience: Seconds to wait for each; None is as long as it lives.

        Raises:
            LostRankError: One has ended, has failed, or does not answer.
        """
        found = []
        for index, channel in enumerate(self.channels):
            try:
                if not channel.poll(patience):
                    raise LostRankError(index + 1, "does not answer")
                kind, value = channel.recv()
            except (EOFError, OSError) as error:
                raise self.lost(index + 1) from error
            if kind == "failed":
                raise LostRankError(index + 1, f"has failed: {value}")
            found.append(value)
        return found

    def last_words(self) -> tuple[int, str] | None:
        """The failure that a follower has reported, and its rank, if one has."""
        for rank in range(1, len(self.channels) + 1):
            if (words := self.words_of(rank, 0)) is not None:
                return rank, words
        return None

    def words_of(self, rank: int, seconds: float = GRACE) -> str | None:
        """The failure that a follower reports within some time; None where it says nothing."""
        channel = self.channels[rank - 1]
        with contextlib.suppress(EOFError, OSError):
            while channel.poll(seconds):
                kind, value = channel.recv()
                if kind == "failed":
                    return str(value)
        return None

    def lost(self, rank: int) -> "LostRankError":
        """The error of a follower that has ended."""
        process = self.processes[rank - 1]
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(GRACE)
        return LostRankError(rank, self.how_ended(rank))

    def how_ended(self, rank: int) -> str:
        """The words for a follower's end."""
        code = self.processes[rank - 1].poll()
        if code is None:
            return "has left the group"
        if code < 0:
            with contextlib.suppress(ValueError):
                return f"was ended by {signal.Signals(-code).name}"
        return f"has ended with code {code}"

    def close(self) -> None:
        """Ends all followers; those that do not by themselves are killed."""
        with self.lock:
            if self.is_closing:
                return
            self.is_closing = True
        os.close(self.waker)
        for channel in self.channels:
            channel.close()
        for process in self.processes:
            try:
                process.wait(GRACE)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()

    def kill(self) -> None:
        """Ends all followers at once."""
        for process in self.processes:
            process.kill()
        self.close()


class LostRankError(Exception):
    """A rank is not there any more, or does not do its part."""

    def __init__(self, rank: int, why: str) -> None:
        super().__init__(f"rank {rank} {why}")
        self.rank = rank


def _limit_sending(channel: Connection, seconds: float) -> None:
    """Lets a message that nobody takes fail after a time."""
    with socket.socket(fileno=os.dup(channel.fileno())) as end:
        end.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, struct.pack("ll", int(seconds), int(seconds % 1 * 1e6)))
