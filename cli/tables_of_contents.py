"""Tables of what lies at a path: checkpoints, golden files and results; models and bundles as `tables` has them."""

from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from .tables import show_summary, show_verdict
from .words import files_text, layers_text, parameters_text, place, size, sizes_text


def show_contents(found: dict[str, Any]) -> None:
    """Prints what `contents.describe` found."""
    kind = found["kind"]
    if kind == "checkpoint":
        _show(f"Checkpoint at {place(found['path'])}", checkpoint_facts(found))
    elif kind == "golden":
        _show(f"Golden file of {place(found['source'])}", golden_facts(found))
    elif kind == "verdict":
        show_verdict({**found, "location": found.get("location"), "notes": found.get("notes") or []}, None)
        _show_circumstances(found)
    elif kind == "bench":
        from .tables_of_speed import show_measured

        show_measured(found, None)
        _show_circumstances(found)
    else:
        show_summary(found)


def checkpoint_facts(found: dict[str, Any]) -> dict[str, str]:
    """A checkpoint in lines."""
    tokenizer = "there" if found["has_tokenizer"] else "missing: export with --tokenizer DIR"
    facts = {
        "layers": layers_text(found["model"]),
        "sizes": sizes_text(found["model"]),
        "parameters": parameters_text(found["parameters"]),
        "quantised": found["quantised"]["words"] if found["quantised"] else "no",
        "weight files": files_text(found["files"]),
        "tokenizer": tokenizer,
    }
    if found["sees"]:
        facts["vision tower"] = "yes" if found["has_preprocessor"] else "yes, its preprocessor_config.json is missing"
    return facts


def golden_facts(found: dict[str, Any]) -> dict[str, str]:
    """A golden file in lines."""
    held = {"has_experts": "chosen experts", "has_greedy": "greedy continuations", "has_images": "images"}
    holds = ["likeliest tokens", *(words for name, words in held.items() if found[name])]
    return {
        "text": f"{found['tokens']:,} tokens in {found['windows']} windows of {found['window_tokens']}",
        "holds": ", ".join(holds),
        "reference": "not quantised" if found["format"] == "none" else found["format"],
        "layers": layers_text(found["model"]),
        "sizes": sizes_text(found["model"]),
        "file": f"{size(found['bytes'])}, by Arriero {found['version']}",
    }


def _show(title: str, facts: dict[str, str]) -> None:
    console = Console()
    console.print(title, style="bold", highlight=False, markup=False)
    table = Table(show_header=False, box=None, padding=(0, 2, 0, 0))
    for name, text in facts.items():
        table.add_row(name, escape(text))
    console.print(table, highlight=False)


def _show_circumstances(found: dict[str, Any]) -> None:
    said = [str(found[name]) for name in ("date", "command") if found.get(name)]
    Console().print("\n".join([*said, str(Path(found["path"]))]), highlight=False, markup=False)
