"""Calls as Llama 4 writes them, read from text that is complete: pythonic, or JSON.

Enters: text that a model wrote. Leaves: names and arguments, or None where the text is anything else. Invariant: the
text is parsed, never evaluated, and whatever it is costs little and raises nothing.

    [get_weather(city="Lima"), get_time()]
    {"name": "get_weather", "parameters": {"city": "Lima"}}
"""

import ast
import json
import keyword
import math
import re
from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

DEEPEST = 50
"""Levels of brackets in a call at most."""

LONGEST = 1 << 17
"""Characters of calls at most."""

STRINGS = re.compile(
    r'("""(?:\\.|(?!""").)*"""|\'\'\'(?:\\.|(?!\'\'\').)*\'\'\'|"(?:\\.|[^"\\\n])*"|\'(?:\\.|[^\'\\\n])*\')', re.DOTALL
)
IN_STRING, OUTSIDE = re.compile(r"[^\"'\\]+"), re.compile(r"[^\"'\[\](){}]+")
CODE = re.compile(r"[\w\s\[\](){},:=.+-]*")
SIGNS = re.compile(r"[+-]\s*[+-]")
ARGUMENT = re.compile(r"\b([^\W\d]\w*)(\s*=)(?!=)")
WORDS = {"true": True, "false": False, "null": None}
"""Constants of JSON, which models write among Python's."""

KEYS = ("name", "type", "parameters", "arguments")
"""Keys of a call in JSON."""

STANDIN = "tool_call_{}_"


@dataclass(frozen=True, slots=True)
class Call:
    """A call of a tool.

    Attributes:
        name: The tool's.
        arguments: Its arguments as JSON.
    """

    name: str
    arguments: str


class _NoCallError(Exception):
    """The text is no list of calls."""


def read_calls(text: str, names: Collection[str]) -> list[Call] | None:
    """Reads calls of tools.

    Args:
        text: All that was written, white space around it apart.
        names: The tools' names; a call of another is none.

    Returns:
        The calls, one at least; None where the text is not calls and nothing else.
    """
    text = text.strip()
    if not text or len(text) > LONGEST:
        return None
    try:
        if text[0] == "{" or re.match(r"\[\s*\{", text):
            return _json_calls(text, names)
        return _pythonic_calls(text, names) if text[0] == "[" else None
    except (_NoCallError, SyntaxError, ValueError, MemoryError, RecursionError):
        return None


def may_begin(text: str, names: Collection[str]) -> bool:
    """Whether a text, without white space before it, begins like calls of some tools, or may go on so."""
    if "<|python_start|>".startswith(text):
        return True
    if text[0] == "[" and (inner := text[1:].lstrip()) and inner[0] not in "{":
        return any(name.startswith(inner) or _is_called(inner, name) for name in names)
    if text[0] not in "[{":
        return False
    inner = text.lstrip("[ \t\r\n").removeprefix("{").lstrip()
    key, closed, _ = inner[1:].partition('"')
    return not inner or (inner[0] == '"' and any(key == each if closed else each.startswith(key) for each in KEYS))


def _is_called(text: str, name: str) -> bool:
    """Whether a text begins with a name and the bracket of its arguments, or may go on so."""
    return text.startswith(name) and text[len(name) :].lstrip()[:1] in ("", "(")


class Brackets:
    """Looks for the end of the first pair of brackets in a text that grows."""

    def __init__(self) -> None:
        self.at, self.depth, self.quote = 0, 0, ""
        self.closed: int | None = None

    def scan(self, text: str) -> int | None:
        """Looks on.

        Args:
            text: The same text every time, with more at its end.

        Returns:
            Where the pair ends, 0 where it lies too deep; None where its end has not come yet.
        """
        while self.closed is None and self.at < len(text):
            plain = (IN_STRING if self.quote else OUTSIDE).match(text, self.at)
            step = plain.end() - self.at if plain else self._in_string(text) if self.quote else self._sign(text)
            if not step:  # what comes next says what it is
                return None
            self.at += step
        return self.closed

    def _in_string(self, text: str) -> int:
        """The characters of a quote or an escape in a string."""
        if text[self.at] == "\\":
            return 2 if self.at + 1 < len(text) else 0
        ahead = text[self.at : self.at + len(self.quote)]
        if ahead == self.quote:
            self.quote = ""
            return len(ahead)
        return 0 if self.quote.startswith(ahead) else 1

    def _sign(self, text: str) -> int:
        """The characters of a quote or a bracket outside of strings."""
        sign = text[self.at]
        if sign in "\"'":
            ahead = text[self.at : self.at + 3]
            if ahead != sign * 3 and ahead == sign * len(ahead):
                return 0
            self.quote = sign * 3 if ahead == sign * 3 else sign
            return len(self.quote)
        self.depth += 1 if sign in "[({" else -1
        if self.depth > DEEPEST:
            self.closed = 0
        elif self.depth <= 0:
            self.closed = self.at + 1
        return 1


def depth_of(text: str) -> int:
    """The levels of brackets outside of strings."""
    depth = deepest = 0
    for sign in re.findall(r"[\[\](){}]", STRINGS.sub("", text)):
        depth += 1 if sign in "[({" else -1
        deepest = max(deepest, depth)
    return deepest


def _json_calls(text: str, names: Collection[str]) -> list[Call]:
    """Calls as objects: one, several after one another, or a list of them."""
    decoder = json.JSONDecoder(parse_constant=_no_constant)
    found: list[Any] = []
    at = 0
    if depth_of(text) > DEEPEST:
        raise _NoCallError
    while at < len(text):
        value, at = decoder.raw_decode(text, at)
        found += value if isinstance(value, list) and not found and at == len(text) else [value]
        at = re.compile(r"\s*;?\s*").match(text, at).end()  # type: ignore[union-attr]  # matches nothing, too
    return [_json_call(each, names) for each in found]


def _json_call(value: Any, names: Collection[str]) -> Call:
    if not isinstance(value, dict) or value.get("type", "function") != "function":
        raise _NoCallError
    given = [key for key in ("parameters", "arguments") if key in value]
    arguments = value[given[0]] if len(given) == 1 else None
    if not set(value) <= {"type", "name", *given} or value.get("name") not in list(names):
        raise _NoCallError
    if not isinstance(arguments, dict):
        raise _NoCallError
    return Call(value["name"], _json(arguments))


def _no_constant(name: str) -> Any:
    raise _NoCallError


def _pythonic_calls(text: str, names: Collection[str]) -> list[Call]:
    """Calls as a list in Python."""
    source, standins = _without_odd_names(text, names)
    tree = ast.parse(source, mode="eval").body
    if not isinstance(tree, ast.List) or not tree.elts:
        raise _NoCallError
    return [_pythonic_call(each, names, standins) for each in tree.elts]


def _without_odd_names(text: str, names: Collection[str]) -> tuple[str, dict[str, str]]:
    """The text with stand-ins for names that Python does not take as such, and what they stand for.

    Raises:
        _NoCallError: The text holds what no call with constant arguments does.
    """
    parts = STRINGS.split(text)
    code = '""'.join(parts[::2])
    if not CODE.fullmatch("".join(parts[::2])) or SIGNS.search(code) or depth_of(text) > DEEPEST:
        raise _NoCallError
    odd = [name for name in names if not name.isidentifier() or keyword.iskeyword(name)]
    standins: dict[str, str] = {}

    def stand_in(name: str) -> str:
        return next((each for each, real in standins.items() if real == name), None) or _add(standins, name)

    for number in range(0, len(parts), 2):
        for name in sorted(odd, key=len, reverse=True):
            called = re.compile(rf"(?<![\w.-]){re.escape(name)}(?=\s*\()")
            parts[number] = called.sub(lambda found: stand_in(found[0]), parts[number])
        parts[number] = ARGUMENT.sub(
            lambda found: (stand_in(found[1]) if keyword.iskeyword(found[1]) else found[1]) + found[2], parts[number]
        )
        words = re.findall(r"[^\W\d]\w*", parts[number])
        if any(keyword.iskeyword(word) and word not in ("True", "False", "None") for word in words):
            raise _NoCallError
    return "".join(parts), standins


def _add(standins: dict[str, str], name: str) -> str:
    new = STANDIN.format(len(standins))
    standins[new] = name
    return new


def _pythonic_call(node: ast.expr, names: Collection[str], standins: dict[str, str]) -> Call:
    if not isinstance(node, ast.Call) or node.args:
        raise _NoCallError
    name = _dotted(node.func)
    name = standins.get(name, name)
    arguments: dict[str, Any] = {}
    for each in node.keywords:
        if each.arg is None or (key := standins.get(each.arg, each.arg)) in arguments:
            raise _NoCallError
        arguments[key] = _value(each.value)
    if name not in names:
        raise _NoCallError
    return Call(name, _json(arguments))


def _dotted(node: ast.expr) -> str:
    parts: list[str] = []
    while isinstance(node, ast.Attribute):
        parts.append(node.attr)
        node = node.value
    if not isinstance(node, ast.Name):
        raise _NoCallError
    return ".".join([node.id, *reversed(parts)])


def _value(node: ast.expr) -> Any:
    """A constant as plain data."""
    if isinstance(node, ast.Constant):
        if node.value is None or type(node.value) in (str, bool, int, float):
            return node.value
    elif isinstance(node, ast.Name) and node.id in WORDS:
        return WORDS[node.id]
    elif isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub | ast.UAdd):
        number = node.operand.value if isinstance(node.operand, ast.Constant) else None
        if type(number) in (int, float):
            return -number if isinstance(node.op, ast.USub) else number  # type: ignore[operator]
    elif isinstance(node, ast.List | ast.Tuple):
        return [_value(each) for each in node.elts]
    elif isinstance(node, ast.Dict):
        keys = [key.value if isinstance(key, ast.Constant) else None for key in node.keys]
        if all(isinstance(key, str) for key in keys):
            return {key: _value(value) for key, value in zip(keys, node.values, strict=True)}
    raise _NoCallError


def _json(value: Any) -> str:
    """Plain data as JSON, characters as they are where they are whole."""
    if not _is_finite(value):
        raise _NoCallError
    text = json.dumps(value, ensure_ascii=False)
    return text if text.isascii() or _is_whole(text) else json.dumps(value)


def _is_finite(value: Any) -> bool:
    if isinstance(value, float):
        return math.isfinite(value)
    several = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    return all(_is_finite(each) for each in several)


def _is_whole(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True
