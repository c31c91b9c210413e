"""A server in a process of its own, for the scripts that load it."""

import json
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any, Self


class ServerProcess:
    """`arriero serve` on a free port, until the block ends.

    Args:
        folder: Model or bundle folder.
        *options: More of its options.
    """

    def __init__(self, folder: Path, *options: str) -> None:
        command = [sys.executable, "-m", "arriero", "serve", str(folder), "--port", "0", "--json", *options]
        self.process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        self.log: list[dict[str, Any]] = []
        self.reader = threading.Thread(target=self._read, daemon=True)
        self.reader.start()
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            raise RuntimeError(f"the server did not start: {self.log}")
        self.about: dict[str, Any] = json.loads(line)
        self.url, self.model = self.about["address"], self.about["model"]

    def _read(self) -> None:
        assert self.process.stderr is not None
        for line in self.process.stderr:
            entry = json.loads(line) if line.startswith("{") else {"event": "text", "text": line}
            if entry["event"] != "request":
                self.log.append(entry)

    def cpu_seconds(self) -> float:
        """Processor time that its first thread has taken, which speaks with the clients."""
        task = Path(f"/proc/{self.process.pid}/task/{self.process.pid}")
        return int((task / "schedstat").read_text().split()[0]) / 1e9  # `stat` counts in hundredths of a second

    def resident(self) -> int:
        """Bytes of its resident set."""
        return int(Path(f"/proc/{self.process.pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")

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
