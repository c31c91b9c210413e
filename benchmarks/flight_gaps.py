"""The longest time that decoding sequences wait while a long prompt joins their flight, by the budget of a step.

Two sequences of the tiny Llama 4 decode; a prompt of thousands of tokens joins. Told for each budget: the median and
the longest time between two tokens of a sequence before and while the prompt is read, and the seconds until the
prompt's first token. The last budget reads the prompt at once, as without one.

    python benchmarks/flight_gaps.py [FOLDER] [--prompt 3500] [--threads 2] [--runs 3]
"""

import argparse
import tempfile
import time
from pathlib import Path
from statistics import median
from typing import Any

from rich.console import Console
from rich.table import Table

import arriero
from arriero.export import export_checkpoint
from arriero.runtime import Flight, Session

TINY = Path(__file__).parent.parent / "examples" / "tiny-llama4"
FREE: dict[str, Any] = {"temperature": 0, "eos_token_id": []}
BUDGETS = (16, 32, 64, 128, 256, 1 << 30)
UNDISTURBED = 40


def gaps(session: Session, prompt: list[int], budget: int) -> tuple[list[float], list[float], float]:
    """Seconds of the steps before the prompt joins, of those while it is read, and to its first token."""
    flight = Flight(session, slots=3, positions=len(prompt) + 500, prefill_budget=budget)
    for text in ("The list type", "Return the"):
        flight.join(session.request(text, 400, **FREE))
    flight.step()
    alone = [seconds_of(flight)[0] for _ in range(UNDISTURBED)]
    number, beside = flight.join(session.request(prompt, 2, **FREE)), []
    while True:
        seconds, numbers = seconds_of(flight)
        beside.append(seconds)
        if number in numbers:
            return alone, beside, sum(beside)


def seconds_of(flight: Flight) -> tuple[float, list[int]]:
    """Seconds of a step, and the requests that got a piece."""
    started = time.perf_counter()
    pieces = flight.step()
    return time.perf_counter() - started, [number for number, _ in pieces]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, nargs="?", help="model or bundle; the tiny Llama 4 where none is given")
    parser.add_argument("--prompt", type=int, default=3500)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--runs", type=int, default=3)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        folder = options.folder or export_checkpoint(TINY, Path(scratch) / "model")
        session = arriero.load(folder, max_seq=options.prompt + 500, threads=options.threads)
        prompt = [9 + index % 500 for index in range(options.prompt)]
        taken: dict[int, list[tuple[list[float], list[float], float]]] = {budget: [] for budget in BUDGETS}
        for _ in range(options.runs):
            for budget in BUDGETS:
                taken[budget].append(gaps(session, prompt, budget))
    table = Table("budget", "step alone, ms", "step beside, ms", "longest, ms", "times a step", "first token, s")
    for budget, runs in taken.items():
        alone = median(second for run in runs for second in run[0])
        beside = median(second for run in runs for second in run[1])
        longest, first = median(max(run[1]) for run in runs), median(run[2] for run in runs)
        name = "all" if budget == BUDGETS[-1] else str(budget)
        row = (1000 * alone, 1000 * beside, 1000 * longest, longest / alone, first)
        table.add_row(name, *(f"{value:.1f}" for value in row))
    Console().print(table)


if __name__ == "__main__":
    main()
