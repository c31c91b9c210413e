"""Fields of a folder's small files that ask for something that Arriero does not do.

Enters: a checkpoint, model or bundle folder. Leaves: a line for each file that has such fields. Invariant: of the
fields of generation, quantisation and images all are named that are not known to be heeded or to change nothing.
"""

from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from ..errors import shortened
from .folders import read_json

GENERATION_HEEDED = frozenset(
    {
        *("bad_words_ids", "begin_suppress_tokens", "do_sample", "eos_token_id", "frequency_penalty", "logit_bias"),
        *("max_length", "max_new_tokens", "min_length", "min_new_tokens", "min_p", "no_repeat_ngram_size"),
        *("presence_penalty", "repetition_penalty", "stop_strings", "suppress_tokens", "temperature", "top_k", "top_p"),
        *("typical_p",),
    }
)
"""Fields of `generation_config.json` that the runtime takes as its defaults."""

GENERATION_HARMLESS = frozenset(
    {
        *(
            "assistant_confidence_threshold",
            "assistant_early_exit",
            "assistant_ensemble_weight",
            "assistant_lookbehind",
        ),
        *("bos_token_id", "cache_config", "compile_config", "continuous_batching_config", "decoder_start_token_id"),
        *("disable_compile", "early_stopping", "is_assistant", "length_penalty", "low_memory", "max_cache_len"),
        *("max_matching_ngram_size", "num_assistant_tokens", "num_assistant_tokens_schedule", "output_attentions"),
        *("output_hidden_states", "output_logits", "output_scores", "pad_token_id", "prefill_chunk_size"),
        *("prompt_lookup_num_tokens", "renormalize_logits", "return_dict_in_generate", "speculation_type"),
        *("target_lookbehind", "transformers_version", "use_cache", "use_mtp"),
    }
)
"""Fields that change a text's cost or what is returned beside it, or that count only beside a field that is named."""

GENERATION_NEUTRAL: Mapping[str, Collection[Any]] = {
    "cache_implementation": (
        *("dynamic", "dynamic_full", "static", "hybrid", "hybrid_chunked", "sliding_window"),
        *("offloaded", "offloaded_static", "offloaded_hybrid", "offloaded_hybrid_chunked"),
    ),
    "constraints": (),
    "diversity_penalty": (0,),
    "dola_layers": (),
    "encoder_no_repeat_ngram_size": (0,),
    "encoder_repetition_penalty": (1,),
    "epsilon_cutoff": (0,),
    "eta_cutoff": (0,),
    "exponential_decay_length_penalty": (),
    "force_words_ids": (),
    "forced_bos_token_id": (),
    "forced_eos_token_id": (),
    "guidance_scale": (1,),
    "max_time": (),
    "num_beam_groups": (1,),
    "num_beams": (1,),
    "num_return_sequences": (1,),
    "penalty_alpha": (0,),
    "remove_invalid_values": (False,),
    "sequence_bias": (),
    "token_healing": (False,),
    "top_h": (),
    "watermarking_config": (),
}
"""Other fields, and the values with which they change nothing."""

TOKENIZER_NEUTRAL: Mapping[str, Collection[Any]] = {
    "add_bos_token": (True,),
    "add_eos_token": (False,),
    "add_prefix_space": (False,),
    "split_special_tokens": (False,),
    "clean_up_tokenization_spaces_for_bpe_even_though_it_will_corrupt_output": (False,),
}
"""Fields of `tokenizer_config.json` that change ids or texts: `tokenizer.json` alone decides these here."""

PROCESSOR_HEEDED = frozenset(
    {
        *("auto_map", "chat_template", "image_processor", "patch_size", "pixel_shuffle_ratio", "processor_class"),
    }
)
PROCESSOR_NEUTRAL: Mapping[str, Collection[Any]] = {
    "fake_image_token": ("<|image|>",),
    "image_token": ("<|image|>",),
    "start_of_image_token": ("<|image_start|>",),
    "end_of_image_token": ("<|image_end|>",),
    "patch_token": ("<|patch|>",),
    "tile_x_separator_token": ("<|tile_x_separator|>",),
    "tile_y_separator_token": ("<|tile_y_separator|>",),
    "tile_token": ("<|tile_x_separator|>",),
    "tile_global_token": ("<|tile_y_separator|>",),
}
"""Fields of `processor_config.json`; the tokens that stand for images are Llama 4's own."""

IMAGES_HEEDED = frozenset(
    {
        *("auto_map", "data_format", "device", "disable_grouping", "do_convert_rgb", "do_normalize", "do_rescale"),
        *(
            "do_resize",
            "feature_extractor_type",
            "image_mean",
            "image_processor_type",
            "image_std",
            "input_data_format",
        ),
        *("max_patches", "patch_size", "pixel_shuffle_ratio", "processor_class", "resample", "rescale_factor"),
        *("resize_to_max_canvas", "return_tensors", "size"),
    }
)
IMAGES_NEUTRAL: Mapping[str, Collection[Any]] = {
    "do_center_crop": (False,),
    "do_pad": (False,),
    "default_to_square": (True, False),
    "crop_size": (),
}
"""Fields of an image processor, heeded or refused by the runtime's images, and others."""

QUANTISATION_HEEDED = frozenset(
    {
        *("quant_method", "quant_algo", "kv_cache_quant_algo", "kv_cache_scheme", "config_groups", "format"),
        *(
            "global_compression_ratio",
            "ignore",
            "quantization_status",
            "sparsity_config",
            "transform_config",
            "version",
        ),
        *(
            "activation_scale_ub",
            "modules_to_not_convert",
            "exclude_modules",
            "producer",
            "group_size",
            "has_zero_point",
        ),
        *("quantization", "run_compressed", "compression_ratio", "quant_library", "quantized_layers", "quant_cfg"),
    }
)
"""Fields of `quantization_config`, read or decided by the types of the tensors."""


def unheeded(folder: Path) -> list[str]:
    """Names the fields that ask for something that is not done, a line a file.

    Raises:
        FolderError: A file is damaged.
    """
    config = read_json(folder / "config.json")
    text = config.get("text_config")
    quantisation = config.get("quantization_config") or (isinstance(text, dict) and text.get("quantization_config"))
    processor = read_json(folder / "processor_config.json")
    has_own = (folder / "generation_config.json").is_file()
    found = {
        "generation_config.json": unheeded_generation(read_json(folder / "generation_config.json")),
        "config.json": {} if has_own else unheeded_generation(generation_fields(config)),
        "tokenizer_config.json": _disagreeing(read_json(folder / "tokenizer_config.json"), TOKENIZER_NEUTRAL),
        "processor_config.json": _unknown(processor, PROCESSOR_HEEDED, PROCESSOR_NEUTRAL),
        "processor_config.json: image_processor": _images(processor.get("image_processor")),
        "preprocessor_config.json": _images(read_json(folder / "preprocessor_config.json")),
        "config.json: quantization_config": _unknown(quantisation, QUANTISATION_HEEDED, {}),
    }
    if isinstance(processor.get("image_processor"), dict):
        del found["preprocessor_config.json"]  # it is not read then
    return [
        f"{name}: not heeded, though it may change results: {_listed(each)}" for name, each in found.items() if each
    ]


def generation_fields(config: Mapping[str, Any]) -> dict[str, Any]:
    """The generation fields of a `config.json`, for a checkpoint without a generation config.

    As in `transformers`, the outer ones come before those of `text_config`.
    """
    names = GENERATION_HEEDED | GENERATION_NEUTRAL.keys() | {"bos_token_id", "pad_token_id"}
    text = config.get("text_config")
    both = {
        **(text if isinstance(text, dict) else {}),
        **{key: each for key, each in config.items() if each is not None},
    }
    return {name: both[name] for name in sorted(names) if both.get(name) is not None}


def unheeded_generation(config: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of a generation config that would change a text and are not heeded, with their values."""
    return _unknown(config, GENERATION_HEEDED | GENERATION_HARMLESS, GENERATION_NEUTRAL)


def _images(config: Any) -> dict[str, Any]:
    return _unknown(config, IMAGES_HEEDED, IMAGES_NEUTRAL)


def _unknown(config: Any, known: Collection[str], neutral: Mapping[str, Collection[Any]]) -> dict[str, Any]:
    """Fields that are neither known nor neutral; whoever reads the file refuses what is no object."""
    if not isinstance(config, dict):
        return {}
    others = {name: value for name, value in config.items() if name not in known and not name.startswith("_")}
    return {name: value for name, value in others.items() if not _is_neutral(value, neutral.get(name, ()))}


def _disagreeing(config: Mapping[str, Any], neutral: Mapping[str, Collection[Any]]) -> dict[str, Any]:
    """Fields of a table that are not neutral."""
    return {name: config[name] for name, same in neutral.items() if not _is_neutral(config.get(name), same)}


def _is_neutral(value: Any, same: Collection[Any]) -> bool:
    """Whether a field's value changes nothing: as if it were not there, or one of some."""
    return value is None or value == [] or value == {} or any(value == each for each in same)


def _listed(fields: Mapping[str, Any], most: int = 8) -> str:
    """Fields and their values, in one line."""
    several = [f"{shortened(name)[1:-1]}={shortened(value, 30)}" for name, value in fields.items()]
    more = [f"{len(several) - most} more"] if len(several) > most else []
    return ", ".join(several[:most] + more)
