"""Limits as people give them: on the command line and in a file with a profile for each recipe.

Enters: options, and a TOML file. Leaves: limits by metric, each with its origin, all of them in range. The file:

    [every]              # for every candidate
    flips = 0.05
    [int8]               # for candidates in int8; none, fp8 and int4 as well
    kl = 0.02
    top1 = 0.95
"""

import math
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from ..errors import AccuracyError, shortened, shortened_text
from ..files.fields import LARGEST
from ..files.reading import read_bytes
from .gates import DEFAULTS, METRICS
from .recorded import CONTINUED

Origin = Literal["default", "file", "given"]
EVERY = "every"
LARGEST_FILE = 1 << 14
"""Bytes of a file of limits at most: names of many parts take tomllib time that grows with their square."""

RANGES: dict[str, tuple[float, float, str]] = {
    "perplexity_ratio": (0.0, math.inf, "a ratio above 0, as 1.02"),
    "kl": (0.0, math.inf, "nats from 0 up, as 0.03"),
    "top1": (0.0, 1.0, "a share from 0 to 1, as 0.95"),
    "flips": (0.0, 1.0, "a share from 0 to 1, as 0.05"),
    "router_flips": (0.0, 1.0, "a share from 0 to 1, as 0.05"),
    "greedy": (0.0, float(CONTINUED), f"tokens from 0 to {CONTINUED}"),
}
"""The range of each limit, and its words."""


def effective(
    format: str, given: Mapping[str, float | None], file: Mapping[str, Mapping[str, float]] | None = None
) -> tuple[dict[str, float], dict[str, Origin]]:
    """The limits of a candidate, and where each comes from.

    Args:
        format: The candidate's format, `none` where it is not quantised: the profile's name.
        given: Limits that go before all others; None leaves one as it is.
        file: Profiles, as `read_limits` gives them.

    Raises:
        AccuracyError: A limit is unknown or out of range.
    """
    limits, origins = dict(DEFAULTS[format]), dict.fromkeys(DEFAULTS[format], "default")
    profiles = file or {}
    for profile in (EVERY, format):
        limits |= profiles.get(profile, {})
        origins |= dict.fromkeys(profiles.get(profile, {}), "file")
    for metric, limit in given.items():
        if limit is not None:
            limits[metric], origins[metric] = check_limit(metric, limit), "given"
    return limits, origins  # type: ignore[return-value]


def read_limits(path: str | Path) -> dict[str, dict[str, float]]:
    """Reads a file of limits.

    Returns:
        Limits by profile and metric.

    Raises:
        AccuracyError: The file cannot be read, or names something unknown or out of range.
    """
    path = Path(path)
    remedy = "give a TOML file of limits with --limits"
    try:
        content = read_bytes(path, AccuracyError, remedy, most=LARGEST_FILE)
    except FileNotFoundError as error:
        raise AccuracyError(f"{path}: {error.strerror}: {remedy}") from error
    try:
        profiles = tomllib.loads(content.decode("utf-8"))
    except (ValueError, RecursionError) as error:
        raise AccuracyError(f"{path}: not TOML ({shortened_text(str(error), 100)}): correct it") from error
    return {name: _profile(path, name, fields) for name, fields in profiles.items()}


def _profile(path: Path, name: str, fields: Any) -> dict[str, float]:
    """One profile's limits."""
    if name in METRICS and not isinstance(fields, dict):
        raise AccuracyError(f"{path}: {name} stands in no table: put it under [{EVERY}] or a recipe's, as [int8]")
    if name not in (EVERY, *DEFAULTS):
        names = ", ".join(f"[{each}]" for each in (EVERY, *DEFAULTS))
        raise AccuracyError(f"{path}: profile [{shortened_text(name, 60)}] is unknown: choose from {names}")
    if not isinstance(fields, dict):
        raise AccuracyError(f"{path}: {name} is {shortened(fields)}, expected a table [{name}] of limits: correct it")
    found = {}
    for metric, limit in fields.items():
        try:
            found[metric] = check_limit(metric, limit)
        except AccuracyError as error:
            raise AccuracyError(f"{path}, [{name}]: {error}") from error
    return found


def check_limit(metric: str, limit: Any) -> float:
    """A limit in range.

    Raises:
        AccuracyError: The metric is unknown, or the limit is none that it can have.
    """
    if metric not in METRICS:
        raise AccuracyError(f"limit {shortened(metric)} is unknown: choose from {', '.join(METRICS)}")
    low, high, words = RANGES[metric]
    is_number = isinstance(limit, int | float) and not isinstance(limit, bool) and abs(limit) < math.inf
    if not is_number or not low <= limit <= min(high, LARGEST) or (metric == "perplexity_ratio") > limit:
        hint = ""
        if is_number and high == 1.0 and 1 < limit <= 100:
            hint = f": {limit:g} % is {limit / 100:g}"
        raise AccuracyError(f"the limit of {metric} is {shortened(limit)}, expected {words}{hint}")
    return float(limit)
