"""The verb: a candidate held against a reference.

Enters: two paths and text. Leaves: a `Verdict`, and where asked for a report. The reference runs first and is released;
what is kept of it is the same as a golden file holds.
"""

import dataclasses
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .. import __version__
from ..errors import AccuracyError, CheckpointError
from ..files.circumstances import circumstances
from ..files.contents_hash import described
from ..files.hub_cache import find_checkpoint
from ..spec.geometry import ModelSpec
from ..spec.recipe_words import in_words
from ..spec.types import Progress
from ..walk.windows import Windows, read_windows
from .gates import Judgement, Outcome, judge, overall
from .golden import read_golden, record, window_of
from .limits import effective, read_limits
from .locate.location import Location
from .metrics import Comparison, Estimate, compare, estimates
from .recorded import Golden
from .sides import check_device, has_tokenizer, open_side, tokenizer_of
from .sides.side import Side

SIZES = (
    "vocab_size",
    "hidden_size",
    "heads",
    "kv_heads",
    "head_dim",
    "experts",
    "experts_per_token",
    "expert_size",
    "dense_size",
)
"""Sizes that two forms of one model have in common, whatever is wrong with one of them."""

SAMPLES = 24
"""Windows of text at most, where nobody says otherwise."""

SCHEMA = 1
"""Version of `verdict.json`."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Verdict:
    """A check's outcome, with all that it rests on.

    Attributes:
        candidate: Path of the candidate.
        reference: Path of the reference.
        outcome: `pass`, `regressed`, or `undecided` where there is not enough data to tell.
        judgements: Outcome of each limit.
        metrics: Estimates by metric.
        windows: Number of windows of text.
        tokens: Number of tokens in all windows.
        notes: Sentences that a person should read besides.
        location: Where the candidate goes wrong first, where that was asked for.
        comparison: Both sides at each token.
        profile: The candidate's format, `none` where it is not quantised: the name of its profile of limits.
        recipe: Its recipe in words.
        circumstances: Date, command, machine and versions, see `files.circumstances`.
        seconds: Duration of the check.
        contents: Path, hash and weight files' identities of `candidate` and `reference`.
        remedy: What would decide it, where there is not enough data to tell.
    """

    candidate: str
    reference: str
    outcome: Outcome
    judgements: tuple[Judgement, ...]
    metrics: Mapping[str, Estimate]
    windows: int
    tokens: int
    notes: tuple[str, ...]
    location: Location | None
    comparison: Comparison = field(repr=False)
    profile: str = "none"
    recipe: str = ""
    circumstances: Mapping[str, Any] = field(default_factory=dict)
    seconds: float = 0.0
    contents: Mapping[str, Any] = field(default_factory=dict)
    remedy: str = ""

    def as_fields(self) -> dict[str, Any]:
        """The verdict in plain values, for JSON; infinite ends of intervals are None."""
        return {
            "schema": SCHEMA,
            "version": __version__,
            **self.circumstances,
            "seconds": round(self.seconds, 3),
            "candidate": self.candidate,
            "reference": self.reference,
            "profile": self.profile,
            "recipe": self.recipe,
            "contents": dict(self.contents),
            "outcome": self.outcome,
            "remedy": self.remedy,
            "windows": self.windows,
            "tokens": self.tokens,
            "metrics": {name: _finite(found) for name, found in self.metrics.items()},
            "limits": [
                {
                    "metric": each.metric,
                    "side": each.side,
                    "limit": each.limit,
                    "outcome": each.outcome,
                    "origin": each.origin,
                }
                for each in self.judgements
            ],
            "notes": list(self.notes),
            "location": None if self.location is None else self.location.as_fields(),
        }


def _finite(found: Estimate) -> dict[str, float | None]:
    return {name: value if np.isfinite(value) else None for name, value in dataclasses.asdict(found).items()}


def check(
    candidate: str | Path,
    reference: str | Path,
    *,
    data: Sequence[str | Path] | NDArray[np.int64] | None = None,
    samples: int | None = None,
    window: int | None = None,
    limits: Mapping[str, float | None] | None = None,
    limits_file: str | Path | None = None,
    locate_fault: bool = False,
    weights: str | Path | None = None,
    reference_weights: str | Path | None = None,
    threads: int | None = None,
    device: str = "cpu",
    progress: Progress = lambda phase, done, total: None,
) -> Verdict:
    """Holds a candidate against a reference.

    Args:
        candidate: A checkpoint, a model, or a bundle.
        reference: A checkpoint, a model, a bundle, or a golden file.
        data: Text files, or token ids [W, S]; nothing for a golden file, which has its own.
        samples: Windows of text at most; None is 24. A golden file fixes it.
        window: Tokens of a window; None is two chunks and a quarter of the model's attention. A golden file fixes it.
        limits: By metric, see `gates.METRICS`; what is left out is as the file says, or `gates.DEFAULTS`.
        limits_file: TOML file of limits by profile, see `limits`.
        locate_fault: Whether the layers are walked for the first one that is out of line.
        weights: Folder of the candidate's weight files, where they have moved.
        reference_weights: The same for the reference.
        threads: Threads of one operator on the CPU.
        device: Where PyTorch computes checkpoints, see `find_device`; layers are located on the CPU.
        progress: Called with the tokens done, and the layers where they are walked.

    Raises:
        AccuracyError: The two cannot be compared, or logits are not finite.
        DataError: The text cannot be read, or is too little.
        DeviceError: There is no such device, or it has too little memory.
    """
    started = time.perf_counter()
    profiles = {} if limits_file is None else read_limits(limits_file)
    effective("none", limits or {})  # what is out of range is named before anything is read
    _check_sides(candidate, reference, device)
    side = open_side(candidate, weights, threads, device=device)
    profile = "none" if side.recipe is None else side.recipe.format
    limits_held, origins = effective(profile, limits or {}, profiles)
    if (against := Path(reference)).is_file():
        fixed = {"--data": data, "--samples": samples, "--window": window}
        golden, other = _recorded(side, against, fixed, locate_fault), None
    else:
        other = open_side(against, reference_weights, threads, device=device, option="--against-weights")
        reader = other.path if has_tokenizer(other.path) else side.path
        _check_alike(side, other.spec, tokenizer_of(reader), against)
        samples = SAMPLES if samples is None else samples
        golden = record(other, _windows(other, reader, data, samples, window), progress, tokenizer_of(reader))
    _check_towers(side, golden, against)
    found = estimates(seen := compare(golden, side, progress))
    judgements = judge(found, limits_held, origins)
    location = _located(side, other, golden.windows, progress) if locate_fault and other is not None else None
    made = _verdict(side, against, seen, found, judgements, location, samples)
    return dataclasses.replace(made, seconds=time.perf_counter() - started)


def _verdict(
    side: Side,
    against: Path,
    seen: Comparison,
    found: Mapping[str, Estimate],
    judgements: tuple[Judgement, ...],
    location: Location | None,
    samples: int | None,
) -> Verdict:
    """Puts together what a check rests on, but for its duration.

    Args:
        side: The candidate.
        against: Path of the reference.
        seen: Both sides at each token.
        found: Estimates by metric.
        judgements: Outcome of each limit.
        location: Where the candidate goes wrong first.
        samples: Windows of text at most; None where a golden file fixes them.
    """
    golden = seen.golden
    return Verdict(
        candidate=str(side.path),
        reference=str(against),
        outcome=overall(judgements),
        judgements=judgements,
        metrics=found,
        windows=golden.ids_WS.shape[0],
        tokens=golden.ids_WS.size - int(np.count_nonzero(golden.windows.is_image_WS)),
        notes=tuple(_notes(side, golden, seen)),
        location=location,
        comparison=seen,
        profile="none" if side.recipe is None else side.recipe.format,
        recipe=in_words(side.recipe),
        circumstances=circumstances(),
        contents={"candidate": described(side.path), "reference": described(against)},
        remedy=_remedy(judgements, golden, samples),
    )


def _check_sides(candidate: str | Path, reference: str | Path, device: str) -> None:
    """Refuses, before a side is opened, a device that is not for them, and a reference that is nowhere."""
    check_device(device, candidate, reference)
    try:
        is_there = Path(reference).exists() or find_checkpoint(reference).exists()  # a name in the hub's cache
    except CheckpointError:
        is_there = False
    if not is_there:
        what = "a golden file, a checkpoint, a model or a bundle"
        raise AccuracyError(f"{reference}: no such file or folder: give {what}")


def _recorded(side: Side, path: Path, fixed: Mapping[str, Any], locate_fault: bool) -> Golden:
    """A golden file's reference.

    Raises:
        AccuracyError: It is none, or of another model, or what was asked for needs the model itself.
    """
    golden = read_golden(path)
    _check_alike(side, golden.spec, golden.tokenizer, path)
    if given := next((option for option, value in fixed.items() if value is not None), None):
        windows, length = golden.ids_WS.shape
        own = f"its own text, {windows} windows of {length} tokens"
        raise AccuracyError(f"{path} has {own}: leave {given} out")
    if locate_fault:
        raise AccuracyError(f"{path} holds no layers to walk: for --locate give the model it was recorded from")
    return golden


def _windows(
    side: Side,
    reader: Path,
    data: Sequence[str | Path] | NDArray[np.int64] | None,
    samples: int,
    window: int | None,
) -> Windows:
    """The text that both sides read.

    Args:
        side: The reference.
        reader: The folder whose tokenizer and chat template read it: the candidate's where the reference has none.
        data: Text files, or token ids [W, S].
        samples: Windows at most.
        window: Tokens of a window.

    Raises:
        AccuracyError: There is none.
        DataError: It cannot be read, or is too little.
    """
    if data is None:
        raise AccuracyError("there is no text: give text files with --data")
    if isinstance(data, np.ndarray):
        return Windows(ids_WS=data)
    return read_windows(
        reader, data, side.spec, samples, window_of(side.spec) if window is None else window, side.vision
    )


def _remedy(judgements: Sequence[Judgement], golden: Golden, samples: int | None) -> str:
    """The way to decide a verdict; empty where it is decided.

    Args:
        judgements: Outcome of each limit.
        golden: The reference.
        samples: Windows at most; None where a golden file fixes them.
    """
    if overall(judgements) != "undecided":
        return ""
    if unseen := [each.metric for each in judgements if each.found is None]:
        names = ", ".join(unseen)
        return f"{names} cannot be estimated here: leave the limit out, or give sides where it can be seen"
    windows = golden.ids_WS.shape[0]
    if samples is None:
        return f"record the golden file over more than its {windows} windows, with more --data or --samples"
    if windows >= samples:
        return f"give more --samples than {samples}"
    return f"give more --data: all of it is {windows} windows"


def _located(side: Side, other: Side, windows: Windows, progress: Progress) -> Location:
    from .locate.first_fault import locate  # PyTorch computes the reference's layers

    return locate(side, other, windows, progress)


def _check_towers(side: Side, golden: Golden, against: Path) -> None:
    """Refuses a candidate that cannot see the images of the data.

    Raises:
        AccuracyError: Its vision tower is another, or it has none.
    """
    if golden.vision is not None and side.vision != golden.vision:
        tower = "has none" if side.vision is None else "has another"
        raise AccuracyError(
            f"the data has images for {against}'s vision tower, {side.path} {tower}: give text, or another candidate"
        )


def _check_alike(side: Side, spec: ModelSpec, tokenizer: str, against: Path) -> None:
    """Refuses two that are no forms of one model.

    Raises:
        AccuracyError: Their sizes or tokenizers differ.
    """
    kinds = [tuple(layer.experts for layer in each.layers) for each in (side.spec, spec)]
    sizes = [(name, getattr(side.spec, name), getattr(spec, name)) for name in SIZES]
    sizes.insert(0, ("layers", len(side.spec.layers), len(spec.layers)))
    for name, ours, theirs in sizes:
        if ours != theirs:
            raise AccuracyError(f"{side.path} has {name} {ours}, {against} has {theirs}: they are not one model")
    if kinds[0] != kinds[1]:
        raise AccuracyError(f"{side.path} and {against} have experts in different layers: they are not one model")
    if tokenizer_of(side.path) != tokenizer:
        raise AccuracyError(f"{side.path} and {against} have different tokenizers: export both from one checkpoint")


def _notes(side: Side, golden: Golden, seen: Comparison) -> list[str]:
    """Differences of the two descriptions, and metrics that could not be seen."""
    notes = []
    for field_ in dataclasses.fields(ModelSpec):
        name = field_.name
        ours, theirs = getattr(side.spec, name), getattr(golden.spec, name)
        if name == "layers":
            for index, (our, their) in enumerate(zip(ours, theirs, strict=True)):
                if our != their:
                    notes.append(f"Layer {index} is described as {our}, in the reference as {their}.")
                    break
        elif ours != theirs and name != "dtype":
            notes.append(f"{name} is {ours}, in the reference {theirs}.")
    if seen.flipped_LWS is None and any(layer.experts for layer in side.spec.layers):
        where = side.blind or "in the reference"
        notes.append(f"The choice of experts cannot be seen {where}: router flips are not told.")
    if not golden.beginnings[1]:
        notes.append("Every window ends within an image: greedy agreement is not told.")
    elif seen.agreed_P is None:
        notes.append("A checkpoint does not generate: for greedy agreement give its export as the reference.")
    return notes
