"""Every answer that follows a JSON schema validates; `tests/fuzz/schemas.py` draws many more."""

import json
import random
from collections import Counter
from pathlib import Path

import jsonschema
from schema_answers import draw_answer, draw_schema
from tokenizers import Tokenizer

from arriero.errors import SessionError
from arriero.runtime.grammars.compiler import GrammarCompiler


def test_answers_drawn_from_schemas_validate(tiny: Path) -> None:
    compiler = GrammarCompiler(Tokenizer.from_file(str(tiny / "tokenizer.json")), 2048)
    counts: Counter[str] = Counter()
    for number in range(20):
        schema = draw_schema(random.Random(number), depth=2)
        try:
            answer = draw_answer(compiler, schema, number)
        except SessionError as error:
            counts["refused" if "is refused" in str(error) else str(error)] += 1
            continue
        counts["finished" if answer is not None else "unfinished"] += 1
        if answer is not None:
            validator = jsonschema.Draft202012Validator
            validator(schema, format_checker=validator.FORMAT_CHECKER).validate(json.loads(answer))
    assert counts["finished"] > 11, counts
    assert set(counts) <= {"finished", "unfinished", "refused"}
    assert counts["refused"] < 7, counts
