"""Values for generation that stand in `config.json`, for a checkpoint without a `generation_config.json`.

As `transformers` takes them then: those beside the text decoder's part before those in it; null is as left out. Beside
a `generation_config.json` none of them is taken, even where that says nothing.
"""

from typing import Any

NAMES = (
    "bos_token_id",
    "eos_token_id",
    "pad_token_id",
    "do_sample",
    "temperature",
    "top_k",
    "top_p",
    "min_p",
    "top_h",
    "typical_p",
    "epsilon_cutoff",
    "eta_cutoff",
    "repetition_penalty",
    "length_penalty",
    "no_repeat_ngram_size",
    "bad_words_ids",
    "sequence_bias",
    "suppress_tokens",
    "begin_suppress_tokens",
    "forced_bos_token_id",
    "forced_eos_token_id",
    "exponential_decay_length_penalty",
    "guidance_scale",
    "max_length",
    "max_new_tokens",
    "min_length",
    "min_new_tokens",
    "stop_strings",
    "num_beams",
    "early_stopping",
    "penalty_alpha",
    "watermarking_config",
)
"""Fields of a generation config that change the text."""


def generation_values(config: dict[str, Any]) -> dict[str, Any]:
    """The values for generation of a `config.json`, by name."""
    nested = config.get("text_config")
    parts = [config, nested if isinstance(nested, dict) else {}]
    found = {name: [part[name] for part in parts if part.get(name) is not None] for name in NAMES}
    return {name: values[0] for name, values in found.items() if values}
