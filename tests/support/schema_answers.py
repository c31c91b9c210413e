"""JSON schemas drawn at random, and answers drawn at random from their grammars, without a model."""

import random
import string
from collections.abc import Callable
from typing import Any

import numpy as np

from arriero.runtime.draws import Sampling
from arriero.runtime.grammars.compiler import GrammarCompiler
from arriero.runtime.grammars.guide import Guide
from arriero.runtime.sampling import Sampler

END = 3
"""Token that ends an answer: the tiny Llama 4's `<|eot|>`."""

LETTERS = 'ab"\\/ é日🦙\n\t{}[]:,<|'
FORMATS = ("date", "time", "date-time", "uuid", "ipv4", "email", "hostname")
PATTERNS = ("^[a-c]{1,4}$", "[0-9]", "^x", "(foo|bar)+$", r"^\d{2}-\w*$", "^$", r"\.")


def draw_schema(rng: random.Random, depth: int = 3) -> dict[str, Any]:
    """A schema in the words of draft 2020-12, at times one that contradicts itself."""
    makers: list[Callable[[random.Random, int], dict[str, Any]]] = [_number, _string, _string, _fixed]
    if depth:
        makers += [_object, _object, _array, _array, _choice, _several, _reference]
    schema = rng.choice(makers)(rng, depth - 1)
    if rng.random() < 0.1:
        schema |= {"title": "t", "description": _text(rng), "default": 1, "examples": [None]}
    return schema


def draw_answer(compiler: GrammarCompiler, schema: Any, seed: int, longest: int = 400) -> str | None:
    """An answer drawn from a schema's grammar, None where it had no end; a `SessionError` where there is no grammar."""
    compiler.worker.fill = Guide.fill  # type: ignore[method-assign, assignment]  # no step of a model runs beside it
    guide = compiler.compile("json_schema", schema).open([END])
    rng = np.random.default_rng(seed)
    sampler = Sampler(Sampling(temperature=1.0, seed=seed), [END], 0, guide)
    closing = [compiler.tokenizer.encode(text, add_special_tokens=False).ids[0] for text in '"}],0']
    ids: list[int] = []
    while len(ids) < longest:
        logits_V = rng.normal(size=compiler.size).astype(np.float32) * 3
        logits_V[closing] += len(ids) / 6  # sooner or later all that is open is closed
        ids.append(sampler(logits_V, ids))
        guide.advance(ids[-1])
        if ids[-1] == END or guide.is_complete:
            return str(compiler.tokenizer.decode(ids))
    return None


def _text(rng: random.Random) -> str:
    return "".join(rng.choice(LETTERS + string.ascii_letters) for _ in range(rng.randrange(6)))


def _number(rng: random.Random, depth: int) -> dict[str, Any]:
    schema: dict[str, Any] = {"type": rng.choice(["integer", "number", ["integer", "null"]])}
    least = rng.choice([rng.randint(-1000, 1000), rng.randint(-9, 9) / 4, 0])
    for name, value in (("minimum", least), ("maximum", least + rng.choice([0, 1, 17, 2.5, 10**6]))):
        if rng.random() < 0.5:
            schema[rng.choice([name, f"exclusive{name.title()}"])] = value
    if rng.random() < 0.3:
        schema["multipleOf"] = rng.choice([1, 2, 5, 10, 0.5, 0.25])
    return schema


def _string(rng: random.Random, depth: int) -> dict[str, Any]:
    schema: dict[str, Any] = {"type": "string"}
    if rng.random() < 0.4:
        schema["minLength"] = rng.randrange(5)
    if rng.random() < 0.5:
        schema["maxLength"] = schema.get("minLength", 0) + rng.randrange(8)
    if rng.random() < 0.25:
        schema["pattern"] = rng.choice(PATTERNS)
    elif rng.random() < 0.2:
        schema["format"] = rng.choice(FORMATS)
    return schema


def _fixed(rng: random.Random, depth: int) -> dict[str, Any]:
    values = [None, True, False, 0, -1.5, 2.5e10, _text(rng), [1, _text(rng)], {_text(rng): None}, rng.randrange(99)]
    return rng.choice(
        [
            {"const": rng.choice(values)},
            {"enum": rng.sample(values, rng.randint(1, 4))},
            {"type": rng.choice(["boolean", "null", "string"])},
            {},
        ]
    )


def _object(rng: random.Random, depth: int) -> dict[str, Any]:
    names = [_text(rng) or "k" for _ in range(rng.randrange(4))]
    schema: dict[str, Any] = {"type": "object", "properties": {name: draw_schema(rng, depth) for name in names}}
    if names and rng.random() < 0.8:
        schema["required"] = sorted(set(rng.sample(names, rng.randint(1, len(names)))))
    if rng.random() < 0.6:
        schema["additionalProperties"] = rng.choice([False, True, draw_schema(rng, 0)])
    if rng.random() < 0.15:
        schema["patternProperties"] = {rng.choice(PATTERNS): draw_schema(rng, 0)}
    if rng.random() < 0.1:
        schema[rng.choice(["minProperties", "maxProperties"])] = rng.randrange(4)
    return schema


def _array(rng: random.Random, depth: int) -> dict[str, Any]:
    schema: dict[str, Any] = {"type": "array"}
    if rng.random() < 0.8:
        schema["items"] = rng.choice([False, draw_schema(rng, depth), draw_schema(rng, depth)])
    if rng.random() < 0.4:
        schema["prefixItems"] = [draw_schema(rng, depth) for _ in range(rng.randrange(1, 3))]
    if rng.random() < 0.5:
        schema["minItems"] = rng.randrange(3)
    if rng.random() < 0.5:
        schema["maxItems"] = schema.get("minItems", 0) + rng.randrange(3)
    if rng.random() < 0.05:
        schema["uniqueItems"] = True
    return schema


def _choice(rng: random.Random, depth: int) -> dict[str, Any]:
    return {rng.choice(["anyOf", "anyOf", "oneOf"]): [draw_schema(rng, depth) for _ in range(rng.randint(1, 3))]}


def _several(rng: random.Random, depth: int) -> dict[str, Any]:
    schema = {"allOf": [draw_schema(rng, depth), draw_schema(rng, 0)]}
    if rng.random() < 0.2:
        schema |= rng.choice([{"not": {"type": "null"}}, {"if": {}, "then": {}}, {"contains": {}}])
    return schema


def _reference(rng: random.Random, depth: int) -> dict[str, Any]:
    inner = draw_schema(rng, depth)
    if rng.random() < 0.4:  # lists within lists
        inner = {"anyOf": [inner, {"type": "array", "items": {"$ref": "#/$defs/it"}, "maxItems": 2}]}
    return {"$defs": {"it": inner}, "type": "object", "properties": {"r": {"$ref": "#/$defs/it"}}, "required": ["r"]}
