"""RoPE's angles as a spec has them, held against a graph's in its own precision. Standard library only."""

import math
from collections.abc import Iterator, Sequence

from ..spec.geometry import ModelSpec, RopeScaling, VisionSpec

NEAR = 3e-6
"""Relative difference of two frequencies that were computed in float32 from the same settings, at most."""

NUDGES = (1.0, 1 - NEAR, 1 + NEAR)
"""Factors on a frequency that lies where one rule of the scaling ends and the next begins."""


def check_frequencies(found: Sequence[float], model: ModelSpec) -> None:
    """Holds a decoder's frequencies, an angle per position for each pair of a head, against its spec.

    Raises:
        ValueError: One is another.
    """
    for index, value in enumerate(found):
        base = 1.0 / model.rope_theta ** (2 * index / model.head_dim)
        allowed = [_scaled(base * nudge, model.rope_scaling) for nudge in NUDGES]
        if not any(math.isclose(value, each, rel_tol=2 * NEAR) for each in allowed):
            said = f"{model.rope_theta:g} with {model.rope_scaling}" if model.rope_scaling else f"{model.rope_theta:g}"
            raise ValueError(
                f"pair {index} turns by {value:.6g} a position, by spec.json's rope_theta {said}: {base:.6g}"
            )


def _scaled(frequency: float, scaling: RopeScaling | None) -> float:
    """A frequency by Llama 3's scaling."""
    if scaling is None:
        return frequency
    low, high, wavelength = scaling.low_freq_factor, scaling.high_freq_factor, 2 * math.pi / frequency
    if wavelength > scaling.original_max_positions / low:
        return frequency / scaling.factor
    if low == high or wavelength < scaling.original_max_positions / high:
        return frequency
    smooth = (scaling.original_max_positions / wavelength - low) / (high - low)
    return (1 - smooth) * frequency / scaling.factor + smooth * frequency


def check_turns(cos: Sequence[float], sin: Sequence[float], vision: VisionSpec) -> None:
    """Holds a tower's cosines and sines, [S, D/2], against its spec.

    Raises:
        ValueError: One is another.
    """
    for place, (angle, found_cos, found_sin) in enumerate(zip(_angles(vision), cos, sin, strict=True)):
        near = NEAR * max(1.0, angle)
        if abs(found_cos - math.cos(angle)) > near or abs(found_sin - math.sin(angle)) > near:
            raise ValueError(f"angle {place} of the rotation is another than spec.json's rope_theta makes it")


def _angles(vision: VisionSpec) -> Iterator[float]:
    """The angle of each pair at each position: half turn by the patch's column, half by its row; the last is 0."""
    width = vision.head_dim // 2
    frequencies = [1.0 / vision.rope_theta ** (index / width) for index in range(0, width, 2)]
    for place in range(vision.grid**2):
        for number in (place % vision.grid + 1, place // vision.grid + 1):
            yield from (number * frequency for frequency in frequencies)
    yield from [0.0] * width
