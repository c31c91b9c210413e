"""Every answer that follows a JSON schema validates: schemas drawn at random, and those of JSON Schema's test suite.

    python tests/fuzz/schemas.py [COUNT] [SEED] [FOLDER]

FOLDER holds the suite's files, as `tests/draft2020-12` of json-schema-org/JSON-Schema-Test-Suite.
"""

import collections
import json
import random
import re
import signal
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import jsonschema
from tokenizers import Tokenizer

ROOT = Path(__file__).parent.parent.parent
sys.path.insert(0, str(ROOT / "tests" / "support"))

from schema_answers import draw_answer, draw_schema  # noqa: E402

from arriero.errors import SessionError  # noqa: E402
from arriero.runtime.grammars.compiler import GrammarCompiler  # noqa: E402

VALIDATOR = jsonschema.Draft202012Validator
ANSWERS = 3
"""Answers of each schema."""


def schemas(count: int, seed: int, folder: Path | None) -> Iterator[tuple[str, Any]]:
    """Names and schemas."""
    for number in range(count):
        schema = draw_schema(random.Random(f"{seed} {number}"))
        yield f"drawn {number}", {**schema, "$defs": {**definitions(schema), **schema.get("$defs", {})}}
    for path in sorted(folder.glob("*.json")) if folder else ():
        for case in json.loads(path.read_text("utf-8")):
            yield f"{path.name}: {case['description']}", case["schema"]


def definitions(schema: Any) -> dict[str, Any]:
    """The definitions of a schema at whatever depth, since references look for them at the top."""
    found: dict[str, Any] = {}
    for each in schema.values() if isinstance(schema, dict) else schema if isinstance(schema, list) else ():
        found |= definitions(each)
    return {**found, **schema.get("$defs", {})} if isinstance(schema, dict) else found


def judge(compiler: GrammarCompiler, given: Iterable[tuple[str, Any]], counts: collections.Counter[str]) -> None:
    """Draws answers, and counts those that validate."""
    for name, schema in given:
        try:
            answers = [draw_answer(compiler, schema, number) for number in range(ANSWERS)]
        except SessionError as error:
            counts["refused" if "is refused" in str(error) else "no token left"] += 1
            if "is refused" not in str(error) and "--verbose" in sys.argv:
                print(name, str(error)[:200], json.dumps(schema)[:300])
            continue
        counts["schemas"] += 1
        for answer in answers:
            if answer is None:
                counts["unfinished"] += 1
                continue
            counts["answers"] += 1
            try:
                VALIDATOR(schema, format_checker=VALIDATOR.FORMAT_CHECKER).validate(json.loads(answer))
            except re.error:  # the oracle knows fewer expressions
                counts["not judged"] += 1
            except (ValueError, jsonschema.ValidationError) as error:
                counts["INVALID"] += 1
                print(f"{name}: {json.dumps(schema)[:600]}\n    {answer[:200]!r}: {str(error).splitlines()[0][:200]}")


def main(count: int = 1000, seed: int = 0, folder: Path | None = None) -> int:
    """Draws answers and validates them. Returns the exit code."""
    tokenizer = Tokenizer.from_file(str(ROOT / "examples" / "tiny-llama4" / "tokenizer.json"))
    compiler = GrammarCompiler(tokenizer, 2048)
    counts: collections.Counter[str] = collections.Counter()
    try:
        judge(compiler, schemas(count, seed, folder), counts)
    finally:  # if only so far
        print(dict(counts), flush=True)
    return 1 if counts["INVALID"] else 0


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    numbers = [int(each) for each in sys.argv[1:3]]
    raise SystemExit(main(*numbers, *(Path(each) for each in sys.argv[3:4])))
