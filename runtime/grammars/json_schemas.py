"""JSON schemas in the keywords that llguidance enforces: the same meaning in other words, where there are such words.

Enters: a schema as libraries write it. Leaves: one with the same valid documents, or fewer of them. Invariant: a
keyword goes only where it allows every document, or where another that says the same takes its place; whatever else
llguidance lacks stays, so that it is refused by its name.
"""

from collections.abc import Callable, Mapping
from typing import Any

PLAIN_FORMATS = frozenset(
    ("password", "binary", "path", "file-path", "directory-path", "text", "textarea", "multiline", "markdown", "html")
)
"""Formats of text that forbid no text: they say where it comes from, or how it is shown."""

NAMES_OF_PATTERNS = frozenset(
    ("starts_with", "ends_with", "includes", "lowercase", "uppercase", "cidrv4", "cidrv6", "emoji")
)
"""Zod's names of a pattern that stands beside them."""

BASE64 = r"^(?:[A-Za-z0-9+/]{4})*(?:[A-Za-z0-9+/]{2}==|[A-Za-z0-9+/]{3}=)?$"
UUID = "^[0-9a-fA-F]{8}-[0-9a-fA-F]{4}-%s[0-9a-fA-F]{3}-[89abAB][0-9a-fA-F]{3}-[0-9a-fA-F]{12}$"
POINTER = r"(?:/(?:[^~/]|~[01])*)*"
FORMATS: dict[str, str] = {
    "byte": BASE64,
    "base64": BASE64,
    "base64url": "^[A-Za-z0-9_-]*$",
    "json-pointer": f"^{POINTER}$",
    "relative-json-pointer": f"^(?:0|[1-9][0-9]*)(?:#|{POINTER})$",
    "guid": "^[0-9a-fA-F]{8}(?:-[0-9a-fA-F]{4}){3}-[0-9a-fA-F]{12}$",
    "e164": "^[+][1-9][0-9]{6,14}$",
    "ulid": "^[0-7][0-9A-HJKMNP-TV-Z]{25}$",
    "nanoid": "^[A-Za-z0-9_-]{21}$",
    "cuid": "^c[0-9a-z]{24}$",
    "cuid2": "^[a-z][0-9a-z]{1,31}$",
    "xid": "^[0-9a-v]{20}$",
    "ksuid": "^[A-Za-z0-9]{27}$",
    **{f"uuid{version}": UUID % version for version in range(1, 9)},
}
"""Expressions of formats that llguidance does not know; all texts of each are of the format."""

NUMBERS = {
    **{f"int{bits}": (-(1 << bits - 1), (1 << bits - 1) - 1) for bits in (8, 16, 32)},
    **{f"uint{bits}": (0, (1 << bits) - 1) for bits in (8, 16, 32, 64)},
    "int64": (1024 - (1 << 63), (1 << 63) - 1),  # the least that llguidance takes
}
"""Least and greatest whole number of OpenAPI's formats."""

LABEL = r"[a-zA-Z0-9](?:[a-zA-Z0-9-]{0,61}[a-zA-Z0-9])?(?:\.[a-zA-Z0-9](?:[-0-9a-zA-Z]{0,61}[0-9a-zA-Z])?)*"
SECONDS = r"\d+([.,]\d+)?S"
DAYS = r"\d+Y(\d+M)?(\d+D)?|\d+M(\d+D)?|\d+D"
TIME = rf"T(?:\d+H(\d+M)?({SECONDS})?|\d+M({SECONDS})?|{SECONDS})"
WITHOUT_LOOKING: dict[str, str] = {
    r"^(?!^[-+.]*$)[+-]?0*\d*\.?\d*$": r"^[+-]?(?:\d+\.?\d*|\.\d+)$",  # pydantic's of a decimal number
    rf"^(?=.{{1,253}}\.?$){LABEL}\.?$": rf"^{LABEL}$",  # zod's of a host, without its last dot
    r"^P(?:(\d+W)|(?!.*W)(?=\d|T\d)(\d+Y)?(\d+M)?(\d+D)?(T(?=\d)(\d+H)?(\d+M)?(\d+([.,]\d+)?S)?)?)$": (
        rf"^P(?:\d+W|(?:{DAYS})(?:{TIME})?|{TIME})$"
    ),  # zod's of a duration
}
"""Expressions that look around, which llguidance does not take, and others that match the same or less."""

ONE = (
    *("additionalProperties", "additionalItems", "items", "contains", "not", "if", "then", "else"),
    *("propertyNames", "unevaluatedItems", "unevaluatedProperties"),
)
SEVERAL = ("allOf", "anyOf", "oneOf", "prefixItems", "items")
NAMED = ("properties", "patternProperties", "$defs", "definitions", "dependentSchemas")
APPLIED = ("allOf", "anyOf", "oneOf", "$ref", "$dynamicRef", "if", "dependentSchemas", "not")
"""Keywords through which another schema may have looked at a document's parts."""

Schema = dict[str, Any]


def enforceable(schema: Any, root: Any = None) -> Any:
    """Rewrites a schema, and those in it, in keywords that llguidance enforces.

    Args:
        schema: The schema, plain data.
        root: The document that its references look into; None takes the schema.

    Raises:
        RecursionError: It is too deep.
    """
    if not isinstance(schema, Mapping):
        return schema
    found, root = dict(schema), schema if root is None else root
    for name in ONE:
        if isinstance(found.get(name), Mapping):
            found[name] = _inner(found[name], root)
    for name in SEVERAL:
        if isinstance(found.get(name), list):
            found[name] = [_inner(each, root) for each in found[name]]
    for name in NAMED:
        if isinstance(found.get(name), Mapping):
            found[name] = {key: _inner(each, root) for key, each in found[name].items()}
    _leave_out(found)
    for rewrite in (_format, _pattern, _unevaluated):
        rewrite(found)
    _names(found, root)
    _kinds(found, root)
    return found


def _inner(schema: Any, root: Any) -> Any:
    """A schema within another; one that allows nothing is false, which llguidance takes there."""
    if isinstance(schema, Mapping) and "not" in schema and _allows_all(schema["not"]):
        return False
    return enforceable(schema, root)


def _leave_out(schema: Schema) -> None:
    """Leaves keywords out that allow every document."""
    idle: dict[str, Callable[[Any], bool]] = {
        "uniqueItems": lambda value: value is False or _most(schema, "maxItems") <= 1,
        "propertyNames": _allows_names,
        "unevaluatedProperties": _allows_all,
        "unevaluatedItems": _allows_all,
        "not": lambda value: value is False,
        "if": lambda value: not {"then", "else"} & set(schema),
        "then": lambda value: "if" not in schema or _allows_all(value),
        "else": lambda value: "if" not in schema or _allows_all(value),
        "minContains": lambda value: "contains" not in schema,
        "maxContains": lambda value: "contains" not in schema,
        "dependentRequired": lambda value: value == {},
        "dependentSchemas": lambda value: value == {},
        "dependencies": lambda value: value == {},
        "$recursiveAnchor": lambda value: value is False,
    }
    if schema.get("minContains") == 0 and schema.get("minContains") is not False and "maxContains" not in schema:
        schema.pop("contains", None)
    for _ in range(2):  # `if` goes once its branches have gone
        for name, allows in idle.items():
            if name in schema and allows(schema[name]):
                del schema[name]


def _allows_all(schema: Any) -> bool:
    return schema is True or schema == {}


def _allows_names(schema: Any) -> bool:
    """Whether a schema allows every name of a property, which is always a text."""
    return schema is True or (isinstance(schema, Mapping) and {**schema, "type": "string"} == {"type": "string"})


def _most(schema: Schema, name: str) -> float:
    value = schema.get(name)
    return value if isinstance(value, int) and not isinstance(value, bool) else float("inf")


def _format(schema: Schema) -> None:
    """Leaves a format out that forbids nothing, and writes others as bounds, expressions or formats that are known."""
    name, kinds = schema.get("format"), schema.get("type")
    if not isinstance(name, str):
        return
    if kinds == "integer" and name in NUMBERS:
        del schema["format"]
        least, most = NUMBERS[name]
        _bind(schema, "minimum", least, max)
        _bind(schema, "maximum", most, min)
    elif name in PLAIN_FORMATS or (name in NAMES_OF_PATTERNS and {"pattern", "allOf"} & set(schema)):
        del schema["format"]
    elif name in FORMATS:
        del schema["format"]
        _also(schema, {"pattern": FORMATS[name]})
    elif name == "ipvanyaddress":
        del schema["format"]
        _also(schema, {"anyOf": [{"format": "ipv4"}, {"format": "ipv6"}]})


def _bind(schema: Schema, name: str, bound: int, choose: Callable[[Any, Any], Any]) -> None:
    """Sets a bound of a number, unless one is there that is narrower, or none."""
    given = schema.get(name, bound)
    if isinstance(given, int | float) and not isinstance(given, bool):
        schema[name] = choose(given, bound)


def _also(schema: Schema, more: Schema) -> None:
    """Adds a schema that has to hold as well."""
    if set(more) & set(schema):
        schema["allOf"] = [*schema.get("allOf", []), more]
    else:
        schema |= more


def _pattern(schema: Schema) -> None:
    pattern = schema.get("pattern")
    if isinstance(pattern, str) and pattern in WITHOUT_LOOKING:
        schema["pattern"] = WITHOUT_LOOKING[pattern]
        if pattern.startswith("^(?=.{1,253}"):
            _bind(schema, "maxLength", 253, min)


def _unevaluated(schema: Schema) -> None:
    """Writes what is forbidden beside the keywords of this schema alone as those do that llguidance knows."""
    if any(name in schema for name in APPLIED):
        return
    if schema.get("unevaluatedProperties") is False:
        del schema["unevaluatedProperties"]
        schema.setdefault("additionalProperties", False)
    if schema.get("unevaluatedItems") is False and "contains" not in schema:
        del schema["unevaluatedItems"]
        if isinstance(schema.get("items"), list):
            schema.setdefault("additionalItems", False)
        else:
            schema.setdefault("items", False)


def _names(schema: Schema, root: Any) -> None:
    """Writes the names that properties may have as properties, or as their pattern."""
    names = _resolved(schema.get("propertyNames"), root)
    if not isinstance(names, Mapping) or "patternProperties" in schema:
        return
    given, others = schema.get("properties", {}), schema.get("additionalProperties", True)
    bound = {key: value for key, value in names.items() if key not in ("type", "title", "description", "$schema")}
    if names.get("type", "string") != "string" or not isinstance(given, Mapping):
        return
    allowed = bound.get("enum", [bound["const"]] if "const" in bound else None)
    if isinstance(allowed, list) and len(bound) == 1:
        known = [name for name in given if name in allowed]
        more = [name for name in allowed if isinstance(name, str) and name not in given]
        schema["properties"] = {**{name: given[name] for name in known}, **dict.fromkeys(more, others)}
        schema["additionalProperties"] = False
    elif isinstance(pattern := _pattern_of(bound), str) and not given:
        schema["patternProperties"] = {pattern: others}
        schema["additionalProperties"] = False
    else:
        return
    del schema["propertyNames"]


def _pattern_of(bound: Mapping[str, Any]) -> Any:
    """The expression of a text by its pattern or its length alone; None where it is bound by anything else."""
    if set(bound) <= {"minLength", "maxLength"}:
        least, most = bound.get("minLength", 0), bound.get("maxLength", "")
        return f"^(?s:.{{{least},{most}}})$" if type(least) is int and type(most) in (int, str) else None
    return bound["pattern"] if set(bound) == {"pattern"} else None


def _kinds(schema: Schema, root: Any) -> None:
    """Writes one of several objects that are known apart by a property, as any of them that has it."""
    about, options = schema.get("discriminator"), schema.get("oneOf")
    name = about.get("propertyName") if isinstance(about, Mapping) else None
    if not isinstance(name, str) or not isinstance(options, list) or "anyOf" in schema:
        return
    found: list[Any] = []
    for option in options:
        meant = _resolved(option, root)
        properties = meant.get("properties") if isinstance(meant, Mapping) else None
        kind = properties.get(name) if isinstance(properties, Mapping) else None
        values = kind.get("enum", [kind["const"]] if "const" in kind else None) if isinstance(kind, Mapping) else None
        if not isinstance(values, list) or not all(isinstance(value, str) for value in values):
            return
        found.append(values)
    if len({value for values in found for value in values}) < sum(map(len, found)):
        return
    del schema["oneOf"]
    schema["anyOf"] = [_requiring(option, name) for option in options]


def _requiring(option: Schema, name: str) -> Schema:
    required = option.get("required", [])
    return {**option, "required": [*required, *(() if name in required else (name,))]}


def _resolved(schema: Any, root: Any) -> Any:
    """The schema that a reference alone points at within the document, or the schema itself."""
    for _ in range(8):
        if not isinstance(schema, Mapping) or set(schema) != {"$ref"} or not isinstance(schema["$ref"], str):
            break
        found, parts = root, schema["$ref"].split("/")
        if parts[0] != "#":
            break
        for part in parts[1:]:
            key = part.replace("~1", "/").replace("~0", "~")
            if not isinstance(found, Mapping) or key not in found:
                return schema
            found = found[key]
        schema = found
    return schema
