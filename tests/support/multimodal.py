"""A random multimodal checkpoint with all its files: the tiny Llama 4's tokenizer with Llama 4's image tokens."""

import json
import shutil
from pathlib import Path

from transformers import AutoTokenizer, Llama4ForConditionalGeneration

TINY = Path(__file__).parent.parent.parent / "examples" / "tiny-llama4"
TOKENS = ("image_start", "image_end", "tile_x_separator", "tile_y_separator", "image", "patch")
VOCABULARY = 2048 + len(TOKENS)
TEMPLATE = """{{ bos_token }}{% for message in messages %}<|header_start|>{{ message['role'] }}<|header_end|>

{% if message['content'] is string %}{{ message['content'] }}{% else %}{% for part in message['content'] %}\
{{ '<|image|>' if part['type'] == 'image' else part['text'] }}{% endfor %}{% endif %}<|eot|>{% endfor %}\
{% if add_generation_prompt %}<|header_start|>assistant<|header_end|>

{% endif %}"""


def write_multimodal(model: Llama4ForConditionalGeneration, folder: Path, most_tiles: int = 4) -> Path:
    """Writes a model's checkpoint, its tokenizer, chat template and preprocessor's settings."""
    model.save_pretrained(folder, max_shard_size="500KB")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(TINY / name, folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.add_special_tokens({"additional_special_tokens": [f"<|{name}|>" for name in TOKENS]})
    tokenizer.save_pretrained(folder)
    vision = model.config.vision_config
    side = {"height": vision.image_size, "width": vision.image_size}
    (folder / "chat_template.jinja").write_text(TEMPLATE)
    (folder / "preprocessor_config.json").write_text(json.dumps({"size": side, "max_patches": most_tiles}))
    patches = {"patch_size": vision.patch_size, "pixel_shuffle_ratio": vision.pixel_shuffle_ratio}
    (folder / "processor_config.json").write_text(json.dumps(patches))
    return folder
