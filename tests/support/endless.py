"""Answers of the tiny Llama 4 that only their length ends: it has several end tokens, and any of them may come."""

import json
from pathlib import Path

_GENERATION = Path(__file__).parents[2] / "examples" / "tiny-llama4" / "generation_config.json"

ENDLESS = {"logit_bias": {str(end): -100 for end in json.loads(_GENERATION.read_text())["eos_token_id"]}}
"""Fields of a request that forbid each end token."""
