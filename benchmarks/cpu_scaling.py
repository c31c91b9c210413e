"""Decoding on a CPU against context, experts and threads, and where a step's time goes.

    python benchmarks/cpu_scaling.py [--bits 4] [--sweeps context,experts,threads,profile] [--folder DIR] [--json FILE]

Four layers of the shapes of `cpu_peers.py`, three of them chunked, beside llama.cpp at as many bits. `context` reads
one long prompt piece by piece and decodes at each length. `experts` has 16, 64 and 128 of them in every second layer;
what a token uses is the same. `profile` is ONNX Runtime's own, a decode step with 512 tokens in the caches, with 8,000
and with 32,000, beside the bytes that each part must read. Its caches are filled with noise, and its sum is above the
time of a step that nobody looks at.
"""

import argparse
import json
import os
import re
import statistics
import sys
import tempfile
from collections import defaultdict
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import onnxruntime as ort
from rich.console import Console
from rich.table import Table
from support.dense import peer
from support.workshop import ENTRIES, Entry, Workshop, numbers, run_child, say, stream_speed, task_of

import arriero
from arriero.measuring.timing import Stream
from arriero.runtime import Session
from arriero.spec.geometry import ModelSpec

SWEEPS = ("context", "experts", "threads", "profile")
LAYERS = 4
LENGTHS = (512, 2048, 8000, 16000, 32000)
"""The last three leave chunks of 8192 nearly full."""
PROFILED = (512, 8000, 32000)
PRODUCTS = re.compile("MatMul|Gemm|Moe|Linear")
LAYER = re.compile(r"(?:model\.)?layers\.(\d+)[./](.*)")
Row = dict[str, Any]


def entries_of(bits: int) -> list[Entry]:
    """Ours, and llama.cpp's at as many bits."""
    ours, theirs = (next(e for e in ENTRIES if (e.engine, e.bits) == (engine, bits)) for engine in ("arriero", "llama"))
    return [ours, theirs]


def speed(entry: Entry, workshop: Workshop, arguments: argparse.Namespace, threads: int = 1, **changes: Any) -> Row:
    """Figures that a child measures, by default over 512 tokens."""
    os.sched_setaffinity(0, arguments.allowed[-threads:])
    made = workshop.make(entry)
    say(f"{entry.name}, {threads} thread(s), {workshop.folder.name}")
    task = task_of(entry.engine, made, workshop.config, threads=threads, cpu_time=arguments.cpu_time, **changes)
    return run_child(task)


def context_sweep(entries: list[Entry], workshop: Workshop, arguments: argparse.Namespace) -> list[Row]:
    """Decoding with ever more tokens in the caches."""
    lengths = [length for length in LENGTHS if length <= arguments.longest]
    rows: list[Row] = []
    for entry in entries:
        found = speed(entry, workshop, arguments, lengths=lengths, steps=16)
        for length, step in zip(lengths, found["at_lengths"], strict=True):
            rows.append({"contender": entry.name, "context": length, "decode_tokens_per_second": 1 / step})
    return rows


def experts_sweep(entries: list[Entry], workshops: dict[int, Workshop], arguments: argparse.Namespace) -> list[Row]:
    """Decoding with more experts to choose from."""
    rows: list[Row] = []
    for experts, workshop in workshops.items():
        for entry in entries:
            found = speed(entry, workshop, arguments, runs=3)
            step = statistics.median(found["decode"])
            rows.append({"contender": entry.name, "experts": experts, "decode_tokens_per_second": 1 / step})
    return rows


def threads_sweep(entries: list[Entry], workshop: Workshop, arguments: argparse.Namespace) -> list[Row]:
    """Decoding and prefill with one thread and with two."""
    rows: list[Row] = []
    for threads in (1, 2):
        for entry in entries:
            found = speed(entry, workshop, arguments, threads=threads, runs=3)
            rates = {"decode": 1, "prefill": 512}
            speeds = {
                f"{name}_tokens_per_second": rate / statistics.median(found[name]) for name, rate in rates.items()
            }
            rows.append({"contender": entry.name, "threads": threads, **speeds})
    return rows


def profile(entry: Entry, workshop: Workshop, arguments: argparse.Namespace) -> list[Row]:
    """Where a decode step of ours spends its time, part by part."""
    os.sched_setaffinity(0, arguments.allowed[-1:])
    bundle = workshop.make(entry)
    stream = stream_speed(Stream(1), arguments.cpu_time)
    rows: list[Row] = []
    for past in sorted({min(length, arguments.longest) for length in PROFILED}):
        say(f"profile of {entry.name} at {past}")
        session, seconds = profiled_steps(bundle, past, workshop.folder)
        sizes = part_sizes(session, past)
        for part, spent in sorted(seconds.items(), key=lambda item: -item[1]):
            reads = sizes.get(part, 0.0)
            rows.append(
                {
                    "contender": entry.name,
                    "context": past,
                    "part": part,
                    "milliseconds": spent * 1e3,
                    "share": spent / sum(seconds.values()),
                    "reads_mb": reads / 1e6,
                    "share_of_stream": reads / spent / stream,
                }
            )
    return rows


def profiled_steps(bundle: Path, past: int, folder: Path, steps: int = 32) -> tuple[Session, dict[str, float]]:
    """Seconds of a step by part, medians over steps but the first few."""

    def watched(graph: bytes, options: Any, **settings: Any) -> Any:
        options.enable_profiling, options.profile_file_prefix = True, str(folder / "profile")
        return create(graph, options, **settings)

    create = ort.InferenceSession
    with patch.object(ort, "InferenceSession", watched):
        session = arriero.load(bundle, threads=1, max_seq=past + steps)
    rng = np.random.default_rng(0)
    state = session.start(1, past + steps)
    for buffer in state.caches.buffers.values():
        buffer[:] = rng.standard_normal(buffer.shape[1:], dtype=np.float32)
    state.past_B[:] = past
    for token in rng.integers(0, session.spec.vocab_size, steps).tolist():
        session.decode(state, [token])
    file = Path(session.decoder.session.end_profiling())
    events = json.loads(file.read_text())
    file.unlink()
    return session, by_part(events, session.spec, steps)


def by_part(events: list[Row], spec: ModelSpec, steps: int) -> dict[str, float]:
    """Seconds of each part in a step. A branch's own time is what is left without the nodes in it."""
    nodes = [event for event in events if event.get("cat") == "Node" and event["name"].endswith("_kernel_time")]
    starts = sorted(event["ts"] for event in events if event["name"] == "model_run")
    assert len(starts) == steps
    per_step: list[dict[str, float]] = [defaultdict(float) for _ in starts]
    for event in nodes:
        step = int(np.searchsorted(starts, event["ts"], "right")) - 1
        name, op = event["name"].removesuffix("_kernel_time"), event["args"]["op_name"]
        per_step[step][part_of(name, op, spec)] += event["dur"] / 1e6
        if "/expert." in name:
            per_step[step]["dispatch"] -= event["dur"] / 1e6  # inside an If, whose time is the dispatch's
    later = per_step[steps // 4 :]
    names = {name for each in later for name in each}
    return {name: statistics.median(each[name] for each in later) for name in names}


def part_of(name: str, op: str, spec: ModelSpec) -> str:
    """The part of the model that a node belongs to."""
    found = LAYER.match(name)
    if found is None:
        return "head, embedding"
    layer, rest = spec.layers[int(found[1])], found[2]
    if "GroupedQueryAttention" in rest:
        kind = "chunked" if layer.chunk else "full"
        return f"attention, {kind}" if "Attention" in op else "attention, around it"
    if "self_attn" in rest:
        return "projections"
    if "MoeDispatch" in rest or "router" in rest:
        return "experts" if PRODUCTS.search(op) and "router" not in rest else "dispatch"
    return "shared expert, MLP" if "feed_forward" in rest and PRODUCTS.search(op) else "norms, sums, activations"


def part_sizes(session: Session, past: int) -> dict[str, float]:
    """Bytes that each part of a step must read."""
    spec = session.spec
    sizes: dict[str, float] = defaultdict(float)
    for name, value in session.decoder.weights.items():
        size, found = float(value.tensor_size_in_bytes()), LAYER.match(name)
        if found is None:
            sizes["head, embedding"] += size / spec.vocab_size if "embed" in name else size
        elif ".experts." in name:
            sizes["experts"] += size * spec.experts_per_token / spec.experts
        elif "router" in name:
            sizes["dispatch"] += size
        else:
            sizes["projections" if "self_attn" in name else "shared expert, MLP"] += size
    caches = session.start(1, 1).caches
    slot = sum(caches.buffers[f"0.{kind}"].nbytes for kind in ("key", "value"))
    for layer in spec.layers:
        kind, filled = ("chunked", past % layer.chunk) if layer.chunk else ("full", past)
        sizes[f"attention, {kind}"] += slot * (filled + 1)
    return sizes


def show(title: str, rows: list[Row]) -> None:
    table = Table(*rows[0], title=title)
    for row in rows:
        table.add_row(*(f"{value:.3g}" if isinstance(value, float) else str(value) for value in row.values()))
    Console(width=None if sys.stdout.isatty() else 120).print(table)


def main() -> None:
    parser = argparse.ArgumentParser(description="Decoding against context, experts and threads; where its time goes.")
    parser.add_argument("--bits", type=int, choices=(4, 8), default=4)
    parser.add_argument("--sweeps", type=lambda text: text.split(","), default=SWEEPS, help=f"Of {', '.join(SWEEPS)}.")
    parser.add_argument("--experts", type=numbers, default=[16, 64, 128])
    parser.add_argument("--longest", type=int, default=LENGTHS[-1], help="The longest context.")
    parser.add_argument("--group", type=int, default=32)
    parser.add_argument("--cpu-time", action="store_true", help="As in cpu_peers.py.")
    parser.add_argument("--folder", type=Path, help="Where to keep what is made.")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    arguments.allowed = sorted(os.sched_getaffinity(0))
    entries = entries_of(arguments.bits)
    if arguments.folder:
        arguments.folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=arguments.folder) as temporary:
        place = arguments.folder or Path(temporary)

        def workshop(shape: str, experts: int) -> Workshop:
            name = f"{shape}-{LAYERS}-{experts}"
            bundles = Path(temporary) / f"bundles-{name}"
            bundles.mkdir()
            return Workshop(place / name, bundles, peer(shape, LAYERS, experts), arguments.group)

        scout = workshop("scout", 16)
        work = {
            "context": lambda: context_sweep(entries, scout, arguments),
            "experts": lambda: experts_sweep(
                entries, {count: workshop("maverick", count) for count in arguments.experts}, arguments
            ),
            "threads": lambda: threads_sweep(entries, scout, arguments),
            "profile": lambda: profile(entries[0], scout, arguments),
        }
        found = {sweep: work[sweep]() for sweep in arguments.sweeps}
    for sweep, rows in found.items():
        show(sweep, rows)
    if arguments.json:
        arguments.json.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
