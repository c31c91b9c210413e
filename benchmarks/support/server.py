"""Processes with their logs, for the scripts that load a server: the server itself, and whoever stands before it."""

import json
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any, Self


class LoggedProcess:
    """A process, killed where the block ends before it does.

    Args:
        *command: Its command.
        with_requests: Whether the lines of its log about requests are kept, of which a long load makes many.

    Attributes:
        log: Lines of its standard error: the JSON ones, and others as events called `text`.
    """

    def __init__(self, *command: str, with_requests: bool = False) -> None:
        self.process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        self.log: list[dict[str, Any]] = []
        self.with_requests = with_requests
        self.reader = threading.Thread(target=self._read, daemon=True)
        self.reader.start()

    def _read(self) -> None:
        assert self.process.stderr is not None
        for line in self.process.stderr:
            entry = json.loads(line) if line.startswith("{") else {"event": "text", "text": line}
            if self.with_requests or entry["event"] != "request":
                self.log.append(entry)

    def first_line(self) -> dict[str, Any]:
        """The JSON that it prints once it is ready.

        Raises:
            RuntimeError: It ended instead.
        """
        assert self.process.stdout is not None
        if not (line := self.process.stdout.readline()):
            self.reader.join(5)
            raise RuntimeError(f"the process did not start: {self.log}")
        about: dict[str, Any] = json.loads(line)
        return about

    def cpu_seconds(self) -> float:
        """Processor time that its first thread has taken, which speaks with the clients."""
        task = Path(f"/proc/{self.process.pid}/task/{self.process.pid}")
        return int((task / "schedstat").read_text().split()[0]) / 1e9  # `stat` counts in hundredths of a second

    def end(self, seconds: float = 60) -> int:
        """Sends SIGTERM. Returns the exit code."""
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
        code = self.process.wait(seconds)
        self.reader.join(seconds)
        return code

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        if self.process.poll() is None:
            self.process.kill()
            self.process.wait()


class ServerProcess(LoggedProcess):
    """`arriero serve` on a free port, until the block ends.

    Args:
        folder: Model or bundle folder.
        *options: More of its options.
        with_requests: Whether its lines about requests are kept.
    """

    def __init__(self, folder: Path, *options: str, with_requests: bool = False) -> None:
        port = () if "--dynamo" in options else ("--port", "0")
        command = [sys.executable, "-m", "arriero", "serve", str(folder), *port, "--json", *options]
        super().__init__(*command, with_requests=with_requests)
        try:
            self.about = self.first_line()
        except RuntimeError:
            self.__exit__()
            raise
        self.url, self.model = self.about.get("address", ""), self.about["model"]

    def requests(self) -> list[dict[str, Any]]:
        """Requests that it has answered, or been left with."""
        return [line for line in self.log if line["event"] == "request"]

    def resident(self) -> int:
        """Bytes of its resident set."""
        return int(Path(f"/proc/{self.process.pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


class BareServer(LoggedProcess):
    """`bare_server.py`, until the block ends.

    Args:
        folder: Model or bundle folder.
        *options: Its options.
    """

    def __init__(self, folder: Path, *options: str) -> None:
        super().__init__(sys.executable, str(Path(__file__).with_name("bare_server.py")), str(folder), *options)
        self.url = self.first_line()["address"]
