"""A verdict as `junit.xml`, which CI systems read: a test case for each limit, with its value, limit and time."""

import re
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np

from .. import __version__
from ..files.circumstances import machine_text
from .check import Verdict
from .gates import Judgement
from .metrics import Estimate

FORBIDDEN = re.compile("[^\t\n\r\x20-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")
"""Characters that XML does not hold."""


def junit(verdict: Verdict) -> bytes:
    """A test suite with a case for each limit; what cannot be decided is an error, so that CI does not pass it."""
    outcomes = [judgement.outcome for judgement in verdict.judgements]
    attributes = {
        "name": f"arriero check {verdict.candidate}",
        "tests": str(len(outcomes)),
        "failures": str(outcomes.count("regressed")),
        "errors": str(outcomes.count("undecided")),
        "skipped": "0",
        "time": f"{verdict.seconds:.3f}",
    }
    if date := verdict.circumstances.get("date"):
        attributes["timestamp"] = str(date).removesuffix("Z")
    suite = ElementTree.Element("testsuite", _clean(attributes))
    _properties(suite, _about(verdict))
    for judgement in verdict.judgements:
        _case(suite, verdict, judgement)
    if verdict.location is not None and verdict.location.blame is not None:
        blame = verdict.location.blame
        text = f"{verdict.location.place}: {blame.name}: {blame.why}"
        ElementTree.SubElement(suite, "system-out").text = FORBIDDEN.sub("?", text)
    return bytes(ElementTree.tostring(suite, encoding="utf-8", xml_declaration=True))


def _about(verdict: Verdict) -> dict[str, Any]:
    contents, around = verdict.contents, verdict.circumstances
    about = {"reference": verdict.reference, "profile": verdict.profile, "tokens": verdict.tokens}
    about |= {"windows": verdict.windows, "version": __version__}
    about |= {name: around.get(name) for name in ("date", "command")}
    about["machine"] = machine_text(around["machine"]) if around.get("machine") else None
    about |= {f"{side}_hash": (contents.get(side) or {}).get("hash") for side in ("candidate", "reference")}
    return {name: value for name, value in about.items() if value is not None}


def _case(suite: ElementTree.Element, verdict: Verdict, judgement: Judgement) -> None:
    name = Path(verdict.candidate).name or verdict.candidate
    share = verdict.seconds / max(1, len(verdict.judgements))  # all limits are judged in one run
    attributes = {"classname": f"arriero.check.{name}", "name": judgement.metric, "time": f"{share:.3f}"}
    case = ElementTree.SubElement(suite, "testcase", _clean(attributes))
    bound = {"max": "at most", "min": "at least"}[judgement.side]
    values: dict[str, Any] = {"limit": f"{judgement.limit:g}", "limit_is": bound, "limit_origin": judgement.origin}
    if (found := judgement.found) is not None:
        values["value"] = f"{found.value:.6g}"
        if np.isfinite(found.low):
            values |= {"low": f"{found.low:.6g}", "high": f"{found.high:.6g}"}
    _properties(case, values)
    text = sentence(judgement)
    if judgement.outcome == "regressed":
        ElementTree.SubElement(case, "failure", _clean({"message": text, "type": "regressed"}))
    elif judgement.outcome == "undecided":
        message = f"{text}: not enough data to tell"
        ElementTree.SubElement(case, "error", _clean({"message": message, "type": "undecided"}))
    ElementTree.SubElement(case, "system-out").text = FORBIDDEN.sub("?", text)


def _properties(parent: ElementTree.Element, values: dict[str, Any]) -> None:
    properties = ElementTree.SubElement(parent, "properties")
    for name, value in values.items():
        ElementTree.SubElement(properties, "property", _clean({"name": name, "value": str(value)}))


def _clean(attributes: dict[str, str]) -> dict[str, str]:
    return {name: FORBIDDEN.sub("?", value) for name, value in attributes.items()}


def sentence(judgement: Judgement) -> str:
    """A limit and what was found, as in `kl is 0.1 (0.09 to 0.11), at most 0.03 is allowed`."""
    bound = "at most" if judgement.side == "max" else "at least"
    return f"{judgement.metric} is {shown(judgement.found)}, {bound} {judgement.limit:g} is allowed"


def shown(found: Estimate | None) -> str:
    """An estimate with its interval."""
    if found is None:
        return "unknown"
    if not np.isfinite(found.low):
        return f"{found.value:.4g}"
    return f"{found.value:.4g} ({found.low:.4g} to {found.high:.4g})"
