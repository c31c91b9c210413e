"""Bundles side by side: what each costs in accuracy, size and memory, and how fast it is.

Enters: `verdict.json` and `bench.json` files, or the folders that hold them. Leaves: a page with one table and one
scatter. A verdict and a measurement belong together where the bundle's hash is the same, wherever it lay.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes

from ..errors import ArrieroError, FolderError
from ..files.circumstances import circumstances, machine_text
from ..files.fields import check_fields
from ..files.reading import read_text
from ..pages.page import Cell, Column, Section, render, table
from ..pages.pictures import Panel, picture_in_two, series
from ..spec.json_text import parse_json

FILES = ("verdict.json", "bench.json")
SAME = 1e-6
"""A divergence up to which a bundle is as the reference, at the lower edge of the picture."""

LARGEST_FILE = 1 << 26
LONGEST_NAME = 20
"""Letters of a bundle's name in the picture; the table has it whole."""


CONTENTS = {"path": str, "hash": (str, None), "bytes": (int, None)}
NUMBER = (float, None)
VERDICT = {
    "outcome": str,
    "recipe": (str, None),
    "tokens": int,
    "contents": {"candidate": CONTENTS, "reference": {"hash": (str, None)}},
    "metrics": {str: {"value": NUMBER, "low": NUMBER, "high": NUMBER}},
}
MACHINE = {"processor": (str, None), "processors": (int, None), "memory_bytes": NUMBER, "system": (str, None)}
CASE = {"batch": int, "prefill": int, "decode_tokens_per_second": float, "prefill_tokens_per_second": float}
BENCH = {
    "recipe": (str, None),
    "threads": int,
    "contents": CONTENTS,
    "machine": MACHINE,
    "peak_rss_bytes": NUMBER,
    "cases": [CASE],
}
"""Fields that are read of the two kinds of results."""


@dataclass(slots=True)
class Compared:
    """One bundle.

    Attributes:
        name: Its folder's name.
        hash: Its hash.
        verdict: What a check found; empty where there is none.
        bench: What a measurement found; empty where there is none.
    """

    name: str
    hash: str
    verdict: dict[str, Any] = field(default_factory=dict)
    bench: dict[str, Any] = field(default_factory=dict)

    @property
    def recipe(self) -> str:
        """The recipe in words."""
        return str((self.verdict or self.bench).get("recipe") or "")

    @property
    def bytes(self) -> int | None:
        """Bytes of the bundle with its weights."""
        contents = self.verdict["contents"]["candidate"] if self.verdict else self.bench["contents"]
        return contents.get("bytes")

    def metric(self, name: str) -> tuple[float, float | None, float | None] | None:
        """A metric's value and interval."""
        found = self.verdict.get("metrics", {}).get(name)
        return (
            None
            if found is None or found.get("value") is None
            else (found["value"], found.get("low"), found.get("high"))
        )

    @property
    def case(self) -> dict[str, Any]:
        """The measured case that is shown: the smallest batch with the longest prompt."""
        cases = self.bench.get("cases") or [{}]
        return min(cases, key=lambda case: (case.get("batch", 0), -case.get("prefill", 0)))


def read_compared(paths: Sequence[str | Path]) -> list[Compared]:
    """Reads and joins results.

    Raises:
        FolderError: A file cannot be read, is neither, or has no hash.
    """
    found: dict[str, Compared] = {}
    for path in map(Path, paths):
        fields, kind = _read(path)
        contents = fields["contents"]["candidate"] if kind == "verdict" else fields["contents"]
        number, where = contents.get("hash"), contents["path"]
        if not isinstance(number, str):
            raise FolderError(f"{path} has no hash of its bundle, which could not be read: run it again")
        bundle = found.setdefault(number, Compared(name=Path(where).name or where, hash=number))
        if getattr(bundle, kind):
            raise FolderError(f"{path} is a second {kind} of {where}: give one {kind}.json a bundle")
        setattr(bundle, kind, fields)
    return list(found.values())


def _read(path: Path) -> tuple[dict[str, Any], str]:
    """A result's fields, and whether it is a `verdict` or a `bench`."""
    if path.is_dir():
        inside = [path / name for name in FILES if (path / name).is_file()]
        if not inside:
            raise FolderError(f"{path} holds neither {' nor '.join(FILES)}: give what check -o or bench -o wrote")
        path = inside[0]
    advice = "give a verdict.json of `arriero check -o` or a bench.json of `arriero bench -o`"
    try:
        fields = parse_json(read_text(path, remedy=advice, most=LARGEST_FILE))
    except (FileNotFoundError, ValueError) as error:
        why = error.strerror if isinstance(error, OSError) else "not JSON"
        raise FolderError(f"{path}: {why}: {advice}") from error
    try:
        check_fields(fields, {"schema": int})
        if fields["schema"] != 1:
            raise ValueError(f"its schema is {fields['schema']}")
        kind = "verdict" if "outcome" in fields else "bench"
        check_fields(fields, VERDICT if kind == "verdict" else BENCH)
    except ValueError as error:
        raise FolderError(f"{path} is no result that this Arriero wrote ({error}): {advice}") from error
    return fields, kind


def compare_page(paths: Sequence[str | Path]) -> str:
    """The page.

    Raises:
        FolderError: As `read_compared`.
    """
    bundles = read_compared(paths)
    if not bundles:
        raise ArrieroError("there is nothing to compare: give verdict.json and bench.json files")
    bundles.sort(key=lambda each: each.bytes or 0)
    return render(
        title=_title(bundles),
        lead=_lead(bundles),
        sections=[
            Section(title="Side by side", text=" ".join(_notes(bundles)), body=_table(bundles)),
            *_scatter(bundles),
            Section(title="Recipes", body=_recipes(bundles)),
        ],
        circumstances=circumstances(),
    )


def _title(bundles: Sequence[Compared]) -> str:
    sizes = [each.bytes for each in bundles if each.bytes]
    span = f", {_size(min(sizes))} to {_size(max(sizes))}" if len(sizes) > 1 else ""
    return f"{len(bundles)} bundle{'s' if len(bundles) > 1 else ''} compared{span}"


def _lead(bundles: Sequence[Compared]) -> str:
    checked = [each for each in bundles if each.verdict]
    if not checked:
        return ""
    passed = [each.name for each in checked if each.verdict["outcome"] == "pass"]
    if not passed:
        is_open = any(each.verdict["outcome"] == "undecided" for each in checked)
        return "None of them is seen to keep its limits." if is_open else "None of them keeps its limits."
    smallest = next(each for each in checked if each.name in passed)
    text = f"The smallest that keeps its limits: {smallest.name}"
    fast = [each for each in checked if each.name in passed and each.case]
    if fast:
        fastest = max(fast, key=lambda each: each.case["decode_tokens_per_second"])
        text += f"; the fastest of those: {fastest.name}"
    return f"{text}."


def _notes(bundles: Sequence[Compared]) -> list[str]:
    """Reasons why rows may not be comparable, and what the speeds are of."""
    notes = []
    texts = {
        (each.verdict["contents"]["reference"].get("hash"), each.verdict["tokens"]) for each in bundles if each.verdict
    }
    if len(texts) > 1:
        notes.append("The checks are of different references or texts: perplexity and KL are not comparable.")
    places = {
        machine_text(each.bench["machine"]) + f", {_threads(each.bench['threads'])}" for each in bundles if each.bench
    }
    cases = {(each.case["batch"], each.case["prefill"]) for each in bundles if each.case}
    if len(places) > 1 or len(cases) > 1:
        notes.append("The measurements are of different machines, threads or lengths: speeds are not comparable.")
    elif cases:
        batch, prefill = next(iter(cases))
        notes.append(f"Speeds at batch {batch} behind {prefill} tokens, on {next(iter(places))}.")
    if alone := [each.name for each in bundles if not each.verdict]:
        notes.append(f"Without a verdict of the same contents: {', '.join(alone)}.")
    if alone := [each.name for each in bundles if not each.bench]:
        notes.append(f"Without a measurement of the same contents: {', '.join(alone)}.")
    return notes


def _threads(count: int) -> str:
    return f"{count} thread{'' if count == 1 else 's'}"


def _table(bundles: Sequence[Compared]) -> Any:
    columns = [Column(name="bundle", breaks=True), Column(name="verdict")]
    names = ("size", "perplexity", "KL, nats", "decode, tokens/s", "prefill, tokens/s", "memory")
    columns += [Column(name=name, numeric=True) for name in names]
    rows: list[list[str | Cell]] = []
    for each in bundles:
        outcome = str(each.verdict.get("outcome", ""))
        case = each.case
        rows.append(
            [
                Cell(text=each.name, small=each.hash[:8]),
                Cell(text=outcome, outcome=outcome),
                _size(each.bytes),
                _estimate(each.metric("perplexity")),
                _estimate(each.metric("kl")),
                f"{case['decode_tokens_per_second']:,.1f}" if case else "",
                f"{case['prefill_tokens_per_second']:,.0f}" if case else "",
                _size(each.bench.get("peak_rss_bytes")),
            ]
        )
    return table(columns, rows)


def _recipes(bundles: Sequence[Compared]) -> Any:
    return table([Column(name="bundle"), Column(name="recipe", breaks=True)], [[e.name, e.recipe] for e in bundles])


def _estimate(found: tuple[float, float | None, float | None] | None) -> str | Cell:
    if found is None:
        return ""
    value, low, high = found
    return Cell(text=f"{value:.4g}", small="" if low is None or high is None else f"{low:.4g} to {high:.4g}")


def _size(count: int | None) -> str:
    if count is None:
        return ""
    return f"{count / 1e9:,.2f} GB" if count >= 1e9 else f"{count / 1e6:,.1f} MB"


def _short(name: str) -> str:
    """A name that a phone has room for beside its circle."""
    return name if len(name) <= LONGEST_NAME else f"{name[: LONGEST_NAME - 6]}…{name[-5:]}"


def _scatter(bundles: Sequence[Compared]) -> list[Section]:
    """KL over speed where each was measured, else over size."""
    shown = [each for each in bundles if each.metric("kl") is not None]
    if not shown:
        return []
    by_speed = all(each.case for each in shown)

    known = [kl[0] for each in shown if (kl := each.metric("kl")) and kl[0] > SAME]
    floor = min(known) / 10 if known else SAME
    unit, in_unit = ("GB", 1e9) if max(each.bytes or 0 for each in shown) >= 1e9 else ("MB", 1e6)
    places = [each.case["decode_tokens_per_second"] if by_speed else (each.bytes or 0) / in_unit for each in shown]
    end = 1.2 * max(places) or 1.0

    def draw(axes: Axes) -> None:
        largest = max(each.bytes or 1 for each in shown)
        for at, each in enumerate(shown):
            kl = each.metric("kl")
            assert kl is not None
            x, y = places[at], max(kl[0], floor)
            if kl[1] is not None and kl[2] is not None:
                axes.plot([x, x], [max(kl[1], floor), max(kl[2], floor)], "-", color=series(at), alpha=0.5)
            axes.scatter([x], [y], s=30 + 260 * (each.bytes or 0) / largest, color=series(at), alpha=0.75)
            name = _short(each.name) + ("" if kl[0] >= floor else ", as the reference")
            beside, side = (13, "left") if x < end / 2 else (-13, "right")  # towards the middle, where there is room
            axes.annotate(
                name,
                (x, y),
                (beside, 0),
                textcoords="offset points",
                ha=side,
                va="center",
                fontsize=8,
                parse_math=False,
            )
        axes.set(yscale="log", xlim=(0, end))
        axes.margins(y=0.2)

    title = "KL divergence, nats a token: lower is nearer the reference"
    below = "decode, tokens/s: further right is faster" if by_speed else f"size, {unit}"
    wide = Panel(title=title, below=below, draw=draw, width=8.0, height=3.8)
    phone = Panel(title=title, below=below, draw=draw, height=3.2)
    caption = "Circles are as large as the bundles. Down and to the right is better."
    caption = caption if by_speed else "Lower is better."
    body = picture_in_two(phone, wide, label="Accuracy over speed", caption=caption)
    return [Section(title="Accuracy over speed" if by_speed else "Accuracy over size", body=body)]
