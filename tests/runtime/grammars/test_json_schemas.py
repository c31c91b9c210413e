"""Schemas as pydantic and zod write them are enforced; a keyword that would not be is refused by its name."""

import json
from pathlib import Path
from typing import Any

import jsonschema
import pytest
from schema_answers import draw_answer
from tokenizers import Tokenizer

from arriero.errors import SessionError
from arriero.runtime.grammars.compiler import GrammarCompiler
from arriero.runtime.grammars.json_schemas import FORMATS, enforceable

TEXT: dict[str, Any] = {"type": "string", "maxLength": 8}
NOTES = {
    "$schema": "http://json-schema.org/draft-07/schema#",
    "$id": "https://example.com/note",
    "$comment": "c",
    "title": "t",
    "description": "d",
    "default": "x",
    "examples": ["x"],
    "deprecated": True,
    "readOnly": True,
    "writeOnly": True,
    "contentMediaType": "text/plain",
    "format": "password",
}
DECIMAL = r"^(?!^[-+.]*$)[+-]?0*\d*\.?\d*$"
DURATION = r"^P(?:(\d+W)|(?!.*W)(?=\d|T\d)(\d+Y)?(\d+M)?(\d+D)?(T(?=\d)(\d+H)?(\d+M)?(\d+([.,]\d+)?S)?)?)$"
OPEN = {"uniqueItems": False, "unevaluatedItems": True, "minContains": 0, "contains": True}
A: dict[str, Any] = {"type": "object", "properties": {"kind": {"const": "a", "default": "a"}}, "title": "A"}
B: dict[str, Any] = {"type": "object", "properties": {"kind": {"const": "b"}, "of": {"type": "boolean"}}}
SCHEMAS: dict[str, dict[str, Any]] = {
    "notes": {**TEXT, **NOTES},
    "of no constraint": {"type": "array", "items": {"type": "boolean"}, "maxItems": 3, **OPEN},
    "conditions that are none": {**TEXT, "if": {"const": "a"}, "then": True, "not": False, "dependentRequired": {}},
    "dictionary of zod": {
        "type": "object",
        "propertyNames": {"type": "string"},
        "additionalProperties": {"type": "integer"},
        "maxProperties": 2,
    },
    "dictionary by an enumeration": {
        "type": "object",
        "$defs": {"Key": {"enum": ["x", "y"], "title": "Key", "type": "string"}},
        "propertyNames": {"$ref": "#/$defs/Key"},
        "additionalProperties": {"type": "boolean"},
        "required": ["y"],
    },
    "dictionary by a pattern": {"type": "object", "propertyNames": {"pattern": "^a[0-9]$"}, "maxProperties": 2},
    "dictionary by lengths": {"type": "object", "propertyNames": {"minLength": 2, "maxLength": 3}, "maxProperties": 2},
    "kinds of pydantic": {
        "$defs": {"A": A, "B": B},
        "oneOf": [{"$ref": "#/$defs/A"}, {"$ref": "#/$defs/B"}],
        "discriminator": {"propertyName": "kind", "mapping": {"a": "#/$defs/A", "b": "#/$defs/B"}},
    },
    "decimal of pydantic": {"anyOf": [{"type": "number", "maximum": 99}, {"type": "string", "pattern": DECIMAL}]},
    "duration of zod": {"type": "string", "pattern": DURATION, "maxLength": 12},
    "whole number": {"type": "integer", "format": "int8"},
    "long whole number": {"type": "integer", "format": "int64"},
    "object that is closed": {**A, "unevaluatedProperties": False},
    "list that is closed": {
        "type": "array",
        "prefixItems": [{"type": "boolean"}, {"const": 1}],
        "unevaluatedItems": False,
    },
    "nothing": {"type": "array", "items": {"not": {}}},
    "optional": {"anyOf": [{"enum": ["a"]}, {"type": "null"}], "default": None},
    "starts": {"type": "string", "format": "starts_with", "pattern": "^ab[0-9]$"},
    "a name like a keyword": {
        "type": "object",
        "properties": {"uniqueItems": {"const": True}, "format": {"const": "byte"}},
        "required": ["uniqueItems", "format"],
        "additionalProperties": False,
    },
    **{name: {"type": "string", "format": name} for name in FORMATS},
    "address": {"type": "string", "format": "ipvanyaddress"},
}


@pytest.fixture(scope="module")
def compiler(tiny: Path) -> GrammarCompiler:
    return GrammarCompiler(Tokenizer.from_file(str(tiny / "tokenizer.json")), 2048)


@pytest.mark.parametrize("name", SCHEMAS)
def test_answers_are_of_the_schema_as_it_was_written(compiler: GrammarCompiler, name: str) -> None:
    schema = SCHEMAS[name]
    given = json.dumps(schema)
    answers = [draw_answer(compiler, schema, seed, 600) for seed in range(4)]
    assert json.dumps(schema) == given
    finished = [json.loads(answer) for answer in answers if answer is not None]
    assert finished
    pattern = {"pattern": FORMATS[name]} if name in FORMATS else {}
    for answer in finished:
        jsonschema.Draft202012Validator({**schema, **pattern}).validate(answer)
        if "format" in schema and name.endswith("whole number"):
            bits = int(schema["format"][3:])
            assert -(1 << bits - 1) <= answer < 1 << bits - 1


@pytest.mark.parametrize(
    ("schema", "named"),
    [
        ({"type": "array", "uniqueItems": True}, "uniqueItems"),
        ({"type": "string", "format": "idn-email"}, "idn-email"),
        ({"type": "string", "format": "starts_with"}, "starts_with"),
        ({"type": "object", "propertyNames": {"pattern": "a", "minLength": 2}}, "propertyNames"),
        ({"type": "object", "propertyNames": {"format": "date"}}, "propertyNames"),
        ({"if": {"type": "string"}, "then": {"minLength": 2}}, "if"),
        ({"type": "array", "contains": {"const": 1}}, "contains"),
        ({"allOf": [A], "unevaluatedProperties": False}, "unevaluatedProperties"),
        ({"oneOf": [A, B]}, "oneOf"),
        ({"oneOf": [A, A], "discriminator": {"propertyName": "kind"}}, "oneOf"),
        ({"oneOf": [A, {"type": "object"}], "discriminator": {"propertyName": "kind"}}, "oneOf"),
        ({"not": {}}, "not"),
        ({"dependentRequired": {"a": ["b"]}}, "dependentRequired"),
        ({"type": "object", "properties": {"a": {"type": "array", "uniqueItems": True}}}, "uniqueItems"),
    ],
    ids=str,
)
def test_a_keyword_that_would_not_be_enforced_is_refused(compiler: GrammarCompiler, schema: Any, named: str) -> None:
    with pytest.raises(SessionError, match=f"^json_schema is refused .*{named}"):
        compiler.compile("json_schema", schema)


def test_a_schema_that_needs_no_other_words_stays_as_it_is() -> None:
    schema = {"type": "object", "properties": {"a": {"$ref": "#/$defs/A"}}, "$defs": {"A": TEXT}, "required": ["a"]}
    assert enforceable(schema) == schema
    assert enforceable(True) is True
