"""Ranks on one machine: tokens of a group beside the whole model's, its speed beside one process, and full-size tables.

    python benchmarks/ranks.py [--parts tokens,ways,speed,sizes] [--threads 2] [--model FOLDER] [--json FILE]

`tokens` splits the tiny Llama 4 three ways in three formats, and counts over held-out text where the likeliest token
differs, and by how much the whole model liked it better than the next where it did. Beside them stands the whole model
against itself with its embeddings moved by a unit in the last place, where routers are watched: what so little does is
what parted sums do.
`ways` asks the tiny Llama 4 that sees, split as often, about text and pictures: alone, in a flight, by `arriero run`,
behind `arriero serve`, and under `check`.
`speed` decodes and prefills as one process with all threads and as two ranks that share them, in turns, with `--model`
a model of one's own in place of the tiny Llama 4. `sizes` splits sparse full-size models in FP8, Scout over 2 ranks and
Maverick over 8, and shows what `arriero inspect` says of them.
"""

import argparse
import json
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table
from support.group_ways import ways
from support.jolted import UNIT, WatchedBundle
from support.sparse import MAVERICK, SCOUT, multimodal, write_sparse_checkpoint
from support.sparse_models import write_sparse_fp8

import arriero
from arriero.calibration import calibrate_model, int4, int8
from arriero.engine import build_bundle
from arriero.export import export_checkpoint
from arriero.files.processors import processors, share_processors
from arriero.runtime import Session

EXAMPLES = Path(__file__).resolve().parent.parent / "examples"
TINY, SEEING = EXAMPLES / "tiny-llama4", EXAMPLES / "tiny-llama4-vision"
LAYOUTS = {"tp 2": (2, 1), "ep 2": (1, 2), "tp 2, ep 2": (2, 2)}
PARTS = ("tokens", "ways", "speed", "sizes")
Row = dict[str, Any]


def held_out(folder: Path) -> Path:
    """The text that the tiny model was not trained on."""
    code = "import sys; sys.path.insert(0, sys.argv[1]); from corpus import held_out_text; print(held_out_text())"
    path = folder / "held_out.txt"
    text = subprocess.run([sys.executable, "-c", code, str(TINY)], check=True, capture_output=True, text=True).stdout
    path.write_text(text, "utf-8")
    return path


def scenes(folder: Path) -> tuple[Path, list[Path]]:
    """Conversations about drawn scenes, and the pictures of two of them."""
    code = (
        "import sys; sys.path.insert(0, sys.argv[1]); from pathlib import Path; from scenes import write_conversations"
    )
    code += "; print(write_conversations(Path(sys.argv[2]), 16))"
    command = [sys.executable, "-c", code, str(SEEING), str(folder / "scenes")]
    path = Path(subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip())
    return path, [path.parent / f"scene-{number}.png" for number in (0, 1)]


def models(checkpoint: Path, folder: Path, data: list[Path]) -> dict[str, Path]:
    """A tiny model in three formats."""
    made = {"bf16": export_checkpoint(checkpoint, folder / "bf16")}
    for name, recipe in (("int8", int8()), ("int4", int4())):
        made[name] = calibrate_model(made["bf16"], folder / name, recipe=recipe, data=data, samples=12)
    return made


def groups(folder: Path, made: dict[str, Path]) -> dict[tuple[str, str], tuple[Path, Path]]:
    """Each model as a bundle, and each of its groups as bundles."""
    found = {}
    for kind, model in made.items():
        whole = build_bundle(model, folder / f"{kind}-bundle")
        for layout, (tp, ep) in LAYOUTS.items():
            name = f"{kind}-{tp}-{ep}"
            group = export_checkpoint(model, folder / name, tp=tp, ep=ep)
            found[kind, layout] = whole, build_bundle(group, folder / f"{name}-bundles")
    return found


def compare_tokens(whole: Session, group: Session, ids_WS: np.ndarray) -> Row:
    """Differences of logits and of the likeliest tokens, and whether a group repeats itself to the bit."""
    repeats, moved, differs, gaps = True, [], [], []
    for ids_S in ids_WS:
        expected, found = whole.logits(ids_S[None]), group.logits(ids_S[None])
        repeats &= np.array_equal(found, group.logits(ids_S[None]))
        moved.append(np.abs(found - expected).max(-1)[0])
        ranked_SV = np.sort(expected[0], -1)
        gaps.append(ranked_SV[:, -1] - ranked_SV[:, -2])
        differs.append(expected[0].argmax(-1) != found[0].argmax(-1))
    moved_T, differs_T, gaps_T = np.concatenate(moved), np.concatenate(differs), np.concatenate(gaps)
    return {
        "largest_difference": float(moved_T.max()),
        "median_difference": float(np.median(moved_T)),
        "places_above_1": int((moved_T > 1).sum()),
        "bit_equal_to_itself": repeats,
        "tokens": len(moved_T),
        "likeliest_differ": int(differs_T.sum()),
        "widest_gap_there": float(gaps_T[differs_T].max(initial=0)),
    }


def token_rows(pairs: dict[tuple[str, str], tuple[Path, Path]], text: Path, threads: int) -> list[Row]:
    rows: list[Row] = []
    for (kind, layout), (whole_path, group_path) in pairs.items():
        whole = arriero.load(whole_path, max_seq=512, threads=1)
        group = arriero.load(group_path, max_seq=512, threads=threads)
        ids_WS = some_text(whole, text)
        alone = [group.generate(row[:40].tolist(), 40, temperature=0, eos_token_id=[]).ids for row in ids_WS]
        prompts = [row[:40].tolist() for row in ids_WS]
        others = group.generate_many(prompts, 40, slots=3, prefill_budget=8, temperature=0, eos_token_id=[])
        rows.append(
            {
                "format": kind,
                "split": layout,
                **compare_tokens(whole, group, ids_WS),
                "in_flight_as_alone": [each.ids for each in others] == alone,
            }
        )
    return rows


def jolt_rows(made: dict[str, Path], text: Path) -> list[Row]:
    """Each whole model against itself, its embeddings moved by a unit in the last place."""
    rows: list[Row] = []
    for kind, path in made.items():
        still, moved = WatchedBundle(path, 512), WatchedBundle(path, 512, UNIT)
        ids_WS = some_text(still.session, text)
        pairs = [(still.logits(ids_S), moved.logits(ids_S)) for ids_S in ids_WS]
        far_T = np.concatenate([np.abs(one - other).max(-1) for (one, _), (other, _) in pairs])
        differs_T = np.concatenate([one.argmax(-1) != other.argmax(-1) for (one, _), (other, _) in pairs])
        is_other_T = np.concatenate([(one != other).any(0) for (_, one), (_, other) in pairs])
        rows.append(
            {
                "format": kind,
                "largest_difference": float(far_T.max()),
                "median_difference": float(np.median(far_T)),
                "places_above_1": int((far_T > 1).sum()),
                "tokens": len(far_T),
                "likeliest_differ": int(differs_T.sum()),
                "other_experts": int(is_other_T.sum()),
                "above_1_with_other_experts": int(((far_T > 1) & is_other_T).sum()),
                "largest_with_the_same_experts": float(far_T[~is_other_T].max()),
            }
        )
    return rows


def way_rows(folder: Path, text: Path, threads: int) -> list[Row]:
    """Each group of the model that sees, asked in every way."""
    folder.mkdir()
    talks, pictures = scenes(folder)
    pairs = groups(folder, models(SEEING, folder, [talks, text]))
    return [
        {"format": kind, "split": layout, **ways(whole, group, pictures, [talks, text], threads)}
        for (kind, layout), (whole, group) in pairs.items()
    ]


def some_text(session: Session, text: Path) -> np.ndarray:
    """Four rows of 300 tokens."""
    ids = session.text.encode(text.read_text("utf-8")[:16000])[: 4 * 300]
    return np.array(ids, dtype=np.int64).reshape(4, -1)


def timed(session: Session, ids: list[int], steps: int) -> tuple[float, float]:
    """Seconds of a prefill, and the median of single steps after it."""
    state = session.start(1, len(ids) + steps)
    started = time.perf_counter()
    session.prefill(state, [ids])
    first, taken = time.perf_counter() - started, []
    for _ in range(steps):
        started = time.perf_counter()
        session.decode(state, [7])
        taken.append(time.perf_counter() - started)
    return first, statistics.median(taken)


def speed_rows(pairs: dict[tuple[str, str], tuple[Path, Path]], threads: int, runs: int) -> list[Row]:
    """One process and two ranks with as many threads, by turns."""
    rows: list[Row] = []
    for (kind, layout), (whole_path, group_path) in pairs.items():
        sessions = {"one process": whole_path, "two ranks": group_path}
        loaded = {name: arriero.load(path, max_seq=400, threads=threads) for name, path in sessions.items()}
        ids = np.random.default_rng(0).integers(10, 2000, 256).tolist()
        readings: dict[str, list[tuple[float, float]]] = {name: [] for name in loaded}
        for _ in range(runs + 1):
            for name, session in loaded.items():
                readings[name].append(timed(session, ids, 64))
        row: Row = {"format": kind, "split": layout}
        for name, taken in readings.items():
            row[f"{name}: prefill_ms"] = statistics.median(first for first, _ in taken[1:]) * 1e3
            row[f"{name}: step_ms"] = statistics.median(step for _, step in taken[1:]) * 1e3
        rows.append(row)
    return rows


def size_rows(folder: Path) -> list[Row]:
    """Full-size models in FP8, split; the peak is this process's, of all that was done before too."""
    from arriero.measuring.summary import summarise

    rows: list[Row] = []
    for name, config, tp in (("Scout", SCOUT, 2), ("Maverick", MAVERICK, 8)):
        place = folder / name
        place.mkdir()
        write_sparse_checkpoint(multimodal(config), place / "checkpoint")
        model = write_sparse_fp8(export_checkpoint(place / "checkpoint", place / "bf16"), place / "fp8")
        started = time.perf_counter()
        group = export_checkpoint(model, place / "group", tp=tp)
        seconds = time.perf_counter() - started
        found = summarise(group)["ranks"]
        rows.append(
            {
                "model": f"{name} FP8 over {tp}",
                "weights_GB_a_rank": [round(rank["weights_bytes"] / 1e9, 1) for rank in found["each"]],
                "cache_bytes_a_token_a_rank": found["each"][0]["kv_cache"]["bytes_per_token"],
                "sums_a_step": found["sums"]["a_step"],
                "bytes_a_token": found["sums"]["bytes_per_token"],
                "bytes_a_logits_row": found["sums"]["bytes_per_logits"],
                "split_seconds": round(seconds, 1),
                "peak_MB": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1000,
            }
        )
    return rows


def show(title: str, rows: list[Row]) -> None:
    table = Table(*rows[0], title=title)
    for row in rows:
        table.add_row(*(f"{value:.3g}" if isinstance(value, float) else str(value) for value in row.values()))
    Console(width=200).print(table)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", default=",".join(PARTS))
    parser.add_argument("--threads", type=int, default=max(2, processors()))
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--model", type=Path, help="a model folder whose speed is timed")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    chosen = arguments.parts.split(",")
    found: dict[str, Any] = {"processors": share_processors(2), "threads": arguments.threads}
    with tempfile.TemporaryDirectory(prefix="ranks-") as scratch:
        folder = Path(scratch)
        if {"tokens", "speed"} & set(chosen):
            text = held_out(folder)
            own = arguments.model
            pairs = groups(folder, models(TINY, folder, [text]) if own is None else {own.name: own})
            parts: dict[str, Callable[[], list[Row]]] = {
                "tokens": lambda: token_rows(pairs, text, arguments.threads),
                "jolts": lambda: jolt_rows({kind: whole for (kind, _), (whole, _) in pairs.items()}, text),
                "speed": lambda: speed_rows(pairs, arguments.threads, arguments.runs),
            }
            for part, rows in parts.items():
                if part in chosen or (part == "jolts" and "tokens" in chosen):
                    found[part] = rows()
                    show(part, found[part])
        if "ways" in chosen:
            found["ways"] = way_rows(folder / "seeing", held_out(folder), arguments.threads)
            show("ways", found["ways"])
        if "sizes" in chosen:
            found["sizes"] = size_rows(folder)
            show("sizes", found["sizes"])
    if arguments.json:
        arguments.json.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
