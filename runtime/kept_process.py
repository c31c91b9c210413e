"""A process that is kept for what may have to be stopped: programs of others, and what they may crash.

Enters: requests, of plain data. Leaves: answers, a kind and a text each, so that nothing in one need be trusted; or why
there is none. Invariant: a request that takes too long, or ends the process, costs that process alone; the next gets
another.

This file is also the program that runs there. It is started with the module paths of the one that asks, loads one
module by its path, nothing else of the package, and has that module's `answer` answer until its input ends.
"""

import atexit
import functools
import json
import marshal
import os
import subprocess
import sys
import threading
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import IO, Any

READY, OVERRUN, ENDED = b"r", b"o", b"e"
"""Kinds of answers, beside those of the module: at the start; too long; the process has ended, with its exit code."""

START_SECONDS = 30.0
"""Time that a process has to start."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Program:
    """A program for the process.

    Attributes:
        module: Path of the module that answers.
        memory: Bytes of address space that the process may have; Linux alone keeps to it.
        seconds: Processor time that an answer may take, of which it dies with `SIGPROF`; 0 is without end.
        stack: Bytes of the stack that it answers on; 0 is the system's.
    """

    module: str
    memory: int
    seconds: float = 0.0
    stack: int = 0


class KeptProcess:
    """A process that answers, started when it is needed and again after it has ended.

    Args:
        program: The program.
    """

    def __init__(self, program: Program) -> None:
        self.program, self.lock = program, threading.Lock()
        self.process: subprocess.Popen[bytes] | None = None
        self.is_ready = self.is_impossible = False

    def start(self) -> None:
        """Starts the process, and does not wait for it."""
        with self.lock:
            self._start()

    def wait_for_start(self) -> None:
        """Starts the process where none is there, and waits until it answers."""
        with self.lock:
            self._is_there()

    def ask(self, request: tuple[Any, ...], seconds: float) -> tuple[bytes, str] | None:
        """Sends a request, and waits some time for its answer.

        Returns:
            A kind and a text; None where no process can be started.
        """
        data = marshal.dumps(request)
        with self.lock:
            for _ in range(2):  # one that somebody else killed meanwhile gets a successor
                if not self._is_there():
                    return None
                found = self._exchange(data, seconds)
                if found[0] != ENDED or found[1] not in ("-9", "-15"):
                    return found
        return found

    def _start(self) -> None:
        if self.is_impossible or (self.process is not None and self.process.poll() is None):
            return
        self.close()
        if not sys.executable or getattr(sys, "frozen", False):
            self.is_impossible = True
            return
        told = json.dumps(asdict(self.program) | {"path": [str(each) for each in sys.path]})
        command = [sys.executable, "-I", "-S", os.path.abspath(__file__), told]
        extra: dict[str, Any] = {"start_new_session": True}  # Ctrl-C is the person's at the terminal, not the process's
        if sys.platform == "win32":
            extra = {"creationflags": subprocess.CREATE_NEW_PROCESS_GROUP | subprocess.CREATE_NO_WINDOW}
        pipe = subprocess.PIPE
        try:
            self.process = subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=subprocess.DEVNULL, **extra)
        except OSError:
            self.is_impossible = True

    def _is_there(self) -> bool:
        """Whether the process runs and answers; it is started where it does not."""
        self._start()
        if self.process is not None and not self.is_ready:
            self.is_ready = self._exchange(None, START_SECONDS) == (READY, "")
            self.is_impossible = not self.is_ready
            if self.is_impossible:
                self.close()
        return self.is_ready

    def _exchange(self, data: bytes | None, seconds: float) -> tuple[bytes, str]:
        """Sends data and reads the answer. A process that takes too long is killed."""
        process = self.process
        assert process is not None
        assert process.stdin is not None
        assert process.stdout is not None
        overrun = threading.Event()

        def stop() -> None:
            overrun.set()
            process.kill()

        timer = threading.Timer(seconds, stop)
        timer.daemon = True
        timer.start()
        try:
            if data is not None:
                write_block(process.stdin, data)
            block = read_block(process.stdout)
        except (OSError, EOFError):
            self.close()
            return (OVERRUN, "") if overrun.is_set() else (ENDED, str(process.returncode))
        except BaseException:  # an interrupt: the answer would be taken for the next one's
            self.close()
            raise
        finally:
            timer.cancel()
        return block[:1], block[1:].decode("utf-8", "surrogatepass")

    def close(self) -> None:
        """Ends the process."""
        process, self.process, self.is_ready = self.process, None, False
        if process is not None:
            for stream in (process.stdin, process.stdout):
                try:
                    if stream is not None:
                        stream.close()
                except OSError:  # what was not written yet
                    pass
            _end(process)


def process_for(program: Program) -> KeptProcess:
    """The process of a program, which ends with this one; after a fork the parent's is not the child's."""
    return _process_for(os.getpid(), program)


@functools.cache
def _process_for(pid: int, program: Program) -> KeptProcess:
    kept = KeptProcess(program)
    atexit.register(kept.close)
    return kept


def _end(process: "subprocess.Popen[bytes]") -> None:
    """Ends a process, which keeps the exit code that it ended with by itself."""
    try:
        process.wait(0.05)  # an input that has ended ends it; one that crashed is gone
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


def write_block(stream: IO[bytes], data: bytes) -> None:
    """Writes data behind its length."""
    stream.write(len(data).to_bytes(8, "little"))
    stream.write(data)
    stream.flush()


def read_block(stream: IO[bytes]) -> bytes:
    """Reads what `write_block` wrote.

    Raises:
        EOFError: The stream has ended.
    """
    length = int.from_bytes(_read(stream, 8), "little")
    return _read(stream, length)


def _read(stream: IO[bytes], size: int) -> bytes:
    data = stream.read(size)
    if len(data) < size:
        raise EOFError
    return data


def main() -> None:
    """Answers requests."""
    import signal

    signal.signal(signal.SIGINT, signal.SIG_IGN)
    source, target = os.fdopen(os.dup(0), "rb"), os.fdopen(os.dup(1), "wb")
    nowhere = os.open(os.devnull, os.O_RDWR)
    os.dup2(nowhere, 0)
    os.dup2(nowhere, 1)
    told = json.loads(sys.argv[1])
    here = os.path.dirname(os.path.abspath(__file__))
    sys.path[:] = [each for each in told.pop("path") if os.path.abspath(each or ".") != here]
    program = Program(**told)
    serve = functools.partial(_serve, _answer_of(program.module), program, source, target)
    if not program.stack:
        serve()
        return
    threading.stack_size(program.stack)
    thread = threading.Thread(target=serve)
    thread.start()
    thread.join()


def _answer_of(path: str) -> Callable[[tuple[Any, ...]], tuple[bytes, str]]:
    import importlib.util

    spec = importlib.util.spec_from_file_location("arriero_kept_module", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    answer: Callable[[tuple[Any, ...]], tuple[bytes, str]] = module.answer
    return answer


def _serve(
    answer: Callable[[tuple[Any, ...]], tuple[bytes, str]], program: Program, source: IO[bytes], target: IO[bytes]
) -> None:
    _bound_memory(program.memory)
    write_block(target, READY)
    while True:
        try:
            request = marshal.loads(read_block(source))
        except EOFError:
            return
        _bound_time(program.seconds)
        kind, text = answer(request)
        _bound_time(0)
        write_block(target, kind + text.encode("utf-8", "surrogatepass"))


def _bound_memory(most: int) -> None:
    if sys.platform == "linux":
        import resource

        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        _, hard = resource.getrlimit(resource.RLIMIT_AS)
        most = most if hard == resource.RLIM_INFINITY else min(most, hard)
        resource.setrlimit(resource.RLIMIT_AS, (most, hard))


def _bound_time(seconds: float) -> None:
    """Has the process end when it has computed for so long; 0 takes that back."""
    if sys.platform != "win32":
        import signal

        signal.setitimer(signal.ITIMER_PROF, seconds)


if __name__ == "__main__":
    main()
