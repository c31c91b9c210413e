"""A group of ranks on the terminal: its layout and sums in words, its ranks in a table."""

from typing import Any

from rich import box
from rich.table import Table

from .words import size


def describe_ranks(ranks: dict[str, Any]) -> str:
    """A group's layout and its sums, in two sentences."""
    groups, sums = ranks["expert_groups"], ranks["sums"]
    split = "the experts alone" if ranks["experts_only"] else f"experts in {groups} group{'s' * (groups > 1)}"
    logits = f" and {size(sums['bytes_per_logits'])} for each position's logits" if sums["bytes_per_logits"] else ""
    return (
        f"{ranks['count']}, {split}; a step has {sums['a_step']} sums over ranks, to which each brings "
        f"{size(sums['bytes_per_token'])} a token{logits}"
    )


def ranks_table(ranks: dict[str, Any]) -> Table:
    """Each rank's weights, experts, cache and, on the CPU, memory."""
    has_memory = any("memory" in rank for rank in ranks["each"])
    headers = ["rank", "weights", "experts", "KV cache a token", *(["memory"] if has_memory else [])]
    table = Table(*headers, box=box.SIMPLE, padding=(0, 1, 0, 0))
    for rank in ranks["each"]:
        experts = "none" if rank["experts"] is None else f"{rank['experts'][0]}–{rank['experts'][1]}"
        row = [str(rank["rank"]), size(rank["weights_bytes"]), experts, size(rank["kv_cache"]["bytes_per_token"])]
        table.add_row(*row, *([size(rank["memory"]["total"])] if has_memory else []))
    return table
