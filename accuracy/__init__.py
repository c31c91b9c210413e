"""From two models and text to where and how much they differ, and a verdict."""

from ..errors import needing

with needing("accuracy"):
    from .check import check
    from .golden import record_golden

__all__ = ["check", "record_golden"]
