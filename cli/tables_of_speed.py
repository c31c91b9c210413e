"""Tables of what was timed: a folder on this machine, or a server under load."""

from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

from .words import size


def show_measured(found: dict[str, Any], folder: Path | None) -> None:
    """Prints what `bench.measure_folder` found."""
    from ..measuring.bench import PLOT

    console, stream = Console(), found["stream"]
    headers = ["prompt", "batch", "TTFT, ms", "prefill, tokens/s", "ITL, ms", "decode, tokens/s"]
    table = Table(*headers, box=box.SIMPLE, padding=(0, 1, 0, 0))
    if stream:
        table.add_column("a step reads")
        table.add_column("GB/s")
        table.add_column("of the stream")
    for column in table.columns:
        column.justify = "right"
    for case in found["cases"]:
        row = [
            f"{case['prefill']}",
            f"{case['batch']}",
            f"{case['ttft_seconds'] * 1e3:,.1f}",
            f"{case['prefill_tokens_per_second']:,.0f}",
            f"{case['itl_seconds'] * 1e3:,.2f}",
            f"{case['decode_tokens_per_second']:,.1f}",
        ]
        if stream:
            row += [
                size(round(case["step_bytes"]["total"])),
                f"{case['decode_bytes_per_second'] / 1e9:.1f}",
                f"{case['share_of_stream']:.0%}",
            ]
        table.add_row(*row)
    console.print(table)
    machine = found["machine"]
    lines = [
        f"{found['target']} on {machine['processor']}, {found['threads']} threads"
        f"{' of ' + str(found['ranks']) + ' ranks' if found['ranks'] > 1 else ''}; loaded in "
        f"{found['load_seconds']:.1f} s, peak RSS {size(found['peak_rss_bytes'])}; medians of {found['runs']} runs, "
        f"{found['decode_tokens']} tokens decoded."
    ]
    if stream:
        lines.append(
            f"The stream is {stream['bytes_per_second'] / 1e9:.1f} GB/s: as many threads reading "
            f"{size(stream['buffer_bytes'])} from end to end, between the runs."
        )
    if folder is not None:
        lines.append(f"Plot: {folder / PLOT}")
    console.print("\n".join(lines), highlight=False, markup=False)


def show_load(found: dict[str, Any], folder: Path | None) -> None:
    """Prints what `load.measure_url` found."""
    from ..measuring.bench import PLOT

    console = Console()
    fails = any(case["failed"] for case in found["cases"])
    headers = ["prompt", "clients", "tokens/s", "TTFT, ms\np50 / p95 / p99", "ITL, ms\np50 / p95 / p99"]
    table = Table(*headers, *(["failed"] if fails else []), box=box.SIMPLE, padding=(0, 1, 0, 0))
    for column in table.columns:
        column.justify, column.no_wrap = "right", True
    for case in found["cases"]:
        times = [[case[name][rank] for rank in ("p50", "p95", "p99")] for name in ("ttft_seconds", "itl_seconds")]
        table.add_row(
            f"{case['prompt_tokens'] or case['prefill']:.0f}",
            f"{case['batch']}",
            f"{case['tokens_per_second']:,.1f}",
            *(" / ".join(milliseconds(value) for value in each) for each in times),
            *([f"{case['failed']}"] if fails else []),
        )
    console.print(table)
    requests = sum(case["requests"] for case in found["cases"])
    lines = [f"{found['model']} at {found['url']}: {requests} requests, {found['decode_tokens']} new tokens at most."]
    lines += [f"First failure: {case['first_error']}" for case in found["cases"] if case["first_error"]][:1]
    if folder is not None:
        lines.append(f"Plot: {folder / PLOT}")
    console.print("\n".join(lines), highlight=False, markup=False, soft_wrap=True)


def milliseconds(seconds: float | None) -> str:
    """Seconds as milliseconds in three digits; a dash where there are none."""
    return "–" if seconds is None else f"{seconds * 1e3:.{0 if seconds >= 0.1 else 1 if seconds >= 0.01 else 2}f}"
