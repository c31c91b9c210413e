"""Tables of which a test takes a sample, because rows are dear and find much the same faults.

`make tables` runs the tests over whole tables: it sets ARRIERO_WHOLE_TABLES.
"""

import os
from collections.abc import Sequence
from typing import TypeVar

Row = TypeVar("Row")


def sampled(table: Sequence[Row], sample: Sequence[Row]) -> list[Row]:
    """The rows that a run tries: the sample, or the whole table where that is asked for.

    Args:
        table: All rows.
        sample: Those of them that any run tries.
    """
    assert sample
    assert not [row for row in sample if row not in table], "the sample is of another table"
    return list(table if os.environ.get("ARRIERO_WHOLE_TABLES") else sample)
