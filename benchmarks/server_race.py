"""`arriero serve` beside llama.cpp's `llama-server`: the same 1.4 billion weights, at 4 and at 8 bits, in one run.

Both servers stand on this machine, and one after the other gets the load of `arriero bench --url`: short prompts and
many new tokens (tokens a second), prompts of 512 tokens, and prompts of 64 tokens behind a beginning of 2,048 that all
share (time to the first token). Rounds of both alternate; medians of the rounds are given, and ours over theirs.

llama-server has its defaults, but for as many slots as there are clients at most, each of `--max-seq` tokens, and the
same number of threads. It is built from the source distribution of `llama-cpp-python`, for this processor:

    pip install gguf
    pip download --no-deps --no-binary :all: llama-cpp-python==0.3.36 && tar xf llama_cpp_python-0.3.36.tar.gz
    cmake -S llama_cpp_python-0.3.36/vendor/llama.cpp -B llama -DCMAKE_BUILD_TYPE=Release -DGGML_NATIVE=ON
    cmake --build llama -j --target llama-server llama-quantize

GCC 12 leaves out what sets up AMX's tiles, and the server ends with an illegal instruction on a processor that has
them: there, use another compiler, or put `asm volatile("" : : "r"(&tc) : "memory");` in front of `_tile_loadconfig` in
`ggml/src/ggml-cpu/amx/mmq.cpp`.

    python benchmarks/server_race.py llama/bin --folder DIR [--bits 4,8] [--clients 1,8,32] [--threads 2] [--rounds 1]

Loads of long prompts take llama-server minutes a case at 32 clients: `--long-clients 1,8` gives them numbers of their
own, `--loads short` leaves them out. `--folder` keeps what was made, and may be that of `cpu_peers.py`.
"""

import argparse
import json
import os
import socket
import statistics
import subprocess
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from support.dense import peer
from support.server import ServerProcess
from support.workshop import Entry, Workshop, numbers, say

from arriero.files.circumstances import circumstances, machine_text
from arriero.measuring.endpoint import Endpoint
from arriero.measuring.load import measure_url

FORMS = {4: ("int4", "q4_0"), 8: ("int8", "q8_0")}
"""Forms of ours and of llama.cpp's by their bits."""

LOADS: dict[str, dict[str, Any]] = {
    "short": {"prefill": [16], "decode_tokens": 128},
    "512": {"prefill": [512], "decode_tokens": 16},
    "2,048 shared": {"prefill": [64], "decode_tokens": 16, "shared": 2048},
}
"""Loads by their prompts."""

PATIENCE = 300
"""Seconds that llama-server has to load its model."""


@contextmanager
def llama_server(program: Path, file: Path, slots: int, max_seq: int, threads: int) -> Iterator[str]:
    """llama-server on a free port, until the block ends. Gives its address."""
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
    command: list[Any] = [program, "-m", file, "--port", port, "-np", slots, "-c", slots * max_seq]
    command += ["-t", threads, "-tb", threads]
    url = f"http://127.0.0.1:{port}"
    process = subprocess.Popen([*map(str, command)], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        until = time.monotonic() + PATIENCE
        while not is_ready(url):
            if process.poll() is not None or time.monotonic() > until:
                raise SystemExit(f"{program} does not serve {file}: run {' '.join(map(str, command))}")
            time.sleep(0.1)
        yield url
    finally:
        process.terminate()
        process.wait()


def is_ready(url: str) -> bool:
    """Whether a server takes requests."""
    try:
        with urllib.request.urlopen(f"{url}/health", timeout=10) as answer:
            return bool(answer.status == 200)
    except OSError:
        return False


def race(bits: int, workshop: Workshop, asked: argparse.Namespace) -> list[dict[str, Any]]:
    """Loads both servers in turns. Returns a record of each load, number of clients, and server."""
    own, other = FORMS[bits]
    slots = max(asked.clients)
    bundle = workshop.make(Entry(engine="arriero", form=own, bits=bits))
    file = workshop.make(Entry(engine="llama", form=other, bits=bits))
    options = ("--slots", str(slots), "--max-seq", str(asked.max_seq), "--threads", str(asked.threads), "--quiet")
    found: dict[tuple[str, int, str], list[dict[str, Any]]] = {}
    with (
        llama_server(asked.llama / "llama-server", file, slots, asked.max_seq, asked.threads) as url,
        ServerProcess(bundle, *options) as server,
    ):
        servers = {"arriero": Endpoint(server.url), "llama-server": Endpoint(url)}
        for number in range(asked.rounds):
            for load in asked.loads:
                clients = asked.clients if load == "short" else asked.long_clients or asked.clients
                for name, endpoint in servers.items():
                    say(f"{bits} bits, round {number + 1}, {load}: {name}")
                    for case in measure_url(endpoint, **LOADS[load], clients=clients, runs=1)["cases"]:
                        found.setdefault((load, case["batch"], name), []).append(case)
        assert server.end() == 0
    return [
        {"bits": bits, "load": load, "clients": clients, "server": name, "rounds": rounds, **middle(rounds)}
        for (load, clients, name), rounds in found.items()
    ]


def middle(rounds: list[dict[str, Any]]) -> dict[str, Any]:
    """Medians of the rounds, and what failed."""
    return {
        "tokens_per_second": statistics.median(each["tokens_per_second"] for each in rounds),
        "ttft_p95": statistics.median(each["ttft_seconds"]["p95"] for each in rounds),
        "failed": sum(each["failed"] for each in rounds),
        "first_error": next((each["first_error"] for each in rounds if each["failed"]), None),
    }


def show(records: list[dict[str, Any]], threads: int) -> None:
    """Prints a row a load and number of clients: both servers, and the ratios, above 1 where ours is ahead."""
    title = f"{machine_text(circumstances()['machine'])}, {threads} threads"
    table = Table(
        "bits", "prompts", "clients", "tokens/s", "llama-server", "×", "TTFT p95, ms", "llama-server", "×", "failed",
        title=title,
    )  # fmt: skip
    for own in records:
        if own["server"] != "arriero":
            continue
        key = own["bits"], own["load"], own["clients"]
        (other,) = (
            each for each in records if (each["bits"], each["load"], each["clients"]) == key and each is not own
        )
        table.add_row(
            f"{own['bits']}",
            own["load"],
            f"{own['clients']}",
            f"{own['tokens_per_second']:.0f}",
            f"{other['tokens_per_second']:.0f}",
            f"{own['tokens_per_second'] / other['tokens_per_second']:.2f}",
            f"{own['ttft_p95'] * 1e3:.0f}",
            f"{other['ttft_p95'] * 1e3:.0f}",
            f"{other['ttft_p95'] / own['ttft_p95']:.2f}",
            f"{own['failed']}, {other['failed']}",
        )
    console = Console(width=130)
    console.print(table)
    for each in records:
        if each["failed"]:
            console.print(f"{each['server']}, {each['load']}, {each['clients']} clients: {each['first_error']}")


def main() -> None:
    parser = argparse.ArgumentParser(description="arriero serve beside llama-server.")
    parser.add_argument("llama", type=Path, help="Folder of llama-server and llama-quantize.")
    parser.add_argument("--bits", type=numbers, default=[4, 8])
    parser.add_argument("--clients", type=numbers, default=[1, 8, 32])
    parser.add_argument("--long-clients", type=numbers, help="Clients of the loads of long prompts.")
    parser.add_argument("--loads", nargs="+", default=list(LOADS), choices=list(LOADS))
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--max-seq", type=int, default=4096)
    parser.add_argument("--folder", type=Path, help="Where to keep what is made.")
    parser.add_argument("--json", type=Path)
    asked = parser.parse_args()
    config = peer("scout")
    if asked.folder:
        asked.folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=asked.folder) as temporary:
        of_shape = f"scout-{config['num_hidden_layers']}-{config['num_local_experts']}"
        place = (asked.folder or Path(temporary)) / of_shape
        workshop = Workshop(place, Path(temporary), config, 32, asked.llama / "llama-quantize")
        os.environ["OMP_NUM_THREADS"] = str(asked.threads)
        records = [each for bits in asked.bits for each in race(bits, workshop, asked)]
    show(records, asked.threads)
    if asked.json:
        asked.json.write_text(json.dumps({**circumstances(), "records": records}, indent=1) + "\n")


if __name__ == "__main__":
    main()
