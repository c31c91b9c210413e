"""Where a candidate goes wrong first: the layer, the op, and the tensor or attribute to blame.

A unit is out of line where its error on the reference's input is beyond what the recipe's rounding and its neighbours
in other layers explain. The first such unit in the order of computation is looked into. Where there are images, the
vision tower is walked first, and the reference's image features enter both decoders.
"""

from ...spec.types import Progress
from ...walk.windows import Windows
from ..sides.side import Side
from .decoder_walk import DecoderWalk
from .location import Location
from .readings import Readings
from .tower_walk import TowerWalk

WINDOWS = 3
"""Windows of text that the layers are run on."""


def locate(side: Side, other: Side, windows: Windows, progress: Progress) -> Location:
    """Takes readings of both sides, and where one is out of line walks there again to find out why.

    Args:
        side: The candidate.
        other: The reference, whose layers PyTorch computes from its weights.
        windows: Token ids and images; the first `WINDOWS` are used. Image features are the reference's for both.
        progress: Called with each layer.

    Raises:
        AccuracyError: One of them is an engine.
    """
    windows = windows.first(WINDOWS)
    decoder = DecoderWalk(side, other, windows, progress)
    tower = TowerWalk(side, other, windows, progress) if len(windows.pixels_N3PP) else None
    readings = Readings(side.recipe is not None or other.recipe is not None)
    if tower is not None:
        tower.read(readings)
    decoder.read(readings)
    found = readings.first_out_of_line()
    reading, explained = (None, None) if found is None else found
    blame = None
    if reading is not None:
        blame = (tower if tower is not None and reading.part == tower.part else decoder).blame(reading)
    return Location(
        blame=blame,
        part=None if reading is None else reading.part,
        place=None if reading is None else reading.place,
        layer=None if reading is None else reading.layer,
        unit=None if reading is None else reading.unit,
        error=None if reading is None else reading.error,
        explained=explained,
        readings=tuple(readings.taken),
        router_flips=decoder.router_flips,
    )
