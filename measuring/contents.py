"""A path's contents in numbers: for `arriero inspect`, whichever of Arriero's files or folders it is.

Enters: a path. Leaves: plain values for JSON, with a `kind`: `model`, `bundle`, `group` (`summary`), or here
`checkpoint`, `golden`, `verdict` and `bench`. Nothing is loaded.
"""

from pathlib import Path
from typing import Any

from ..errors import ArrieroError, FolderError, shortened
from ..files.fields import check_fields
from ..files.folders import SPEC, find_files, is_packed
from ..files.hub_cache import find_checkpoint
from ..files.reading import read_json
from ..files.safetensors import PointerError, open_shard
from ..spec.folder import FolderSpec
from ..spec.geometry import ModelSpec
from ..spec.json_text import parse_json
from ..spec.parameters import count_parameters
from ..spec.recipe_words import in_words
from .summary import companions, geometry, summarise

VERDICT, BENCH = "verdict.json", "bench.json"
TEXT, NUMBER = (str, None), (float, None)
ESTIMATE = {"value": float, "low": NUMBER, "high": NUMBER}
LIMIT = {"metric": str, "side": str, "limit": float, "outcome": str}
BLAME = {"name": str, "op": str, "why": str, "attribute": TEXT}
LOCATED = {"blame": BLAME, "place": str, "unit": str, "error": float, "explained": float}
CASE = dict.fromkeys(("ttft_seconds", "prefill_tokens_per_second", "itl_seconds", "decode_tokens_per_second"), float)
STREAMED = {"step_bytes": {"total": float}, "decode_bytes_per_second": float, "share_of_stream": float}
SHOWN: dict[str, dict[str, Any]] = {
    "verdict": {
        "candidate": str,
        "reference": str,
        "outcome": str,
        "windows": int,
        "tokens": int,
        "remedy": TEXT,
        "metrics": {str: ESTIMATE},
        "limits": [LIMIT],
        "notes": ([str], None),
        "location": ({"blame": (dict, None)}, None),
    },
    "bench": {
        "folder": str,
        "target": str,
        "threads": int,
        "ranks": int,
        "runs": int,
        "decode_tokens": int,
        "load_seconds": float,
        "peak_rss_bytes": float,
        "machine": {"processor": TEXT},
        "stream": ({"bytes_per_second": float, "buffer_bytes": float}, None),
        "cases": [{"prefill": int, "batch": int, **CASE}],
    },
}
"""Fields that are shown of the two kinds of results."""
OUTCOMES = ("pass", "regressed", "undecided")
FORMS = "a checkpoint, a model, a bundle, a golden file, or a folder that check -o or bench -o wrote"


def describe(path: str | Path, **options: Any) -> dict[str, Any]:
    """Describes a folder or file; the options are those of `summarise`.

    Raises:
        ArrieroError: It is none that Arriero knows, or damaged.
    """
    found = find_checkpoint(path)
    if found.is_file() and not is_packed(found):
        return _golden(found) if found.name not in (VERDICT, BENCH) else _result(found)
    if (found / SPEC).exists() or not found.is_dir():
        return summarise(found, **options)
    if (found / "config.json").is_file():
        return _checkpoint(found)
    for name in (VERDICT, BENCH):
        if (found / name).is_file():
            return _result(found / name)
    raise FolderError(f"{found} holds no spec.json, config.json, {VERDICT} or {BENCH}: give {FORMS}")


def weight_files(folder: Path, spec: FolderSpec, weights: Path | None = None) -> list[dict[str, Any]]:
    """Where each weight file lies, and its state: `there`, `missing`, or `another` file than the one exported."""
    found = []
    for file in spec.weight_files:
        place = (weights or Path()) / file.name if weights else Path(file.path) if file.path else folder / file.name
        try:
            path, state = find_files(folder, [file], weights)[file.name], "there"
        except FolderError:
            path, state = place, "another" if place.is_file() else "missing"
        found.append({"name": file.name, "path": str(path), "bytes": file.size, "state": state})
    return found


def _checkpoint(folder: Path) -> dict[str, Any]:
    """A checkpoint, checked as export would."""
    from ..export.checkpoint import open_checkpoint

    opened = open_checkpoint(folder)
    total, active = count_parameters(opened.spec, opened.vision)
    quantised = opened.quantised
    return {
        "kind": "checkpoint",
        "path": str(folder),
        "model": geometry(opened.spec),
        "sees": opened.vision is not None,
        "quantised": None
        if quantised is None
        else {"method": quantised.scheme.method, "words": in_words(quantised.recipe)},
        "parameters": {"total": total, "active": active},
        "files": [
            {"name": shard.path.name, "path": str(shard.path), "bytes": shard.size, "state": "there"}
            for shard in opened.shards
        ],
        **companions(folder),
    }


def _way_out(path: Path) -> str:
    """The remedy for a file that is not shown by itself: the folder that it is a part of, or all that is shown."""
    is_part = any((path.parent / name).is_file() for name in (SPEC, "config.json"))
    return f"give the folder that it is a part of, {path.parent}" if is_part else f"give {FORMS}"


def _golden(path: Path) -> dict[str, Any]:
    """A golden file, from its header."""
    try:
        shard = open_shard(path)
        about = shard.metadata
        if "golden" not in about:
            raise FolderError(f"{path} is no golden file: {_way_out(path)}")
        windows, length = shard.tensors["ids_WS"].shape
        model = ModelSpec.from_fields(parse_json(about["model"]))
        source, written_by, form = about["source"], about["arriero"], about["format"]
    except (FolderError, PointerError):
        raise
    except (ArrieroError, KeyError, ValueError, TypeError, AttributeError, RecursionError) as error:
        raise FolderError(f"{path} is no golden file, or damaged ({str(error)[:100]}): {_way_out(path)}") from error
    return {
        "kind": "golden",
        "path": str(path),
        "bytes": path.stat().st_size,
        "version": written_by,
        "source": source,
        "format": form,
        "windows": windows,
        "window_tokens": length,
        "tokens": windows * length,
        "has_images": "pixels_N3PP" in shard.tensors,
        "has_experts": "experts_LWSK" in shard.tensors,
        "has_greedy": "continued_PC" in shard.tensors,
        "model": geometry(model),
    }


def _result(path: Path) -> dict[str, Any]:
    """A verdict or a measurement, as it was written."""
    kind = path.stem
    try:
        fields = read_json(path, remedy="write it again")
        check_fields(fields, SHOWN[kind])
        if kind == "bench" and fields.get("stream"):
            check_fields(fields["cases"], [STREAMED], "cases")
        if kind == "verdict" and (fields.get("location") or {}).get("blame"):
            check_fields(fields["location"], LOCATED, "location")
        for each in [fields, *fields["limits"]] if kind == "verdict" else ():
            if each["outcome"] not in OUTCOMES:
                raise ValueError(f"outcome is {shortened(each['outcome'])}, expected one of {', '.join(OUTCOMES)}")
    except (OSError, ValueError) as error:
        raise FolderError(f"{path} is damaged ({error}): write it again") from error
    return {**fields, "kind": kind, "path": str(path)}
