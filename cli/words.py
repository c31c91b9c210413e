"""Numbers and folders in words, for tables on the terminal."""

from pathlib import Path
from typing import Any


def layers_text(model: dict[str, Any]) -> str:
    """A model's layers in words."""
    experts = f"{model['expert_layers']} with {model['experts']} experts (top {model['experts_per_token']})"
    chunked = f"{model['chunked_layers']} chunked at {model['chunk']} positions"
    experts = experts if model["expert_layers"] else "none with experts"
    chunked = chunked if model["chunked_layers"] else "none chunked"
    return f"{model['layers']}, of them {experts}, {chunked}"


def sizes_text(model: dict[str, Any]) -> str:
    """A model's sizes in words."""
    return (
        f"hidden {model['hidden_size']}, {model['heads']} heads and {model['kv_heads']} kv heads of "
        f"{model['head_dim']}, vocabulary {model['vocab_size']}, context {model['max_positions']}, {model['dtype']}"
    )


def parameters_text(parameters: dict[str, int]) -> str:
    """Parameters in words, as in `108.6 B, 17.2 B active`."""
    return f"{count(parameters['total'])}, {count(parameters['active'])} active for a token"


def quantised_text(quantised: dict[str, Any]) -> str:
    """How a folder is quantised, in words."""
    parts = [quantised["words"]]
    if quantised["kv_cache"] != "none" and "keys and values" not in quantised["words"]:
        parts.append(f"keys and values in {quantised['kv_cache'].upper()}")
    if few := quantised["unmeasured_experts"]:
        parts.append(f"{few} experts without statistics of their own")
    return "; ".join(parts)


def count(number: int) -> str:
    """A count for a person."""
    for limit, letter in ((10**9, "B"), (10**6, "M"), (10**3, "k")):
        if number >= limit:
            return f"{number / limit:.1f} {letter}"
    return str(number)


def place(path: str | Path) -> str:
    """A path for a person: from the working directory where it lies in there, as it is where it doesn't."""
    try:
        return str(Path(path).relative_to(Path.cwd()))
    except (ValueError, OSError):  # the working directory may be gone
        return str(path)


def files_text(files: list[dict[str, Any]]) -> str:
    """Weight files in words: how many, how large, where, and which are not there."""
    places = sorted({str(Path(file["path"]).parent) for file in files})
    where = place(places[0]) if len(places) == 1 else f"{len(places)} folders"
    lost = [f"{file['name']} is {file['state']}" for file in files if file["state"] != "there"]
    text = f"{len(files)}, {size(sum(file['bytes'] for file in files))}, in {where}"
    return f"{text}; {'; '.join(lost[:8])}{f' and {len(lost) - 8} more' if len(lost) > 8 else ''}" if lost else text


def size(count: int) -> str:
    """Bytes for a person, in powers of 1000."""
    value, unit = float(count), "B"
    for unit in ("B", "kB", "MB", "GB", "TB"):
        if value < 1000 or unit == "TB":
            break
        value /= 1000
    return f"{value:.0f} {unit}" if unit == "B" else f"{value:.1f} {unit}"
