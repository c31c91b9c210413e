"""Llama 4 on a CPU: Arriero beside llama.cpp and `transformers`, the same random weights in all of them.

Makes a checkpoint of 1.4 billion parameters in Scout's or Maverick's shape, and of it a bundle for each recipe (plain
rounding, head included), a GGUF for each of llama.cpp's types (all matrices alike, written by llama.cpp's own
quantiser), and logits of one prompt by `transformers` in float32, from which each contender's divergence is taken.
Then contenders take turns, each run in a process of its own, pinned to as many processors as it has threads; in front
of each the memory's speed is read. Medians of the rounds are given.

    pip install gguf && CMAKE_ARGS=-DGGML_NATIVE=ON pip install llama-cpp-python==0.3.36   # compiles for some minutes
    python benchmarks/cpu_peers.py [--shape scout] [--bits 4,8] [--threads 1] [--folder DIR] [--json FILE]

`--folder` keeps what was made, for the next run; bundles are built anew every time. `--cases decode` is the quickest.
"""

import argparse
import json
import math
import os
import statistics
import sys
import tempfile
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from rich.console import Console
from rich.table import Table
from support.dense import peer
from support.workshop import ENTRIES, Entry, Workshop, numbers, run_child, say, stream_speed, task_of

from arriero.export.checkpoint import expected_tensors
from arriero.export.config import model_spec
from arriero.measuring.timing import Stream
from arriero.spec.geometry import ModelSpec

CASES = ("first", "prefill", "decode", "batch")


def divergence(reference_SV: NDArray[np.float32], logits_SV: NDArray[np.float32]) -> dict[str, float]:
    """How far logits are from the reference's: KL in nats a token, and where both find the same token likeliest."""
    log_p, log_q = (log_softmax(logits.astype(np.float64)) for logits in (reference_SV, logits_SV))
    same = reference_SV.argmax(-1) == logits_SV.argmax(-1)
    return {
        "kl": float((np.exp(log_p) * (log_p - log_q)).sum(-1).mean()),
        "top1": float(same.mean()),
        "max_abs": float(np.abs(reference_SV - logits_SV).max()),
    }


def log_softmax(x_SV: NDArray[np.float64]) -> NDArray[np.float64]:
    shifted = x_SV - x_SV.max(-1, keepdims=True)
    log: NDArray[np.float64] = shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))
    return log


def race(entries: list[Entry], workshop: Workshop, threads: int, arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """Runs all contenders in turns. Returns a record of each."""
    changes = {
        "threads": threads,
        "context": arguments.context,
        "steps": arguments.steps,
        "runs": arguments.runs if set(arguments.cases) & {"prefill", "decode", "batch"} else 0,
        "batch": arguments.batch if "batch" in arguments.cases else 1,
        "cpu_time": arguments.cpu_time,
    }
    made = {entry: workshop.make(entry) for entry in entries}
    reference = workshop.reference()
    records = {}
    for entry in entries:
        base = task_of(entry.engine, made[entry], workshop.config, dtype=entry.form, threads=threads)
        with tempfile.NamedTemporaryFile(suffix=".npy") as file:
            found = run_child(replace(base, logits=file.name))
            records[entry] = {
                **asdict(entry),
                "name": entry.name,
                "threads": threads,
                "size": workshop.size(entry, made[entry]),
                "step_bytes": found.get("step_bytes") or step_bytes(entry, made[entry], workshop, arguments),
                **divergence(reference, np.load(file.name)),
                "rounds": [],
            }
        say(f"{entry.name}: KL {records[entry]['kl']:.2g}")
    stream = Stream(threads)
    for number in range(arguments.rounds):
        for entry in entries:
            say(f"{threads} thread(s), round {number + 1}: {entry.name}")
            speed = stream_speed(stream, arguments.cpu_time)
            task = task_of(entry.engine, made[entry], workshop.config, dtype=entry.form, **changes)
            records[entry]["rounds"].append({**run_child(task), "stream": speed})
    return [record | summary(record, changes["batch"], arguments) for record in records.values()]


def step_bytes(entry: Entry, made: Path, workshop: Workshop, arguments: argparse.Namespace) -> float:
    """Bytes that a decode step of another's must read."""
    spec, past = model_spec(workshop.config), arguments.context + (arguments.steps - 1) / 2
    if entry.engine == "llama":
        from support.gguf_file import tensor_sizes

        return step_reads(tensor_sizes(made), spec, past, cache_size=2)
    item = 2 if entry.form == "bfloat16" else 4
    sizes = {name: math.prod(shape) * item for name, shape in expected_tensors(spec).items()}
    return step_reads(sizes, spec, past, cache_size=item)


def step_reads(sizes: dict[str, int], spec: ModelSpec, past: float, cache_size: int) -> float:
    """Bytes of all weights, but of experts those of a token, of the embedding a row; and of the filled caches."""
    total = 0.0
    for name, size in sizes.items():
        if "experts." in name or "_exps." in name:
            total += size * spec.experts_per_token / spec.experts
        elif "embd" in name or "embed" in name:
            total += size / spec.vocab_size
        else:
            total += size
    slots = sum((past % layer.chunk if layer.chunk else past) + 1 for layer in spec.layers)
    return total + slots * 2 * spec.kv_heads * spec.head_dim * cache_size


def summary(record: dict[str, Any], batch: int, arguments: argparse.Namespace) -> dict[str, Any]:
    """Medians over the rounds, in tokens a second and bytes."""
    rounds = record["rounds"]

    def middle(name: str) -> float | None:
        values = [statistics.median(found[name]) for found in rounds if found.get(name)]
        return statistics.median(values) if values else None

    prefill, decode, together = middle("prefill"), middle("decode"), middle("batch")
    found: dict[str, Any] = {
        "first_seconds": statistics.median(found["first"] for found in rounds),
        "peak_rss": max(found["peak_rss"] for found in rounds),
        "prefill_tokens_per_second": prefill and arguments.context / prefill,
        "decode_tokens_per_second": decode and 1 / decode,
        "batch_tokens_per_second": together and batch / together,
    }
    if decode:
        shares = [record["step_bytes"] / statistics.median(each["decode"]) / each["stream"] for each in rounds]
        found |= {"bytes_per_second": record["step_bytes"] / decode, "share_of_stream": statistics.median(shares)}
    return found


COLUMNS = (
    ("decode, tok/s", "decode_tokens_per_second"),
    ("prefill, tok/s", "prefill_tokens_per_second"),
    ("batch, tok/s", "batch_tokens_per_second"),
)


def show(records: list[dict[str, Any]], arguments: argparse.Namespace) -> None:
    """Prints a row a contender; in brackets how many times llama.cpp's speed at as many bits and threads."""
    title = f"{arguments.shape}, context {arguments.context}, batch {arguments.batch}; in brackets: × llama.cpp"
    table = Table(
        "contender", "thr.", "GB", "KL, top-1", *(header for header, _ in COLUMNS),
        "step reads, MB", "GB/s", "of stream", "first token, s", "peak RSS, GB (× size)", title=title,
    )  # fmt: skip
    for record in records:
        rivals = [
            other
            for other in records
            if other["engine"] == "llama" and (other["bits"], other["threads"]) == (record["bits"], record["threads"])
        ]
        speeds = []
        for _, name in COLUMNS:
            value = record[name]
            times = f" ({value / rivals[0][name]:.2f})" if value and rivals and rivals[0] is not record else ""
            speeds.append(f"{value:.1f}{times}" if value else "")
        is_timed = "bytes_per_second" in record
        table.add_row(
            record["name"],
            str(record["threads"]),
            f"{record['size'] / 1e9:.2f}",
            f"{record['kl']:.2g}, {record['top1']:.2f}",
            *speeds,
            f"{record['step_bytes'] / 1e6:.0f}",
            f"{record['bytes_per_second'] / 1e9:.1f}" if is_timed else "",
            f"{record['share_of_stream']:.0%}" if is_timed else "",
            f"{record['first_seconds']:.2f}",
            f"{record['peak_rss'] / 1e9:.2f} ({record['peak_rss'] / record['size']:.2f})",
        )
    Console(width=None if sys.stdout.isatty() else 190).print(table)


def main() -> None:
    parser = argparse.ArgumentParser(description="Llama 4 on a CPU, beside llama.cpp and transformers.")
    parser.add_argument("--shape", choices=("scout", "maverick"), default="scout")
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--experts", type=int, help="Other than the shape's own.")
    parser.add_argument("--bits", type=numbers, default=[4, 8])
    parser.add_argument("--contenders", help=f"Instead of --bits: of {', '.join(entry.name for entry in ENTRIES)}.")
    parser.add_argument("--group", type=int, default=32, help="Weights that share an int4 scale in ours.")
    parser.add_argument(
        "--cases", type=lambda text: text.split(","), default=CASES, help="Some of first, prefill, decode, batch."
    )
    parser.add_argument("--threads", type=numbers, default=[1])
    parser.add_argument("--cpus", type=numbers, help="Processors to pin to; the last of those allowed.")
    parser.add_argument("--context", type=int, default=512)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--steps", type=int, default=32, help="Decode steps of a run.")
    parser.add_argument("--runs", type=int, default=2, help="Timed runs of each case in a process.")
    parser.add_argument("--rounds", type=int, default=3, help="Processes of each contender.")
    parser.add_argument(
        "--cpu-time",
        action="store_true",
        help="Take the processor's seconds, not the clock's: where others use the machine. One thread only.",
    )
    parser.add_argument("--folder", type=Path, help="Where to keep what is made.")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    names = arguments.contenders.split(",") if arguments.contenders else None
    entries = [entry for entry in ENTRIES if (entry.name in names if names else entry.is_usual(arguments.bits))]
    config = peer(arguments.shape, arguments.layers, arguments.experts)
    if arguments.folder:
        arguments.folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=arguments.folder) as temporary:
        place = arguments.folder or Path(temporary)
        of_shape = f"{arguments.shape}-{config['num_hidden_layers']}-{config['num_local_experts']}"
        workshop = Workshop(place / of_shape, Path(temporary), config, arguments.group)
        records = []
        allowed = sorted(os.sched_getaffinity(0))
        for threads in arguments.threads:
            os.sched_setaffinity(0, arguments.cpus or allowed[-threads:])  # children inherit it
            records += race(entries, workshop, threads, arguments)
    show(records, arguments)
    if arguments.json:
        arguments.json.write_text(json.dumps({"config": config, "records": records}, indent=1) + "\n")


if __name__ == "__main__":
    main()
