"""From a model and text to a quantised model."""

from ..errors import without_extra

try:
    from .presets import fp8, int4, int8
    from .quantised_model import calibrate_model
except ModuleNotFoundError as error:
    raise without_extra(error, "calibration") from error

__all__ = ["calibrate_model", "fp8", "int4", "int8"]
