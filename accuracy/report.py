"""A verdict written down: `verdict.json` for programs, `junit.xml` for CI, `report.html` for people.

Enters: a verdict, the tokenizer's folder, and the history where there is one. Leaves: a folder of the three, complete
or not there. The page is one self-contained file.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ..files.output import new_folder
from ..pages.history import Run
from ..pages.page import Cell, Column, Section, box, render, table
from ..pages.trend import trend_sections
from ..runtime.text import Text
from .check import Verdict
from .gates import METRICS, Judgement
from .junit import junit
from .metrics import Estimate, moved_by_layer
from .plots import plot_divergence, plot_profile, plot_routing
from .recorded import CONTINUED

VERDICT = "verdict.json"
WORST, CONTEXT = 12, 12
"""Tokens that are shown, and how many before each."""

WORDS = {"pass": "passes", "regressed": "has regressed", "undecided": "cannot be judged: not enough data to tell"}
INTERVALS = "Intervals hold 95 %, by drawing whole windows anew."
ORIGINS = {"default": "by default", "file": "from the file", "given": "as given"}
NAMES = {name: words for name, (_, words) in METRICS.items()} | {
    "reference_perplexity": "perplexity of the reference",
    "perplexity": "perplexity of the candidate",
}


@dataclass(frozen=True, kw_only=True, slots=True)
class WorstToken:
    """One of the tokens where the two differ most, with what stands before it and what each expects."""

    window: int
    position: int
    divergence: float
    before: str
    next: str
    reference: str
    candidate: str


def write_report(verdict: Verdict, out: str | Path, *, force: bool = False, history: Sequence[Run] = ()) -> Path:
    """Writes the three files.

    Args:
        verdict: The verdict.
        out: The folder.
        force: Whether an existing report is replaced.
        history: Runs, this one the last, whose trend the page shows.

    Raises:
        FolderError: `out` exists, or cannot be written.
    """
    out = Path(out)
    with new_folder(out, force=force, mark=VERDICT) as folder:
        (folder / VERDICT).write_text(json.dumps(verdict.as_fields(), indent=1) + "\n", "utf-8")
        (folder / "junit.xml").write_bytes(junit(verdict))
        (folder / "report.html").write_text(page(verdict, history), "utf-8")
    return out


def shown(name: str, found: Estimate | None) -> tuple[str, str]:
    """A metric's value and its interval, as `14.6 of 32`."""
    if found is None:
        return "unknown", ""
    value = f"{found.value:.3g} of {CONTINUED}" if name == "greedy" else f"{found.value:.4g}"
    return value, f"{found.low:.4g} to {found.high:.4g}" if np.isfinite(found.low) else ""


def worst_tokens(verdict: Verdict) -> list[WorstToken]:
    """The tokens with the largest divergence, at most one of each window's neighbourhood."""
    seen, text = verdict.comparison, Text(Path(verdict.candidate))
    found: list[WorstToken] = []
    for flat in np.argsort(-np.where(seen.golden.judged_WN, seen.divergence_WN, -np.inf), axis=None):
        window, at = (int(each) for each in np.unravel_index(flat, seen.divergence_WN.shape))
        if not seen.golden.judged_WN[window, at]:
            break
        if any(window == other.window and abs(at - other.position) < CONTEXT for other in found):
            continue
        ids = seen.golden.ids_WS[window]

        def words(*tokens: int) -> str:
            return text.decode([int(token) for token in tokens]).replace("\n", "⏎").replace("  ", "␣␣") or "·"

        found.append(
            WorstToken(
                window=window,
                position=at,
                divergence=float(seen.divergence_WN[window, at]),
                before=words(*ids[max(0, at + 1 - CONTEXT) : at + 1]),
                next=words(ids[at + 1]),
                reference=words(seen.reference_likeliest_WN[window, at]),
                candidate=words(seen.likeliest_WN[window, at]),
            )
        )
        if len(found) == WORST:
            break
    return found


def page(verdict: Verdict, history: Sequence[Run] = ()) -> str:
    """The report as one page."""
    name = Path(verdict.candidate).name or verdict.candidate
    return render(
        title=f"{name} {WORDS[verdict.outcome]}",
        outcome=verdict.outcome,
        lead=(
            f"{verdict.candidate} against {verdict.reference}, over {verdict.tokens:,} tokens in {verdict.windows} "
            f"windows. {verdict.recipe[:1].upper()}{verdict.recipe[1:]}."
        ),
        sections=[
            *_location(verdict),
            _metrics(verdict),
            *trend_sections(history),
            *_layers(verdict),
            _divergence(verdict),
            *_experts(verdict),
            _worst(verdict),
        ],
        circumstances=verdict.circumstances,
    )


def _location(verdict: Verdict) -> list[Section]:
    location = verdict.location
    if location is None:
        return []
    blame = location.blame
    if blame is None:
        text = "No layer is out of line: every unit's error on the reference's input is what rounding explains."
        return [Section(text=text)]
    attribute = f", attribute {blame.attribute}" if blame.attribute else ""
    title = f"First out of line: {location.place}, {blame.name}{attribute} ({blame.op})"
    text = (
        f"{blame.why[:1].upper()}{blame.why[1:]}. It shows at {location.unit}: an error of {location.error:.2g} on the "
        f"reference's input, where at most {location.explained:.2g} is explained by rounding and by the other layers."
    )
    return [Section(body=box(title, text))]


def _metrics(verdict: Verdict) -> Section:
    judged = {judgement.metric: judgement for judgement in verdict.judgements}
    rows = []
    for name in [*verdict.metrics, *(name for name in judged if name not in verdict.metrics)]:
        value, interval = shown(name, verdict.metrics.get(name))
        rows.append([NAMES[name], Cell(text=value, small=interval), *_limit(judged.get(name))])
    has_intervals = any(np.isfinite(found.low) for found in verdict.metrics.values())
    said = [INTERVALS if has_intervals else "There are too few windows for intervals."]
    said += [f"To decide what is open, {verdict.remedy}."] if verdict.remedy else []
    text = " ".join([*said, *verdict.notes])
    columns = [Column(name="metric", breaks=True), Column(name="found", numeric=True)]
    columns.append(Column(name="limit", numeric=True))
    return Section(title="What was found", text=text, body=table(columns, rows))


def _limit(judgement: Judgement | None) -> list[str | Cell]:
    if judgement is None:
        return [""]
    bound = f"{'≤' if judgement.side == 'max' else '≥'} {judgement.limit:g}"
    return [
        Cell(text=f"{judgement.outcome}, {bound}", small=ORIGINS[judgement.origin], outcome=judgement.outcome),
    ]


def _layers(verdict: Verdict) -> list[Section]:
    if verdict.location is None:
        return []
    text = "Each layer run on the reference's input: how far each unit's output is off."
    return [Section(title="Layers", text=text, body=plot_profile(verdict.location))]


def _divergence(verdict: Verdict) -> Section:
    text = "How far the candidate's expectation of the next token is from the reference's."
    return Section(title="Divergence", text=text, body=plot_divergence(verdict.comparison, verdict.metrics["kl"]))


def _experts(verdict: Verdict) -> list[Section]:
    seen = verdict.comparison
    moved_LE, flips = moved_by_layer(seen), verdict.metrics.get("router_flips")
    if moved_LE is None or flips is None:
        return []
    layers = [index for index, layer in enumerate(seen.golden.spec.layers) if layer.experts]
    text = (
        f"{100 * (1 - flips.value):.4g} % of all choices agree. Of the tokens that the reference sent to an expert, "
        "the share that went elsewhere: up to 1 % is what rounding does to near ties."
    )
    return [Section(title="Experts", text=text, body=plot_routing(moved_LE, layers[: len(moved_LE)]))]


def _worst(verdict: Verdict) -> Section:
    columns = [Column(name="KL, nats", numeric=True), Column(name="text before", breaks=True)]
    columns += [Column(name=name) for name in ("comes", "reference", "candidate")]
    rows: list[list[str | Cell]] = [
        [f"{each.divergence:.3g}", *(Cell(text=text, code=True) for text in _words(each))]
        for each in worst_tokens(verdict)
    ]
    return Section(title="The worst tokens", body=table(columns, rows))


def _words(token: WorstToken) -> tuple[str, ...]:
    return token.before, token.next, token.reference, token.candidate
