"""Cases of damaged files in processes, a batch each; one that dies or hangs is named, and the rest go on."""

import subprocess
import sys
import tempfile
import threading
from collections import Counter
from pathlib import Path

SCRIPT = Path(__file__).with_name("hostile_files.py")
SILENCE = 90.0
"""Seconds without a word from a process until it is taken to hang; busy machines are slow, so a case's own time is
measured in the processor's."""


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
            timer = _restarted(None, process)
            for line in process.stdout:
                timer = _restarted(timer, process)
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
            timer.cancel()
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


def _restarted(timer: threading.Timer | None, process: subprocess.Popen[str]) -> threading.Timer:
    if timer is not None:
        timer.cancel()
    timer = threading.Timer(SILENCE, process.kill)
    timer.daemon = True
    timer.start()
    return timer
