"""From a model and text to a quantised model."""

from ..errors import needing

with needing("calibration"):
    from .presets import fp8, int4, int8
    from .quantised_model import calibrate_model

__all__ = ["calibrate_model", "fp8", "int4", "int8"]
