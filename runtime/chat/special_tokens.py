"""A folder's special tokens: their names, which templates use, and those that its tokenizer does not know yet.

Enters: `tokenizer_config.json`, and where it lists no added tokens `special_tokens_map.json` and `added_tokens.json`.
Leaves: what `transformers` makes of them.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Tokenizer

from ...errors import FolderError, shortened
from ...files.folders import read_json

NAMES = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
EXTRA, ADDITIONAL = "extra_special_tokens", "additional_special_tokens"
SPECIFIC, DECODER = "model_specific_special_tokens", "added_tokens_decoder"
FLAGS = ("lstrip", "rstrip", "single_word", "normalized", "special")


def complete_tokenizer(tokenizer: Tokenizer, folder: Path, config: Mapping[str, Any]) -> dict[str, str]:
    """Adds to a tokenizer the special tokens that only the files beside it name.

    Args:
        tokenizer: The tokenizer, changed in place.
        folder: Its folder.
        config: The folder's tokenizer_config.json.

    Returns:
        The special tokens that have names, as in `bos_token`; a name that is not set is not there.

    Raises:
        FolderError: A file is damaged, or a token none.
    """
    settings = _settings(folder, config)
    specific, extra = settings[SPECIFIC], settings[EXTRA]
    if tokenizer.padding is not None:
        settings.setdefault("pad_token", tokenizer.padding["pad_token"])
    order = [*NAMES, *(name for name in settings if name not in NAMES)]
    named = {name: token for name in order if (token := _named_token(name, settings.get(name), folder))}
    named.update({name: _token(name, value, folder) for name, value in specific.items()})
    extras = [_token(EXTRA, value, folder) for value in extra]
    listed = _listed(folder, config, {token.content for token in (*named.values(), *extras)})
    added = tokenizer.get_added_tokens_decoder().values()
    flags = {repr(token) for token in added}
    new = [token for _, token in sorted(listed.items()) if repr(token) not in flags]
    known = {token.content for token in (*added, *new)}
    for token in (*named.values(), *extras):
        if token.content not in known:
            known.add(token.content)
            new.append(token)
    names = {token.content for token in named.values()}
    for token in new:
        token.special = token.special or token.content in names
    if new:
        tokenizer.add_tokens(new)
    return {name: token.content for name, token in named.items()}


def _settings(folder: Path, config: Mapping[str, Any]) -> dict[str, Any]:
    """The settings of special tokens, where the map of a file of its own comes before the tokenizer's config."""
    settings = {name: value for name, value in config.items() if name.endswith(("_token", "_tokens"))}
    path = folder / "tokenizer_config.json"
    specific = settings.pop(SPECIFIC, None) or {
        name: settings.pop(name)
        for name, value in list(settings.items())
        if name.endswith("_token") and name not in NAMES and isinstance(value, str)
    }
    if ADDITIONAL in settings and not settings.get(EXTRA):
        settings[EXTRA] = settings.pop(ADDITIONAL)
    if isinstance(settings.get(EXTRA), dict):
        specific = {**specific, **settings.pop(EXTRA)}
    if DECODER not in config:
        path = folder / "special_tokens_map.json"
        for name, value in read_json(path).items():
            if name == EXTRA and isinstance(value, list) and isinstance(settings.get(EXTRA), list):
                value = settings[EXTRA] + [token for token in value if token not in settings[EXTRA]]
            settings[name] = value
        if isinstance(settings.get(EXTRA), dict):
            specific = {**specific, **settings.pop(EXTRA)}
    if ADDITIONAL in settings:
        settings.setdefault(EXTRA, settings.pop(ADDITIONAL))
    extra = settings.get(EXTRA) or []
    if not isinstance(specific, dict) or not isinstance(extra, list):
        raise FolderError(f"{path}: {EXTRA} is {shortened(extra)}, expected a list or an object of tokens: correct it")
    return {**settings, SPECIFIC: specific, EXTRA: extra}


def _listed(folder: Path, config: Mapping[str, Any], special: set[str]) -> dict[int, AddedToken]:
    """The tokens that have their ids beside the tokenizer."""
    path = folder / ("tokenizer_config.json" if DECODER in config else "added_tokens.json")
    value = config[DECODER] if DECODER in config else read_json(path)
    try:
        if DECODER in config:
            return {int(number): _token(DECODER, token, folder) for number, token in value.items()}
        return {
            number + 0: AddedToken(text, normalized=text not in special, special=text in special)
            for text, number in value.items()
        }
    except (AttributeError, TypeError, ValueError) as error:
        raise FolderError(f"{path}: {shortened(value)} is no list of tokens and their ids: correct it") from error


def _named_token(name: str, value: Any, folder: Path) -> AddedToken | None:
    """The token of a setting that may be one; None where it is not set, or is no token's name."""
    if value is None or not name.endswith("_token"):
        return None
    if name not in NAMES and not isinstance(value, str | dict):  # a switch, as in `add_bos_token`
        return None
    return _token(name, value, folder)


def _token(name: str, value: Any, folder: Path) -> AddedToken:
    """A token as configs write it: a text, or an object with its text and flags."""
    content = value.get("content") if isinstance(value, dict) else value
    if not isinstance(content, str):
        raise FolderError(
            f"{folder}: tokenizer_config.json or special_tokens_map.json has the {name} {shortened(value)}, expected a "
            "text, or an object with its content: correct it"
        )
    if not isinstance(value, dict):
        return AddedToken(content, special=True)
    flags = {} if name == DECODER else {"special": True}
    flags |= {flag: bool(value[flag]) for flag in FLAGS if flag in value}
    return AddedToken(content, **flags)
