"""The library that draws, asked for before anything long is run."""

from importlib.util import find_spec


def check_drawable() -> None:
    """Refuses, before anything is computed, a picture that could not be drawn.

    Raises:
        ModuleNotFoundError: matplotlib is not installed; it is imported later, since its memory is not the model's.
    """
    if find_spec("matplotlib") is None:
        raise ModuleNotFoundError("No module named 'matplotlib'", name="matplotlib")
