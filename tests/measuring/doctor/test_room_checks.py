"""What is advised where a bundle does not fit."""

import pytest

from arriero.files.machine_memory import Room
from arriero.measuring.doctor.room_checks import _remedy


@pytest.mark.parametrize(("slots", "fitting"), [(4, 3), (1_000_000, 3), (10**30, 3), (1_000_000, 999_999)])
def test_the_most_slots_that_fit_are_found_by_few_looks(slots: int, fitting: int) -> None:
    looks: list[int] = []

    def needed(rows: int, length: int) -> int:
        looks.append(rows)
        return 1000 + rows * length

    said = _remedy(needed, slots, 100, Room(1000 + fitting * 100 + 99, 1 << 40, "the machine"))
    assert said == f"serve it with --slots {fitting}"
    assert len(looks) < 100
