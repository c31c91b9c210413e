"""Cases of damaged files in processes, a batch each; one that dies or hangs is named, and the rest go on."""

import os
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from pathlib import Path

SCRIPT = Path(__file__).with_name("hostile_files.py")
BUSY, SILENCE = 20.0, 900.0
"""Seconds of a processor, and seconds by the clock, without a word from a process until it is taken to hang; a busy
machine may give it none of its time for long."""


def run_cases(base: Path, seed: int, first: int, last: int) -> tuple[Counter[tuple[str, str]], list[str]]:
    """Runs cases in one process, and in another one after each that ends it.

    Returns:
        How many cases of each kind came out how, and the troubles in words.
    """
    counts: Counter[tuple[str, str]] = Counter()
    troubles: list[str] = []
    while first < last:
        with tempfile.TemporaryDirectory() as scratch:
            command = [sys.executable, str(SCRIPT), str(base), scratch, str(seed), str(first), str(last)]
            process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
            begun, errors = first, list[str]()
            assert process.stdout is not None
            assert process.stderr is not None
            reader = threading.Thread(target=_collect, args=(process.stderr, errors), daemon=True)
            reader.start()
            watch = Watch(process)
            for line in process.stdout:
                watch.heard()
                word, _, rest = line.rstrip("\n").partition(" ")
                if word == "begin":
                    begun = int(rest)
                    continue
                number, _, said = rest.partition(" ")
                name, _, found = said.partition("\t")
                counts[name, found.partition(":")[0]] += 1
                first = int(number) + 1
                if found.startswith("trouble"):
                    troubles.append(f"seed {seed}, case {number}, {name}: {found}")
            watch.ended.set()
            code = process.wait()
            reader.join()
        if first < last:
            said = "".join(errors)[-300:]
            troubles.append(f"seed {seed}, case {begun}: the process ended with {code} ({said!r})")
            first = begun + 1
    return counts, troubles


def _collect(stream: object, lines: list[str]) -> None:
    for line in stream:  # type: ignore[attr-defined]
        lines.append(line)
        del lines[:-50]


class Watch:
    """Kills a process that says nothing for long, by its own processor's time or by the clock."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self.process, self.ended = process, threading.Event()
        self.heard()
        threading.Thread(target=self._run, daemon=True).start()

    def heard(self) -> None:
        """Begins to wait anew."""
        self.since = time.monotonic(), self._busy()

    def _run(self) -> None:
        while not self.ended.wait(1):
            clock, busy = self.since
            if self._busy() - busy > BUSY or time.monotonic() - clock > SILENCE:
                self.process.kill()
                return

    def _busy(self) -> float:
        """Seconds of a processor that the process has had; 0 where nobody knows."""
        try:
            fields = Path(f"/proc/{self.process.pid}/stat").read_text().rpartition(")")[2].split()
        except OSError:
            return 0.0
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")
