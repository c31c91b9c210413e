"""Tables on the terminal: a folder in numbers, its speed, what became of its weights, and a verdict."""

import re
from collections import Counter, defaultdict
from pathlib import Path
from statistics import median
from typing import Any

from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from .ranks_table import describe_ranks, ranks_table
from .words import files_text, layers_text, parameters_text, place, quantised_text, size, sizes_text


def show_summary(found: dict[str, Any]) -> None:
    """Prints what `summary.summarise` found."""
    console = Console()
    model = found["model"]
    built_for = f" for {found['target']}" if found["target"] else ""
    source = escape(place(found["source"]))
    console.print(
        f"[bold]{found['kind'].capitalize()}{built_for}[/], from {source}, by Arriero {found['version']}",
        highlight=False,
    )
    facts = Table(show_header=False, box=None, padding=(0, 2, 0, 0))
    facts.add_row("layers", layers_text(model))
    facts.add_row("sizes", sizes_text(model))
    if "parameters" in found:
        facts.add_row("parameters", parameters_text(found["parameters"]))
    if (quantised := found.get("quantised")) is not None:
        facts.add_row("quantised", quantised_text(quantised))
    if (cache := found.get("kv_cache")) is not None:
        facts.add_row(
            "KV cache",
            f"{size(cache['bytes_per_token'])} a token; {size(cache['chunked_bytes_per_token'])} of it in chunked "
            "layers, which hold one chunk at most",
        )
    files = found.get("weight_files", {"count": 0})
    if files["count"]:
        listed = found.get("files")
        text = files_text(listed) if listed else f"{files['count']}, {size(files['bytes'])}, read in place"
        facts.add_row("weight files", escape(text))
    if not found["has_tokenizer"]:
        facts.add_row("tokenizer", "missing: export again with --tokenizer DIR")
    if (vision := found.get("vision")) is not None:
        missing = "" if found["has_preprocessor"] else "; its preprocessor_config.json is missing"
        facts.add_row("vision tower", describe_vision(vision) + missing)
    if (draft := found.get("draft")) is not None:
        facts.add_row("draft", describe_draft(draft))
    if (memory := found.get("memory")) is not None:
        facts.add_row("memory", describe_memory(memory))
    if (engine := found.get("engine")) is not None:
        facts.add_row("engine", describe_engine(engine))
    if (ranks := found.get("ranks")) is not None:
        facts.add_row("ranks", describe_ranks(ranks))
    console.print(facts, highlight=False)
    if ranks is not None:
        console.print(ranks_table(ranks))
    if engine is not None:
        console.print(profiles_table(engine))
        console.print(layers_table(found["layers"]))
    if "every_layer" in found:
        console.print(every_layer_table(found["every_layer"]))
    if vision is not None and "engine" in vision:
        console.print(layers_table(vision["fused_layers"], title="From the build log of the vision tower"))
        if "every_layer" in vision:
            console.print(every_layer_table(vision["every_layer"], title="Every fused layer of the vision tower"))


def describe_memory(memory: dict[str, int]) -> str:
    """Memory that a session on the CPU will take, in a sentence."""
    parts = {
        "mapped": "weights as they lie in their files",
        "converted": "weights widened or turned",
        "kv_cache": "KV cache",
        "kept": "kept by the allocator",
        "activations": "activations",
        "tower": "the vision tower from the first image on",
        "tiles": "its activations",
        "draft": "the draft and its KV cache",
    }
    named = [f"{size(memory[part])} {what}" for part, what in parts.items() if memory[part]]
    copied = f"; {size(memory['huge_pages'])} are copied with --pages huge" if memory["huge_pages"] else ""
    return (
        f"{size(memory['total'])} for {memory['batch']} × {memory['max_seq']} tokens: {', '.join(named)}, "
        f"{size(memory['process'] + memory['graph'])} the process{copied}"
    )


def describe_draft(draft: dict[str, Any]) -> str:
    """The head that drafts tokens, in a sentence."""
    layers, states = draft["layers"], [str(state) for state in draft["states"]]
    return (
        f"EAGLE-3, {layers} layer{'s' * (layers != 1)}, hidden {draft['hidden_size']}, guesses {draft['vocab_size']:,} "
        f"tokens from the states behind layers {', '.join(states)}; linears in "
        f"{draft['dtype'] if draft['format'] == 'none' else draft['format']}"
    )


def describe_vision(vision: dict[str, Any]) -> str:
    """The vision tower in a sentence, and its engine in another."""
    found = (
        f"{vision['layers']} layers, hidden {vision['hidden_size']}, {vision['heads']} heads; a tile of "
        f"{vision['image_size']} × {vision['image_size']} pixels is {vision['features']} tokens"
    )
    if (engine := vision.get("engine")) is None:
        return found
    return (
        f"{found}\nengine of {size(engine['bytes'])} for 1–{engine['max_tiles']} tiles; on the GPU "
        f"{size(engine['total_bytes'])} in all: {size(engine['weights_inside_bytes'])} weights inside, "
        f"{size(engine['weights_outside_bytes'])} outside, {size(engine['activations_bytes'])} activations, "
        f"{size(engine['tiles_bytes'])} tiles and their features"
    )


def describe_engine(engine: dict[str, Any]) -> str:
    """One line on an engine."""
    gpus = ", ".join(f"sm{capability}" for capability in engine["capabilities"])
    experts = f"experts by {engine['experts']}" if engine["experts"] else "no experts"
    return (
        f"{engine['flavour']} {engine['version']} for {gpus}; attention by {engine['attention'] or 'nothing'}, "
        f"{experts}; weights {size(engine['weights_inside_bytes'])} inside, "
        f"{size(engine['weights_outside_bytes'])} outside; {engine['kernels']} compiled kernels"
    )


def profiles_table(engine: dict[str, Any]) -> Table:
    """Each profile's sizes, and the memory that it needs."""
    table = Table(
        "profile", "rows", "tokens a row", "activations", "logits", "KV cache", "in all", title="Memory on the GPU"
    )
    for profile in engine["profiles"]:
        table.add_row(
            profile["name"],
            f"1–{profile['max_batch']}",
            f"1–{profile['max_length']}" if profile["max_length"] > 1 else "1",
            size(profile["activations_bytes"]),
            size(profile["logits_bytes"]),
            size(profile["kv_cache_bytes"]),
            size(profile["total_bytes"]),
        )
    return table


def layers_table(layers: list[dict[str, Any]], *, title: str = "From the build log, all profiles") -> Table:
    """The fused layers by kind and types."""
    table = Table("fused layers", "kind", "types in", "types out", title=title)
    for layer in layers:
        table.add_row(str(layer["count"]), layer["kind"], layer["inputs"], layer["outputs"])
    return table


def every_layer_table(layers: list[dict[str, Any]], *, title: str = "Every fused layer") -> Table:
    """Each fused layer: what of the graph is in it, and its tensors' types and sizes; -1 is a size that varies."""
    table = Table(title=title, show_lines=True)
    for header in ("of the graph", "kind", "in", "out"):
        table.add_column(header, overflow="fold")
    for layer in layers:
        table.add_row(parts(layer), layer["kind"], tensors(layer["inputs"]), tensors(layer["outputs"]))
    return table


def parts(layer: dict[str, Any]) -> str:
    """The layer and the weights or ops whose nodes were fused, `layers.0: self_attn.q_proj, self_attn.k_proj`."""
    found: dict[str, dict[str, None]] = {}
    for node in layer["nodes"]:
        where, _, rest = node.partition("/")
        what = rest.partition("/")[0]
        named = "." in what or what in ("GroupedQueryAttention", "MoeDispatch", "Attention")
        found.setdefault(where, {}).update({what: None} if named else {})
    lines = [f"{where}: {', '.join(names)}" if names else where for where, names in found.items()]
    return "\n".join(lines) or layer["name"]


def tensors(described: list[dict[str, Any]]) -> str:
    """Types and dimensions, a line each."""
    return "\n".join(f"{each['dtype']} {'×'.join(map(str, each['dims'])) or 'scalar'}" for each in described)


KINDS = {
    "attention": r"layers\.\d+\.self_attn\.",
    "shared experts": r"layers\.\d+\.feed_forward\.shared_expert\.",
    "routed experts": r"layers\.\d+\.feed_forward\.experts\.",
    "routers": r"layers\.\d+\.feed_forward\.router",
    "dense MLPs": r"layers\.\d+\.feed_forward\.(gate|up|down)_proj",
    "LM head": r"lm_head",
    "token embedding": r"embed_tokens",
    "norms": r"norms",
    "tower attention": r"vision_model\.model\.layers\.\d+\.self_attn\.",
    "tower MLPs": r"vision_model\.model\.layers\.\d+\.mlp\.",
    "tower, others": r"vision_model\.|multi_modal_projector\.",
}
"""Kinds of weights in the order of their table, and how their names begin; the first that matches holds."""

SQNR = "SQNR in dB: higher is better, 6 are one bit"


def kind_of(name: str) -> str:
    """The kind of a weight; one that is of none stands for itself."""
    return next((kind for kind, pattern in KINDS.items() if re.match(pattern, name)), name)


def show_quantised(records: list[dict[str, Any]], kept: dict[str, str], report: Path, *, every_weight: bool) -> None:
    """Prints on stderr what calibration made of the weights: a line a kind, and a line a weight where asked for."""
    console = Console(stderr=True)
    if every_weight:
        console.print(every_weight_table(records, kept))
    console.print(kinds_table(records, kept))
    known = [record for record in records if record["output_sqnr"] is not None]
    if known:
        worst = min(known, key=lambda record: record["output_sqnr"])
        console.print(f"Worst output: {worst['name']}, {worst['output_sqnr']:.1f} dB", highlight=False, soft_wrap=True)
    console.print(f"Report: {report}", highlight=False, markup=False, soft_wrap=True)


def show_sizes(found: dict[str, Any]) -> None:
    """Prints on stderr what became of a model's size, and how evenly its experts were used."""
    console = Console(stderr=True)
    before, after = found["bytes_before"], found["bytes_after"]
    share = f" ({after / before:.0%})" if before else ""
    console.print(f"Weights: {size(before)} before, {size(after)} after{share}", highlight=False, soft_wrap=True)
    if (even := found["experts_balance"]) is not None:
        console.print(
            f"Experts: the least busy saw {even['fewest_tokens']:,} tokens, {even['least']:.2g} of an even share; the "
            f"busiest {even['most']:.2g} times one",
            highlight=False,
            soft_wrap=True,
        )
    if few := found["unmeasured"]:
        console.print(f"Without statistics of their own: {len(few)} experts, see the report", highlight=False)


def kinds_table(records: list[dict[str, Any]], kept: dict[str, str]) -> Table:
    """Weights by kind and type: how many, and the worst and the median error of each, as SQNR in dB."""
    groups: dict[tuple[str, str], list[dict[str, Any]]] = defaultdict(list)
    for record in records:
        groups[kind_of(record["name"]), record["format"]].append(record)
    counts = Counter((kind_of(name), dtype) for name, dtype in kept.items())
    table = Table(box=box.SIMPLE, padding=(0, 1, 0, 0), title=SQNR)
    table.add_column("weights", overflow="fold")
    for header in ("count", "type", "weight worst", "median", "output worst", "median"):
        table.add_column(header, justify="left" if header == "type" else "right")
    order = [*KINDS, *(kind for kind, _ in [*groups, *counts] if kind not in KINDS)]
    for kind, dtype in sorted({*groups, *counts}, key=lambda group: (order.index(group[0]), group[1])):
        found = groups.get((kind, dtype), [])
        errors: list[str] = []
        for name in ("weight_sqnr", "output_sqnr") if found else ():
            values = [record[name] for record in found if record[name] is not None]
            errors += [f"{min(values):.1f}", f"{median(values):.1f}"] if values else ["unseen", ""]
        table.add_row(kind, f"{len(found) + counts[kind, dtype]:,}", dtype, *(errors or ["exact"]))
    return table


def every_weight_table(records: list[dict[str, Any]], kept: dict[str, str]) -> Table:
    """A line for each weight, and for those that are kept as they were."""
    table = Table(box=None, title=SQNR)
    table.add_column("weight", overflow="fold")
    table.add_column("type")
    for header in ("weight", "output"):
        table.add_column(header, justify="right")
    for record in records:
        known = (record[name] for name in ("weight_sqnr", "output_sqnr"))
        errors = ("unseen" if value is None else f"{value:.1f}" for value in known)
        table.add_row(record["name"], record["format"], *errors)
    for name, dtype in kept.items():
        table.add_row(name, dtype, "exact", "")
    return table


def show_verdict(found: dict[str, Any], report: Path | None) -> None:
    """Prints what `accuracy.check` found."""
    console = Console()
    colour = {"pass": "green", "regressed": "red", "undecided": "yellow"}
    limits = {each["metric"]: each for each in found["limits"]}
    table = Table("", "found", "95 % interval", "limit", "", box=box.SIMPLE, padding=(0, 1, 0, 0))
    for name, estimate in found["metrics"].items():
        limit = limits.get(name)
        interval = interval_text(estimate.get("low"), estimate.get("high"))
        bound = f"{'≤' if limit['side'] == 'max' else '≥'} {limit['limit']:g}" if limit else ""
        outcome = f"[{colour[limit['outcome']]}]{limit['outcome']}[/]" if limit else ""
        value = f"{estimate['value']:.3g} of 32" if name == "greedy" else f"{estimate['value']:.4g}"
        table.add_row(name.replace("_", " "), value, interval, bound, outcome)
    console.print(table)
    for note in found["notes"]:
        console.print(note, highlight=False, markup=False)
    if (location := found["location"]) is not None:
        console.print(location_text(location), highlight=False)
    words = {"pass": "passes", "regressed": "has regressed", "undecided": "cannot be judged"}
    remedy = f": {found.get('remedy') or 'give more --data'}" if found["outcome"] == "undecided" else ""
    outcome, candidate, reference = found["outcome"], *(escape(str(found[side])) for side in ("candidate", "reference"))
    console.print(
        f"[bold {colour[outcome]}]{candidate} {words[outcome]}[/], over {found['tokens']:,} tokens in "
        f"{found['windows']} windows, against {reference}{remedy}.",
        highlight=False,
    )
    if report is not None:
        console.print(f"Report: {report / 'report.html'}", highlight=False, markup=False)


def interval_text(low: float | None, high: float | None) -> str:
    """An interval, of whose ends one that is None is infinite; empty where there is none."""
    if low is None and high is None:
        return ""
    return f"{'-∞' if low is None else f'{low:.4g}'} to {'∞' if high is None else f'{high:.4g}'}"


def location_text(location: dict[str, Any]) -> str:
    """Where a candidate goes wrong first, in a sentence or two."""
    blame = location.get("blame")
    if not blame:
        return "No layer is out of line: every unit's error on the reference's input is what rounding explains."
    attribute = f", attribute {blame['attribute']}" if blame.get("attribute") else ""
    return (
        f"First out of line: {location['place']}, [bold]{blame['name']}{attribute}[/] ({blame['op']}): "
        f"{blame['why']}. At {location['unit']} the error is {location['error']:.2g}, where at most "
        f"{location['explained']:.2g} is explained."
    )
