"""`transformers`' image processor and processor for Llama 4, in a process of their own, as oracles.

They need torchvision, whose wheel on the package index does not load beside a PyTorch for CPUs, and whose presence then
breaks `transformers` altogether. So it is no dependency, and the process has in its place the few functions that the
processors call, which in torchvision as well are one call of PyTorch each. They were compared with torchvision 0.28's:
equal, bit for bit.
"""

import enum
import importlib.machinery
import pickle
import subprocess
import sys
import types
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

Size = tuple[tuple[int, int], tuple[int, int]]
"""Rows and columns, and height and width."""


@dataclass
class Case:
    """What the processor is given: images (PIL images or arrays), the image processor's settings, a prompt."""

    images: list[Any]
    settings: dict[str, Any] = field(default_factory=dict)
    prompt: str = ""


@dataclass
class Answer:
    """What it makes of that: tiles [N, 3, P, P] and the rows and columns of each image, and the prompt's ids."""

    pixels: list[np.ndarray]
    grids: list[tuple[int, int]]
    ids: list[int]


def ask_processor(cases: list[Case], folder: Path) -> list[Answer]:
    """Runs the processor over cases. `folder` has a tokenizer, and gets the processor's files."""
    return _ask("answer_cases", cases, folder)


def ask_chats(conversations: list[tuple[Any, dict[str, Any]]], folder: Path) -> list[list[int]]:
    """The ids that a folder's processor makes of conversations, with keywords of its chat template for each."""
    return _ask("answer_chats", conversations, folder)


def ask_sizes(sizes: list[tuple[int, int]], settings: list[dict[str, Any]]) -> list[list[Size]]:
    """The grid, and the size in it, that the image processor finds for heights and widths, with each of settings."""
    return _ask("answer_sizes", sizes, settings)


def _ask(question: str, *arguments: Any) -> Any:
    run = subprocess.run([sys.executable, __file__], input=pickle.dumps((question, arguments)), capture_output=True)
    assert run.returncode == 0, run.stderr.decode()
    return pickle.loads(run.stdout)


def answer_cases(cases: list[Case], folder: Path) -> list[Answer]:
    from transformers import AutoTokenizer, Llama4ImageProcessor, Llama4Processor

    tokenizer = AutoTokenizer.from_pretrained(folder)
    answers = []
    for case in cases:
        processor = Llama4Processor(Llama4ImageProcessor(**case.settings), tokenizer)
        processor.save_pretrained(folder)
        made = processor.image_processor(case.images)
        ids = processor(images=case.images, text=case.prompt)["input_ids"][0] if case.prompt else []
        pixels = [each.reshape(-1, *each.shape[-3:]).float().numpy() for each in made["pixel_values"]]
        answers.append(Answer(pixels, [tuple(each.tolist()) for each in made["aspect_ratios"]], list(ids)))
    return answers


def answer_chats(conversations: list[tuple[Any, dict[str, Any]]], folder: Path) -> list[list[int]]:
    from transformers import AutoProcessor
    from transformers.image_utils import load_image

    def fetch(images: Any) -> Any:  # by Pillow, as the processor does without torchvision
        return [fetch(each) for each in images] if isinstance(images, list | tuple) else load_image(images)

    processor = AutoProcessor.from_pretrained(folder)
    processor.image_processor.fetch_images = fetch
    made = [
        processor.apply_chat_template(messages, tokenize=True, return_dict=True, add_generation_prompt=True, **given)
        for messages, given in conversations
    ]
    return [list(each["input_ids"][0]) for each in made]


def answer_sizes(sizes: list[tuple[int, int]], settings: list[dict[str, Any]]) -> list[list[Size]]:
    """Asks with images that have a size and no content, and a resize that only says how it was called."""
    import torch
    from transformers import Llama4ImageProcessor
    from transformers.models.llama4 import image_processing_llama4

    called: list[tuple[int, int]] = []

    class Sizes(Llama4ImageProcessor):
        def resize(self, image: torch.Tensor, size: Any, **_: Any) -> torch.Tensor:
            called.append((int(size.height), int(size.width)))
            return torch.zeros(1, 1, 1, 1, dtype=torch.uint8)

        def rescale_and_normalize(self, images: torch.Tensor, *_: Any) -> torch.Tensor:
            return images

    image_processing_llama4.pad_to_best_fit = lambda images, _: images
    image_processing_llama4.split_to_tiles = lambda images, *_: images[None]
    answers = []
    for each in settings:
        processor, found = Sizes(**each), []
        for height, width in sizes:
            called.clear()
            image = torch.zeros((), dtype=torch.uint8).expand(3, height, width)
            options = {**SETTINGS, **each, "size": processor.size, "disable_grouping": True, "return_tensors": None}
            made = processor._preprocess([image], **options)
            found.append((tuple(made["aspect_ratios"][0].tolist()), called[0]))
        answers.append(found)
    return answers


SETTINGS = {
    "do_resize": True,
    "resample": 2,
    "do_rescale": True,
    "rescale_factor": 1 / 255,
    "do_normalize": True,
    "image_mean": [0.5] * 3,
    "image_std": [0.5] * 3,
    "max_patches": 16,
    "resize_to_max_canvas": False,
}


def stand_in_for_torchvision() -> None:
    """Makes `torchvision` a module of the functions that the processors call."""
    import torch

    torch.set_num_threads(1)  # two wait for each other on a busy machine
    mode = enum.Enum(
        "InterpolationMode", ["NEAREST", "NEAREST_EXACT", "BILINEAR", "BICUBIC", "BOX", "HAMMING", "LANCZOS"]
    )

    def resize(image: torch.Tensor, size: Any, interpolation: Any = None, antialias: bool = True) -> torch.Tensor:
        assert (interpolation, antialias, image.dtype) == (mode.BILINEAR, True, torch.uint8)
        size = [int(side) for side in size]
        if list(image.shape[-2:]) == size:
            return image
        return torch.nn.functional.interpolate(image, size, mode="bilinear", antialias=True)

    def pad(image: torch.Tensor, padding: list[int], fill: Any = 0) -> torch.Tensor:
        left, top, right, bottom = (int(each) for each in padding)
        assert not any(fill)
        return torch.nn.functional.pad(image, [left, right, top, bottom])

    def normalize(image: torch.Tensor, mean: Any, std: Any, inplace: bool = False) -> torch.Tensor:
        mean, std = (torch.tensor(each, dtype=image.dtype).view(-1, 1, 1) for each in (mean, std))
        return (image - mean) / std

    def grayscale_to_rgb(image: torch.Tensor) -> torch.Tensor:
        return image.expand(3, -1, -1) if image.shape[-3] == 1 else image

    def pil_to_tensor(image: Any) -> torch.Tensor:
        return torch.from_numpy(np.array(image)).permute(2, 0, 1)

    module = types.ModuleType("torchvision")
    module.__dict__.update(__version__="0.28.0", __path__=[], InterpolationMode=mode)
    module.__dict__.update({each.__name__: each for each in (resize, pad, normalize, grayscale_to_rgb, pil_to_tensor)})
    module.__dict__.update(io=module, transforms=module, v2=module, functional=module)
    module.__spec__ = importlib.machinery.ModuleSpec("torchvision", None)
    for name in ("", ".transforms", ".transforms.functional", ".transforms.v2", ".transforms.v2.functional"):
        sys.modules["torchvision" + name] = module


if __name__ == "__main__":
    question, arguments = pickle.load(sys.stdin.buffer)
    stand_in_for_torchvision()
    import llama4_processor  # by its name, as who asks knows its classes

    answer = getattr(llama4_processor, question)(*arguments)
    sys.stdout.buffer.write(pickle.dumps(answer))
