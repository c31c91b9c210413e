"""The trend over many checks: each metric with its intervals and its limit, run by run.

Enters: runs of one series. Leaves: pictures and tables for a page, and `trend_page` of whole histories.
"""

from collections.abc import Sequence
from pathlib import Path

from matplotlib.axes import Axes

from ..errors import AccuracyError
from ..files.circumstances import circumstances
from .history import Run, in_series, read_history
from .page import Cell, Column, Section, render, table
from .pictures import Mark, Panel, colour, picture

NAMES = {
    "perplexity_ratio": "perplexity over the reference's",
    "kl": "KL divergence, nats a token",
    "top1": "same likeliest token",
    "flips": "flips",
    "router_flips": "experts chosen otherwise",
    "greedy": "greedy tokens alike, of 32",
}
"""Metrics that a trend shows, in order, and their words."""

SHORT = {
    "perplexity_ratio": "perplexity ratio",
    "kl": "KL",
    "top1": "top-1",
    "flips": "flips",
    "router_flips": "experts",
    "greedy": "greedy",
}
"""Their short names, for the head of a table."""

COLOURS = {"pass": "good", "regressed": "bad", "undecided": "open"}
SAID = {"pass": "passed", "regressed": "regressed", "undecided": "undecided"}
TICKS = 5
"""Dates, at most, below a picture."""

MOST_LISTED = 30
"""Runs, at most, that a table lists; the last ones."""


def trend_sections(runs: Sequence[Run], title: str = "Trend") -> list[Section]:
    """A series as a part of a page; nothing where there is no run."""
    if not runs:
        return []
    names = [name for name in NAMES if any(name in run.metrics for run in runs)]
    panels = [
        Panel(title=NAMES[name], draw=lambda axes, name=name: _draw_metric(axes, runs, name))  # type: ignore[misc]
        for name in names
    ]
    legend = [Mark(colour=COLOURS[name], words=words, sign="area") for name, words in SAID.items()]
    legend.append(Mark(colour="faint", words="limit", sign="dash"))
    caption = "Each run with its 95 % interval."
    drawn = picture(panels, label=f"Metrics over {len(runs)} runs", legend=legend, caption=caption, columns=3)
    listed = list(runs)[-MOST_LISTED:]
    body = drawn + table(
        [Column(name="run, UTC"), Column(name="outcome"), *(Column(name=SHORT[name], numeric=True) for name in names)],
        [_row(run, names) for run in reversed(listed)],
    )
    more = f", the last {MOST_LISTED} in the table" if len(runs) > MOST_LISTED else ""
    return [Section(title=title, text=f"{_counted(runs)}{more}.", body=body)]


def trend_page(paths: Sequence[str | Path]) -> str:
    """The page of one or more histories.

    Raises:
        AccuracyError: A history cannot be read, or none of them has a run.
    """
    runs = [run for path in paths for run in read_history(path)]
    if not runs:
        raise AccuracyError(f"{paths[0]} holds no run: write one with `arriero check --history`")
    series = in_series(sorted(runs, key=lambda run: run.date))
    last = [each[-1] for each in series.values()]
    broken = [run.candidate for run in last if run.outcome == "regressed"]
    open_ones = [run.candidate for run in last if run.outcome == "undecided"]
    outcome = "regressed" if broken else "undecided" if open_ones else "pass"
    words = {
        "regressed": f"Regressed in the last run: {', '.join(broken)}",
        "undecided": f"Not enough data in the last run: {', '.join(open_ones)}",
        "pass": f"{last[0].candidate} passes" if len(last) == 1 else f"All {len(last)} series pass",
    }
    sections = [
        section
        for (candidate, reference, profile), each in series.items()
        for section in trend_sections(each, f"{candidate} ({profile}) against {reference}")
    ]
    return render(
        title=words[outcome],
        outcome=outcome,
        lead=f"{len(runs)} runs from {runs[0].date[:10]} to {max(run.date for run in runs)[:10]}.",
        sections=sections,
        circumstances=circumstances(),
    )


def _counted(runs: Sequence[Run]) -> str:
    counts = {name: sum(run.outcome == name for run in runs) for name in COLOURS}
    parts = [f"{count} {SAID[name]}" for name, count in counts.items() if count]
    return f"{len(runs)} run{'s' if len(runs) > 1 else ''}: {', '.join(parts)}"


def _row(run: Run, names: Sequence[str]) -> list[str | Cell]:
    cells: list[str | Cell] = [run.date.replace("T", " ").rstrip("Z"), Cell(text=run.outcome, outcome=run.outcome)]
    for name in names:
        found = run.metrics.get(name)
        cells.append("" if found is None else f"{found['value']:.4g}")
    return cells


def _draw_metric(axes: Axes, runs: Sequence[Run], name: str) -> None:
    places = [at for at, run in enumerate(runs) if name in run.metrics]
    values = [float(runs[at].metrics[name]["value"] or 0.0) for at in places]
    axes.plot(places, values, "-", color=colour("c1"), linewidth=1)
    for at, value in zip(places, values, strict=True):
        found = runs[at].metrics[name]
        judged = runs[at].limits.get(name)
        mark = colour(COLOURS.get(str(judged["outcome"]), "c1") if judged else "c1")
        low, high = found["low"], found["high"]
        if low is not None and high is not None:
            axes.plot([at, at], [low, high], "-", color=mark, linewidth=2, alpha=0.45)
        axes.plot(at, value, "o", color=mark, markersize=4, clip_on=False)
    limited = [(at, float(runs[at].limits[name]["limit"])) for at in places if name in runs[at].limits]
    if limited:
        axes.step(*zip(*limited, strict=True), "--", where="mid", color=colour("faint"), linewidth=1)
        if len(limited) == 1:
            axes.axhline(limited[0][1], linestyle="--", color=colour("faint"), linewidth=1)
    step = max(1, -(-len(runs) // TICKS))
    shown = list(range(0, len(runs), step))
    axes.set_xticks(shown, _times([runs[at].date for at in shown]))
    axes.set_ylim(bottom=max(0.0, axes.get_ylim()[0]))
    axes.set_xlim(-0.5, max(len(runs) - 0.5, 0.5))


def _times(dates: Sequence[str]) -> list[str]:
    """The day of each date; where it is that of the one before, the time of day."""
    before = ["", *dates]
    return [date[11:16] if date[:10] == last[:10] else date[5:10] for last, date in zip(before, dates, strict=False)]
