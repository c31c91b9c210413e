"""How fast a folder runs on this machine, and how near that is to what its memory allows.

Enters: a model or bundle folder. Leaves: figures ready for JSON, and on demand a folder of `bench.json` and
`bench.png`. Runs of all cases take turns, each beside a reading of the memory's speed, so that what else the machine
does falls on all alike; medians are given.
"""

import json
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any

from .. import __version__
from ..errors import SessionError
from ..files.circumstances import circumstances, machine_text
from ..files.contents_hash import described
from ..files.drawing import check_drawable
from ..files.folders import rank_folder, read_spec
from ..files.output import check_free, new_folder
from ..loading import load
from ..spec.folder import FolderSpec
from ..spec.recipe_words import in_words
from ..spec.stored_weights import Pages
from ..spec.types import Progress

if TYPE_CHECKING:
    from ..runtime import Session
    from .timing import Case, Reading

RESULT, PLOT = "bench.json", "bench.png"
SCHEMA = 1
"""Version of `bench.json`."""

LENGTHS, BATCHES = (128, 512, 2048), (1, 4, 8)


def measure_folder(
    folder: str | Path,
    *,
    prefill: Sequence[int] | None = None,
    batch: Sequence[int] | None = None,
    decode_tokens: int = 32,
    runs: int = 3,
    threads: int | None = None,
    weights: str | Path | None = None,
    pages: Pages = "auto",
    progress: Progress = lambda phase, done, total: None,
) -> dict[str, Any]:
    """Times a folder.

    Args:
        folder: A model or bundle folder, or a group of them.
        prefill: Tokens of a prompt; None takes those of 128, 512 and 2048 that the context has room for.
        batch: Rows at once; None takes those of 1, 4 and 8 that an engine was built for.
        decode_tokens: Tokens decoded after each prompt.
        runs: Timed runs of each case, after one that is not timed.
        threads: Threads of one operator on the CPU; None takes the processors that this process may use.
        weights: Folder of the weight files, where they have moved.
        pages: Which weights lie in huge pages, as in `load`.
        progress: Called with the phase, the runs done and the runs in all.

    Returns:
        JSON-ready: the machine, the stream bandwidth, the peak of memory, and for each case the time to first token,
        tokens a second of prefill and decode, the bytes that a decode step must read, and the bandwidth achieved.

    Raises:
        ArrieroError: The folder cannot be loaded, or a setting is out of range.
    """
    path = Path(folder)
    spec = _own_spec(path)
    lengths, batches = _sizes(spec, prefill, batch, decode_tokens)
    if runs < 1:
        raise SessionError(f"runs is {runs}, expected a whole number from 1 up")
    from ..files.processors import processors
    from .timing import Case

    started = time.perf_counter()
    longest, most = max(lengths) + decode_tokens, max(batches)
    session = load(path, max_seq=longest, max_batch=most, threads=threads, weights=weights, pages=pages)
    loading = time.perf_counter() - started
    cases = [Case(length=length, batch=rows) for length in lengths for rows in batches]
    threads = threads or processors()
    measured = _time_cases(spec, session, cases, decode_tokens, runs, threads, progress)
    return {
        "schema": SCHEMA,
        **_described(path, spec),
        "threads": threads,
        "ranks": spec.ranks,
        "decode_tokens": decode_tokens,
        "runs": runs,
        "pages": pages,
        "load_seconds": loading,
        **measured,
    }


def _described(path: Path, spec: FolderSpec) -> dict[str, Any]:
    """The folder, and where and when it is timed."""
    return {
        "folder": str(path),
        "version": __version__,
        **circumstances(),
        "target": spec.target or "cpu",
        "recipe": in_words(spec.recipe),
        "contents": described(path),
    }


def _own_spec(path: Path) -> FolderSpec:
    """A folder's spec, or that of a group's first rank: all ranks have one target and its limits."""
    spec = read_spec(path)
    return spec if spec.kind != "group" else rank_folder(path, spec, 0)[1]


def check_output(out: Path, *, force: bool) -> None:
    """Refuses, before anything is timed, an output that cannot be written or drawn.

    Raises:
        FolderError: `out` exists and may not be replaced.
        ModuleNotFoundError: matplotlib is not installed; it is imported later, since its memory is not the model's.
    """
    check_drawable()
    check_free(out, force=force, mark=RESULT)


def write_measured(
    found: dict[str, Any], out: Path, *, force: bool = False, draw: Callable[[dict[str, Any], Path], None] | None = None
) -> None:
    """Writes what was found as `bench.json`, and as a picture by `draw`, that of a folder's. Needs matplotlib."""
    with new_folder(out, force=force, mark=RESULT) as folder:
        (folder / RESULT).write_text(json.dumps(found, indent=1) + "\n", "utf-8")
        (draw or draw_folder)(found, folder / PLOT)


def draw_folder(found: dict[str, Any], file: Path) -> None:
    """Draws tokens a second and the achieved bandwidth over the prompt's length, a line a batch."""
    from matplotlib.figure import Figure

    stream = found["stream"]
    panels = [
        ("prefill_tokens_per_second", "prefill, tokens/s", 1.0),
        ("decode_tokens_per_second", "decode, tokens/s", 1.0),
        *([("decode_bytes_per_second", "decode, GB/s read", 1e9)] if stream else []),
    ]
    figure = Figure(figsize=(4 * len(panels), 4.4), layout="constrained")
    all_axes = figure.subplots(1, len(panels))
    lengths = sorted({case["prefill"] for case in found["cases"]})
    for axes, (name, label, unit) in zip(all_axes, panels, strict=True):
        for batch in sorted({case["batch"] for case in found["cases"]}):
            of_batch = [case for case in found["cases"] if case["batch"] == batch]
            values = [case[name] / unit for case in of_batch]
            axes.plot([case["prefill"] for case in of_batch], values, "o-", label=f"batch {batch}")
        axes.set(xlabel="tokens of the prompt", ylabel=label, xscale="log")
        axes.set_xticks(lengths, [str(length) for length in lengths])
        axes.minorticks_off()
        axes.spines[["top", "right"]].set_visible(False)
    if stream:
        speed = stream["bytes_per_second"] / 1e9
        all_axes[-1].axhline(speed, color="#222222", linestyle=":", label="the memory's own speed")
    for axes in all_axes:
        axes.set_ylim(0, 1.06 * axes.get_ylim()[1])  # last, since it keeps the top where it is then
    figure.suptitle(_heading(found), x=0.01, ha="left", fontsize=10)
    figure.legend(*all_axes[-1].get_legend_handles_labels(), loc="outside lower center", ncols=4, frameon=False)
    figure.savefig(file, dpi=110)


def _heading(found: dict[str, Any]) -> str:
    """The picture's heading: which model, how quantised, on which machine, with how many threads, when."""
    threads = f"{found['threads']} thread{'s' if found['threads'] > 1 else ''}"
    recipe = found["recipe"].partition(";")[0].partition(", a scale")[0]
    return (
        f"{Path(found['folder']).name or found['folder']} ({recipe}), {found['target']}, {threads}\n"
        f"{machine_text(found['machine'])}; {found['date'][:10]}, Arriero {found['version']}"
    )


def parse_sizes(text: str | None, option: str) -> list[int] | None:
    """Numbers from an option's text, as in `128,512`; None stays None.

    Raises:
        SessionError: It is no such list.
    """
    if text is None:
        return None
    parts = [part.strip() for part in text.split(",")]
    if not all(part.isdecimal() and int(part) for part in parts):
        raise SessionError(f"{option} is {text!r}, expected whole numbers from 1 up with commas between, as in 128,512")
    return [int(part) for part in parts]


def _sizes(
    spec: FolderSpec, prefill: Sequence[int] | None, batch: Sequence[int] | None, decode_tokens: int
) -> tuple[list[int], list[int]]:
    """The lengths and batches to time: those asked for, or those of the usual ones that fit."""
    context = spec.engine.max_seq if spec.engine else spec.model.max_positions
    room = context - decode_tokens
    if decode_tokens < 1 or room < 1:
        raise SessionError(f"decode_tokens is {decode_tokens}, expected 1 to {context - 1}: a sequence holds {context}")
    lengths = [length for length in LENGTHS if length <= room] or [room] if prefill is None else list(prefill)
    rows = min(profile.max_batch for profile in spec.engine.profiles) if spec.engine else None
    batches = [size for size in BATCHES if rows is None or size <= rows] if batch is None else list(batch)
    if not lengths or not batches or min(*lengths, *batches) < 1:
        raise SessionError(f"prefill is {lengths} and batch {batches}, expected whole numbers from 1 up")
    if max(lengths) > room:
        raise SessionError(
            f"a prompt of {max(lengths)} tokens and {decode_tokens} decoded ones are more than a sequence holds, "
            f"{context}: give a shorter --prefill"
        )
    return sorted(set(lengths)), sorted(set(batches))


def _time_cases(
    spec: FolderSpec,
    session: "Session",
    cases: Sequence["Case"],
    decode_tokens: int,
    runs: int,
    threads: int,
    progress: Progress,
) -> dict[str, Any]:
    """The peak of memory, the stream's bandwidth, and each case's record; the cases take turns."""
    from ..runtime.memory import step_reads
    from .timing import Stream, peak_memory, time_case

    sizes = _weight_sizes(session)
    total = len(cases) * (runs + 1)
    for done, case in enumerate(cases):
        progress("warm-up", done, total)
        time_case(session, case, decode_tokens)
    peak = peak_memory(getattr(session.decoder, "processes", ()))  # before the stream's buffer
    stream = Stream(threads) if sizes else None
    readings: dict[Case, list[tuple[Reading, float | None]]] = {case: [] for case in cases}
    for run in range(runs):
        for at, case in enumerate(cases):
            progress(f"run {run + 1}", len(cases) * (run + 1) + at, total)
            speed = stream.read() if stream else None
            readings[case].append((time_case(session, case, decode_tokens), speed))
    records = []
    for case, taken in readings.items():
        reads = step_reads(spec, sizes, case.batch, case.length + (decode_tokens - 1) / 2) if sizes else None
        records.append(_record(case, taken, None if reads is None else asdict(reads)))
    speeds = [speed for taken in readings.values() for _, speed in taken if speed is not None]
    return {
        "peak_rss_bytes": peak,
        "stream": {"bytes_per_second": median(speeds), "buffer_bytes": stream.size} if stream else None,
        "cases": records,
    }


def _weight_sizes(session: "Session") -> dict[str, int]:
    """Bytes of each weight as ONNX Runtime has it; none of an engine, whose memory is the GPU's, or of a group."""
    from ..runtime.backends.onnxruntime_decoder import OnnxRuntimeDecoder

    if not isinstance(session.decoder, OnnxRuntimeDecoder):
        return {}
    return {name: value.tensor_size_in_bytes() for name, value in session.decoder.weights.items()}


def _record(
    case: "Case", taken: list[tuple["Reading", float | None]], reads: dict[str, float] | None
) -> dict[str, Any]:
    """One case's medians, and the runs they come from. The share of the stream is computed run by run."""
    first, step = (median(getattr(reading, name) for reading, _ in taken) for name in ("first", "step"))
    total = sum(reads.values()) if reads else None
    shares = [total / reading.step / speed for reading, speed in taken if total and speed]
    return {
        "prefill": case.length,
        "batch": case.batch,
        "ttft_seconds": first,
        "prefill_tokens_per_second": case.batch * case.length / first,
        "itl_seconds": step,
        "decode_tokens_per_second": case.batch / step,
        "step_bytes": {**reads, "total": total} if reads else None,
        "decode_bytes_per_second": total / step if total else None,
        "share_of_stream": median(shares) if shares else None,
        "readings": [
            {"ttft_seconds": reading.first, "itl_seconds": reading.step, "stream_bytes_per_second": speed}
            for reading, speed in taken
        ],
    }
