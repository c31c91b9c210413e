"""The history of checks: a line of JSON a run, appended, and read back as series of comparable runs.

Enters: the fields of verdicts. Leaves: `Run`s in the order of their lines. Runs are one series where candidate and
reference have the same names and the candidate the same profile of limits.
"""

import errno
import json
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import AccuracyError, printable, shortened
from ..files.fields import check_fields
from ..files.output import unwritable
from ..files.reading import open_regular, read_text
from ..spec.json_text import parse_json

LARGEST = 1 << 28
"""Bytes of a history at most."""

SCHEMA = 1
KEPT = ("date", "version", "command", "machine", "seconds", "candidate", "reference", "profile", "recipe", "outcome")
"""Fields of a verdict that a line takes over as they are."""

NUMBER = (float, None)
LINE = {
    "date": str,
    "candidate": str,
    "reference": str,
    "outcome": str,
    "metrics": {str: {"value": float, "low": NUMBER, "high": NUMBER}},
    "limits": [{"metric": str, "side": str, "limit": float, "outcome": str}],
    "hashes": ({"candidate": (str, None)}, None),
}
"""Fields that are read of a line."""

DATE = re.compile(r"\d{4}-\d{2}-\d{2}T\d{2}:\d{2}:\d{2}Z")
OUTCOMES = ("pass", "regressed", "undecided")


@dataclass(frozen=True, kw_only=True, slots=True)
class Run:
    """One check.

    Attributes:
        date: When it ran, UTC.
        candidate: Name of the candidate's folder.
        reference: Name of the reference.
        profile: The candidate's format.
        outcome: `pass`, `regressed` or `undecided`.
        metrics: Value and interval by metric; ends that are None are infinite.
        limits: Limit by metric: `side`, `limit` and `outcome`.
        hash: The candidate's hash; empty where it is unknown.
    """

    date: str
    candidate: str
    reference: str
    profile: str
    outcome: str
    metrics: Mapping[str, Mapping[str, float | None]]
    limits: Mapping[str, Mapping[str, Any]]
    hash: str

    @property
    def series(self) -> tuple[str, str, str]:
        """The name of the series that the run belongs to."""
        return self.candidate, self.reference, self.profile


def line_of(verdict: Mapping[str, Any]) -> str:
    """A run's line, from a verdict's fields."""
    contents = verdict.get("contents") or {}
    fields = {
        "schema": SCHEMA,
        **{name: verdict.get(name) for name in KEPT},
        "hashes": {side: (contents.get(side) or {}).get("hash") for side in ("candidate", "reference")},
        "metrics": verdict["metrics"],
        "limits": verdict["limits"],
    }
    return json.dumps(fields, ensure_ascii=False) + "\n"


def append_run(path: str | Path, verdict: Mapping[str, Any]) -> None:
    """Appends a run's line, in one write.

    Raises:
        AccuracyError: The file cannot be written.
    """
    try:
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        end = _missing_end(Path(path))
        number = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o666)
        try:
            os.write(number, end + printable(line_of(verdict)).encode("utf-8"))
        finally:
            os.close(number)
    except OSError as error:
        raise AccuracyError(f"{path}: {error.strerror or error}: give another file with --history") from error


def check_appendable(path: Path) -> None:
    """Refuses a history that no line can be appended to.

    Raises:
        AccuracyError: The file cannot be written, or there is none and none can be made.
    """
    exists = os.path.lexists(path)
    why = None if exists else unwritable(path.absolute().parent)
    if exists and not os.access(path, os.W_OK):
        why = os.strerror(errno.EACCES)
    if why is not None:
        raise AccuracyError(f"{path}: {why}: give another file with --history")


def _missing_end(path: Path) -> bytes:
    """A newline where a killed writer left none."""
    if not os.path.lexists(path):
        return b""
    with open_regular(path) as file:
        if not file.seek(0, os.SEEK_END):
            return b""
        file.seek(-1, os.SEEK_END)
        return b"" if file.read(1) == b"\n" else b"\n"


def read_history(path: str | Path, *, missing_ok: bool = False) -> list[Run]:
    """Reads a history.

    Args:
        path: The file.
        missing_ok: Whether a file that is not there is an empty history.

    Raises:
        AccuracyError: It cannot be read, or a line is no run.
    """
    path = Path(path)
    try:
        text = read_text(path, AccuracyError, "give what `arriero check --history` wrote", most=LARGEST)
    except FileNotFoundError as error:
        if missing_ok:
            return []
        raise AccuracyError(f"{path}: no such file: give what `arriero check --history` wrote") from error
    lines = enumerate(text.splitlines(), start=1)
    return [_run(line, f"{path}, line {number}") for number, line in lines if line.strip()]


def _run(line: str, where: str) -> Run:
    try:
        fields = parse_json(line)
        if not isinstance(fields, dict) or fields.get("schema") != SCHEMA:
            raise ValueError(f"its schema is no {SCHEMA}")
        check_fields(fields, LINE)
        if fields["outcome"] not in OUTCOMES:
            raise ValueError(f"its outcome is {shortened(fields['outcome'])}")
        if not DATE.fullmatch(fields["date"]):
            raise ValueError(f"its date is {shortened(fields['date'])}, expected one as 2031-05-01T04:00:00Z")
        return Run(
            date=str(fields["date"]),
            candidate=Path(str(fields["candidate"])).name,
            reference=Path(str(fields["reference"])).name,
            profile=str(fields["profile"]),
            outcome=fields["outcome"],
            metrics={str(name): _estimate(found) for name, found in fields["metrics"].items()},
            limits={str(each["metric"]): _limit(each) for each in fields["limits"]},
            hash=str((fields.get("hashes") or {}).get("candidate") or ""),
        )
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        why = f"lacks {error}" if isinstance(error, KeyError) else str(error)[:120]
        remedy = "remove the line, or give another file"
        raise AccuracyError(f"{where} is no run of `arriero check --history` ({why}): {remedy}") from error


def _estimate(found: Mapping[str, Any]) -> dict[str, float | None]:
    return {
        "value": float(found["value"]),
        **{name: None if found[name] is None else float(found[name]) for name in ("low", "high")},
    }


def _limit(each: Mapping[str, Any]) -> dict[str, Any]:
    return {"side": str(each["side"]), "limit": float(each["limit"]), "outcome": str(each["outcome"])}


def in_series(runs: Sequence[Run]) -> dict[tuple[str, str, str], list[Run]]:
    """Runs by series, in the order of their first runs."""
    found: dict[tuple[str, str, str], list[Run]] = {}
    for run in runs:
        found.setdefault(run.series, []).append(run)
    return found
