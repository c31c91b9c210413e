"""From a model and text to a quantised model."""

from .model import calibrate_model
from .presets import fp8, int4, int8

__all__ = ["calibrate_model", "fp8", "int4", "int8"]
