"""From two models and text to where and how much they differ, and a verdict."""

from ..errors import without_extra

try:
    from .check import check
    from .golden import record_golden
except ModuleNotFoundError as error:
    raise without_extra(error, "accuracy") from error

__all__ = ["check", "record_golden"]
