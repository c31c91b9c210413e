"""The grammar of answers in which the model decides: free text, or calls that are of their functions' schemas.

Enters: tools, and the schema of the answer where it has one. Leaves: a grammar in Lark, and the expression of a call's
beginning. Invariant: text is free until it has become the beginning of a call of a known tool, and from there on it is
a call; a strict tool's arguments are of its schema, whichever form the model writes. Calls are bound in the forms that
Llama 4 writes: as a list in Python, whose values are written as in JSON, as JSON, several in a row, or as a JSON list.
"""

import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

from ..runtime.grammars.trial import OPTIONS
from .tools import END, MOST_CALLS, START, function_of, parameters_of

SPACE = r"[ \t\r\n]*"
ANY_OBJECT: dict[str, Any] = {"type": "object"}
WRITABLE = frozenset(("type", "properties", "required", "additionalProperties", "$defs", "definitions"))
NOTES = frozenset(("title", "description", "$schema", "$comment", "$id", "default", "examples", "deprecated"))
"""Keywords of parameters that Python's arguments can follow one by one, and those that say nothing about them."""

KEY = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
PYTHONIC = {"boolean": '"True" | "False"', "null": '"None"'}
"""Constants as Python writes them, by the types that they are of."""


def bound_grammar(
    tools: Sequence[Mapping[str, Any]], *, parallel: bool, marked: bool, answer: Mapping[str, Any] | None = None
) -> str:
    """The grammar of an answer that may be calls.

    Args:
        tools: The tools, in OpenAI's form.
        parallel: Whether there may be several calls.
        marked: Whether the tokenizer has the marks that may stand around calls.
        answer: The schema of an answer that is none; None where that is free.

    Raises:
        SessionError: A strict tool's parameters are no object's schema.
    """
    functions = [function_of(tool) for tool in tools]
    numbers = range(len(functions))

    def several(form: str) -> str:
        return f" ({form}){{0,{MOST_CALLS - 1}}}" if parallel else ""

    pythonic = [number for number in numbers if _is_pythonic(functions[number])]
    lines = [f"calls: ({'python | ' if pythonic else ''}objects | list) WS?", "WS: /[ \\t\\r\\n]{1,20}/"]
    lines += [f"COMMA: /{SPACE},{SPACE}/", f"SEPARATOR: /{SPACE};{SPACE}|[ \\t\\r\\n]+/"]
    for number, function in enumerate(functions):
        lines += _forms(number, function)
    if pythonic:
        more = several(f"COMMA ({_either('N_{0} a_{0}', pythonic)})")
        lines.append(f'python: ({_either("P_{0} a_{0}", pythonic)}){more} WS? "]"')
    inner = _either('K_{0} o_{0} WS? "}}"', numbers)
    objects, first = _either('J_{0} o_{0} WS? "}}"', numbers), _either('L_{0} o_{0} WS? "}}"', numbers)
    lines.append(f"objects: ({objects}){several(f'SEPARATOR? ({inner})')}")
    lines.append(f'list: ({first}){several(f"COMMA ({inner})")} WS? "]"')
    return "\n".join([*_starts(functions, pythonic, marked, answer), *lines])


def beginnings(tools: Sequence[Mapping[str, Any]]) -> re.Pattern[str]:
    """The expression of the beginnings of tools' calls from which on the grammar binds them."""
    found: list[str] = []
    for function in map(function_of, tools):
        heads = _heads(function["name"])
        found += heads if _is_pythonic(function) else heads[2:]
    return re.compile("|".join(found))


def _starts(
    functions: Sequence[Mapping[str, Any]], pythonic: Sequence[int], marked: bool, answer: Mapping[str, Any] | None
) -> list[str]:
    """The rules of the whole answer."""
    if answer is not None:
        options: list[Any] = [_moved(answer, "#/anyOf/0")]
        for number, function in enumerate(functions, 1):
            arguments = _moved(_bound(function), f"#/anyOf/{number}/properties/parameters")
            properties = {"name": {"const": function["name"]}, "parameters": arguments}
            option = {"type": "object", "properties": properties, "required": list(properties)}
            options.append({**option, "additionalProperties": False})
        written = json.dumps({"anyOf": options, "x-guidance": OPTIONS})
        more = f" | ({START} calls {END}?){{1,{MOST_CALLS}}}" if marked else ""
        python = " | python WS?" if pythonic else ""
        return [f"start: answer{python}{more}", f"answer: %json {written}"]
    heads = [*(f"P_{number}" for number in pythonic)]
    heads += [f"{kind}_{number}" for kind in "JL" for number in range(len(functions))]
    free = f"/(?s:.+)/ & ~( ({' | '.join(heads)}) /(?s:.*)/ )"
    for mark in (START, END):
        free += rf" & ~/(?s:.*){re.escape(mark)}(?s:.*)/"
    start = f"start: part? (({START} | {END}) part?)*" if marked else "start: part?"
    return [start, "part: FREE | calls", f"FREE: {free}"]


def _heads(name: str) -> tuple[str, str, str, str, str]:
    """The beginnings of a call: first or next in a list in Python, as JSON, first or next in a list of JSON."""
    kind = rf'("type"{SPACE}:{SPACE}"function"{SPACE},{SPACE})?'
    called = rf"{re.escape(name)}{SPACE}\("
    name = rf'"name"{SPACE}:{SPACE}"{re.escape(name)}"'
    named = rf'\{{{SPACE}{kind}{name}{SPACE},{SPACE}"(parameters|arguments)"{SPACE}:{SPACE}'
    return rf"{SPACE}\[{SPACE}{called}", called, f"{SPACE}{named}", rf"{SPACE}\[{SPACE}{named}", named


def _either(form: str, numbers: Sequence[int]) -> str:
    return " | ".join(form.format(number) for number in numbers)


def _forms(number: int, function: Mapping[str, Any]) -> list[str]:
    """The rules of one function's calls."""
    heads = dict(zip("PNJLK", _heads(function["name"]), strict=True))
    schema = _bound(function)
    lines = [f"{kind}_{number}: /{head}/" for kind, head in heads.items() if kind not in "PN" or _is_pythonic(function)]
    lines.append(f"o_{number}: %json {json.dumps({**schema, 'type': 'object', 'x-guidance': OPTIONS})}")
    if not _is_pythonic(function):
        return lines
    if not function.get("strict"):
        key, value = f"ANY_{number}", f"any_{number}"
        lines += [f"{key}: /{KEY.pattern}{SPACE}={SPACE}/", f"{value}: {_value({}, {})}"]
        return [*lines, f'a_{number}: WS? ({key} {value} (COMMA {key} {value})*)? WS? ")"']
    return lines + _arguments(number, schema)


def _arguments(number: int, schema: Mapping[str, Any]) -> list[str]:
    """The rules of a strict function's arguments in Python, in the order of its schema."""
    properties, required = schema.get("properties", {}), schema.get("required", ())
    shared = {name: schema[name] for name in ("$defs", "definitions") if name in schema}
    lines = [f"a_{number}: WS? s_{number}_0"]
    for place, (name, each) in enumerate(properties.items()):
        this = f"{number}_{place}"
        after, written = f"r_{number}_{place + 1}", f"n_{this} v_{this}"
        skipped = "" if name in required else f" | s_{number}_{place + 1}"
        optional = f"(COMMA {written})?" if skipped else f"COMMA {written}"
        lines += [f"n_{this}: /{name}{SPACE}={SPACE}/", f"v_{this}: {_value(each, shared)}"]
        lines += [f"s_{this}: {written} {after}{skipped}", f"r_{this}: {optional} {after}"]
    last = len(properties)
    return [*lines, *(f'{kind}_{number}_{last}: WS? ")"' for kind in "sr")]


def _value(schema: Any, shared: Mapping[str, Any]) -> str:
    """The rule of an argument's value in Python: as JSON writes it, but constants in either way."""
    if not isinstance(schema, Mapping):
        schema = {} if schema else {"not": {}}
    kinds = schema.get("type", () if set(schema) - NOTES else tuple(PYTHONIC))
    kinds = (kinds,) if isinstance(kinds, str) else kinds
    is_plain = not {"enum", "const", "allOf", "anyOf", "oneOf", "$ref"} & set(schema)
    shared = shared if '"$ref"' in json.dumps(schema) else {}
    constants = [PYTHONIC[kind] for kind in kinds if kind in PYTHONIC] if is_plain else []
    return " | ".join([f"%json {json.dumps({**schema, **shared, 'x-guidance': OPTIONS})}", *constants])


def _bound(function: Mapping[str, Any]) -> Mapping[str, Any]:
    """The schema that a function's arguments follow: its own where it is strict."""
    return parameters_of(function) if function.get("strict") else ANY_OBJECT


def _is_pythonic(function: Mapping[str, Any]) -> bool:
    """Whether Python's arguments can follow a function's schema one by one."""
    if not function.get("strict"):
        return True
    schema = parameters_of(function)
    properties, text = schema.get("properties", {}), json.dumps(schema)
    is_flat = set(schema) <= WRITABLE | NOTES and set(schema.get("required", ())) <= set(properties)
    is_closed = not any(f'"$ref": "{place}' in text for place in ('#"', "#/properties"))
    return is_flat and is_closed and all(KEY.fullmatch(name) for name in properties)


def _moved(schema: Any, place: str) -> Any:
    """A schema whose references within itself hold where it stands in another."""
    if isinstance(schema, list):
        return [_moved(each, place) for each in schema]
    if not isinstance(schema, Mapping):
        return schema
    found = {name: _moved(each, place) for name, each in schema.items()}
    reference = found.get("$ref")
    if isinstance(reference, str) and (reference == "#" or reference.startswith("#/")):
        found["$ref"] = place + reference[1:]
    return found
