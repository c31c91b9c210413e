"""A checkpoint's own settings of generation, for a caller who gives none.

Enters: a folder's `generation_config.json`. Leaves: `Defaults`. Invariant: a value out of range is refused by its name.
"""

from dataclasses import dataclass
from pathlib import Path

from ..errors import FolderError, SessionError
from .sampling import Sampling
from .text import read_json


@dataclass(frozen=True, kw_only=True, slots=True)
class Defaults:
    """A checkpoint's settings of generation, for a caller who gives none."""

    eos_token_ids: tuple[int, ...]
    sampling: Sampling


def read_defaults(folder: Path) -> Defaults:
    """Reads `generation_config.json`; without `do_sample` in it, the largest logit is taken.

    Raises:
        FolderError: The file is damaged, or a value in it out of range.
    """
    config = read_json(folder / "generation_config.json")
    config = {name: value for name, value in config.items() if value is not None}
    eos = config.get("eos_token_id", [])
    ends = eos if isinstance(eos, list) else [eos]
    try:
        if not all(type(token) is int for token in ends):
            raise SessionError(f"eos_token_id is {eos!r}, expected one token id or a list of them")
        sampling = Sampling(
            temperature=config.get("temperature", 1.0) if config.get("do_sample") else 0.0,
            top_k=config.get("top_k", 0),
            top_p=config.get("top_p", 1.0),
            min_p=config.get("min_p", 0.0),
            repetition_penalty=config.get("repetition_penalty", 1.0),
        )
    except (TypeError, SessionError) as error:
        raise FolderError(f"{folder / 'generation_config.json'}: {error}: correct it") from error
    return Defaults(eos_token_ids=tuple(ends), sampling=sampling)
