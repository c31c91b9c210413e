"""A verdict written down: `verdict.json` for programs, `junit.xml` for CI, `report.html` for people.

Enters: a verdict, and the tokenizer's folder. Leaves: a folder of the three, complete or not there. The page is one
self-contained file.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
from jinja2 import Environment

from .. import __version__
from ..errors import printable
from ..files.output import new_folder
from ..runtime.text import Text
from .check import Verdict
from .gates import METRICS, Judgement
from .metrics import Estimate, routing_matrix
from .plots import plot_divergence, plot_profile, plot_routing

VERDICT = "verdict.json"
WORST, CONTEXT = 12, 12
"""Tokens that are shown, and how many before each."""

WORDS = {"pass": "passes", "regressed": "has regressed", "undecided": "cannot be judged: not enough data to tell"}


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


def write_report(verdict: Verdict, out: str | Path, *, force: bool = False) -> Path:
    """Writes the three files.

    Raises:
        FolderError: `out` exists, or cannot be written.
    """
    out = Path(out)
    with new_folder(out, force=force, mark=VERDICT) as folder:
        (folder / VERDICT).write_text(json.dumps(verdict.as_fields(), indent=1) + "\n", "utf-8")
        (folder / "junit.xml").write_bytes(junit(verdict))
        (folder / "report.html").write_text(printable(page(verdict)), "utf-8")
    return out


def junit(verdict: Verdict) -> bytes:
    """A test suite with a case for each limit; what cannot be decided is an error, so that CI does not pass it."""
    outcomes = [judgement.outcome for judgement in verdict.judgements]
    counts = {
        "tests": str(len(outcomes)),
        "failures": str(outcomes.count("regressed")),
        "errors": str(outcomes.count("undecided")),
    }
    suite = ElementTree.Element("testsuite", {"name": printable(f"arriero check {verdict.candidate}"), **counts})
    for judgement in verdict.judgements:
        case = ElementTree.SubElement(suite, "testcase", classname="arriero.check", name=judgement.metric)
        text = sentence(judgement)
        if judgement.outcome == "regressed":
            ElementTree.SubElement(case, "failure", message=text)
        elif judgement.outcome == "undecided":
            ElementTree.SubElement(case, "error", message=f"{text}: not enough data to tell")
    if verdict.location is not None and verdict.location.blame is not None:
        blame = verdict.location.blame
        ElementTree.SubElement(suite, "system-out").text = f"{verdict.location.place}: {blame.name}: {blame.why}"
    return bytes(ElementTree.tostring(suite, encoding="utf-8", xml_declaration=True))


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


def worst_tokens(verdict: Verdict) -> list[WorstToken]:
    """The tokens with the largest divergence, at most one of each window's neighbourhood."""
    seen, text = verdict.comparison, Text(Path(verdict.candidate))
    found: list[WorstToken] = []
    for flat in np.argsort(-seen.divergence_WN, axis=None):
        window, at = (int(each) for each in np.unravel_index(flat, seen.divergence_WN.shape))
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


def page(verdict: Verdict) -> str:
    """The report as one page."""
    matrix_EE = routing_matrix(verdict.comparison)
    named = {name: words for name, (_, words) in METRICS.items()}
    named |= {"reference_perplexity": "perplexity of the reference", "perplexity": "perplexity of the candidate"}
    template = Environment(autoescape=True).from_string(TEMPLATE)
    return template.render(
        verdict=verdict,
        words=WORDS,
        named=named,
        inf=np.inf,
        judged={judgement.metric: judgement for judgement in verdict.judgements},
        worst=worst_tokens(verdict),
        divergence=plot_divergence(verdict.comparison),
        profile=None if verdict.location is None else plot_profile(verdict.location),
        routing=None if matrix_EE is None else plot_routing(matrix_EE),
        version=__version__,
    )


TEMPLATE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<title>{{ verdict.candidate }} {{ verdict.outcome }}</title>
<style>
body { font: 16px/1.5 system-ui, sans-serif; max-width: 62rem; margin: 2rem auto; padding: 0 1rem; color: #222 }
h1, h2 { font-weight: 600; line-height: 1.2; overflow-wrap: anywhere } h2 { margin-top: 2.5rem }
.wide { overflow-x: auto } img { max-width: 62rem; width: 100%; min-width: 36rem } .small { width: auto }
table { border-collapse: collapse; font-size: 14px }
td, th { padding: .3rem .9rem .3rem 0; text-align: left; border-bottom: 1px solid #ddd; vertical-align: top }
td.n, th.n { text-align: right; font-variant-numeric: tabular-nums; white-space: nowrap }
.pass { color: #228833 } .regressed { color: #cc3311 } .undecided { color: #997700 }
.box { border-left: 4px solid #cc3311; padding: .2rem 1rem; background: #fbf3f1; overflow-wrap: anywhere }
code { font: 13px ui-monospace, monospace; background: #f3f3f3; padding: 0 .2rem; white-space: pre-wrap }
</style></head><body>
<h1>{{ verdict.candidate }} <span class="{{ verdict.outcome }}">{{ words[verdict.outcome] }}</span></h1>
<p>Held against {{ verdict.reference }} over {{ "{:,}".format(verdict.tokens) }} tokens in {{ verdict.windows }}
windows. Intervals hold 95 %, by drawing windows anew. Arriero {{ version }}.</p>
{% for note in verdict.notes %}<p>{{ note }}</p>{% endfor %}
{% set l = verdict.location %}{% if l %}{% if l.blame %}
<div class="box"><p><b>First out of line: {{ l.place }}, {{ l.blame.name }}
{%- if l.blame.attribute %}, attribute {{ l.blame.attribute }}{% endif %}</b> ({{ l.blame.op }}): {{ l.blame.why }}.</p>
<p>It shows at {{ l.unit }}: an error of {{ "%.2g"|format(l.error) }} on the reference's input, where at most
{{ "%.2g"|format(l.explained) }} is explained by rounding and by the other layers.</p></div>
{% else %}<p class="pass">No layer is out of line: every unit's error on the reference's input is what rounding
explains.</p>{% endif %}{% endif %}
<h2>What was found</h2><div class="wide">
<table><tr><th>metric</th><th class="n">found</th><th class="n">limit</th><th></th></tr>
{% for name, found in verdict.metrics.items() %}{% set j = judged.get(name) %}
<tr><td>{{ named[name] }}</td><td class="n">{{ "%.4g"|format(found.value) }}
{%- if found.low > -inf %}<br><small>{{ "%.4g to %.4g"|format(found.low, found.high) }}</small>{% endif %}</td>
<td class="n">{% if j %}{{ "≤" if j.side == "max" else "≥" }} {{ "%g"|format(j.limit) }}{% endif %}</td>
<td>{% if j %}<span class="{{ j.outcome }}">{{ j.outcome }}</span>{% endif %}</td></tr>{% endfor %}</table></div>
{% if profile %}<h2>Layers</h2><p>Each layer run on the reference's input: how far each unit's output is off.</p>
<div class="wide">
<img alt="Error by layer" src="data:image/png;base64,{{ profile }}"></div>{% endif %}
<h2>Divergence</h2><p>How far the candidate's expectation of the next token is from the reference's.</p>
<div class="wide"><img alt="KL divergence" src="data:image/png;base64,{{ divergence }}"></div>
{% if routing %}<h2>Experts</h2><p>Where the tokens went that the reference sent to an expert (row), in percent, over
all layers. A token at another expert is a flip, not a rounding.</p>
<div class="wide"><img class="small" alt="Agreement of experts" src="data:image/png;base64,{{ routing }}"></div>
{% endif %}
<h2>The worst tokens</h2><div class="wide"><table>
<tr><th class="n">KL, nats</th><th>text before</th><th>comes</th><th>reference</th><th>candidate</th></tr>
{% for w in worst %}<tr><td class="n">{{ "%.2f"|format(w.divergence) }}</td><td><code>{{ w.before }}</code></td>
<td><code>{{ w.next }}</code></td><td><code>{{ w.reference }}</code></td><td><code>{{ w.candidate }}</code></td></tr>
{% endfor %}</table></div>
</body></html>
"""
