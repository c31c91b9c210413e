"""The fields of a configuration, read one by one with their types and ranges.

Enters: a parsed JSON object. Leaves: values of the right type, or an error that names the field. A field that is left
out takes its default; one that is null takes none: where null means something, whoever reads the field says what.
"""

from collections.abc import Container
from typing import Any, NoReturn

from ..errors import CheckpointError, shortened

LARGEST = 2**31 - 1
"""Largest whole number; what is larger is no size of a model."""

WIDEST = 2**63 - 1
"""Largest whole number in place of a fraction, which `transformers` gives PyTorch as it stands."""


class Fields:
    """The values of a configuration, read with their ranges.

    Args:
        values: By name.
        place: Put before a name in errors.
    """

    def __init__(self, values: dict[str, Any], place: str = "") -> None:
        self.values, self.place = values, place

    def get(self, name: str, default: Any = None) -> Any:
        """The value as it stands."""
        return self.values.get(name, default)

    def is_null(self, name: str) -> bool:
        """Whether the field is there and null."""
        return name in self.values and self.values[name] is None

    def count(self, name: str, default: int | None = None, least: int = 1) -> int:
        """A whole number from `least` up."""
        value: Any = self.values.get(name, default)
        if not is_whole(value) or value < least:
            self.refuse(name, f"a whole number from {least} up")
        if value > LARGEST:
            self.refuse(name, f"at most {LARGEST}")
        return value

    def side(self, name: str, default: int) -> int:
        """A square's side, which may be written as height and width."""
        value: Any = self.values.get(name, default)
        if isinstance(value, list) and len(value) == 2 and value[0] == value[1]:
            return Fields({name: value[0]}, self.place).count(name)
        return self.count(name, default)

    def positive(self, name: str, default: float | None = None) -> float:
        """A number above 0."""
        return self._number(name, default, zero=False)

    def not_negative(self, name: str, default: float | None = None) -> float:
        """A number from 0 up."""
        return self._number(name, default, zero=True)

    def flag(self, name: str, default: bool) -> bool:
        """True or false."""
        value: Any = self.values.get(name, default)
        if not isinstance(value, bool):
            self.refuse(name, "true or false")
        return value

    def list_of_whole(self, name: str) -> list[int] | None:
        """A list of whole numbers; None where the field is null or left out."""
        values = self.values.get(name)
        if values is not None and (not isinstance(values, list) or not all(map(is_whole, values))):
            self.refuse(name, "a list of whole numbers, or null")
        return values

    def one_of(self, name: str, default: Any, valid: Container[Any], expected: str) -> Any:
        """A text among those that are valid."""
        value: Any = self.values.get(name, default)
        if not isinstance(value, str) or value not in valid:
            self.refuse(name, expected)
        return value

    def refuse(self, name: str, expected: str) -> NoReturn:
        """Raises the error for a value out of range."""
        found = shortened(self.values[name], 120) if name in self.values else "missing"
        raise CheckpointError(f"config.json: {self.place}{name} is {found}, expected {expected}")

    def _number(self, name: str, default: float | None, *, zero: bool) -> float:
        value: Any = self.values.get(name, default)
        number = isinstance(value, int | float) and not isinstance(value, bool)
        if not number or not 0 <= value < 1e300 or (value == 0 and not zero):
            self.refuse(name, "a number from 0 up" if zero else "a number above 0")
        if is_whole(value) and value > WIDEST:
            self.refuse(name, f"at most {WIDEST}, or with a decimal point")
        return float(value)


def is_whole(value: Any) -> bool:
    """Whether a value is a whole number, which true and false are not."""
    return isinstance(value, int) and not isinstance(value, bool)
